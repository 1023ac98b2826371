"""`Experiment`, a run as a value, and `run`, which puts its parts together."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

from pjpo import (
    checkpoints,
    checks,
    distributed,
    models,
    online,
    optim,
    packing,
    progress,
    report,
    run_models,
    runs,
    sharding,
    step,
    train,
)
from pjpo.data import saved as saved_data
from pjpo.data.batches import Batches
from pjpo.data.buckets import Buckets, check_room, collate
from pjpo.data.examples import Data
from pjpo.evals import token_rewards
from pjpo.evals.result import side_by_side
from pjpo.models import actor_critic, lora
from pjpo.models.policy import joined
from pjpo.per_source import per_source
from pjpo.rewards.protocol import Unscored
from pjpo.types import Batch

PAIRS = "pairs.jsonl"  # in a run's folder: data that the run sampled itself
# What a run may go on with changed: none of it changes what is computed, but for rounding.
MAY_CHANGE = ("mesh", "wandb_project", *(f"loop.{what}_every_steps" for what in ("log", "evaluate", "checkpoint")))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Which pretrained model, and how it computes."""

    source: str  # a packaged name, a Hugging Face folder, or a .gguf file
    dtype: Literal["float32", "bfloat16"] = "float32"  # of products and activations
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights at rest; adapters stay float32
    scan_layers: bool = False  # compiles faster; unrolled runs faster on a CPU
    remat: bool = False  # recompute layers in the backward pass, to save memory
    attention: Literal["plain", "flash"] = "plain"  # flash: fused kernels on TPU, and in bfloat16 on GPU
    lora: lora.Config = dataclasses.field(default_factory=lambda: lora.Config(rank=0))
    scalar_head: bool = False  # for reward models and critics; starts at zero

    @property
    def settings(self) -> dict[str, Any]:
        """As `pjpo.models.load` takes them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Model)}

    def made(self, root: Path, say: Callable[[str], None]) -> Model:
        """The model as something that can be loaded; one that has to be made first, below `root`, overrides this."""
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything a run depends on."""

    loss: tyro.conf.Suppress[Callable]  # of a module in pjpo/methods
    method: Any  # what its paper lets one choose; that module's Config
    model: Model
    data: Any  # where examples come from; a config with `build(context) -> Data`
    optimizer: optim.Config
    loop: train.Loop
    batch_size: int  # prompts in an update, over all devices
    reference: step.Reference  # none, online (a second set of weights), stored (on disk), adapter (weights less LoRA)
    reference_source: str | None = None  # of the weights that are the reference, as in Model; None: the run's start
    rollouts: online.Config | None = None  # for online methods: what is sampled for the prompts that `data` gives
    critic: Model | None = None  # what estimates values for methods that ask; None: the model, by its own scalar head
    dpo_model: Model | None = None  # for RTO: the policy whose log-ratios to the reference are rewards; None: the start
    evaluation: Any = None  # what is measured along training; a config with `build(context, data)`, see pjpo/evals
    keep_best_by: tuple[str, Literal["max", "min"]] | None = None  # a metric: keep the best checkpoint beside the last
    num_microbatches: int = 1  # parts that an update's batch is cut into, to save memory
    pack: bool = False  # leave padding out of the computation, and even batches out; worth it where lengths vary
    mesh: sharding.Config = dataclasses.field(default_factory=sharding.Config)
    seed: int = 0  # of the order of the data, of adapters, and of what the run samples
    wandb_project: str | None = None  # log to this project of Weights & Biases too; needs the extra wandb
    smoke: tyro.conf.Suppress[Mapping[str, Any]] = dataclasses.field(default_factory=dict)  # overrides for --smoke

    def __post_init__(self):
        checks.kinds(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What data and evaluation may ask of a run while they are built."""

    policy: models.Policy | actor_critic.ActorCritic
    params: dict
    tokenizer: Any
    loss: Callable
    method: Any
    key: jax.Array
    mesh: jax.sharding.Mesh
    say: Callable[[str], None]
    prepare: Callable[[Batch], Batch]  # onto the mesh, with the reference's log-probs where these are stored
    reference: step.Reference
    buckets: Buckets | None = None  # known once there is data


def run(
    name: str,
    experiment: Experiment,
    *,
    root: Path | str = "runs",
    resume: Path | None = None,
    say: Callable = progress.say,
) -> Path:
    """Run an experiment to its end, in a new folder under `root` or in that of the run to resume; returns the folder.

    Raises:
        ValueError: settings that do not fit each other, or a folder that holds something else.
        train.Stopped: interrupted, with everything saved.
        FloatingPointError: diverged; the report shows how.
        Unscored: a reward with `on_error` "raise" failed.
        distributed.Lost: another process ended.
    """
    distributed.agree("config", {"experiment": name, "resume": str(resume), **runs.flat(describe(experiment))})
    distributed.agree("code", runs.code())
    say = say if distributed.is_first() else lambda _: None
    mesh = sharding.make_mesh(experiment.mesh)
    _check(experiment, mesh)
    if not resume:
        runs.check_root(root)
    experiment = dataclasses.replace(experiment, model=_made(experiment.model, Path(root), say))
    config = describe(experiment)
    folder = _folder(lambda: runs.open(resume, name, config, may_change=MAY_CHANGE)) if resume else None
    parts = _build(experiment, mesh, folder.path if folder else None, Path(root), say)
    # Only now, so that a model, data or settings that cannot be used leave no folder behind.
    folder = folder or _folder(lambda: runs.create(root, name, config))
    if experiment.wandb_project and distributed.is_first():
        folder = dataclasses.replace(folder, sink=runs.wandb_sink(experiment.wandb_project, folder, config))
    say(f"run: {folder.path}")
    try:
        with folder, checkpoints.Checkpoints(folder.checkpoints, experiment.keep_best_by, say=say) as saved:
            _run(experiment, parts, folder, saved)
    except (train.Stopped, FloatingPointError) as ended:
        _report(folder, say)
        if isinstance(ended, FloatingPointError):
            raise
        raise train.Stopped(f"{ended}\n{how_to_go_on(name, folder)}") from None
    except Unscored as failed:
        raise Unscored(f"{failed}\n{how_to_go_on(name, folder)}") from failed
    except KeyboardInterrupt:
        about = "stopped at once; updates after the last checkpoint will be repeated"
        raise train.StoppedAtOnce(f"{about}\n{how_to_go_on(name, folder)}") from None
    except Exception as error:
        if not distributed.is_loss(error):
            if isinstance(error, ValueError) and not resume and distributed.is_first():
                runs.discard(folder)
            raise
        raise distributed.Lost(f"{distributed.about_loss(error)}\n{how_to_go_on(name, folder)}") from None
    _report(folder, say)
    return folder.path


def describe(value: Any) -> Any:
    """A config as JSON knows it: dataclasses as dicts, functions and classes by name."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "smoke"}
        kind = (
            {} if isinstance(value, Experiment) else {"config": f"{type(value).__module__}.{type(value).__qualname__}"}
        )
        return kind | fields
    if isinstance(value, tuple):
        return [describe(item) for item in value]
    return f"{value.__module__}.{value.__qualname__}" if callable(value) else value


def recall(value: Any, described: Any, name: str = "config") -> Any:
    """The inverse of `describe`: `value`, an experiment, with the settings of a run of it.

    Raises:
        ValueError: settings that `describe` cannot have written; names them.
    """
    if dataclasses.is_dataclass(value) and described is not None:
        if not isinstance(described, Mapping):
            raise ValueError(f"{name} must be an object of settings, got {described!r}")
        names = [field.name for field in dataclasses.fields(value) if field.name in described]
        fields = {name: recall(getattr(value, name), described[name], name) for name in names}
        return dataclasses.replace(value, **fields)  # refuses values of another kind
    if callable(value):
        return value
    if isinstance(value, tuple) and isinstance(described, list) and len(value) == len(described):
        return tuple(recall(item, there, name) for item, there in zip(value, described, strict=True))
    if isinstance(value, (int, float)) and described in runs.NOT_FINITE:
        return float(described)
    return tuple(described) if isinstance(described, list) else described


def completed(method: Any, batch: Batch) -> Batch:
    """A batch on the host with what a method adds to it by its config's `prepare`, if it has one (KTO does)."""
    return method.prepare(batch) if hasattr(method, "prepare") else batch


def notice(method: Any, data: Data) -> str | None:
    """What a method has to say of the labels it trains on, if its config has `notice` (KTO does)."""
    if not (hasattr(method, "notice") and data.train and data.train[0].labels):
        return None
    return method.notice([bool(label) for example in data.train for label in example.labels or ()])


def _check(experiment: Experiment, mesh: jax.sharding.Mesh) -> None:
    """Settings that do not fit each other, or the machine.

    Raises:
        ValueError: naming them.
        ModuleNotFoundError: what one of them needs is not installed.
    """
    sharding.check_batch(mesh, experiment.batch_size, experiment.num_microbatches)
    optim.make_schedule(experiment.optimizer, experiment.loop.num_steps)
    if experiment.rollouts:
        online.check(experiment)
    run_models.check(experiment)
    if experiment.keep_best_by and not experiment.evaluation:
        raise ValueError(f"keep_best_by {experiment.keep_best_by[0]!r} needs an evaluation, but evaluation is None")
    if not 0 <= experiment.seed < 2**32:
        raise ValueError(f"seed must be >= 0 and below 2**32, got {experiment.seed}")
    if experiment.wandb_project:
        runs.import_wandb()


def how_to_go_on(name: str, folder: runs.RunFolder) -> str:
    return "Go on with: " + shlex.join(["python", "-m", f"experiments.{name}", "--resume", str(folder.path)])


def _made(model: Model, root: Path, say: Callable[[str], None]) -> Model:
    """The first process makes it, for all to load."""
    if jax.process_count() == 1:
        return model.made(root, say)
    return recall(Model(source=""), distributed.from_first(lambda: describe(model.made(root, say))))


def _report(folder: runs.RunFolder, say: Callable[[str], None]) -> None:
    distributed.from_first(lambda: say(f"report: {report.write(folder)}"))  # the others wait, to leave together


def _folder(make: Callable[[], runs.RunFolder]) -> runs.RunFolder:
    """The run's folder, made by the first process and seen by all."""
    if jax.process_count() == 1:
        return make()
    path = Path(distributed.from_first(lambda: str(make().path.absolute())))
    if distributed.any_of(not path.is_dir()):
        raise ValueError(f"{path}, the run's folder, is not there for every process; put --runs where all can see it")
    return runs.RunFolder(path) if distributed.is_first() else runs.Witness(path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parts:
    """What a run is put together from, all of it checked."""

    context: Context
    data: Data
    reference_model: run_models.Reference
    evaluate: Callable | None
    batches: train.Offline | online.Rollouts
    show_tokens: Callable[[dict], list[dict]] | None  # parameters to rows of token-level rewards
    dpo_logps: Callable[[Batch], Any] | None
    state_key: jax.Array


def _build(experiment: Experiment, mesh, resumed: Path | None, root: Path, say) -> _Parts:
    data_key, adapter_key, state_key = jax.random.split(jax.random.key(experiment.seed), 3)
    policy, params, tokenizer = run_models.load(experiment, mesh, adapter_key)
    stored = (resumed.parent.parent if resumed else root) / "reference_logps"  # for all runs: content is its address
    ref_params = run_models.reference_params(experiment, policy, params, tokenizer, mesh)
    is_start = experiment.reference_source is None
    reference_model = run_models.Reference(experiment.reference, policy, ref_params, stored, is_start=is_start)
    dpo_logps = run_models.dpo_logps(experiment, policy, params, tokenizer, mesh)
    context = Context(
        policy=policy,
        params=params,
        tokenizer=tokenizer,
        loss=experiment.loss,
        method=experiment.method,
        key=data_key,
        mesh=mesh,
        say=say,
        prepare=lambda batch: sharding.place_batch(reference_model.attach(completed(experiment.method, batch)), mesh),
        reference=experiment.reference,
    )
    # A run that goes on trains on what it began with.
    kept = resumed / PAIRS if resumed else None
    data = saved_data.load(kept) if kept and kept.exists() else experiment.data.build(context)
    say(data.about)
    if said := notice(experiment.method, data):
        say(said)
    loss = per_source(experiment.loss, data.sources) if data.sources else experiment.loss
    context = dataclasses.replace(context, loss=loss, buckets=Buckets.of(itertools.chain(data.train, data.held_out)))
    evaluate = experiment.evaluation.build(context, data) if experiment.evaluation else None
    if getattr(evaluate, "reads_reference", False):
        reference_model.keep(say)
    show_tokens = None
    if experiment.rollouts:
        batches = _rollouts(experiment, experiment.rollouts, context, data)
    else:
        check_room(itertools.chain(data.train, data.held_out), policy.config.max_positions)
        batches = _batches(experiment, context, data, reference_model)
        first = collate(data.train[: experiment.batch_size], context.buckets)
        prepared = batches.prepare(jax.tree.map(lambda x: x[sharding.own_rows(mesh, len(x))], first))
        reference_model.check_start(experiment, prepared)
        show_tokens = token_rewards.build(context, data, experiment.batch_size)
    return _Parts(
        context=context,
        data=data,
        reference_model=reference_model,
        evaluate=evaluate,
        batches=batches,
        show_tokens=show_tokens,
        dpo_logps=dpo_logps,
        state_key=state_key,
    )


def _rollouts(experiment: Experiment, config: online.Config, context: Context, data: Data) -> online.Rollouts:
    found = online.Rollouts(
        config,
        experiment.method,
        context.policy,
        context.tokenizer,
        data.train,
        batch_size=experiment.batch_size,
        seed=experiment.seed,
        weights=data.weights,
        scored_together=experiment.batch_size // experiment.num_microbatches,
    )
    distributed.agree("data", found.get_state())
    return found


def _batches(
    experiment: Experiment, context: Context, data: Data, reference_model: run_models.Reference
) -> train.Offline:
    """This host's shares of the training batches, and a function that completes one and places it on the mesh."""
    mesh = context.mesh
    index, count = sharding.share(mesh)
    num_groups = sharding.num_batch_parts(mesh) * experiment.num_microbatches
    adds = hasattr(experiment.method, "prepare")  # tokens, so batches are packed after it, as they come
    batches = Batches(
        data.train,
        batch_size=experiment.batch_size,
        seed=experiment.seed,
        buckets=context.buckets,
        num_groups=num_groups if experiment.pack and not adds else None,
        weights=data.weights,
        shard_index=index,
        shard_count=count,
    )
    distributed.agree("data", batches.get_state())

    def prepare(share: Batch) -> Batch:
        share = reference_model.attach(completed(experiment.method, share), mesh)
        if experiment.pack and share.packing is None:
            share = packing.pack(share, num_groups=num_groups // count, largest=distributed.largest)
        return sharding.place_share(share, mesh)

    return train.Offline(batches, prepare)


def _run(experiment: Experiment, parts: _Parts, folder: runs.RunFolder, saved: checkpoints.Checkpoints) -> None:
    context, data, reference_model = parts.context, parts.data, parts.reference_model
    policy, mesh = context.policy, context.mesh
    folder.summary({f"counts/{what}": count for what, count in data.counts.items()})
    if data.sampled and distributed.is_first() and not (folder.path / PAIRS).exists():
        saved_data.save(folder.path / PAIRS, data)
    schedule = optim.make_schedule(experiment.optimizer, experiment.loop.num_steps)
    optimizer = optim.make_optimizer(experiment.optimizer, schedule)
    batches, kind = parts.batches, experiment.reference
    if isinstance(batches, online.Rollouts):
        kind = batches.config.reference_in_updates(kind, experiment.method)
    update = step.make_update(
        context.loss,
        experiment.method,
        batches.policy if isinstance(batches, online.Rollouts) else policy,  # at the temperature of what it sampled
        optimizer,
        mesh,
        reference=kind,
        schedule=schedule,
        num_microbatches=experiment.num_microbatches,
    )
    if isinstance(batches, online.Rollouts):
        batches.start(
            reference_model.of,
            lambda batch: sharding.place_batch(batch, mesh),
            folder.sample,
            parts.dpo_logps,
            context.say,
        )
        update = batches.timed(update)
    state = train.train(
        experiment.loop,
        update=update,
        # Where nothing reads the start's own arrays any more, the state takes them over: weights are held once.
        state=step.init_state(
            policy,
            context.params,
            optimizer,
            parts.state_key,
            mesh,
            keep_params=(reference_model.is_kept and reference_model.is_start) or parts.dpo_logps is not None,
        ),
        ref_params=reference_model.params if kind == "online" else None,
        batches=batches,
        evaluate=_Evaluation(experiment, parts, folder) if parts.evaluate else None,
        trainable=lambda state: dataclasses.replace(state, params=policy.trainable(state.params)[0]),
        restored=lambda state, saved: dataclasses.replace(
            saved, params=joined(saved.params, policy.trainable(state.params)[1])
        ),
        folder=folder,
        checkpoints=saved,
        say=context.say,
    )
    rows = runs.read(folder.path).samples
    before, after = (
        [row for row in rows if row.get("kind") == "completion" and row["step"] == number]
        for number in (0, experiment.loop.num_steps)
    )
    if before and after:
        context.say(side_by_side(before, after))
    written = distributed.from_first(lambda: any(row.get("kind") == "token_rewards" for row in rows))
    if parts.show_tokens and not written:
        folder.sample(experiment.loop.num_steps, parts.show_tokens(state.params))
    folder.summary({"finished": True})


class _Evaluation:
    """The evaluation as the loop calls it: `start/...`, `eval/...` and samples go to the run's folder."""

    def __init__(self, experiment: Experiment, parts: _Parts, folder: runs.RunFolder):
        self.last_step, self.keep_best_by = experiment.loop.num_steps, experiment.keep_best_by
        self.parts, self.folder = parts, folder

    def __call__(self, state: step.State, number: int) -> dict[str, float]:
        """
        Raises:
            ValueError: `keep_best_by` names something else than the metrics that come back.
        """
        assert self.parts.evaluate is not None, "called without an evaluation"
        ref_params = self.parts.reference_model.start(state)
        result = self.parts.evaluate(state.params, ref_params, title=f"evaluating step {number}")
        metrics = {f"eval/{name}": value for name, value in result.metrics.items()}
        if self.keep_best_by and (metric := self.keep_best_by[0]) not in metrics:
            near = difflib.get_close_matches(metric, metrics, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"keep_best_by: there is no metric {metric!r}{hint} Known: {', '.join(metrics)}")
        self.folder.sample(number, [{"kind": "completion", **row} for row in result.samples])
        if number == 0:
            self.folder.summary({f"start/{name}": value for name, value in result.metrics.items()} | result.best_of)
        if number == self.last_step:
            self.folder.summary(metrics | result.words)
            for finding, sentence in result.words.items():
                self.parts.context.say(f"{finding}: {sentence}")
        return metrics
