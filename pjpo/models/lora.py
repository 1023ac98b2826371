"""Low-rank adapters. Hu et al. 2021, arXiv:2106.09685, Eq. 3: x W + alpha/rank (x A) B, with B = 0 at the start.

Their parameters live in a Flax collection of their own, "lora", so the reference model is the same weights without it
and an optimizer can hold state for the adapters alone. A starts uniform with variance 2 / D (He et al. 2015), 6 times
that of PEFT's default, so learning rates do not carry over as they are.
"""

import dataclasses
import math
import numbers

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from pjpo.products import product

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    rank: int = 8  # 0 for no adapters: all weights are trained
    alpha: float = 16.0  # the update is scaled by alpha / rank
    targets: tuple[str, ...] = PROJECTIONS  # which projections of every layer get an adapter

    def __post_init__(self):
        if not (isinstance(self.rank, numbers.Integral) and self.rank >= 0):
            raise ValueError(f"lora: rank must be at least 1, or 0 for no adapters, got {self.rank!r}")
        if not (isinstance(self.alpha, numbers.Real) and 0 < self.alpha < math.inf):
            raise ValueError(f"lora: alpha must be > 0, got {self.alpha!r}")
        if not (isinstance(self.targets, tuple) and self.targets and set(PROJECTIONS).issuperset(self.targets)):
            raise ValueError(
                f"lora: targets must be some of {', '.join(PROJECTIONS)}; got {self.targets!r}, give a tuple"
            )


class Adapter(nn.Module):
    """x [..., D] -> the update [..., *out]; None where the parameters passed in hold no adapters."""

    config: Config
    out: tuple[int, ...]
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array | None:
        if not self.is_initializing() and not self.has_variable("lora", "a"):
            return None

        def draw():
            return nn.initializers.he_uniform()(
                self.make_rng("params"), (x.shape[-1], self.config.rank), self.param_dtype
            )

        a = self.variable("lora", "a", draw)
        b = self.variable("lora", "b", jnp.zeros, (self.config.rank, *self.out), self.param_dtype)
        return product(product(x, a.value), b.value) * (self.config.alpha / self.config.rank)
