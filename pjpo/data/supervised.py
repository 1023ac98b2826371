"""Supervised rows from files: prompt and completion, or plain text (see `rows`)."""

import dataclasses

from pjpo.data import files, rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(files.Completions):
    read_row = staticmethod(rows.supervised)
