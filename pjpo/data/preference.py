"""Preference pairs from files: rows with prompt, chosen, rejected, or HH's two whole dialogues (see `rows`)."""

import dataclasses

from pjpo.data import files, rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(files.Completions):
    read_row = staticmethod(rows.preference)
