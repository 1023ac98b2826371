"""Attention over a shared prompt: one softmax over the prompt's keys and the completion's own.

Letters: K key/value heads, Q query heads for each, H numbers a head. A projection `qkv` is [.., K, R, H], R = Q + 2:
per key/value head its query heads, its key, its value. Scores and softmax are float32 whatever the compute dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pjpo.logps import soft_cap
from pjpo.models import filled, whole
from pjpo.models.filled import MASKED
from pjpo.models.streams import Streams
from pjpo.products import einsum

NUM_BLOCKS, MIN_BLOCK = 4, 128  # into how many blocks of queries causal attention is cut, of at least how many


class Scoring(NamedTuple):
    """How a layer scores a query against a key."""

    scale: float  # of their product
    softcap: float | None = None  # scores are cap * tanh(score / cap)
    window: int | Array | None = None  # how many positions a query sees, its own and those before it; None: all


def shared_prefix(
    streams: Streams, qkv: Float[Array, "G M K R H"], cache: None, scoring: Scoring
) -> tuple[Float[Array, "G M K Q H"], None]:
    """Prompts attend to themselves, each completion to its prompt and itself, causally; for training and scoring."""
    prompts, completions = streams.split(streams.to_slots(qkv))
    prompts = prompts.transpose(0, 2, 3, 1, 4)  # [B, K, Q+2, P, H]
    completions = completions.transpose(0, 3, 1, 4, 2, 5)  # [B, K, N, Q+2, T, H]
    prompt_q, prompt_k, prompt_v = _queries_keys_values(prompts, scoring)
    q, k, v = _queries_keys_values(completions, scoring)
    among_prompts = streams.prompt_keys[:, None, None, None, :] & _causal(prompt_k.shape[2])
    to_prompt = streams.prompt_keys[:, None, None, None, None, :]
    among_own = _causal(k.shape[3])[None]
    if scoring.window is not None:
        at, steps = _positions(streams.prompt_keys), jnp.arange(k.shape[3])
        first = streams.prompt_keys.sum(1)[:, None, None]  # position of each completion's first input
        among_prompts &= _near(at[:, :, None], at[:, None], scoring.window)[:, None, None]
        to_prompt &= _near(first + steps[None, :, None], at[:, None], scoring.window)[:, None, None, None]
        among_own &= _near(steps[:, None], steps[None], scoring.window)[None, None, None, None]
    prompt_out = _attend_causally(prompt_q, prompt_k, prompt_v, among_prompts, scoring)
    out = _attend(q, [(prompt_k, prompt_v, "bksh", to_prompt), (k, v, "bknsh", among_own)], scoring)
    out = streams.join(prompt_out.transpose(0, 3, 1, 2, 4), out.transpose(0, 2, 4, 1, 3, 5))
    return streams.to_places(out), None


def prefill(
    prompt_mask: Bool[Array, "B P"], qkv: Float[Array, "B P K R H"], cache: None, scoring: Scoring
) -> tuple[Float[Array, "B P K Q H"], tuple[Array, Array]]:
    """Prompts attend to themselves; their keys and values [B, K, P, H] come back as the cache."""
    q, k, v = _queries_keys_values(qkv.transpose(0, 2, 3, 1, 4), scoring)
    visible = prompt_mask[:, None, None, None, :] & _causal(k.shape[2])
    if scoring.window is not None:
        at = _positions(prompt_mask)
        visible &= _near(at[:, :, None], at[:, None], scoring.window)[:, None, None]
    out = _attend_causally(q, k, v, visible, scoring)
    return out.transpose(0, 3, 1, 2, 4), (k, v)


class DecodeCache(NamedTuple):
    """What `decode` keeps of a layer: XLA would copy what it has to reshape between an update and a product."""

    prompt_k: Float[Array, "B K H P"]
    prompt_v: Float[Array, "B K P H"]
    own: whole.Cache | filled.Cache  # the completions', rows B*N


def decode_cache(
    prompt_cache: tuple[Float[Array, "B K P H"], Float[Array, "B K P H"]],
    num_completions: int,
    length: int,
    in_blocks: bool,
) -> DecodeCache:
    """A cache for `length` steps. In blocks all of it is float32, to which XLA would widen it at each step."""
    own = filled.Cache if in_blocks else whole.Cache
    k, v = (x.astype(jnp.float32) if in_blocks else x for x in prompt_cache)
    of_completions = own.blank(len(k) * num_completions, k.shape[1], length, k.shape[3], v.dtype)
    return DecodeCache(jnp.swapaxes(k, -1, -2), v, of_completions)


def decode(
    prompt_keys: Bool[Array, "B P"],
    step: Int[Array, ""],
    qkv: Float[Array, "B N K R H"],
    cache: DecodeCache,
    scoring: Scoring,
) -> tuple[Float[Array, "B N K Q H"], DecodeCache]:
    """Token `step` of every completion attends to its prompt and to the completion so far."""
    num_prompts, num_completions, *heads = qkv.shape
    q, k, v = jnp.split(qkv.reshape(-1, *heads), [heads[1] - 2, heads[1] - 1], axis=2)  # [B*N, K, (Q, 1, 1), H]
    q = q * scoring.scale
    own = cache.own.write(k[:, :, 0], v[:, :, 0], step)

    def by_prompt(x: Array) -> Array:  # [B*N, K, Q, ..] -> [B, K, N*Q, ..]
        x = x.reshape(num_prompts, num_completions, *x.shape[1:])
        return x.transpose(0, 2, 1, 3, 4).reshape(num_prompts, heads[0], -1, x.shape[-1])

    def by_completion(x: Array) -> Array:  # its inverse
        x = x.reshape(num_prompts, heads[0], num_completions, -1, x.shape[-1])
        return x.transpose(0, 2, 1, 3, 4).reshape(-1, heads[0], *x.shape[3:])

    to_own = own.scores(q, step)
    visible, own_steps = prompt_keys[:, None, None], jnp.arange(to_own.shape[-1])
    so_far = own_steps <= step
    if scoring.window is not None:
        here = prompt_keys.sum(1)[:, None] + step
        visible &= _near(here, _positions(prompt_keys), scoring.window)[:, None, None]
        so_far &= _near(step, own_steps, scoring.window)
    to_prompt = soft_cap(einsum("bkqh,bkhs->bkqs", by_prompt(q), cache.prompt_k, many=False), scoring.softcap)
    to_prompt = by_completion(jnp.where(visible, to_prompt, MASKED))
    to_own = jnp.where(so_far[None, None, None], soft_cap(to_own, scoring.softcap), MASKED)
    peak = jnp.maximum(to_prompt.max(-1, keepdims=True), to_own.max(-1, keepdims=True))
    to_prompt, to_own = jnp.exp(to_prompt - peak), jnp.exp(to_own - peak)
    total = to_prompt.sum(-1, keepdims=True) + to_own.sum(-1, keepdims=True)
    out = by_completion(einsum("bkqs,bksh->bkqh", by_prompt(to_prompt).astype(q.dtype), cache.prompt_v, many=False))
    out = own.mix(to_own.astype(q.dtype), step, out) / total
    return out.astype(q.dtype).reshape(num_prompts, num_completions, heads[0], -1, heads[2]), cache._replace(own=own)


def _queries_keys_values(heads: Array, scoring: Scoring) -> tuple[Array, Array, Array]:
    """[..., Q+2, T, H] -> scaled queries [..., Q, T, H], keys and values [..., T, H]."""
    q, k, v = jnp.split(heads, [heads.shape[-3] - 2, heads.shape[-3] - 1], axis=-3)
    return q * scoring.scale, k.squeeze(-3), v.squeeze(-3)


def _causal(length: int) -> Array:
    """[1, 1, 1, T, T]; query t sees keys 0 to t."""
    return jnp.tril(jnp.ones((1, 1, 1, length, length), bool))


def _positions(mask: Array) -> Array:
    """[B, P]: of each token that the mask holds, in its own sequence."""
    return mask.cumsum(1) - 1


def _near(queries: Array, keys: Array, window: int | Array) -> Array:
    """Whether the positions of keys are in the window of the positions of queries that come later."""
    return queries - keys < window


def _attend_causally(q: Array, k: Array, v: Array, visible: Array, scoring: Scoring) -> Array:
    """Queries [B, K, Q, T, H] over keys and values [B, K, T, H] of their own sequence, none of which sees a later one.

    Long sequences go in a few blocks of queries, and no score of a block with later keys is computed.
    """
    length = k.shape[2]
    size = max(MIN_BLOCK, -(-length // NUM_BLOCKS))
    out = []
    for start in range(0, length, size):
        rows, end = slice(start, start + size), start + size
        own = _attend(q[..., rows, :], [(k[..., :end, :], v[..., :end, :], "bksh", visible[..., rows, :end])], scoring)
        out.append(own)
    return jnp.concatenate(out, axis=-2)


def _attend(q: Array, sources: list[tuple[Array, Array, str, Array]], scoring: Scoring) -> Array:
    """Queries [B, K, (N,) Q, T, H] over the union of sources: (keys, values, their axes, which are visible)."""
    axes = "bkqth" if q.ndim == 5 else "bknqth"
    weights, peak = [], None
    for keys, _, source, visible in sources:
        product = soft_cap(einsum(f"{axes},{source}->{axes[:-1]}s", q, keys, many=True), scoring.softcap)
        product = jnp.where(visible, product, MASKED)
        weights.append(product)
        highest = product.max(-1, keepdims=True)
        peak = highest if peak is None else jnp.maximum(peak, highest)
    peak = lax.stop_gradient(peak)
    weights = [jnp.exp(product - peak) for product in weights]
    total = sum(w.sum(-1, keepdims=True) for w in weights)
    out = sum(
        einsum(f"{axes[:-1]}s,{source}->{axes}", w.astype(q.dtype), v, many=True)
        for w, (_, v, source, _) in zip(weights, sources, strict=True)
    )
    return (out / total).astype(q.dtype)
