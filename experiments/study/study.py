"""A study as a value, the command line of it, and what its run leaves in its folder.

    config.json, samples.jsonl (each seed's numbers, rollouts and their updates), plot.png, result.md, summary.json,
    report.html

A study is many short trainings, and claims about their numbers that hold or do not. Numbers are named
"<row>: <column>", after their places in the table of `result.md`.
"""

from __future__ import annotations

import abc
import dataclasses
import datetime
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from experiments import registry
from experiments.claims.claim import FEWEST_SEEDS, Above, Numbers, Within, interval, seeds
from experiments.study import bench
from pjpo import checks, optim, progress, report, runs, train
from pjpo.experiment import describe, how_to_go_on

Record = Callable[[str, Iterable[Mapping[str, Any]]], None]  # (training, rows): keeps them in samples.jsonl
Claims = Mapping[str, tuple[Above | Within, ...]]  # what is claimed, and the checks that must all hold


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(abc.ABC):
    """What all studies have; a subclass adds its settings, `measure`, `claims` and `panels`."""

    paper: ClassVar[str]
    setting: ClassVar[str]  # what is run, a sentence
    optional: ClassVar[tuple[str, ...]] = ()  # fields that may be empty
    start: Any  # what trainings begin from; a config whose `load()` gives what `measure` takes
    training: bench.Training
    num_seeds: int = FEWEST_SEEDS  # at least two; a study that goes on may have more
    smoke: tyro.conf.Suppress[Mapping[str, Any]] = dataclasses.field(default_factory=dict)  # overrides for --smoke

    def __post_init__(self):
        checks.kinds(self)
        if self.num_seeds < 2:
            raise ValueError(f"study: num_seeds must be >= 2 for an interval, got {self.num_seeds}")
        for name, value in vars(self).items():
            if name.startswith("num_") and value < 1:
                raise ValueError(f"study: {name} must be >= 1, got {value}")
            if value == () and name not in self.optional:
                raise ValueError(f"study: {name} must name one value at least")

    @abc.abstractmethod
    def measure(self, start: Any, seed: int, record: Record) -> Numbers:
        """The numbers of one seed, by name; what else is worth keeping of a training goes to `record`."""

    @abc.abstractmethod
    def claims(self) -> Claims:
        """What is judged over all seeds."""

    @abc.abstractmethod
    def panels(self) -> Sequence[Panel]:
        """What is drawn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """Curves of one plot: label -> points (x, name of the number)."""

    title: str
    xlabel: str
    ylabel: str
    curves: Mapping[str, Sequence[tuple[Any, str]]]


def launch(value: Study, argv: list[str] | None = None) -> None:
    """The command line of a study: typed overrides, --smoke, --resume, --help."""
    with registry.told():
        name, options = registry.parse(registry.Options, value, argv)
        run(name, options.experiment, root=options.runs, resume=options.resume)


def run(name: str, study: Study, *, root: Path | str = "runs", resume: Path | None = None, say=progress.say) -> Path:
    """All seeds, one after the other, then the verdicts; returns the folder.

    Raises:
        ValueError: the folder to resume holds something else, or a new one cannot be written.
        train.Stopped: interrupted; the seeds that are done are kept.
    """
    config = describe(study)
    for part in vars(study).values():
        if isinstance(part, bench.Training):
            optim.make_schedule(part.optimizer, part.num_steps)  # refuses a warm-up that outlasts it
    if not resume:
        runs.check_root(root)
    begin = study.start.load()  # first: a model that cannot be loaded leaves no folder behind
    folder = runs.open(resume, name, config, may_change=["num_seeds"]) if resume else runs.create(root, name, config)
    say(f"run: {folder.path}")
    done = {row["step"]: row for row in runs.read(folder.path).samples if row["kind"] == "seed"}
    try:
        with folder, progress.bar(name, study.num_seeds, "seed") as bar:
            for seed in range(study.num_seeds):
                if seed not in done:
                    began, kept = time.perf_counter(), []
                    numbers = dict(study.measure(begin, seed, functools.partial(_keep, kept)))
                    done[seed] = {"kind": "seed", "numbers": numbers, "minutes": (time.perf_counter() - began) / 60}
                    folder.sample(seed, [*kept, done[seed]])  # at once: a seed is there whole, or not at all
                bar.update()
    except ValueError:
        if not resume:
            runs.discard(folder)
        raise
    except KeyboardInterrupt:
        about = "stopped at once; the seed under way will be repeated"
        raise train.StoppedAtOnce(f"{about}\n{how_to_go_on(name, folder)}") from None
    rows = [done[seed] for seed in range(study.num_seeds)]
    numbers = [row["numbers"] for row in rows]
    verdicts = judged(study, numbers)
    draw(study.panels(), numbers).savefig(folder.path / "plot.png", dpi=144)
    text = markdown(name, study, numbers, verdicts, sum(row["minutes"] for row in rows))
    runs.write_whole(folder.path / "result.md", text)
    means = {f"{key}": "{:.4g} ± {:.1g}".format(*interval(values(numbers, key))) for key in numbers[0]}
    folder.summary({text: f"{word}: {shown}" for text, word, shown in verdicts} | means | {"finished": True})
    for verdict in verdicts:
        say("{}\n    {}: {}".format(*verdict))
    say(f"report: {report.write(folder)}")
    return folder.path


def _keep(kept: list[dict[str, Any]], training: str, rows: Iterable[Mapping[str, Any]]) -> None:
    kept.extend({"training": training, **row} for row in rows)


def values(numbers: Sequence[Numbers], name: str) -> np.ndarray:
    return np.array([row[name] for row in numbers])


def judged(study: Study, numbers: Sequence[Numbers]) -> list[tuple[str, str, str]]:
    """(claim, "holds" or "does not hold", the numbers that say so)."""
    found = []
    for text, parts in study.claims().items():
        each = [part.judge(numbers) for part in parts]
        shown = "; ".join(shown if held else f"NOT {shown}" for held, shown in each)
        found.append((text, "holds" if all(held for held, _ in each) else "does not hold", shown))
    return found


def markdown(name: str, study: Study, numbers: Sequence[Numbers], verdicts, minutes: float) -> str:
    """A section for docs/claims.md."""
    places = [key.rsplit(": ", 1) for key in numbers[0]]
    rows, columns = (list(dict.fromkeys(part)) for part in zip(*places, strict=True))

    def cell(row: str, column: str) -> str:
        key = f"{row}: {column}"
        return "{:.3g} ± {:.1g}".format(*interval(values(numbers, key))) if key in numbers[0] else ""

    lines = [
        f"### {study.paper}: `{name}`",
        "",
        f"{study.setting} {seeds(len(numbers))}, {datetime.date.today()}, JAX {jax.__version__}, "
        f"{jax.default_backend().upper()}, {minutes:.1f} minutes.",
        "",
        *(f"- {text}: **{word}**. {shown}" for text, word, shown in verdicts),
        "",
        f"![{name}](studies/{name}.png)",
        "",
        f"| | {' | '.join(columns)} |",
        f"| --- |{' --- |' * len(columns)}",
        *(f"| {row} | {' | '.join(cell(row, column) for column in columns)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def draw(panels: Sequence[Panel], numbers: Sequence[Numbers]) -> Figure:
    """Means over seeds with 95 % intervals, side by side where curves share their x; the legend stands above."""
    with matplotlib.rc_context(report.STYLE):
        figure = Figure(figsize=(4.4 * len(panels), 4.0), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            middle = (len(panel.curves) - 1) / 2
            for place, (label, points) in enumerate(panel.curves.items()):
                means, halves = zip(*(interval(values(numbers, name)) for _, name in points), strict=True)
                style = {"color": report.SERIES[place % len(report.SERIES)], "label": label, "elinewidth": 0.8}
                bars = axes.errorbar([x for x, _ in points], means, halves, fmt="o-", **style)
                aside = ScaledTranslation((place - middle) / 30, 0, figure.dpi_scale_trans)  # inches
                for artist in bars.get_children():
                    artist.set_transform(artist.get_transform() + aside)
            axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
            axes.set_title(panel.title, pad=6 + 14 * -(-len(panel.curves) // 2))  # points: above the legend's rows
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
            if any(isinstance(x, str) for points in panel.curves.values() for x, _ in points):
                axes.tick_params(axis="x", rotation=15)
    return figure
