"""Attention over a shared prompt: one softmax over the prompt's keys and the completion's own.

Letters: K key/value heads, Q query heads for each, H numbers a head. A projection `qkv` is [.., K, R, H], R = Q + 2:
per key/value head its query heads, its key, its value. Scores and softmax are float32 whatever the compute dtype.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pjpo.models.streams import Streams

MASKED = -1e30  # a score that is finite, so that a row with nothing to look at is harmless


def rotary(positions: Int[Array, "G M"], head_dim: int, theta: float, dtype) -> tuple[Array, Array]:
    """Cosines and signed sines [G, M, 1, 1, 2, H/2] that turn a head's halves. Su et al. 2021, Eq. 34.

    `dtype` is that of the queries and keys; angles are float32 at least.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    frequencies = theta ** (-jnp.arange(head_dim // 2, dtype=wide) / (head_dim // 2))
    angles = (positions[:, :, None].astype(wide) * frequencies[None, None])[:, :, None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-2), jnp.concatenate([-sin, sin], axis=-2)


@jax.custom_vjp
def rotate(qkv: Float[Array, "G M K R H"], turns: tuple[Array, Array]) -> Float[Array, "G M K R H"]:
    """Turn the pairs (i, i + H/2) of queries and keys by their angles, in float32 or wider; values stay as they are.

    Written without slices and concatenations, which a CPU would not vectorise; the gradient turns back.
    """
    cos, sin = turns
    halves = qkv.reshape(*qkv.shape[:-1], 2, -1)
    wide = halves.astype(jnp.promote_types(qkv.dtype, jnp.float32))
    turned = (wide * cos + jnp.flip(wide, axis=-2) * sin).astype(qkv.dtype)
    is_value = jnp.arange(qkv.shape[3]).reshape(1, 1, 1, -1, 1, 1) == qkv.shape[3] - 1
    return jnp.where(is_value, halves, turned).reshape(qkv.shape)


def _rotate_back(turns, cotangent):
    cos, sin = turns
    # The barrier keeps the joining of prompts and completions out of this loop, which reads every number twice.
    return rotate(lax.optimization_barrier(cotangent), (cos, -sin)), None


rotate.defvjp(lambda qkv, turns: (rotate(qkv, turns), turns), _rotate_back)


def shared_prefix(
    streams: Streams, qkv: Float[Array, "G M K R H"], cache: None
) -> tuple[Float[Array, "G M K Q H"], None]:
    """Prompts attend to themselves, each completion to its prompt and itself, causally; for training and scoring."""
    prompts, completions = streams.split(streams.to_slots(qkv))
    prompts = prompts.transpose(0, 2, 3, 1, 4)  # [B, K, Q+2, P, H]
    completions = completions.transpose(0, 3, 1, 4, 2, 5)  # [B, K, N, Q+2, T, H]
    prompt_q, prompt_k, prompt_v = _queries_keys_values(prompts)
    q, k, v = _queries_keys_values(completions)
    among_prompts = streams.prompt_keys[:, None, None, None, :] & _causal(prompt_k.shape[2])
    prompt_out = _attend(prompt_q, [(prompt_k, prompt_v, "bksh", among_prompts)])
    visible = streams.prompt_keys[:, None, None, None, None, :]
    out = _attend(q, [(prompt_k, prompt_v, "bksh", visible), (k, v, "bknsh", _causal(k.shape[3])[None])])
    out = streams.join(prompt_out.transpose(0, 3, 1, 2, 4), out.transpose(0, 2, 4, 1, 3, 5))
    return streams.to_places(out), None


def prefill(
    prompt_mask: Bool[Array, "B P"], qkv: Float[Array, "B P K R H"], cache: None
) -> tuple[Float[Array, "B P K Q H"], tuple[Array, Array]]:
    """Prompts attend to themselves; their keys and values [B, K, P, H] come back as the cache."""
    q, k, v = _queries_keys_values(qkv.transpose(0, 2, 3, 1, 4))
    out = _attend(q, [(k, v, "bksh", prompt_mask[:, None, None, None, :] & _causal(k.shape[2]))])
    return out.transpose(0, 3, 1, 2, 4), (k, v)


def decode_cache(
    prompt_cache: tuple[Float[Array, "B K P H"], Float[Array, "B K P H"]], num_completions: int, length: int
) -> tuple[Array, ...]:
    """What `decode` keeps: keys [B, K, H, P] and values [B, K, P, H] of prompts, then the completions', rows B*N.

    Products take these shapes as they are; XLA would copy what it has to reshape between update and product.
    """
    k, v = prompt_cache
    rows, kv_heads, head_dim = len(k) * num_completions, k.shape[1], k.shape[3]
    blank = jnp.zeros((rows, kv_heads, length, head_dim), v.dtype)
    return jnp.swapaxes(k, -1, -2), v, jnp.swapaxes(blank, -1, -2).astype(k.dtype), blank


def decode(
    prompt_keys: Bool[Array, "B P"], step: Int[Array, ""], qkv: Float[Array, "B N K R H"], cache: tuple[Array, ...]
) -> tuple[Float[Array, "B N K Q H"], tuple[Array, ...]]:
    """Token `step` of every completion attends to its prompt and to the completion so far; see `decode_cache`."""
    prompt_k, prompt_v, keys, values = cache
    num_prompts, num_completions, *heads = qkv.shape
    q, k, v = jnp.split(qkv.reshape(-1, *heads), [heads[1] - 2, heads[1] - 1], axis=2)  # [B*N, K, (Q, 1, 1), H]
    q = q * q.shape[-1] ** -0.5
    keys = lax.dynamic_update_slice_in_dim(keys, jnp.swapaxes(k, -1, -2).astype(keys.dtype), step, axis=3)
    values = lax.dynamic_update_slice_in_dim(values, v.astype(values.dtype), step, axis=2)

    def by_prompt(x: Array) -> Array:  # [B*N, K, Q, ..] -> [B, K, N*Q, ..]
        x = x.reshape(num_prompts, num_completions, *x.shape[1:])
        return x.transpose(0, 2, 1, 3, 4).reshape(num_prompts, heads[0], -1, x.shape[-1])

    def by_completion(x: Array) -> Array:  # its inverse
        x = x.reshape(num_prompts, heads[0], num_completions, -1, x.shape[-1])
        return x.transpose(0, 2, 1, 3, 4).reshape(-1, heads[0], *x.shape[3:])

    to_prompt = jnp.where(prompt_keys[:, None, None], _einsum("bkqh,bkhs->bkqs", by_prompt(q), prompt_k), MASKED)
    to_prompt = by_completion(to_prompt)
    so_far = (jnp.arange(keys.shape[-1]) <= step)[None, None, None]
    to_own = jnp.where(so_far, _einsum("bkqh,bkhs->bkqs", q, keys), MASKED)
    peak = jnp.maximum(to_prompt.max(-1, keepdims=True), to_own.max(-1, keepdims=True))
    to_prompt, to_own = jnp.exp(to_prompt - peak), jnp.exp(to_own - peak)
    total = to_prompt.sum(-1, keepdims=True) + to_own.sum(-1, keepdims=True)
    out = by_completion(_einsum("bkqs,bksh->bkqh", by_prompt(to_prompt).astype(q.dtype), prompt_v))
    out = (out + _einsum("bkqs,bksh->bkqh", to_own.astype(q.dtype), values)) / total
    return out.astype(q.dtype).reshape(num_prompts, num_completions, heads[0], -1, heads[2]), (
        prompt_k,
        prompt_v,
        keys,
        values,
    )


def _queries_keys_values(heads: Array) -> tuple[Array, Array, Array]:
    """[..., Q+2, T, H] -> scaled queries [..., Q, T, H], keys and values [..., T, H]."""
    q, k, v = jnp.split(heads, [heads.shape[-3] - 2, heads.shape[-3] - 1], axis=-3)
    return q * q.shape[-1] ** -0.5, k.squeeze(-3), v.squeeze(-3)


def _causal(length: int) -> Array:
    """[1, 1, 1, T, T]; query t sees keys 0 to t."""
    return jnp.tril(jnp.ones((1, 1, 1, length, length), bool))


def _attend(q: Array, sources: list[tuple[Array, Array, str, Array]]) -> Array:
    """Queries [B, K, (N,) Q, T, H] over the union of sources: (keys, values, their axes, which are visible)."""
    axes = "bkqth" if q.ndim == 5 else "bknqth"
    weights, peak = [], None
    for keys, _, source, visible in sources:
        product = jnp.where(visible, _einsum(f"{axes},{source}->{axes[:-1]}s", q, keys), MASKED)
        weights.append(product)
        highest = product.max(-1, keepdims=True)
        peak = highest if peak is None else jnp.maximum(peak, highest)
    peak = lax.stop_gradient(peak)
    weights = [jnp.exp(product - peak) for product in weights]
    total = sum(w.sum(-1, keepdims=True) for w in weights)
    out = sum(
        _einsum(f"{axes[:-1]}s,{source}->{axes}", w.astype(q.dtype), v)
        for w, (_, v, source, _) in zip(weights, sources, strict=True)
    )
    return (out / total).astype(q.dtype)


def _einsum(axes: str, a: Array, b: Array) -> Array:
    """To float32, as in `pjpo.products.dot`."""
    precision = None if a.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(axes, a, b, precision=precision, preferred_element_type=wide)
