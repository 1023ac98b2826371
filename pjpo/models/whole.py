"""Keys and values of completions as one array of all steps, which products read whole; see `pjpo.models.filled`."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pjpo.products import einsum


class Cache(NamedTuple):
    keys: Float[Array, "R K H T"]
    values: Float[Array, "R K T H"]

    @classmethod
    def blank(cls, rows: int, kv_heads: int, length: int, head_dim: int, dtype: jnp.dtype) -> Cache:
        """Of `length` steps."""
        return cls(
            jnp.zeros((rows, kv_heads, head_dim, length), dtype), jnp.zeros((rows, kv_heads, length, head_dim), dtype)
        )

    def write(self, key: Float[Array, "R K H"], value: Float[Array, "R K H"], step: Int[Array, ""]) -> Cache:
        """With those of token `step`."""
        return Cache(
            lax.dynamic_update_slice_in_dim(self.keys, key[..., None].astype(self.keys.dtype), step, axis=3),
            lax.dynamic_update_slice_in_dim(self.values, value[:, :, None].astype(self.values.dtype), step, axis=2),
        )

    def scores(self, q: Float[Array, "R K Q H"], step: Int[Array, ""]) -> Float[Array, "R K Q T"]:
        """Products of queries with keys, float32; those with what is not written yet are of no use."""
        return einsum("bkqh,bkhs->bkqs", q, self.keys, many=False)

    def mix(
        self, weights: Float[Array, "R K Q T"], step: Int[Array, ""], start: Float[Array, "R K Q H"]
    ) -> Float[Array, "R K Q H"]:
        """`start` plus the values by their weights; float32."""
        return start + einsum("bkqs,bksh->bkqh", weights, self.values, many=False)
