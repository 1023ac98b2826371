"""Accuracy and pass@k of a model small enough to know every probability, and what is refused."""

import itertools
import math
import types

import jax
import numpy as np
import pytest

from pjpo.data.examples import Data, Example
from pjpo.evals import exact_match
from pjpo.rewards.protocol import Rewards
from pjpo.types import Batch
from tests import tiny

POLICY = tiny.make_policy(num_layers=1)
PARAMS = tiny.make_params(POLICY)
PROMPTS = [
    np.array([3, 5], np.int32),
    np.array([8], np.int32),
    np.array([1, 2, 30], np.int32),
    np.array([7, 7], np.int32),
]


class Numbers:
    """Ids as text; two of the tiny vocabulary's 37 end a completion."""

    stop_ids = (0,)

    def decode(self, ids, skip_special=True):
        return "".join(f"{int(i)} " for i in ids)

    def encode(self, text, special=False):
        return [int(number) for number in text.split()]


def first_is_even(completions, limit):
    return [float(int(text.split()[0]) % 2 == 0) for text in completions]


def length(completions):
    return [len(text.split()) for text in completions]


REWARDS = Rewards(functions=(first_is_even, length), weights=(1.0, 0.0))


def evaluation(prompts=PROMPTS, rewards=REWARDS, said=None, **settings):
    context = types.SimpleNamespace(
        policy=POLICY, tokenizer=Numbers(), key=jax.random.key(7), say=(said if said is not None else []).append
    )
    examples = [Example(prompt, (), {"limit": 1}, f"p:{i}") for i, prompt in enumerate(prompts)]
    settings = {"max_completion_tokens": 2, "batch_size": 4, "num_completions": 4, "pass_at": (1, 4), **settings}
    return exact_match.Config(rewards=rewards, **settings).build(context, Data([], examples, {}, ""))


def first_token_probabilities(prompt):
    tokens = np.arange(37, dtype=np.int32)[None, :, None]
    batch = Batch.of(prompt_tokens=prompt[None], completion_tokens=tokens)
    return np.exp(np.asarray(POLICY.logps(PARAMS, batch), np.float64))[0, :, 0]


def test_accuracy_is_that_of_the_likeliest_tokens():
    likeliest = [int(first_token_probabilities(prompt).argmax()) for prompt in PROMPTS]
    right = np.array([token % 2 == 0 for token in likeliest])
    metrics = evaluation()(PARAMS).metrics
    assert metrics["accuracy"] == right.mean()
    np.testing.assert_allclose(metrics["accuracy_stderr"], right.std(ddof=1) / 2)


def test_samples_agree_with_the_probabilities():
    prompts = [PROMPTS[0]] * 512
    expected = first_token_probabilities(PROMPTS[0])[::2].sum()
    metrics = evaluation(prompts, max_completion_tokens=1, batch_size=512, pass_at=(1, 2, 4))(PARAMS).metrics
    for k in (1, 2, 4):
        difference = abs(metrics[f"pass@{k}"] - (1 - (1 - expected) ** k))
        assert 0 < difference < 4 * metrics[f"pass@{k}_stderr"] < 0.2
    assert metrics["reward/first_is_even"] == pytest.approx(metrics["pass@1"])
    assert metrics["mean_length"] == metrics["reward/length"] == 1


def test_the_share_of_groups_that_teach_nothing():
    seen = []

    def verdicts(completions):
        seen.append(first_is_even(completions, None))
        return seen[-1]

    prompts = [PROMPTS[i % 4] for i in range(64)]
    metrics = evaluation(prompts, rewards=Rewards(functions=(verdicts,), weights=(1.0,)))(PARAMS).metrics
    counts = [sum(seen[1][row * 4 : row * 4 + 4]) for row in range(64)]  # seen[0] is greedy
    assert {0, 4} < set(counts)
    assert metrics["frac_reward_zero_std"] == (counts.count(0) + counts.count(4)) / 64


def test_rows_are_of_the_first_sample_of_each_problem():
    result = evaluation()(PARAMS)
    assert [row["prompt"] for row in result.samples] == [Numbers().decode(prompt) for prompt in PROMPTS]
    for row in result.samples:
        completion = row["text"].removeprefix(row["prompt"])
        assert row["reward_first_is_even"] == first_is_even([completion], None)[0]
        assert row["reward_length"] == len(completion.split())


def test_it_stops_where_rollouts_stop():
    even = tuple(f"{number} " for number in range(0, 37, 2))  # as they decode
    rows = evaluation(PROMPTS * 4, stop=even)(PARAMS).samples
    lengths = {True: set(), False: set()}
    for row in rows:
        lengths[bool(row["reward_first_is_even"])].add(row["reward_length"])
    assert lengths == {True: {1}, False: {2}}
    with pytest.raises(ValueError, match="stop '1 2' must be one token of the tokenizer, got 2; choose another text"):
        evaluation(stop=("1 2",))


def test_the_same_parameters_give_the_same_result_in_any_batch_size():
    first, again, other = (evaluation(batch_size=size)(PARAMS) for size in (4, 4, 3))
    assert first.metrics == again.metrics
    assert first.samples == again.samples == other.samples


def test_what_cannot_be_scored_is_wrong_and_counted():
    said = []

    def fails(completions):
        raise ZeroDivisionError("no verdict")

    rewards = Rewards(functions=(fails, length), weights=(1.0, 1.0))
    metrics = evaluation(rewards=rewards, said=said)(PARAMS).metrics
    assert metrics["accuracy"] == metrics["pass@4"] == 0
    assert metrics["failures"] == 4 + 16
    assert math.isnan(metrics["reward/fails"])
    assert said[0] == "reward 'fails', row p:0, completion 0: ZeroDivisionError: no verdict"


def test_pass_at_k_golden_values_and_every_subset():
    right = np.arange(10)[None] < 3
    np.testing.assert_allclose([exact_match.pass_at(k, right)[0] for k in (1, 5)], [0.3, 0.91666667], atol=5e-9)
    for num_right, k in itertools.product(range(6), range(1, 6)):
        right = np.arange(5) < num_right
        expected = np.mean([any(subset) for subset in itertools.combinations(right, k)])
        np.testing.assert_allclose(exact_match.pass_at(k, right[None]), [expected])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_completions": 0, "pass_at": ()}, "exact match: num_completions must be >= 1, got 0"),
        ({"max_completion_tokens": 0}, "exact match: max_completion_tokens must be >= 1, got 0"),
        ({"pass_at": (5,)}, r"pass_at must be within 1 and num_completions 4, got \(5,\)"),
        ({"prompts": []}, "the data holds nothing out"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        evaluation(**settings)


def test_columns_that_are_missing_are_refused_before_sampling():
    rewards = Rewards(functions=("gsm8k",), weights=(1.0,))
    with pytest.raises(ValueError, match="reward 'gsm8k' reads answer, but the rows have only the columns limit"):
        evaluation(rewards=rewards)
