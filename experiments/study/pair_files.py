"""What studies of rewards begin from: one model, pairs of a file to learn from, and files of pairs from elsewhere."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.study import bench
from pjpo import checks, models, pairs
from pjpo.data import preference
from pjpo.data.batches import in_order
from pjpo.data.buckets import check_room
from pjpo.data.examples import Example, Examples
from pjpo.experiment import Model
from pjpo.logps import sum_completion
from pjpo.types import CHOSEN, REJECTED


@dataclasses.dataclass(frozen=True)
class Pairs(bench.Bench):
    pairs: Examples
    shifted: dict[str, Sequence[Example]]  # by the file's name

    def score_margins(self, params: dict, rows: Sequence[Example]) -> np.ndarray:
        """By how much the scalar head prefers chosen [n]."""
        return self._margins(lambda batch: self.policy.scores(params, batch), rows)

    def logp_margins(self, params: dict, rows: Sequence[Example]) -> np.ndarray:
        """By how many nats chosen is likelier [n]."""
        return self._margins(lambda batch: sum_completion(self.policy.logps(params, batch), batch.loss_mask), rows)

    def _margins(self, values, rows: Sequence[Example]) -> np.ndarray:
        batches = in_order(rows, 8, bench.buckets_of(rows))
        return np.concatenate([pairs.margins(values(batch)) for batch in batches])[: len(rows)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    model: Model  # with a scalar head
    data: preference.Config  # num_held_out of its pairs are drawn anew by every seed
    shifted: tuple[str, ...] = ()  # files of pairs from elsewhere

    def __post_init__(self):
        checks.kinds(self)
        names = [self.name, *self.names]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"pairs: files are told apart by their names, and {twice} come twice; rename one")

    @property
    def name(self) -> str:
        return Path(self.data.path).name

    @property
    def names(self) -> list[str]:
        """Of the shifted files."""
        return [Path(path).name for path in self.shifted]

    def load(self) -> Pairs:
        reader = types.SimpleNamespace(tokenizer=models.tokenizer(self.model.source))
        everything = dataclasses.replace(self.data, num_held_out=0)
        found = [dataclasses.replace(everything, path=p).build(reader) for p in (self.data.path, *self.shifted)]
        print(*(data.about for data in found), sep="\n")
        rows, *shifted = (data.train for data in found)
        start = bench.Config(model=self.model).load()
        every = [example for rows in (rows, *shifted) for example in rows]
        check_room(every, start.policy.config.max_positions)
        return Pairs(
            start.config, start.policy, start.params, start.tokenizer, rows, dict(zip(self.names, shifted, strict=True))
        )


def accuracy(margins: np.ndarray) -> float:
    return float((np.sign(margins) + 1).mean() / 2)  # half of the ties


def longer(rows: Sequence[Example]) -> np.ndarray:
    """By how many tokens chosen is longer [n]."""
    return np.array([len(row.completions[CHOSEN]) - len(row.completions[REJECTED]) for row in rows], np.float32)
