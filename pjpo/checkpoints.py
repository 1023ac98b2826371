"""Checkpoints of a run: saved in the background, whole or not at all, the best and the last ones kept.

A checkpoint is a folder named by its step. It is written beside its place and renamed when every byte is there, so a
run killed while saving leaves a temporary folder and nothing else. The list of its files with their sizes and checksums
is part of it; a checkpoint that does not agree with its list is damaged, and is passed over in favour of an older one.

Several processes write one checkpoint together, into a folder that all of them see; any number of them restores it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pjpo import distributed

FILES = "files.json"  # inside a checkpoint: {path: [bytes, crc32]}
TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of a folder that is being written
DAMAGED = ".damaged"  # ends the name of a damaged checkpoint that was moved aside


class SaveError(OSError):
    """A checkpoint could not be written. The ones before it are untouched."""


class Restored(NamedTuple):
    step: int
    state: Any
    extra: dict[str, Any]


class Checkpoints:
    """The checkpoints in one folder. Use it in a `with`: a program must not end while a checkpoint is being written.

    Args:
        folder: made at the first save.
        keep_best_by: (metric, "max" or "min"); the checkpoint that is best by it is kept beside the last ones. A
            checkpoint saved without that metric is never the best.
        keep_last: how many of the newest stay. With 2, a damaged last checkpoint costs no more than one interval.
        say: where messages about ignored checkpoints go.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        keep_best_by: tuple[str, str] | None = None,
        *,
        keep_last: int = 2,
        say: Callable[[str], None] = print,
    ):
        if keep_best_by is not None and keep_best_by[1] not in ("max", "min"):
            raise ValueError(f"keep_best_by must be (metric, 'max') or (metric, 'min'), got {keep_best_by}")
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}")
        self.folder = Path(folder).absolute()
        self.keep_last, self.say = keep_last, say
        self._metric, self._mode = keep_best_by or (None, "max")
        self._manager: Any = (
            None  # Orbax's, made at the first save: importing it takes a second, and it tidies the folder
        )
        self._saving: int | None = None  # the step that is being written in the background
        self._damaged: list[int] = []  # the steps that `restore` passed over

    def steps(self) -> list[int]:
        """The steps of the finished checkpoints, damaged or not, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.is_dir() and path.name.isdecimal())

    def best(self) -> int | None:
        """The step of the best good checkpoint by `keep_best_by`; None if none was saved with that metric."""
        scores = {}
        for step in self.steps():
            path = self.folder / str(step) / "metrics" / "metrics"
            metrics = json.loads(path.read_text()) if path.exists() and not _damage(path.parent.parent) else {}
            if self._metric in metrics:
                scores[step] = self._score(metrics)
        return max(scores, key=lambda step: scores[step], default=None)

    def save(self, step: int, state: Any, extra: dict[str, Any] | None = None, metrics: dict | None = None) -> None:
        """Begins to save; training may go on at once, and may donate `state`. A step that is saved already is left.

        Args:
            step: names the checkpoint.
            state: a pytree of arrays, typed PRNG keys and Python numbers.
            extra: what else the run needs, JSON-able; the position of the data, for example.
            metrics: numbers of this step; `keep_best_by` looks here.

        Raises:
            SaveError: this checkpoint could not be begun, or the one before it could not be finished.
        """
        import orbax.checkpoint as ocp

        self.wait()
        self._move_damaged()
        if distributed.from_first(lambda: step in self.steps()):
            return
        leaves = _by_name(state)
        for name, leaf in leaves.items():
            if not hasattr(leaf, "dtype") and not isinstance(leaf, (bool, int, float)):
                raise ValueError(f"state.{name} is {leaf!r}; a checkpoint holds arrays, PRNG keys and numbers")
        about = {
            "extra": extra or {},
            "leaves": {name: _spec(leaf) for name, leaf in leaves.items()},
            "keys": {name: str(jax.random.key_impl(leaf)) for name, leaf in leaves.items() if _is_key(leaf)},
        }
        about = json.loads(json.dumps(about))  # refuses what is not JSON here and now, and is a copy
        arrays = {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in leaves.items()}
        score = {self._metric: float(metrics[self._metric])} if metrics and self._metric in metrics else None
        items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about))
        self._saving = step
        try:
            if self._manager is None:
                self._manager = self._make_manager()
            self._manager.save(step, args=items, metrics=score, force=True)
        except Exception as error:
            self._fail(error)

    def wait(self) -> None:
        """Until the checkpoint that is being written is whole and in its place.

        Raises:
            SaveError: it could not be finished.
        """
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._fail(error)
        self._saving = None

    def close(self) -> None:
        """Waits, then lets Orbax's threads go."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def restore(self, like: Any, step: int | None = None, *, inside: str = "") -> Restored | None:
        """The newest good checkpoint, or that of `step`; None where no checkpoint was ever finished.

        Args:
            like: a pytree like the saved state, of arrays or `jax.ShapeDtypeStruct`s. The restored arrays lie where
                these lie: their shardings are taken, whatever mesh the checkpoint was saved on.
            step: of one certain checkpoint, such as `best()`.
            inside: `like` is only this part of the state, such as "params"; nothing else is read.

        Raises:
            ValueError: every checkpoint is damaged (or the one asked for), or a good one does not fit `like`.
        """
        self.wait()
        found, self._damaged = distributed.from_first(lambda: self._newest_good(step))
        return None if found is None else self._read(found, like, inside)

    def _newest_good(self, step: int | None) -> tuple[int | None, list[int]]:
        """The step to restore, and the steps that are damaged."""
        steps, damaged = self.steps() if step is None else [step], set(self._damaged)
        for path in sorted(self.folder.glob(f"*{TEMPORARY}*")):
            self.say(f"{path}: a half-written checkpoint, ignored; the run was stopped while it was being saved")
        problems = {}
        for found in reversed(steps):
            problem = _damage(self.folder / str(found))
            if problem is None:
                if problems:
                    self.say(f"the checkpoint of step {found} is used instead")
                return found, sorted(damaged)
            problems[found] = problem
            damaged.add(found)
            self.say(f"{self.folder / str(found)}: a damaged checkpoint, ignored: {problem}")
        if problems:
            listed = "; ".join(f"step {step}: {problem}" for step, problem in problems.items())
            if step is not None:
                others = ", ".join(str(other) for other in self.steps() if other != step) or "none"
                raise ValueError(f"{self.folder} has no good checkpoint of {listed}; others are: {others}")
            raise ValueError(f"no good checkpoint in {self.folder}: {listed}. Remove that folder to start anew")
        return None, sorted(damaged)

    def _read(self, step: int, like: Any, inside: str) -> Restored:
        """A checkpoint whose files are in order."""
        import orbax.checkpoint as ocp

        path = self.folder / str(step)
        about = json.loads((path / "about" / "metadata").read_text())
        prefix = f"{inside}." if inside else ""
        leaves = {f"{prefix}{name}": leaf for name, leaf in _by_name(like).items()}
        there = {name: spec for name, spec in about["leaves"].items() if name.startswith(prefix)}
        differences = [
            f"{name} is {there.get(name, 'missing')} there and {wanted} here"
            for name in sorted(there.keys() | leaves.keys())
            if (wanted := _spec(leaves[name]) if name in leaves else "missing") != there.get(name, "missing")
        ]
        if differences:
            more = f", and {len(differences) - 5} more" if len(differences) > 5 else ""
            raise ValueError(
                f"the checkpoint {path} holds another state: {'; '.join(differences[:5])}{more}. "
                "Restore it with the settings it was saved with"
            )
        abstract = {name: _abstract(leaf) for name, leaf in leaves.items()}
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            if inside:
                how = ocp.checkpoint_utils.construct_restore_args(abstract)
                state = ocp.args.PyTreeRestore(abstract, restore_args=how, partial_restore=True)
            else:
                state = ocp.args.StandardRestore(abstract)
            arrays = checkpointer.restore(path, args=ocp.args.Composite(state=state)).state
        for name, impl in about["keys"].items():
            if name in leaves:
                arrays[name] = jax.random.wrap_key_data(arrays[name], impl=impl)
        state = jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in leaves])
        return Restored(step, state, about["extra"])

    def _move_damaged(self) -> None:
        """Out of the way of new checkpoints of the same steps."""
        if not self._damaged:
            return
        self.close()  # the next manager looks at the folder anew

        def move() -> None:
            for step in self._damaged:
                path = self.folder / str(step)
                shutil.rmtree(path.with_suffix(DAMAGED), ignore_errors=True)
                path.rename(path.with_suffix(DAMAGED))

        distributed.from_first(move)
        self._damaged = []

    def _make_manager(self):
        import orbax.checkpoint as ocp

        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_not_from_orbax)
        policies = ocp.checkpoint_managers
        keep = [policies.LatestN(self.keep_last)]
        if self._metric:
            keep.append(policies.BestN(get_metric_fn=self._score, n=1, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            best_fn=self._score if self._metric else None,  # else Orbax stores no metrics
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._list_files,
                create_directories_asynchronously=False,  # a folder that cannot be made is told at once
            ),
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def _score(self, metrics: dict[Any, float] | None) -> float:
        """Higher is better."""
        value = (metrics or {}).get(self._metric, math.nan)
        return -math.inf if math.isnan(value) else value if self._mode == "max" else -value

    def _list_files(self) -> None:
        """Writes the list of files into the finished temporary folder, just before Orbax renames it."""
        (path,) = self.folder.glob(f"{self._saving}{TEMPORARY}*")
        files = {str(file.relative_to(path)): _sum(file) for file in sorted(path.glob("*/**/*")) if file.is_file()}
        (path / FILES).write_text(json.dumps(files))

    def _fail(self, error: Exception) -> None:
        """Gives back the space of the checkpoint that could not be saved, and says what to do."""
        step, self._saving, self._manager = self._saving, None, None  # Orbax's manager would report the error again
        for path in self.folder.glob(f"{step}{TEMPORARY}*") if distributed.is_first() else ():
            shutil.rmtree(path, ignore_errors=True)
        place = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        free = shutil.disk_usage(place).free / 2**20
        good = next(
            (f"{self.folder / str(s)}" for s in reversed(self.steps()) if not _damage(self.folder / str(s))), None
        )
        reason = str(error).strip().split("\n")[0].split(" [")[0][-200:] or type(error).__name__  # its end says why
        raise SaveError(
            f"the checkpoint of step {step} could not be saved in {self.folder}; the disk may be full "
            f"({free:.0f} MB free now). Last good checkpoint: {good or 'none'}. Make room and resume the run. "
            f"The cause: {reason}"
        ) from error


def _not_from_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs a failed save many times over, with pages of detail; `SaveError` says it once."""
    return "orbax" not in record.pathname and "orbax" not in record.getMessage()


def _by_name(tree: Any) -> dict[str, Any]:
    """Leaves by a readable name, in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two leaves of the state have one name"
    return named


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _spec(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else type(leaf).__name__


def _abstract(leaf: Any) -> Any:
    """What Orbax restores in the place of `leaf`."""
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return leaf  # NumPy arrays and Python numbers come back as such
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def _damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if they are as they were written."""
    try:
        files = json.loads((path / FILES).read_text())
        if missing := {"state", "about"} - {name.partition("/")[0] for name in files}:
            return f"{FILES} names nothing of {', '.join(sorted(missing))}"
        for name, [size, checksum] in files.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if _sum(path / name) != [size, checksum]:
                return (
                    f"{name} has changed since it was written ({size} bytes then, {(path / name).stat().st_size} now)"
                )
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{FILES} cannot be read ({error})"
    return None


def _sum(path: Path) -> list[int]:
    """Size in bytes and crc32."""
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]
