"""The method's own loss and metrics on held-out examples."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from pjpo.data.batches import in_order


@dataclasses.dataclass(frozen=True)
class Result:
    metrics: dict[str, float]
    samples: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    batch_size: int = 8  # examples scored together

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"held-out evaluation: batch_size must be >= 1, got {self.batch_size}")

    def build(self, context, data):
        """A function (params, ref_params) -> Result over `data.held_out`, in one shape for each bucket.

        Raises:
            ValueError: there is nothing to evaluate on.
        """
        if not data.held_out:
            raise ValueError("held-out evaluation: the data holds nothing out; set num_held_out to 1 or more")

        @jax.jit
        def measure(params, ref_params, batch):
            ref_logps = None if ref_params is None else context.policy.logps(ref_params, batch)
            mean, metrics = context.loss(context.method, batch, context.policy.logps(params, batch), ref_logps)
            return {"loss": mean, **metrics}

        def evaluate(params, ref_params, *, title: str = "evaluating") -> Result:
            parts = [
                jax.device_get(measure(params, ref_params, context.place(batch)))
                for batch in in_order(data.held_out, self.batch_size, context.buckets)
            ]
            total = jax.tree.map(lambda *x: np.sum(x, axis=0), *parts)
            return Result({name: float(mean.value()) for name, mean in total.items()}, [])

        return evaluate
