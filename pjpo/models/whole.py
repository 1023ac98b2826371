"""Keys and values of completions as one array of all steps, which products read whole; see `pjpo.models.filled`."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pjpo.products import einsum


def blank(rows: int, kv_heads: int, length: int, head_dim: int, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Keys [R, K, H, T] and values [R, K, T, H] of `length` steps."""
    return jnp.zeros((rows, kv_heads, head_dim, length), dtype), jnp.zeros((rows, kv_heads, length, head_dim), dtype)


def write(
    keys: Float[Array, "R K H T"],
    values: Float[Array, "R K T H"],
    key: Float[Array, "R K H"],
    value: Float[Array, "R K H"],
    step: Int[Array, ""],
) -> tuple[Array, Array]:
    """Keys and values with those of token `step`."""
    return (
        lax.dynamic_update_slice_in_dim(keys, key[..., None].astype(keys.dtype), step, axis=3),
        lax.dynamic_update_slice_in_dim(values, value[:, :, None].astype(values.dtype), step, axis=2),
    )


def scores(q: Float[Array, "R K Q H"], keys: Float[Array, "R K H T"], step: Int[Array, ""]) -> Float[Array, "R K Q T"]:
    """Products of queries with keys, float32; those with what is not written yet are of no use."""
    return einsum("bkqh,bkhs->bkqs", q, keys)


def mix(
    weights: Float[Array, "R K Q T"],
    values: Float[Array, "R K T H"],
    step: Int[Array, ""],
    start: Float[Array, "R K Q H"],
) -> Float[Array, "R K Q H"]:
    """`start` plus the values by their weights; float32."""
    return start + einsum("bkqs,bksh->bkqh", weights, values)
