"""The method's own loss and metrics on held-out examples."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from pjpo import distributed, sharding
from pjpo.data.batches import in_order
from pjpo.evals.result import Result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    batch_size: int = 8  # examples scored together

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"held-out evaluation: batch_size must be >= 1, got {self.batch_size}")

    def build(self, context, data):
        """A function (params, ref_params) -> Result over `data.held_out`, in one shape for each bucket.

        Raises:
            ValueError: there is nothing to evaluate on, or a batch that the mesh cannot cut.
        """
        if not data.held_out:
            raise ValueError("held-out evaluation: the data holds nothing out; set num_held_out to 1 or more")
        sharding.check_batch(context.mesh, self.batch_size, name="evaluation.batch_size")

        @jax.jit
        def measure(params, ref_params, batch):
            ref_logps = batch.ref_logps  # there already, where the reference is stored
            if ref_logps is None and ref_params is not None:
                ref_logps = context.policy.logps(ref_params, batch)
            mean, metrics = context.loss(context.method, batch, context.policy.logps(params, batch), ref_logps)
            return {"loss": mean, **metrics}

        def evaluate(params, ref_params, *, title: str = "evaluating") -> Result:
            parts = [
                distributed.fetch(measure(params, ref_params, context.prepare(batch)))
                for batch in in_order(data.held_out, self.batch_size, context.buckets)
            ]
            total = jax.tree.map(lambda *x: np.sum(x, axis=0), *parts)
            return Result(metrics={name: float(mean.value()) for name, mean in total.items()})

        return evaluate
