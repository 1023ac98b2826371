"""A claim with what is measured for it and what would be holding, and the table of all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import stats

Numbers = Mapping[str, float]
FEWEST_SEEDS = 5  # that a published verdict may rest on


@dataclasses.dataclass(frozen=True)
class Above:
    """`higher` exceeds `lower` by more than `by`: the 95 % interval of the paired differences over seeds lies above."""

    higher: str
    lower: str
    by: float = 0.0

    def judge(self, runs: Sequence[Numbers]) -> tuple[bool, str]:
        differences = np.array([run[self.higher] - run[self.lower] for run in runs])
        mean, half = interval(differences)
        shown = f"{self.higher} - {self.lower} = {mean:.3g} [{mean - half:.3g}, {mean + half:.3g}]"
        return bool(mean - half > self.by), shown


@dataclasses.dataclass(frozen=True)
class Within:
    """A number lies between two bounds at every seed."""

    name: str
    low: float
    high: float

    def judge(self, runs: Sequence[Numbers]) -> tuple[bool, str]:
        values = np.array([run[self.name] for run in runs])
        held = bool(np.all((values >= self.low) & (values <= self.high)))
        return held, f"{self.name} in [{values.min():.3g}, {values.max():.3g}], asked [{self.low:.3g}, {self.high:.3g}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    paper: str
    text: str
    setting: str  # what is run
    measure: Callable[[int], Numbers]  # by seed
    checks: tuple[Above | Within, ...]  # all must hold


@dataclasses.dataclass(frozen=True)
class Verdict:
    claim: Claim
    runs: list[Numbers]  # by seed

    @property
    def judged(self) -> list[tuple[bool, str]]:
        return [check.judge(self.runs) for check in self.claim.checks]

    @property
    def holds(self) -> bool:
        return all(held for held, _ in self.judged)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half the 95 % t-interval of it."""
    error = values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * error)


def seeds(number: int) -> str:
    """How many there are, with a mark on too few."""
    return f"{number} seeds" + (f" (**fewer than {FEWEST_SEEDS}**)" if number < FEWEST_SEEDS else "")


def run(claim: Claim, num_seeds: int = FEWEST_SEEDS) -> Verdict:
    """
    Raises:
        ValueError: fewer than two seeds, which have no interval.
    """
    if num_seeds < 2:
        raise ValueError(f"claims: num_seeds must be >= 2 for an interval, got {num_seeds}")
    return Verdict(claim, [claim.measure(seed) for seed in range(num_seeds)])


def table(verdicts: Sequence[Verdict]) -> str:
    """Markdown: paper, claim, what was run, numbers, whether it holds."""
    lines = ["| paper | claim | what was run | numbers | holds |", "| --- | --- | --- | --- | --- |"]
    for verdict in verdicts:
        claim = verdict.claim
        means = {name: interval(np.array([run[name] for run in verdict.runs])) for name in verdict.runs[0]}
        numbers = "; ".join(f"{name} {mean:.4g} ± {half:.1g}" for name, (mean, half) in means.items())
        judged = zip(claim.checks, verdict.judged, strict=True)
        # A bound that was kept is seen from the numbers.
        checks = [f"{'' if held else 'NOT '}{x}" for check, (held, x) in judged if isinstance(check, Above) or not held]
        held = "yes" if verdict.holds else "**no**"
        lines.append(f"| {claim.paper} | {claim.text} | {claim.setting} | {'; '.join([numbers, *checks])} | {held} |")
    return "\n".join(lines)
