"""Prompts from files, to sample completions for; other columns stay with the example, for rewards to read."""

import dataclasses

from pjpo.data import files, rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(files.Prompts):
    read_row = staticmethod(rows.prompt_only)
    num_completions = 0
