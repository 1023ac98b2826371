"""The method's own loss and metrics on held-out examples; where these are pairs, the panel of diagnostics too."""

from __future__ import annotations

import dataclasses
import zlib

import jax
import numpy as np

from pjpo import distributed, rollouts, sharding, step
from pjpo.data.batches import in_order
from pjpo.evals import panel
from pjpo.evals.result import Result
from pjpo.logps import sum_completion
from pjpo.sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    batch_size: int = 8  # examples scored together
    num_sampled: int = 0  # prompts of pairs that are continued, to measure KL and entropy; 0 for none
    max_completion_tokens: int = 32  # of those continuations

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("num_sampled", 0), ("max_completion_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"held-out evaluation: {name} must be >= {least}, got {getattr(self, name)}")

    def build(self, context, data):
        """A function (params, ref_params) -> Result over `data.held_out`, in one shape for each bucket.

        Raises:
            ValueError: there is nothing to evaluate on, or a batch that the mesh cannot cut.
        """
        if not data.held_out:
            raise ValueError("held-out evaluation: the data holds nothing out; set num_held_out to 1 or more")
        sharding.check_batch(context.mesh, self.batch_size, name="evaluation.batch_size")
        policy, are_pairs = context.policy, len(data.held_out[0].completions) == 2

        @jax.jit
        def measure(params, ref_params, batch):
            ref_logps = batch.ref_logps  # there already, where the reference is stored
            if ref_logps is None and ref_params is not None:
                ref_logps = policy.logps(ref_params, batch)
            outputs = step.outputs_of(context.method, policy, params, batch)
            mean, metrics = step.apply(context.loss, context.method, batch, outputs, ref_logps)
            rows = {}
            if are_pairs and "logps" in outputs and ref_logps is not None:
                sums = (sum_completion(x, batch.loss_mask) for x in (outputs["logps"], ref_logps))
                rows = dict(zip(("logps", "ref_logps"), sums, strict=True)) | {"lengths": batch.loss_mask.sum(-1)}
            return {"loss": mean, **metrics}, rows

        def evaluate(params, ref_params, *, title: str = "evaluating") -> Result:
            parts, rows = zip(
                *(
                    distributed.fetch(measure(params, ref_params, context.prepare(batch)))
                    for batch in in_order(data.held_out, self.batch_size, context.buckets)
                ),
                strict=True,
            )
            total = jax.tree.map(lambda *x: np.sum(x, axis=0), *parts)
            metrics, words = {name: float(mean.value()) for name, mean in total.items()}, {}
            if rows[0]:
                pairs = jax.tree.map(lambda *x: np.concatenate(x)[: len(data.held_out)], *rows)
                metrics = panel.of_pairs(getattr(context.method, "beta", 1.0), **pairs) | metrics
                words["displacement"] = panel.displacement(pairs["logps"], pairs["ref_logps"])
            if rows[0] and self.num_sampled:
                metrics |= self._of_samples(context, data, params, ref_params, title)
            return Result(metrics=metrics, words=words)

        return evaluate

    def _of_samples(self, context, data, params, ref_params, title: str) -> dict[str, float]:
        sampling = Sampling(
            num_completions=1,
            max_completion_tokens=self.max_completion_tokens,
            stop_tokens=context.tokenizer.stop_ids,
        )
        prompts = [example.prompt for example in data.held_out[: self.num_sampled]]
        key = jax.random.fold_in(context.key, zlib.crc32(b"held out"))
        options = {"batch_size": self.batch_size, "title": title}
        batch = rollouts.rollouts(context.policy, params, prompts, key, sampling, **options)
        return panel.of_samples(batch, distributed.fetch(context.policy.logps(ref_params, batch)))
