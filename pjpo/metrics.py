"""Means and extremes that add up: microbatches, devices and hosts give the same number however the batch is cut."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pjpo.logps import widened


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean kept as its sum and count, float32 (float64 under x64), so that parts can be added before dividing."""

    sum: Float[Array, ""]
    count: Float[Array, ""]

    @classmethod
    def of(cls, values: Array, mask: Array | None = None) -> Mean:
        """The mean of `values` where `mask` (of the same shape) is true; of all values without one."""
        values, mask = _checked(values, mask)
        return cls(jnp.where(mask, values, 0).sum(), mask.sum().astype(values.dtype))

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.sum + other.sum, self.count + other.count)

    def __radd__(self, zero: int) -> Mean:
        """For `sum`, which starts from 0."""
        return self if zero == 0 else NotImplemented

    def value(self) -> Float[Array, ""]:
        """Sum over count; 0 where nothing was counted."""
        return jnp.where(self.count > 0, self.sum / jnp.where(self.count > 0, self.count, 1), 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Largest(Mean):
    """The largest of a batch's numbers, whatever parts it is cut into; over several updates the mean of theirs."""

    @classmethod
    def of(cls, values: Array, mask: Array | None = None) -> Largest:
        """The largest of `values` where `mask` (of the same shape) is true; of all values without one."""
        values, mask = _checked(values, mask)
        largest = jnp.where(mask, values, -jnp.inf).max(initial=-jnp.inf)
        return cls(jnp.where(mask.any(), largest, 0), mask.any().astype(values.dtype))

    def __add__(self, other: Mean) -> Largest:
        return self.of(jnp.stack([self.sum, other.sum]), jnp.stack([self.count, other.count]) > 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Smallest(Largest):
    """The smallest, as `Largest` has it."""

    @classmethod
    def of(cls, values: Array, mask: Array | None = None) -> Smallest:
        """The smallest of `values` where `mask` (of the same shape) is true; of all values without one."""
        values, mask = _checked(values, mask)
        opposite = Largest.of(-values, mask)
        return cls(-opposite.sum, opposite.count)


def _checked(values: Array, mask: Array | None) -> tuple[Array, Array]:
    """Values in float32 or wider, and their mask."""
    values = widened(values)
    mask = jnp.ones(values.shape, bool) if mask is None else jnp.asarray(mask)
    assert mask.shape == values.shape, f"mask {mask.shape} does not fit values {values.shape}"
    return values, mask
