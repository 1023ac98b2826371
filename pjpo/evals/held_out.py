"""The method's own loss and metrics on held-out examples; where these are preferences, the panel of diagnostics too."""

from __future__ import annotations

import dataclasses
import zlib

import jax
import numpy as np

from pjpo import checks, distributed, rollouts, sharding, step
from pjpo.data.batches import in_order
from pjpo.evals import panel
from pjpo.evals.preferences import kind_of
from pjpo.evals.result import Result
from pjpo.sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    batch_size: int = 8  # examples scored together
    # Held-out prompts of preferences that are continued, to measure KL and entropy. 0 for none, which saves the start's
    # weights where the method has no reference and the model no adapters.
    num_sampled: int = 16
    max_completion_tokens: int = 32  # of those continuations

    def __post_init__(self):
        checks.kinds(self)
        for name, least in (("batch_size", 1), ("num_sampled", 0), ("max_completion_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"held-out evaluation: {name} must be >= {least}, got {getattr(self, name)}")

    def build(self, context, data) -> Evaluation:
        """
        Raises:
            ValueError: there is nothing to evaluate on, or a batch that the mesh cannot cut.
        """
        if not data.held_out:
            raise ValueError("held-out evaluation: the data holds nothing out; set num_held_out to 1 or more")
        sharding.check_batch(context.mesh, self.batch_size, name="evaluation.batch_size")
        evaluation = Evaluation(self, context, data)
        if evaluation.kind and not self.num_sampled:
            context.say("held-out evaluation: no KL, no entropy; evaluation.num_sampled=16 samples to measure them")
        if evaluation.kind == "labelled":
            context.say(
                "held-out evaluation: no rankings, no reward accuracy: these compare two completions of a prompt"
            )
        return evaluation


class Evaluation:
    """A function (params, ref_params) -> Result over all held-out examples, in one shape for each bucket.

    The panel of a method without a reference compares with the run's start, whose log-probs are computed here. The KL
    asks for the start's weights as long as the run trains, see `reads_reference`.
    """

    def __init__(self, config: Config, context, data):
        self.config, self.context, self.held_out = config, context, data.held_out
        self.kind = kind_of(data.held_out, context.method)
        self.reads_reference = bool(self.kind and config.num_sampled)
        self._start = None
        if self.kind and context.reference == "none":
            self._start = [context.policy.logps(context.params, batch) for batch in self._batches()]
        self._measure = jax.jit(self._measured)

    def __call__(self, params, ref_params, *, title: str = "evaluating") -> Result:
        """The method's metrics; of preferences the panel's too, and `kl` and `entropy` of samples, see `panel`.

        A method's own `kl` keeps its name, as KTO's, the reference point; that of samples is `sequence_kl` beside it.

        Raises:
            ValueError: samples are asked for, and there is no reference to measure their KL to.
        """
        own_reference = None if self.context.reference == "none" else ref_params
        parts, rows = zip(
            *(
                distributed.fetch(self._measure(params, own_reference, batch, self._start and self._start[number]))
                for number, batch in enumerate(self._batches())
            ),
            strict=True,
        )
        total = jax.tree.map(lambda *x: np.sum(x, axis=0), *parts)
        own, words = {name: float(mean.value()) for name, mean in total.items() if mean.count}, {}
        metrics = own
        if self.kind:
            metrics, words = panel.of_rows(self.kind, self.context.method, rows, len(self.held_out))
            metrics |= own
        if self.reads_reference:
            found = self._of_samples(params, ref_params, title)
            metrics |= {f"sequence_{name}" if "kl" in own and "kl" in name else name: x for name, x in found.items()}
        return Result(metrics=metrics, words=words)

    def _batches(self):
        for batch in in_order(self.held_out, self.config.batch_size, self.context.buckets):
            yield self.context.prepare(batch)

    def _measured(self, params, ref_params, batch, start):
        context = self.context
        ref_logps = batch.ref_logps  # there already, where the reference is stored
        if ref_logps is None and ref_params is not None:
            ref_logps = context.policy.logps(ref_params, batch)
        outputs = step.outputs_of(context.method, context.policy, params, batch)
        mean, metrics = step.apply(context.loss, context.method, batch, outputs, ref_logps)
        rows = {}
        if self.kind:
            rows = panel.rows_of(self.kind, batch, outputs["logps"], ref_logps if start is None else start)
        return {"loss": mean, **metrics}, rows

    def _of_samples(self, params, ref_params, title: str) -> dict[str, float]:
        context, config = self.context, self.config
        if ref_params is None:
            raise ValueError("held-out evaluation: KL needs a reference; pass ref_params, or set num_sampled to 0")
        sampling = Sampling(
            num_completions=1,
            max_completion_tokens=config.max_completion_tokens,
            stop_tokens=context.tokenizer.stop_ids,
        )
        prompts = [example.prompt for example in self.held_out[: config.num_sampled]]
        key = jax.random.fold_in(context.key, zlib.crc32(b"held out"))
        options = {"batch_size": config.batch_size, "title": title}
        batch = rollouts.rollouts(context.policy, params, prompts, key, sampling, **options)
        return panel.of_samples(batch, distributed.fetch(context.policy.logps(ref_params, batch)))
