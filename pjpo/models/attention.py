"""Attention over a shared prompt: one softmax over the prompt's keys and the completion's own.

Letters: K key/value heads, Q query heads for each of them, H numbers a head. A projection `qkv` is [.., K, Q+2, H]: per
key/value head its query heads, its key, its value. Scores and softmax are float32 whatever the compute dtype.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pjpo.models.streams import Streams

MASKED = -1e30  # a score that is finite, so that a row with nothing to look at is harmless


def rotate(x: Float[Array, "*rows K Q H"], positions: Int[Array, "*rows"], theta: float) -> Float[Array, "*rows K Q H"]:
    """Rotary position embedding on half-split pairs (i, i + H/2), computed in float32. Su et al. 2021, Eq. 34."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None, None].astype(jnp.float32) * jnp.expand_dims(frequencies, range(positions.ndim + 2))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def shared_prefix(streams: Streams, qkv: Float[Array, "G M K Q+2 H"], cache: None) -> tuple[Float[Array, "G M K Q H"], None]:
    """Prompts attend to themselves, each completion to its prompt and itself, causally; for training and scoring."""
    prompts, completions = streams.split(streams.to_slots(qkv))
    prompts = prompts.transpose(0, 2, 3, 1, 4)  # [B, K, Q+2, P, H]
    completions = completions.transpose(0, 3, 4, 1, 2, 5)  # [B, K, Q+2, N, T, H]
    prompt_q, prompt_k, prompt_v = _queries_keys_values(prompts)
    q, k, v = _queries_keys_values(completions)
    among_prompts = streams.prompt_keys[:, None, None, None, :] & _causal(prompt_k.shape[2])
    prompt_out = _attend(prompt_q, [(prompt_k, prompt_v, "bksh", among_prompts)])
    visible = streams.prompt_keys[:, None, None, None, None, :]
    out = _attend(q, [(prompt_k, prompt_v, "bksh", visible), (k, v, "bknsh", _causal(k.shape[3])[None])])
    out = streams.join(prompt_out.transpose(0, 3, 1, 2, 4), out.transpose(0, 3, 4, 1, 2, 5))
    return streams.to_places(out), None


def prefill(
    prompt_mask: Bool[Array, "B P"], qkv: Float[Array, "B P K Q+2 H"], cache: None
) -> tuple[Float[Array, "B P K Q H"], tuple[Array, Array]]:
    """Prompts attend to themselves; their keys and values [B, K, P, H] come back as the cache."""
    q, k, v = _queries_keys_values(qkv.transpose(0, 2, 3, 1, 4))
    out = _attend(q, [(k, v, "bksh", prompt_mask[:, None, None, None, :] & _causal(k.shape[2]))])
    return out.transpose(0, 3, 1, 2, 4), (k, v)


def decode(
    prompt_keys: Bool[Array, "B P"], step: Int[Array, ""], qkv: Float[Array, "B N K Q+2 H"], cache: tuple[Array, ...]
) -> tuple[Float[Array, "B N K Q H"], tuple[Array, ...]]:
    """Token `step` of every completion attends to its prompt and to the completion so far.

    The cache is the prompts' keys and values [B, K, P, H], then the completions' [B, K, N, T, H].
    """
    prompt_k, prompt_v, keys, values = cache
    q, k, v = _queries_keys_values(qkv.transpose(0, 2, 3, 1, 4)[:, :, :, :, None])  # [B, K, (Q,) N, 1, H]
    keys = lax.dynamic_update_slice_in_dim(keys, k.astype(keys.dtype), step, axis=3)
    values = lax.dynamic_update_slice_in_dim(values, v.astype(values.dtype), step, axis=3)
    visible = prompt_keys[:, None, None, None, None, :]
    so_far = jnp.expand_dims(jnp.arange(keys.shape[3]) <= step, range(5))
    out = _attend(q, [(prompt_k, prompt_v, "bksh", visible), (keys, values, "bknsh", so_far)])
    return out[:, :, :, :, 0].transpose(0, 3, 1, 2, 4), (prompt_k, prompt_v, keys, values)


def _queries_keys_values(heads: Array) -> tuple[Array, Array, Array]:
    q = heads[:, :, :-2]
    return q * q.shape[-1] ** -0.5, heads[:, :, -2], heads[:, :, -1]


def _causal(length: int) -> Array:
    """[1, 1, 1, T, T]; query t sees keys 0 to t."""
    return jnp.tril(jnp.ones((1, 1, 1, length, length), bool))


def _attend(q: Array, sources: list[tuple[Array, Array, str, Array]]) -> Array:
    """Queries [B, K, Q, (N,) T, H] over the union of several sources of (keys, values, their axes, which are visible)."""
    axes = "bkqth" if q.ndim == 5 else "bkqnth"
    weights, peak = [], None
    for keys, _, source, visible in sources:
        product = jnp.einsum(f"{axes},{source}->{axes[:-1]}s", q, keys, precision=_precision(q), preferred_element_type=_wide(q))
        product = jnp.where(visible, product, MASKED)
        weights.append(product)
        highest = product.max(-1, keepdims=True)
        peak = highest if peak is None else jnp.maximum(peak, highest)
    peak = lax.stop_gradient(peak)
    weights = [jnp.exp(product - peak) for product in weights]
    total = sum(w.sum(-1, keepdims=True) for w in weights)
    out = sum(
        jnp.einsum(f"{axes[:-1]}s,{source}->{axes}", w.astype(q.dtype), v, precision=_precision(q), preferred_element_type=_wide(q))
        for w, (_, v, source, _) in zip(weights, sources, strict=True)
    )
    return (out / total).astype(q.dtype)


def _wide(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _precision(x: Array):
    return None if x.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
