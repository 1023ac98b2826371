"""Rotary position embeddings, and how models stretch them to more positions than they were first trained on."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

KINDS = ("linear", "llama3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """Slower rotation. "linear": of every pair; Chen et al. 2023, arXiv:2306.15595, Eq. 4.

    "llama3": only of pairs that turn too rarely within the original positions for a model to have seen every angle;
    Grattafiori et al. 2024, arXiv:2407.21783, as in the code released with it.
    """

    kind: Literal["linear", "llama3"]
    factor: float  # angles are divided by it
    low_freq_factor: float = 1.0  # llama3: pairs with at most so many turns in the original positions are slowed fully,
    high_freq_factor: float = 4.0  # those with at least so many not at all, those between in part
    original_positions: int = 8192

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"rope_scaling: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"rope_scaling: factor must be >= 1 and finite, got {self.factor}")
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ValueError(
                "rope_scaling: 0 < low_freq_factor < high_freq_factor must hold, "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )
        if self.original_positions < 1:
            raise ValueError(f"rope_scaling: original_positions must be >= 1, got {self.original_positions}")

    def apply(self, frequencies: Float[Array | np.ndarray, " half"]) -> Float[Array | np.ndarray, " half"]:
        """Radians that each pair turns from one position to the next, before -> after."""
        if self.kind == "linear":
            return frequencies / self.factor
        turns = self.original_positions * frequencies / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clip(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def rotary(
    positions: Int[Array, "G M"], head_dim: int, theta: float, dtype, scaling: Scaling | None = None
) -> tuple[Array, Array]:
    """Cosines and signed sines [G, M, 1, 1, 2, H/2] that turn a head's halves. Su et al. 2021, Eq. 34.

    `dtype` is that of the queries and keys; angles are float32 at least.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    frequencies = theta ** (-jnp.arange(head_dim // 2, dtype=wide) / (head_dim // 2))
    if scaling is not None:
        frequencies = scaling.apply(frequencies)
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
