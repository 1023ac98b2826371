"""What a data config builds: examples as token ids, and the account of every row that did not become one."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A prompt with its completions: 2 (chosen, rejected) for pairs, 1 for supervised rows, 0 for prompts alone."""

    prompt: Int[np.ndarray, " p"]
    completions: tuple[np.ndarray, ...]  # int32 each; the end-of-sequence token included
    columns: dict[str, Any]  # the rest of the row (labels, answers, ...), as JSON knows it
    id: str  # where the row came from: source:line


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    train: list[Example]
    held_out: list[Example]
    counts: dict[str, int]  # rows read, used, skipped by reason, and what was noticed
    about: str  # the same to read, with examples of each
    sampled: bool = False  # drawn from the policy, so that a run keeps it in its folder and goes on with it


class Tally:
    """Counts by what happened to a row, and where it happened first."""

    def __init__(self):
        self.counts: collections.Counter[str] = collections.Counter()
        self._places: dict[str, list[str]] = collections.defaultdict(list)

    def add(self, what: str, place: str | None = None) -> None:
        """Count `what`; `place` is kept where it is one of the first three."""
        self.counts[what] += 1
        if place is not None and len(self._places[what]) < 3:
            self._places[what].append(place)

    def __str__(self) -> str:
        lines = []
        for what, count in self.counts.items():
            places = self._places[what]
            more = ", ..." if count > len(places) else ""
            lines.append(f"  {what}: {count}" + (f" ({', '.join(places)}{more})" if places else ""))
        return "\n".join(lines)


def hold_out(
    examples: Sequence[Example], prompts: Sequence[str], num_held_out: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Split into (train, held out), at random. All examples of one prompt go to the same side.

    Args:
        examples: to split.
        prompts: of each example, what it has in common with those that must not end up on the other side.
        num_held_out: examples, not prompts.
        seed: which prompts.

    Raises:
        ValueError: nothing would be left to train on, or too few examples stand apart from the others.
    """
    groups = collections.defaultdict(list)
    for index, prompt in enumerate(prompts):
        groups[prompt].append(index)
    groups, held_out = list(groups.values()), set()
    for group in np.random.default_rng(seed).permutation(len(groups)):
        if len(held_out) + len(groups[group]) <= num_held_out:
            held_out.update(groups[group])
    if len(held_out) < num_held_out or num_held_out >= len(examples):
        raise ValueError(
            f"num_held_out {num_held_out} is too many for {len(examples)} examples of {len(groups)} prompts, "
            f"as a prompt is held out as a whole; use at most {max(0, min(len(held_out), len(examples) - 1))}"
        )
    sides = [[], []]
    for index, example in enumerate(examples):
        sides[index in held_out].append(example)
    return sides[0], sides[1]
