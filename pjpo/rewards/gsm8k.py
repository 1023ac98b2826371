"""Whether the final number is that of a GSM8K row. Cobbe et al. 2021, arXiv:2110.14168.

Solutions of the data set end in `#### number`; numbers are compared as numbers.
"""

from __future__ import annotations

import dataclasses
from decimal import Decimal
from typing import Literal

from pjpo import checks
from pjpo.rewards.answers import extract, written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """1 where the number is right, else 0. Reads the column `answer`: a number, or a solution that ends in one."""

    extract: Literal["####", "last number"] = "####"  # where a completion's number is: behind #### only, or the last

    def __post_init__(self):
        checks.one_of(self, "extract", ("####", "last number"))

    def __call__(self, completions: list[str], *, answer: list, **columns) -> list[float]:
        """
        Raises:
            ValueError: a row whose answer holds no number.
        """
        return [float(self._is_right(text, written(gold))) for text, gold in zip(completions, answer, strict=True)]

    def _is_right(self, completion: str, answer: str) -> bool:
        right = extract(answer, "####") or extract(answer, "last number")
        if right is None:
            raise ValueError(f"gsm8k: the column 'answer' holds no number: {answer!r:.200}")
        found = extract(completion, self.extract)
        return found is not None and Decimal(found) == Decimal(right)
