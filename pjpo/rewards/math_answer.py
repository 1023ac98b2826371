"""Whether a completion's answer equals the row's as mathematics, by the library Math-Verify.

LaTeX, fractions, sets, intervals and plain numbers are compared by value: 3/4, \\frac{3}{4} and 0.75 are one.
"""

from __future__ import annotations

import dataclasses

from pjpo.rewards.answers import written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """1 where they are equal, else 0, no answer included. Reads the column `answer`: LaTeX, with or without dollars.

    The library's own time limits are off, as they need the alarm that guards the whole call here.
    """

    def __call__(self, completions: list[str], *, answer: list, **columns) -> list[float]:
        """
        Raises:
            ImportError: Math-Verify is not installed.
            ValueError: a row whose answer is no mathematics.
        """
        math_verify = self.prepare()

        def is_right(text: str, gold: str) -> bool:
            delimited = gold if "$" in gold or "\\boxed" in gold else f"${gold}$"
            expected = math_verify.parse(delimited, parsing_timeout=None)
            if not expected:
                raise ValueError(f"math_answer: the column 'answer' holds nothing to compare with: {gold!r:.200}")
            found = math_verify.parse(text, parsing_timeout=None)
            return math_verify.verify(expected, found, timeout_seconds=None)

        return [float(is_right(text, written(gold))) for text, gold in zip(completions, answer, strict=True)]

    def prepare(self):
        """The package."""
        try:
            import math_verify
        except ImportError as error:
            raise ImportError(
                "the math_answer reward needs math-verify; install it with pip install 'pjpo[rewards]'"
            ) from error
        return math_verify
