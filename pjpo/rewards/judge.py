"""Sentiment of a text by a classifier learned from labelled reviews: TF-IDF and logistic regression.

It shares nothing with VADER, so a policy trained on one cannot please the other by the first one's quirks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from pjpo.data import reviews

SHORT = 30  # words; about what a policy is asked to write


@dataclasses.dataclass(frozen=True)
class Judge:
    """A fitted classifier with its accuracy on reviews that were kept from it."""

    pipeline: Any  # texts -> P(negative), P(positive)
    accuracy: float  # on held-out reviews
    short_accuracy: float  # on their first `SHORT` words

    @classmethod
    def train(
        cls, texts: Sequence[str], labels: Sequence[int] | np.ndarray, *, held_out: float = 0.1, seed: int = 0
    ) -> Judge:
        """Seconds for 20,000 reviews: of each, words and pairs of words in its first and its last sixty.

        Those 120 words judge held-out reviews as well as the whole text does, in a third of the time.

        Args:
            texts: reviews.
            labels: 1 where positive, 0 where negative.
            held_out: the fraction that accuracy is measured on.
            seed: which ones.

        Raises:
            ValueError: texts and labels that do not fit each other, or a side without both labels.
        """
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
            from sklearn.pipeline import make_pipeline
        except ImportError as error:
            raise ImportError("the judge needs scikit-learn; install it with pip install 'pjpo[rewards]'") from error

        labels = np.asarray(labels)
        if len(texts) != len(labels):
            raise ValueError(
                f"judge: {len(texts)} texts with {len(labels)} labels; give one label, 0 or 1, for each text"
            )
        held_out_rows, rows = np.split(
            np.random.default_rng(seed).permutation(len(texts)), [round(held_out * len(texts))]
        )
        for part, chosen in {"training": rows, "held-out": held_out_rows}.items():
            if set(labels[chosen].tolist()) != {0, 1}:
                found = sorted(set(labels[chosen].tolist()))
                raise ValueError(f"judge: the {part} reviews need both labels, 0 and 1, got {found}; give more reviews")

        pipeline = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2, dtype=np.float32),
            LogisticRegression(C=10, solver="liblinear", random_state=seed),
        )
        pipeline.fit([_excerpt(texts[row]) for row in rows], labels[rows])

        def accuracy(cut) -> float:
            return float(pipeline.score([cut(texts[row]) for row in held_out_rows], labels[held_out_rows]))

        return cls(pipeline, accuracy(_excerpt), accuracy(lambda text: " ".join(text.split()[:SHORT])))

    def reward(self, texts: Sequence[str]) -> Float32[np.ndarray, " n"]:
        """The probability that each text is positive."""
        return self.pipeline.predict_proba(texts)[:, 1].astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The probability that prompt and completion, as one text, are positive. It then is no independent judge any more.

    It learns from the film reviews that are kept for judges, in seconds, when it is first needed.
    """

    def __call__(self, completions: list[str], *, prompts: list[str], **columns) -> list[float]:
        return of_reviews().reward(list(map("".join, zip(prompts, completions, strict=True)))).tolist()

    def prepare(self) -> None:
        of_reviews()


@functools.cache
def of_reviews() -> Judge:
    """Learned from the reviews that no policy meets."""
    known = [review for review in reviews.read() if review.use == "judge"]
    return Judge.train([review.text for review in known], [review.label for review in known])


def _excerpt(text: str, num_words: int = 60) -> str:
    words = text.split()
    return text if len(words) <= 2 * num_words else " ".join(words[:num_words] + words[-num_words:])
