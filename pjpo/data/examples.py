"""What a data config builds: examples as token ids, and the account of every row that did not become one."""

from __future__ import annotations

import array
import collections
import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from pjpo.data.scratch import Scratch


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A prompt with its completions: 2 (chosen, rejected) for pairs, 1 for supervised rows, 0 for prompts alone."""

    prompt: Int[np.ndarray, " p"]
    completions: tuple[np.ndarray, ...]  # int32 each; the end-of-sequence token included
    columns: dict[str, Any]  # the rest of the row (answers, scores, ...), as JSON knows it
    id: str  # where the row came from: source:line
    loss_masks: tuple[np.ndarray, ...] | None = None  # bool, which tokens of each completion count; None: all
    labels: tuple[bool, ...] | None = None  # of each completion, whether it is desirable
    source: int | None = None  # which of `Data.sources`


class Examples(Sequence[Example]):
    """Examples on disk (see `Scratch`): eight bytes of memory each, however long they are."""

    def __init__(self, examples: Iterable[Example] = ()):
        self._scratch, self._starts = Scratch(), array.array("Q")
        for example in examples:
            self.append(example)

    def append(self, example: Example) -> None:
        masks = example.loss_masks or ()
        head = {
            "sizes": [len(example.prompt), *map(len, example.completions)],
            "masked": example.loss_masks is not None,
            "rest": [example.columns, example.id, example.labels, example.source],
        }
        arrays = [np.asarray(x, np.int32) for x in (example.prompt, *example.completions, *masks)]
        body = json.dumps(head).encode() + b"\n" + b"".join(x.tobytes() for x in arrays)
        self._starts.append(self._scratch.append(len(body).to_bytes(8, "little") + body))

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        start = self._starts[index]
        length = int.from_bytes(self._scratch.read(start, 8), "little")
        head, _, body = self._scratch.read(start + 8, length).partition(b"\n")
        head = json.loads(head)
        sizes, masked = head["sizes"], head["masked"]
        ends = np.cumsum([*sizes, *sizes[1:] * masked])
        prompt, *parts = np.split(np.frombuffer(body, np.int32), ends[:-1])
        num_completions = len(sizes) - 1
        columns, id, labels, source = head["rest"]
        return Example(
            prompt=prompt,
            completions=tuple(parts[:num_completions]),
            columns=columns,
            id=id,
            loss_masks=tuple(part.astype(bool) for part in parts[num_completions:]) if masked else None,
            labels=None if labels is None else tuple(labels),
            source=source,
        )

    def take(self, rows: Iterable[int]) -> Examples:
        """These examples, in this order, in the same file."""
        taken = object.__new__(Examples)
        taken._scratch, taken._starts = self._scratch, array.array("Q", (self._starts[row] for row in rows))
        return taken


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What a data config knows of its rows before it reads any, by its property `shape`; None: the rows will say."""

    num_completions: int | None = None  # of each prompt, as `Example` has them
    prompt_tokens: int | None = None  # at most
    completion_tokens: int | None = None  # of each, at most


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    train: Sequence[Example]
    held_out: Sequence[Example]
    counts: dict[str, int]  # rows read, used, skipped by reason, and what was noticed
    about: str  # the same to read, with examples of each
    sampled: bool = False  # drawn from the policy, so that a run keeps it in its folder and goes on with it
    sources: tuple[str, ...] = ()  # names, where there are several; `Example.source` is a place here
    weights: tuple[float, ...] = ()  # their shares of training, which add up to 1


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

    def places(self, what: str) -> list[str]:
        """The first three, and "..." where there are more."""
        places = self._places.get(what, [])
        return places + ["..."] * (0 < len(places) < self.counts[what])

    def __str__(self) -> str:
        lines = []
        for what, count in self.counts.items():
            places = self.places(what)
            lines.append(f"  {what}: {count}" + (f" ({', '.join(places)})" if places else ""))
        return "\n".join(lines)


def hold_out(examples: Examples, prompts: Sequence[bytes], num_held_out: int, seed: int) -> tuple[Examples, Examples]:
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
        least = min(map(len, groups), default=0)
        too, way_out = "many", f"at most {max(0, min(len(held_out), len(examples) - 1))}"
        if num_held_out < least < len(examples):
            too, way_out = "few", f"{least}, the examples of the smallest"
        raise ValueError(
            f"num_held_out {num_held_out} is too {too} for {len(examples)} examples of {len(groups)} prompts, "
            f"as a prompt is held out as a whole; use {way_out}"
        )
    everything = range(len(examples))
    return examples.take(row for row in everything if row not in held_out), examples.take(sorted(held_out))
