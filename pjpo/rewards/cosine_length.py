"""Cosine length reward. Yeo et al. 2025, arXiv:2502.03373, section 3.2; the cap of Light-R1, arXiv:2503.10460.

A right answer is worth more the shorter it is, a wrong one costs less the longer it is, and reaching the limit has a
reward of its own. With a cap, a right answer gains nothing from being shorter still.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pjpo import checks
from pjpo.rewards.protocol import call


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Reads `completion_ids`, and the columns that its verifier reads."""

    verifier: Any  # another reward; right is 1 or more
    max_tokens: int  # limit of a completion
    right_short: float = 2.0  # reward of a right answer of length 0
    right_long: float = 1.0  # of one at the limit
    wrong_short: float = -10.0
    wrong_long: float = 0.0
    exceeded: float = -10.0  # of a completion of `max_tokens` or more, right or wrong
    cap: float = math.inf  # of right answers; Light-R1's is not published, 1.5 lies in the middle

    def __post_init__(self):
        checks.kinds(self)
        checks.at_least(self, 1, "max_tokens")
        if not callable(self.verifier):
            raise ValueError(f"cosine_length: verifier must be a reward that can be called, got {self.verifier!r}")

    def __call__(self, completions: list[str], *, completion_ids: list, **columns) -> list[float | None]:
        keywords = {"completions": completions, "completion_ids": completion_ids, **columns}
        scores = call(self.verifier, keywords)
        rows = zip(completion_ids, scores, strict=True)
        return [
            None if score is None or math.isnan(score) else self.reward(len(ids), score >= 1) for ids, score in rows
        ]

    def prepare(self) -> None:
        if hasattr(self.verifier, "prepare"):
            self.verifier.prepare()

    def warm_up(self, completions: list[str], **given) -> None:
        if hasattr(self.verifier, "warm_up"):
            call(self.verifier.warm_up, {"completions": completions, **given})

    def reward(self, num_tokens: int, is_right: bool) -> float:
        """Of one completion."""
        if num_tokens >= self.max_tokens:
            return self.exceeded
        short, long = (self.right_short, self.right_long) if is_right else (self.wrong_short, self.wrong_long)
        value = long + 0.5 * (short - long) * (1 + math.cos(math.pi * num_tokens / self.max_tokens))
        return min(value, self.cap) if is_right else value
