"""Preference pairs from files: rows with prompt, chosen, rejected, or HH's two whole dialogues (see `rows`)."""

import dataclasses

from pjpo.data import files, rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(files.Completions):
    with_target: bool = False  # the column `target` is a third completion: what SLiC-HF's likelihood term is of

    @property
    def num_completions(self) -> int:
        return 2 + self.with_target

    def read_row(self, row):
        return rows.preference(row, with_target=self.with_target)
