"""Unpaired rows from files: prompt, completion, and a label that says whether it is desirable (see `rows`)."""

import dataclasses

from pjpo.data import files, rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(files.Completions):
    """One completion a prompt; `labels` [B, 1] of a batch are true where it is desirable."""

    read_row = staticmethod(rows.unpaired)
    num_completions = 1
