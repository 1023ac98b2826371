"""A run's folder, runs/<experiment>/<id>/: what is written while it trains, and the reader for looking at it later.

    config.json      experiment, effective config, versions, commit, devices
    metrics.jsonl    {"step": 10, "loss": 0.69, ...}; a step may have several lines
    samples.jsonl    {"step": 10, "kind": "completion", "prompt": ..., "completion": ..., ...}
    summary.json     final numbers, flat: start/..., eval/..., counts/..., and "finished" where the run did
    events.out.*     the metrics once more, for TensorBoard
    checkpoints/     see pjpo/checkpoints.py
    report.html      see pjpo/report.py

Everything is JSON that any reader takes. JSON has no nan and no infinity, so these are written as the strings "NaN",
"Infinity" and "-Infinity", which `float` reads; `read` gives them back as numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pjpo import outputs

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
NOT_FINITE = ("NaN", "Infinity", "-Infinity")


def check_root(root: str | os.PathLike) -> None:
    """Before anything is computed for a run whose folder could not be made.

    Raises:
        ValueError: see `pjpo.outputs.check_folder`.
    """
    outputs.check_folder(root, "run", "choose another folder with --runs")


def create(root: str | os.PathLike, experiment: str, config: Mapping[str, Any]) -> RunFolder:
    """A new folder root/<experiment>/<id>, where the id is the time and a short hash of the config.

    Args:
        root: usually "runs".
        experiment: its name.
        config: the whole effective config; nested, JSON-able.
    """
    config = _plain(config)
    digest = hashlib.sha256(json.dumps([experiment, config], sort_keys=True).encode()).hexdigest()[:6]
    parent = Path(root) / experiment
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        path = parent / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{digest}"
        try:
            path.mkdir()
            break
        except FileExistsError:
            time.sleep(0.1)  # the same experiment, started twice within a second
    folder = RunFolder(path)
    folder._write_config(experiment, config)
    return folder


def open(
    path: str | os.PathLike, experiment: str, config: Mapping[str, Any], *, may_change: Iterable[str] = ()
) -> RunFolder:
    """An existing folder, to go on with its run.

    Args:
        path: of the run's folder.
        experiment, config: as they are now; they must be what the folder holds.
        may_change: names in the config that may differ, such as "num_steps"; of a nested value, "data.path". The folder
            then remembers the new ones.

    Raises:
        FileNotFoundError: there is no run at `path`.
        ValueError: it holds another experiment or another config; all differences are named.
    """
    stored = _read_config(Path(path))
    if stored["experiment"] != experiment:
        raise ValueError(
            f"{path} holds a run of {stored['experiment']!r}, not of {experiment!r}; "
            f"resume it with python -m experiments.{stored['experiment']}, or start a new run"
        )
    there, here = flat(stored["config"]), flat(_plain(config))
    different = [
        name for name in sorted(there.keys() | here.keys()) if there.get(name, "absent") != here.get(name, "absent")
    ]
    refused = [name for name in different if not any(f"{name}.".startswith(f"{free}.") for free in may_change)]
    if refused:
        listed = "; ".join(
            f"{name}: {there.get(name, 'absent')!r} there, {here.get(name, 'absent')!r} here" for name in refused
        )
        raise ValueError(
            f"{path} holds a run with another config ({listed}); resume it with its own, or start a new run"
        )
    folder = RunFolder(Path(path))
    if different:
        folder._write_config(experiment, _plain(config))
    for name in ("metrics.jsonl", "samples.jsonl"):
        folder._forget(name, after=math.inf)  # only the half line that a killed run may have left
    return folder


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The writing side of a run; stands for its path. One process writes to it."""

    path: Path
    sink: Callable[[int, dict[str, float]], object] | None = None  # (step, metrics): where else metrics go

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Numbers of one step, under the names they have; to metrics.jsonl and to TensorBoard."""
        numbers = {name: float(value) for name, value in metrics.items()}
        self._append("metrics.jsonl", [{"step": int(step)} | numbers])
        with _naming(self.path / "events.out.*"):
            self._events.write(step, numbers)
        if self.sink is not None:
            self.sink(int(step), numbers)

    def sample(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Texts of one step, any JSON-able fields; `pjpo.report` shows the fields named at the top of this file."""
        self._append("samples.jsonl", [{"step": int(step)} | dict(row) for row in rows])

    def summary(self, numbers: Mapping[str, Any]) -> None:
        """Adds to the final numbers, or replaces those of the same names."""
        path = self.path / "summary.json"
        known = _read_json(path) if path.exists() else {}
        write_whole(path, json.dumps(known | _plain(numbers), indent=1))

    def rewind(self, step: int) -> None:
        """Forgets metrics and samples after `step`, and that the run finished, to go on from the checkpoint of then.

        Raises:
            ValueError: a finished run would be forgotten whole.
        """
        known = _read_summary(self.path)
        if known.pop("finished", False):
            if step < 0:
                raise ValueError(
                    f"{self.path} finished, but has no checkpoint to go on from; its numbers stay. Start a new run"
                )
            write_whole(self.path / "summary.json", json.dumps(_plain(known), indent=1))
        for name in ("metrics.jsonl", "samples.jsonl"):
            self._forget(name, after=step)
        self._events.rewind(step)

    def close(self) -> None:
        if "_events" in vars(self):
            with _naming(self.path / "events.out.*"):
                vars(self).pop("_events").close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.close()
        except OSError:
            if error is None:  # else the first error says more
                raise

    @functools.cached_property
    def _events(self) -> _Events:
        return _Events(self.path)

    def _write_config(self, experiment: str, config: Any) -> None:
        about = {"experiment": experiment, "config": config, **_surroundings()}
        write_whole(self.path / "config.json", json.dumps(about, indent=1))

    def _append(self, name: str, rows: list[dict]) -> None:
        path = self.path / name
        with _naming(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(map(_line, rows))

    def _forget(self, name: str, after: int | float) -> None:
        if (self.path / name).exists():
            write_whole(
                self.path / name, "".join(_line(row) for row in _read_lines(self.path / name) if row["step"] <= after)
            )


class Witness(RunFolder):
    """A run's folder in a process that does not write to it, as another one does."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None: ...
    def sample(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None: ...
    def summary(self, numbers: Mapping[str, Any]) -> None: ...
    def rewind(self, step: int) -> None: ...


class _Events:
    """TensorBoard's file. The `SummaryWriter` of tensorboardX has a thread, without which (a full disk) a run hangs."""

    def __init__(self, folder: Path):
        from tensorboardX.event_file_writer import EventsWriter

        self._writer = EventsWriter(
            str(folder / "events"), f".{time.time_ns()}"
        )  # a second run of a second: a new file
        self._flushed = time.monotonic()

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        from tensorboardX.proto import event_pb2, summary_pb2

        values = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        summary = summary_pb2.Summary(value=values)
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > 10:  # seconds; it waits for the disk
            self._writer.flush()
            self._flushed = time.monotonic()

    def rewind(self, step: int) -> None:
        """TensorBoard drops what it read after `step` when it meets this mark."""
        from tensorboardX.proto import event_pb2

        mark = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=mark))

    def close(self) -> None:
        self._writer.close()


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as it lies on disk, finished or not."""

    path: Path
    experiment: str
    config: dict[str, Any]
    about: dict[str, Any]  # versions, commit, devices, when it was created
    metrics: dict[str, tuple[np.ndarray, np.ndarray]]  # name -> (steps [S] int64, values [S] float64), steps ascending
    samples: list[dict[str, Any]]
    summary: dict[str, Any]


def wandb_sink(project: str, folder: RunFolder, config: Mapping[str, Any]) -> Callable[[int, dict[str, float]], None]:
    """A sink that logs to Weights & Biases, one run there for each folder here, gone on with when the folder is.

    Raises:
        ModuleNotFoundError: the extra is not installed.
    """
    wandb, name = import_wandb(), folder.path.name
    run = wandb.init(project=project, id=name, name=name, config=_plain(config), dir=str(folder.path), resume="allow")
    return lambda step, numbers: run.log(numbers, step=step)


def import_wandb() -> Any:
    """
    Raises:
        ModuleNotFoundError: the extra is not installed.
    """
    try:
        import wandb  # pyright: ignore[reportMissingImports]  # an extra
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("wandb_project is set, but wandb is missing: pip install -e '.[wandb]'") from error
    return wandb


def discard(folder: RunFolder) -> None:
    """Removes a new run's folder if nothing was measured: settings that only the first measurement could refuse."""
    if not any((folder.path / name).exists() for name in ("metrics.jsonl", "samples.jsonl")):
        shutil.rmtree(folder.path)
        with contextlib.suppress(OSError):  # other runs of the experiment
            folder.path.parent.rmdir()


def read(path: str | os.PathLike) -> Run:
    """Reads a run's folder.

    Raises:
        FileNotFoundError: there is no run at `path`.
        ValueError: a file of it cannot be read; the file and the line are named.
    """
    path = Path(path)
    about = _read_config(path)
    columns: dict[str, dict[int, float]] = {}
    for number, row in enumerate(_read_lines(path / "metrics.jsonl"), 1):
        step = row.pop("step")
        for name, value in row.items():
            try:
                columns.setdefault(name, {})[step] = float(value)
            except (TypeError, ValueError):
                place = f"{path / 'metrics.jsonl'}, line {number}, step {step}"
                raise ValueError(f"{place}: {name} is no number but {value!r}; remove that line") from None
    metrics = {}
    for name, values in columns.items():
        steps = sorted(values)
        metrics[name] = np.array(steps, np.int64), np.array([values[step] for step in steps], np.float64)
    return Run(
        path=path,
        experiment=about.pop("experiment"),
        config=about.pop("config"),
        about=about,
        metrics=metrics,
        samples=list(_read_lines(path / "samples.jsonl")),
        summary=_read_summary(path),
    )


def newest(root: str | os.PathLike, experiment: str) -> Path:
    """The folder of the experiment's newest run that finished.

    Raises:
        FileNotFoundError: it has none there; names the newest that did not finish.
    """
    found = sorted(path.parent for path in Path(root).glob(f"{experiment}/*/config.json"))
    finished = [path for path in found if _read_summary(path).get("finished")]
    if finished:
        return finished[-1]
    if found:
        raise FileNotFoundError(
            f"no run of {experiment!r} in {Path(root).absolute()} has finished; the newest, {found[-1]}, can be read "
            f"as it is, or goes on with python -m experiments.{experiment} --resume {found[-1]}"
        )
    raise FileNotFoundError(
        f"no run of {experiment!r} in {Path(root).absolute()}; make one with python -m experiments.{experiment}"
    )


def _read_summary(path: Path) -> dict[str, Any]:
    file = path / "summary.json"
    numbers = _read_json(file) if file.exists() else {}
    return {name: float(value) if value in NOT_FINITE else value for name, value in numbers.items()}


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.exists():
        found = (run.parent for depth in ("*", "*/*") for run in path.glob(f"{depth}/config.json"))
        below = sorted(map(str, found), reverse=True)[:3]
        hint = f"; below it are: {', '.join(below)}" if below else ""
        raise FileNotFoundError(f"{path} is not the folder of a run: it has no config.json{hint}")
    about = _read_json(file)
    if not (isinstance(about.get("experiment"), str) and isinstance(about.get("config"), dict)):
        raise ValueError(f"{path} is not the folder of a run: its config.json names no experiment with its config")
    return about


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object; it is no file of a run")
    return content


def _read_lines(path: Path) -> Iterable[dict[str, Any]]:
    """The rows of a file; half a line at its end belongs to a run that is writing, or was killed."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}; remove that line") from error
            if not isinstance(row, dict) or "step" not in row:
                raise ValueError(f"{path}, line {number} is no object with a step; remove that line")
            yield row


def _line(row: dict[str, Any]) -> str:
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(beside, path)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A full disk does not say which file it was."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _plain(value: Any) -> Any:
    """As JSON gives it back: lists for tuples, numbers for NumPy's and JAX's, strings for what is not finite.

    Raises:
        ValueError: there is something else in it.
    """
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # arrays and NumPy's scalars
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise ValueError(f"a run's files hold numbers, texts, lists and dicts; got {value!r} ({type(value).__name__})")


def flat(config: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted names."""
    if not isinstance(config, dict) or (name and not config):
        return {name: config}
    return {
        key: leaf for part in config for key, leaf in flat(config[part], f"{name}.{part}" if name else part).items()
    }


def code() -> dict[str, str | None]:
    """What runs: versions of packages, and a digest of this project's own files."""
    digest, package = hashlib.sha256(), Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)} {path.stat().st_size};".encode() + path.read_bytes())
    return _versions() | {"pjpo": digest.hexdigest()[:16]}


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _surroundings() -> dict[str, Any]:
    """What a number may depend on besides the config."""
    import jax

    devices = [device.device_kind for device in jax.devices()]
    return {
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": _versions(),
        "commit": _commit(),
        "devices": {kind: devices.count(kind) for kind in sorted(set(devices))},
        "processes": jax.process_count(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def _commit() -> str | None:
    """Of this code: the hash, with "-dirty" where files differ from it; None outside a checkout."""
    here = Path(__file__)
    try:
        subprocess.run(
            ["git", "ls-files", "--error-unmatch", here.name], cwd=here.parent, check=True, capture_output=True
        )
        described = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        return subprocess.run(described, cwd=here.parent, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
