"""DAPO's soft penalty of overlong completions. Yu et al. 2025, arXiv:2503.14476, Eq. 13."""

from __future__ import annotations

import dataclasses

from pjpo import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """0 up to `max_tokens - cache_tokens`, falling to -1 at `max_tokens`, and -1 beyond. Reads `completion_ids`."""

    max_tokens: int  # the paper: 20480
    cache_tokens: int  # the last tokens before the limit, over which it falls; the paper: 4096

    def __post_init__(self):
        checks.kinds(self)
        checks.at_least(self, 1, "max_tokens", "cache_tokens")
        if self.cache_tokens > self.max_tokens:
            raise ValueError(f"overlong: cache_tokens must be <= max_tokens {self.max_tokens}, got {self.cache_tokens}")

    def __call__(self, completions: list[str], *, completion_ids: list, **columns) -> list[float]:
        free = self.max_tokens - self.cache_tokens
        return [min(0.0, max((free - len(ids)) / self.cache_tokens, -1.0)) for ids in completion_ids]
