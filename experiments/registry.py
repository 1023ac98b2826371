"""The map from names to experiments, which is this folder itself, and their command line."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import dis
import importlib
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import tyro

import pjpo
from pjpo import distributed, experiment, runs, train
from pjpo.experiment import Experiment, Model

__all__ = ["Experiment", "Model", "about", "check_name", "commands", "get", "launch", "names", "override"]

FOLDER = Path(__file__).parent
SMOKE_PAIRS = str(FOLDER / "smoke_pairs.jsonl")  # made up, for --smoke of what reads the user's own pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    experiment: Annotated[Any, tyro.conf.arg(name="")]
    smoke: bool = False  # a minute's worth of it, to see that everything works
    resume: Path | None = None  # folder of a run to go on with
    runs: Path = Path("runs")  # where new runs get their folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    # One of several processes, as the cluster's scheduler says, or as is given:
    is_distributed: Annotated[bool, tyro.conf.arg(name="distributed")] = False
    processes: Annotated[distributed.Config, tyro.conf.arg(name="distributed")] = dataclasses.field(
        default_factory=distributed.Config
    )


AnyOptions = TypeVar("AnyOptions", bound=Options)


def names() -> list[str]:
    return sorted(p.stem for p in FOLDER.glob("*.py") if not p.stem.startswith("_") and p.stem != "registry")


def about(name: str) -> str:
    """The first sentence of a command's header."""
    file = FOLDER / f"{name}.py"
    source = file if file.exists() else FOLDER / name / "__main__.py"
    header = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return header.split("\n\n")[0].replace("\n", " ")


def commands() -> list[str]:
    """All that `python -m experiments.<name>` runs: the experiments, and what is beside them."""
    return [*names(), *(path.parent.name for path in FOLDER.glob("*/__main__.py"))]


def check_name(name: str, known: Sequence[str]) -> None:
    """
    Raises:
        ValueError: it is none of the known ones; names what is near, and all experiments.
    """
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown experiment {name!r}{hint} Known: {', '.join(names())}")


def get(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        ValueError: there is none.
    """
    check_name(name, names())
    return importlib.import_module(f"experiments.{name}").EXPERIMENT


def override(value: Any, changes: Mapping[str, Any]) -> Any:
    """A copy of a nested dataclass with fields replaced, by dotted names: {"loop.num_steps": 3}."""
    for name, new in changes.items():
        head, _, rest = name.partition(".")
        value = dataclasses.replace(value, **{head: override(getattr(value, head), {rest: new}) if rest else new})
    return value


def launch(value: Experiment, argv: list[str] | None = None) -> None:
    """The command line of an experiment: typed overrides, --smoke, --resume, --distributed, --help."""
    with told():
        name, options = parse(RunOptions, value, argv)
        given = options.is_distributed or options.processes != distributed.Config()
        with distributed.started(options.processes if given else None):
            experiment.run(name, options.experiment, root=options.runs, resume=options.resume)


def parse(kind: type[AnyOptions], value: Any, argv: list[str] | None) -> tuple[str, AnyOptions]:
    """Name and options of what Python was started with; overrides are of `value`, of its smoke, or of a run's folder.

    Raises:
        ValueError, FileNotFoundError: the folder to resume is no run's.
    """
    name, about = program()

    def read(default: Any) -> AnyOptions:
        return tyro.cli(
            kind,
            default=kind(experiment=default),
            args=argv,
            prog=f"python -m experiments.{name}",
            description=about,
            config=(tyro.conf.AvoidSubcommands,),
        )

    options = read(value)
    if options.resume:  # the settings are the folder's
        found = runs.read(options.resume)
        return name, read(_recalled(value, found) if found.experiment == name else value)
    return name, read(override(value, value.smoke)) if options.smoke else options


def _recalled(value: Any, run: runs.Run) -> Any:
    try:
        return experiment.recall(value, run.config)
    except ValueError as error:
        file = run.path / "config.json"
        raise ValueError(
            f"{file} holds settings of no run: {error}; put back what it held, or start a new run"
        ) from error


def program() -> tuple[str, str | None]:
    """Name and header of the experiment that Python was started with."""
    main = sys.modules["__main__"]
    name = main.__spec__.name.removeprefix("experiments.") if main.__spec__ else Path(main.__file__ or "").stem
    return name, main.__doc__


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Errors whose message is enough end the program with that message."""
    try:
        yield
    except train.StoppedAtOnce as stopped:
        leave(str(stopped))
    except train.Stopped as stopped:
        raise SystemExit(str(stopped) if distributed.is_first() else 1) from None
    except distributed.Lost as lost:
        raise SystemExit(str(lost)) from None
    except KeyboardInterrupt:
        again = shlex.join(["python", *sys.orig_argv[1:]])
        leave(f"stopped before there was anything to go on with, so nothing was kept. Start again with: {again}")
    except (ValueError, RuntimeError, FloatingPointError, ImportError, OSError) as error:
        if not is_told(error):
            raise
        raise SystemExit(str(error)) from None


def leave(message: str) -> NoReturn:
    """End the program as an interrupted one.

    JAX may still compute what was asked for, and an interpreter that is torn down meanwhile can crash: so it is not.
    """
    if distributed.is_first():
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def is_told(error: Exception) -> bool:
    """Whether the message is enough: the machine's fault, or what a `raise` of this project says. The rest are bugs."""
    last = error.__traceback__
    assert last is not None, "asked about an error that nobody raised"
    while last.tb_next:
        last = last.tb_next
    code = last.tb_frame.f_code
    ours = {Path(pjpo.__file__).parent, FOLDER} & set(Path(code.co_filename).parents)
    return isinstance(error, OSError) or (bool(ours) and dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS")
