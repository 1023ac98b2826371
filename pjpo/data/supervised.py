"""Supervised rows from files: prompt and completion, chat messages, or plain text (see `rows`)."""

import dataclasses

from pjpo.data import files, rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(files.Completions):
    turns: rows.Turns = "last"  # of chat messages, which the assistant's loss counts: the last turn, or all

    num_completions = 1

    def read_row(self, row: dict) -> rows.Row:
        return rows.supervised(row, turns=self.turns)
