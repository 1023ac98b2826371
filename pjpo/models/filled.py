"""Keys and values of completions in blocks of steps, of which decoding reads those that are filled.

Where decoding waits for memory, this spares it half of the cache on average. XLA would copy a slice of the cache before
a product, so scores and mixtures are sums of outer products here, as in `pjpo.products.streamed_rows` and for the same
programs. Letters beside those of `pjpo.models.attention`: R rows, S blocks of L steps, C parts of P numbers of a head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pjpo.products import LANES, ZERO, add_up, count_up

MASKED = -1e30  # a score that is finite, so that a row with nothing to look at is harmless


class Cache(NamedTuple):
    keys: Float[Array, "R K S C P L"]
    values: Float[Array, "R K S L H"]

    @classmethod
    def blank(cls, rows: int, kv_heads: int, length: int, head_dim: int, dtype: jnp.dtype) -> Cache:
        """Of `length` steps, in whole blocks; float32 is meant."""
        num_blocks, part = -(-length // LANES), math.gcd(head_dim, LANES)
        return cls(
            jnp.zeros((rows, kv_heads, num_blocks, head_dim // part, part, LANES), dtype),
            jnp.zeros((rows, kv_heads, num_blocks, LANES, head_dim), dtype),
        )

    def write(self, key: Float[Array, "R K H"], value: Float[Array, "R K H"], step: Int[Array, ""]) -> Cache:
        """With those of token `step`."""
        keys, values = self
        block, place = step // LANES, step % LANES
        key = key.reshape(*key.shape[:2], 1, *keys.shape[3:5], 1)
        return Cache(
            lax.dynamic_update_slice(keys, key.astype(keys.dtype), (0, 0, block, 0, 0, place)),
            lax.dynamic_update_slice(values, value[:, :, None, None].astype(values.dtype), (0, 0, block, place, 0)),
        )

    def scores(self, q: Float[Array, "R K Q H"], step: Int[Array, ""]) -> Float[Array, "R K Q T"]:
        """Products of queries with keys up to the end of `step`'s block, float32; those with later ones are MASKED."""
        keys, rows = self.keys, q.shape[:3]
        num_parts, size = keys.shape[3:5]
        q = q.astype(keys.dtype).reshape(*rows, num_parts, size)

        def block(at: Array, found: Array) -> Array:
            def add(part: Array, sums: Array) -> Array:
                def product(of_part: int) -> Array:
                    place = np.uint32(of_part)
                    query = lax.dynamic_slice(q, (ZERO, ZERO, ZERO, part, place), (*rows, 1, 1)).reshape(*rows, 1)
                    key = lax.dynamic_slice(keys, (ZERO, ZERO, at, part, place, ZERO), (*rows[:2], 1, 1, 1, LANES))
                    return query * key.reshape(*rows[:2], 1, LANES)

                return add_up(sums, map(product, range(size)))

            own = count_up(num_parts, add, jnp.zeros((*rows, LANES), keys.dtype))
            return lax.dynamic_update_slice(found, own[:, :, :, None], (ZERO, ZERO, ZERO, at, ZERO))

        masked = jnp.full((*rows, keys.shape[2], LANES), MASKED, keys.dtype)
        return count_up(step // LANES + 1, block, masked).reshape(*rows, -1)

    def mix(
        self, weights: Float[Array, "R K Q T"], step: Int[Array, ""], start: Float[Array, "R K Q H"]
    ) -> Float[Array, "R K Q H"]:
        """`start` plus the values, up to the end of `step`'s block, by their weights; float32."""
        values, rows = self.values, weights.shape[:3]
        head_dim = values.shape[-1]
        weights = weights.astype(values.dtype).reshape(*rows, -1, LANES)

        def block(at: Array, sums: Array) -> Array:
            def product(of_block: int) -> Array:
                place = np.uint32(of_block)
                weight = lax.dynamic_slice(weights, (ZERO, ZERO, ZERO, at, place), (*rows, 1, 1)).reshape(*rows, 1)
                value = lax.dynamic_slice(values, (ZERO, ZERO, at, place, ZERO), (*rows[:2], 1, 1, head_dim))
                return weight * value.reshape(*rows[:2], 1, head_dim)

            return add_up(sums, map(product, range(LANES)))

        return count_up(step // LANES + 1, block, start)
