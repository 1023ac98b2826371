"""The training loop: batches, update, evaluation, checkpoints, logs. Side effects are kept here."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pjpo import checks, distributed, progress
from pjpo.checkpoints import Checkpoints
from pjpo.metrics import Mean
from pjpo.runs import RunFolder
from pjpo.types import Batch

# What the progress bar shows, where there is such a number.
WATCHED = ("loss", "reward", "rewards/accuracies", "rewards/margins", "eval/reward_vader", "eval/accuracy")


class Stopped(Exception):
    """The run was interrupted; its state is saved, and the message says how to go on."""


class StoppedAtOnce(Stopped):
    """It was interrupted while it saved or computed; what it saved before is there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """When to do what; periods in updates, 0 for never."""

    num_steps: int
    log_every_steps: int = 1
    evaluate_every_steps: int = 0  # beside the first and the last
    checkpoint_every_steps: int = 0  # beside the last

    def __post_init__(self):
        checks.kinds(self)
        for name, least in (
            ("num_steps", 1),
            ("log_every_steps", 1),
            ("evaluate_every_steps", 0),
            ("checkpoint_every_steps", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Offline:
    """Batches that are the same whatever the policy has become, as `train` asks for them."""

    batches: Any  # an iterator of host-side batches with `get_state` and `set_state`
    # To what `update` takes: reference log-probs, packing, placement. A process's part becomes the whole batch here.
    prepare: Callable[[Batch], Batch]
    period: ClassVar = 1  # it can be saved after every update

    def next(self, state: Any) -> Batch:
        return self.prepare(next(self.batches))

    def get_state(self) -> dict[str, Any]:
        return self.batches.get_state()

    def set_state(self, position: dict[str, Any]) -> None:
        self.batches.set_state(position)


def train(
    loop: Loop,
    *,
    update: Callable,
    state: Any,
    ref_params: dict | None,
    batches: Any,
    evaluate: Callable[[Any, int], Mapping[str, float]] | None,
    trainable: Callable[[Any], Any],
    restored: Callable[[Any, Any], Any],
    folder: RunFolder,
    checkpoints: Checkpoints,
    say: Callable[[str], None] = print,
) -> Any:
    """Updates until `loop.num_steps` are done, from wherever the newest good checkpoint in the folder ends.

    Args:
        loop: periods.
        update: from `pjpo.step.make_update`; donates the state.
        state: the state at step 0; it is used up.
        ref_params: passed on to `update`.
        batches: where batches on the mesh come from, such as `Offline`: `next(state)` gives one. It is saved with
            `get_state` and `set_state`, and only after a multiple of `period` updates.
        evaluate: (state, step) to metrics, which are logged under their names; None evaluates nothing.
        trainable: state to what a checkpoint must hold.
        restored: (state, checkpointed) to the state to go on with.
        folder: where numbers are logged.
        checkpoints: where states are saved.
        say: where messages go.

    Returns:
        The state after the last update.

    Raises:
        Stopped: Ctrl-C or SIGTERM; everything is saved.
        FloatingPointError: the loss or the gradient became nan or infinite; earlier checkpoints stay.
        pjpo.checkpoints.SaveError: a checkpoint could not be written.
    """
    found = checkpoints.restore(trainable(state))
    step, num_tokens = 0, 0
    if found is not None:
        step, state = found.step, restored(state, found.state)
        batches.set_state(found.extra["batches"])
        num_tokens = found.extra["num_tokens"]
        folder.rewind(step)
        say(f"going on from step {step} of {loop.num_steps}")
    else:
        folder.rewind(-1)
        if evaluate is not None:
            folder.log(0, evaluate(state, 0))
    since, counted, pending, watched = step, num_tokens, [], {}
    started = time.perf_counter()

    def diverged(what: str) -> FloatingPointError:
        checkpoints.wait()
        good = checkpoints.steps()
        kept = f"step {good[-1]} in {checkpoints.folder}" if good else "none"
        place = f"in update {step}" if step <= since + 1 else f"between updates {since + 1} and {step}"
        return FloatingPointError(
            f"{what} {place}; last checkpoint: {kept}. A smaller learning_rate or max_grad_norm, or float32, usually "
            "helps; log_every_steps=1 tells the update"
        )

    def flush() -> None:
        nonlocal since, counted, started, num_tokens
        if not pending:
            return
        logged, counts = zip(*distributed.fetch(pending), strict=True)
        num_tokens += int(sum(counts))
        # What nothing was counted of has no mean, 0 as little as another.
        metrics = {name: float(mean.value()) for name, mean in _total(list(logged)).items() if mean.count}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics.get(name, 0.0)):
                raise diverged(f"{name} became {metrics[name]}")
        speed = (num_tokens - counted) / (time.perf_counter() - started)
        folder.log(step, metrics | {"num_tokens": num_tokens, "tokens_per_second": speed})
        show(metrics)
        since, counted, started = step, num_tokens, time.perf_counter()
        pending.clear()

    def show(metrics: Mapping[str, float]) -> None:
        watched.update({name: f"{metrics[name]:.3f}" for name in WATCHED if name in metrics})
        bar.set_postfix(watched, refresh=False)

    def save(metrics: Mapping[str, float] | None) -> None:
        if not _all_finite(trainable(state)):  # a finite loss and gradient can still make a step too large
            raise diverged("the parameters became nan or infinite")
        extra = {"batches": batches.get_state(), "num_tokens": num_tokens}
        checkpoints.save(step, trainable(state), extra, dict(metrics or {}))

    with (
        _Interruption("this update" if batches.period == 1 else "the updates of this rollout") as interruption,
        progress.bar("training", loop.num_steps, "step", initial=step, smoothing=0.1) as bar,
    ):
        stop = distributed.Call()
        while step < loop.num_steps:
            batch = batches.next(state)
            state, metrics = update(state, ref_params, batch)
            pending.append((metrics, _num_tokens(batch)))
            step += 1
            bar.update()
            last, evaluated = step == loop.num_steps, None
            if last or _due(step, loop.log_every_steps):
                flush()
            if evaluate is not None and (last or _due(step, loop.evaluate_every_steps)):
                flush()
                evaluated = evaluate(state, step)
                folder.log(step, evaluated)
                show(evaluated)
                started = time.perf_counter()
            stopping = stop(interruption.asked) and not last and _due(step, batches.period)
            if last or stopping or _due(step, loop.checkpoint_every_steps):
                flush()
                save(evaluated)
            if stopping:
                checkpoints.wait()
                raise Stopped(f"stopped after step {step} of {loop.num_steps}, which is saved in {checkpoints.folder}")
    checkpoints.wait()
    return state


def _due(step: int, period: int) -> bool:
    return period > 0 and step % period == 0


def _total(metrics: list[dict[str, Mean]]) -> dict[str, Mean]:
    return jax.tree.map(lambda *parts: np.sum(parts, axis=0, dtype=np.float64), *metrics)


def _all_finite(tree: Any) -> bool:
    """Leaf by leaf: few shapes to compile for, where a whole tree may have thousands of leaves."""
    numbers = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return all(jax.device_get([_finite(leaf) for leaf in numbers]))


_finite = jax.jit(lambda leaf: jnp.isfinite(leaf).all())
_num_tokens = jax.jit(lambda batch: batch.prompt_mask.sum() + batch.completion_mask.sum())


class _Interruption:
    """Ctrl-C and SIGTERM ask for a stop where it can be saved, evaluated; a second one does not wait."""

    def __init__(self, until: str):
        self.asked, self._until = False, until
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interruption:
        if threading.current_thread() is threading.main_thread():  # elsewhere no handler can be set
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        said = f"\nstopping after {self._until}; once more to stop at once\n"
        os.write(2, said.encode())  # print is not for signal handlers

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
