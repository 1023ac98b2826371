"""`Experiment`, a run as a value, and `run`, which puts its parts together."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

from pjpo import checkpoints, models, optim, packing, reference, report, runs, sharding, step, train
from pjpo.data.batches import Batches
from pjpo.data.buckets import Buckets, collate
from pjpo.evals import sentiment, token_rewards
from pjpo.models import lora
from pjpo.types import Batch

# What a run may go on with changed: none of it changes what is computed, but for rounding.
MAY_CHANGE = ("mesh", "wandb_project", *(f"loop.{what}_every_steps" for what in ("log", "evaluate", "checkpoint")))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Which pretrained model, and how it computes."""

    source: str  # a packaged name, a Hugging Face folder, or a .gguf file
    dtype: Literal["float32", "bfloat16"] = "float32"  # of products and activations
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights at rest
    scan_layers: bool = False  # compiles faster; unrolled runs faster on a CPU
    remat: bool = False  # recompute layers in the backward pass, to save memory
    lora: lora.Config | None = None  # adapters; without them all weights are trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything a run depends on."""

    loss: tyro.conf.Suppress[Callable]  # of a module in pjpo/methods
    method: Any  # that module's Config
    model: Model
    data: Any  # a config with `build(context) -> Data`
    optimizer: optim.Config
    loop: train.Loop
    batch_size: int  # prompts in an update, over all devices
    reference: step.Reference  # none, online (a second set of weights), stored (on disk), adapter (weights less LoRA)
    evaluation: Any = None  # a config with `build(context, data)`, see pjpo/evals
    keep_best_by: tuple[str, str] | None = None  # (metric, "max" or "min"): keep that checkpoint beside the last ones
    num_microbatches: int = 1  # parts that an update's batch is cut into, to save memory
    pack: bool = False  # leave padding out of the computation; worth it where lengths vary
    mesh: sharding.Config = dataclasses.field(default_factory=sharding.Config)
    seed: int = 0
    wandb_project: str | None = None  # log to this project of Weights & Biases too; needs the extra wandb
    smoke: tyro.conf.Suppress[Mapping[str, Any]] = dataclasses.field(default_factory=dict)  # overrides for --smoke


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What data and evaluation may ask of a run while they are built."""

    policy: models.Policy
    params: dict
    tokenizer: Any
    loss: Callable
    method: Any
    key: jax.Array
    folder: Path
    say: Callable[[str], None]
    place: Callable[[Batch], Batch]  # onto the mesh
    buckets: Buckets | None = None  # known once there is data


def run(name: str, experiment: Experiment, *, root: Path | str = "runs", resume: Path | None = None, say=print) -> Path:
    """Run an experiment to its end, in a new folder under `root` or in that of the run to resume; returns the folder.

    Raises:
        ValueError: settings that do not fit each other, or a folder that holds something else.
        train.Stopped: interrupted, with everything saved.
    """
    mesh = sharding.make_mesh(experiment.mesh)
    sharding.check_batch(mesh, experiment.batch_size, experiment.num_microbatches)
    schedule = optim.make_schedule(experiment.optimizer, experiment.loop.num_steps)
    if experiment.reference == "adapter" and experiment.model.lora is None:
        raise ValueError("reference 'adapter' is the model without its adapters, but model.lora is None; use 'online'")
    config = describe(experiment)
    folder = runs.open(resume, name, config, may_change=MAY_CHANGE) if resume else runs.create(root, name, config)
    if experiment.wandb_project:
        folder = dataclasses.replace(folder, sink=runs.wandb_sink(experiment.wandb_project, folder, config))
    say(f"run: {folder.path}")
    try:
        with folder, checkpoints.Checkpoints(folder.checkpoints, experiment.keep_best_by, say=say) as saved:
            _run(experiment, mesh, schedule, folder, saved, say)
    except (train.Stopped, KeyboardInterrupt) as stopped:
        about = str(stopped) or "stopped at once; updates after the last checkpoint will be repeated"
        command = shlex.join(["python", "-m", f"experiments.{name}", "--resume", str(folder.path)])
        raise train.Stopped(f"{about}\nGo on with: {command}") from None
    say(f"report: {report.write(folder)}")
    return folder.path


def describe(value: Any) -> Any:
    """A config as JSON knows it: dataclasses as dicts, functions and classes by name."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "smoke"}
        kind = (
            {} if isinstance(value, Experiment) else {"config": f"{type(value).__module__}.{type(value).__qualname__}"}
        )
        return kind | fields
    return f"{value.__module__}.{value.__qualname__}" if callable(value) else value


def recall(value: Any, described: Any) -> Any:
    """The inverse of `describe`: `value`, an experiment, with the settings of a run of it."""
    if dataclasses.is_dataclass(value) and isinstance(described, Mapping):
        fields = [field.name for field in dataclasses.fields(value) if field.name in described]
        return dataclasses.replace(value, **{name: recall(getattr(value, name), described[name]) for name in fields})
    if callable(value):
        return value
    if isinstance(value, float) and isinstance(described, str):
        return float(described)  # what is not finite, as a run's folder spells it
    return tuple(described) if isinstance(described, list) else described


def _run(experiment: Experiment, mesh, schedule, folder: runs.RunFolder, saved: checkpoints.Checkpoints, say) -> None:
    settings = {field.name: getattr(experiment.model, field.name) for field in dataclasses.fields(experiment.model)}
    data_key, adapter_key, state_key = jax.random.split(jax.random.key(experiment.seed), 3)
    policy, params, tokenizer = models.load(**settings, mesh=mesh, key=adapter_key)
    context = Context(
        policy=policy,
        params=params,
        tokenizer=tokenizer,
        loss=experiment.loss,
        method=experiment.method,
        key=data_key,
        folder=folder.path,
        say=say,
        place=lambda batch: sharding.place_batch(batch, mesh),
    )
    data = experiment.data.build(context)
    say(data.about)
    folder.summary({f"counts/{what}": count for what, count in data.counts.items()})
    context = dataclasses.replace(context, buckets=Buckets.of(data.train + data.held_out))
    reference_model = _ReferenceModel(experiment.reference, policy, params, folder)
    evaluation = _Evaluation(experiment, context, data, reference_model, folder)

    batches = Batches(data.train, batch_size=experiment.batch_size, seed=experiment.seed, buckets=context.buckets)
    optimizer = optim.make_optimizer(experiment.optimizer, schedule)
    num_groups = sharding.num_batch_parts(mesh) * experiment.num_microbatches

    def prepare(batch: Batch) -> Batch:
        batch = reference_model.attach(batch)
        return context.place(packing.pack(batch, num_groups=num_groups) if experiment.pack else batch)

    first = collate(data.train[: experiment.batch_size], context.buckets)
    prepared = prepare(first)
    reference_model.check_start(experiment, prepared)
    state = train.train(
        experiment.loop,
        update=step.make_update(
            experiment.loss,
            experiment.method,
            policy,
            optimizer,
            mesh,
            reference=experiment.reference,
            schedule=schedule,
            num_microbatches=experiment.num_microbatches,
        ),
        # Where nothing reads the start's own arrays any more, the state takes them over: weights are held once.
        state=step.init_state(
            policy, params, optimizer, state_key, mesh, keep_params=experiment.reference in ("online", "stored")
        ),
        ref_params=reference_model.params if experiment.reference == "online" else None,
        batches=batches,
        prepare=prepare,
        evaluate=evaluation if experiment.evaluation else None,
        trainable=lambda state: dataclasses.replace(state, params=policy.trainable(state.params)[0]),
        restored=lambda state, saved: dataclasses.replace(saved, params=state.params | saved.params),
        folder=folder,
        checkpoints=saved,
        say=say,
    )
    written = any(row.get("kind") == "token_rewards" for row in runs.read(folder.path).samples)
    is_pairs = first.completion_tokens.shape[1] == 2
    if is_pairs and experiment.reference != "none" and hasattr(experiment.method, "beta") and not written:
        # In the shapes of the step-0 gate, for which everything is compiled.
        logps, ref_logps = (policy.logps(p, prepared)[:4] for p in (state.params, reference_model.of(state)))
        shown = jax.tree.map(lambda x: x[:4], first)
        labels = ("chosen", "rejected")
        rows = token_rewards.rows(experiment.method.beta, shown, logps, ref_logps, tokenizer, labels)
        folder.sample(experiment.loop.num_steps, rows)


class _ReferenceModel:
    """The start of the run as the reference, in whichever of its forms."""

    def __init__(self, kind: step.Reference, policy: models.Policy, params: dict, folder: runs.RunFolder):
        self.kind, self.policy, self.params = kind, policy, params
        stored = folder.path.parent.parent / "reference_logps"  # shared by runs: its content is its address
        self.store = reference.Store(stored, policy, policy.without_adapters(params)) if kind == "stored" else None

    def of(self, state: step.State) -> dict | None:
        """Its parameters beside a state: with adapters the state's own arrays, which every update donates."""
        if self.kind == "adapter":
            return self.policy.without_adapters(state.params)
        return None if self.kind == "none" else self.params

    def attach(self, batch: Batch) -> Batch:
        return self.store.attach(batch) if self.store else batch

    def check_start(self, experiment: Experiment, batch: Batch) -> None:
        """The step-0 gate, on a prepared batch; see `pjpo.reference.check_start`."""
        if self.kind == "none":
            return
        ref_params = self.policy.without_adapters(self.params) if self.kind == "adapter" else self.params
        ref_logps = batch.ref_logps if self.store else self.policy.logps(ref_params, batch)
        # Stored bfloat16 numbers may come from a batch of another shape, which a GPU rounds otherwise.
        coarse = self.store is not None and self.policy.config.dtype == "bfloat16"
        allowed = {"tolerance": 1e-2, "token_tolerance": 0.25} if coarse else {}
        logps = self.policy.logps(self.params, batch)
        reference.check_start(experiment.loss, experiment.method, batch, logps, ref_logps, **allowed)


class _Evaluation:
    """An experiment's evaluation, written to the run's folder: `start/...`, `eval/...`, samples."""

    def __init__(self, experiment: Experiment, context: Context, data, reference_model: _ReferenceModel, folder):
        self.last_step = experiment.loop.num_steps
        self.evaluate = experiment.evaluation.build(context, data) if experiment.evaluation else None
        self.reference_model, self.folder, self.say = reference_model, folder, context.say
        self.start: Any = None

    def __call__(self, state: step.State, number: int) -> dict[str, float]:
        assert self.evaluate is not None, "called without an evaluation"
        result = self.evaluate(state.params, self.reference_model.of(state), title=f"evaluating step {number}")
        self.folder.sample(number, [{"kind": "completion", **row} for row in result.samples])
        if number == 0:
            self.start = result
            self.folder.summary({f"start/{name}": value for name, value in result.metrics.items()})
            if isinstance(result, sentiment.Result):
                self.folder.summary(sentiment.best_of(result))
        if number == self.last_step:
            self.folder.summary({f"eval/{name}": value for name, value in result.metrics.items()})
            if isinstance(result, sentiment.Result) and self.start:
                self.say(sentiment.side_by_side(self.start, result))
        return {f"eval/{name}": value for name, value in result.metrics.items()}
