"""Supervised rows from files: prompt and completion, chat messages, or plain text (see `rows`)."""

import dataclasses
from typing import get_args

from pjpo.data import files, rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(files.Completions):
    turns: rows.Turns = "last"  # of chat messages, which the assistant's loss counts: the last turn, or all

    num_completions = 1

    def __post_init__(self):
        super().__post_init__()
        if self.turns not in get_args(rows.Turns):
            raise ValueError(f"data: turns must be one of {', '.join(get_args(rows.Turns))}, got {self.turns!r}")

    def read_row(self, row: dict) -> rows.Row:
        return rows.supervised(row, turns=self.turns)
