"""Sentiment of a text by rule: VADER's compound score. Hutto & Gilbert 2014.

A lexicon of rated words with rules for negation, degree, capitals and punctuation. On whole film reviews its sign
agrees with two labels in three: a real reward, cheap and gameable, which is why `judge` looks at the same texts.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32


def reward(texts: Sequence[str]) -> Float32[np.ndarray, " n"]:
    """The compound score of each text, from -1 (negative) to 1 (positive); 0 where no word is in the lexicon."""
    return np.array([_analyzer().polarity_scores(text)["compound"] for text in texts], np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The compound score as one reward among others."""

    whole: bool = True  # of prompt and completion as one text: what is negated across the border counts as it reads

    def __call__(self, completions: list[str], *, prompts: list[str], **columns) -> list[float]:
        texts = list(map("".join, zip(prompts, completions, strict=True))) if self.whole else completions
        return reward(texts).tolist()

    def prepare(self) -> None:
        _analyzer()


@functools.cache
def _analyzer():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError(
            "the VADER reward needs vaderSentiment; install it with pip install 'pjpo[rewards]'"
        ) from error
    return SentimentIntensityAnalyzer()
