"""The diagnostics of pairs and samples against numbers by hand."""

import types

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from pjpo.data.buckets import Buckets
from pjpo.data.examples import Example
from pjpo.evals import panel
from pjpo.methods import dpo
from pjpo.types import Batch

REF = np.array([[-10.0, -8.0], [-6.0, -7.0], [-5.0, -5.0], [-9.0, -4.0]])
LOGPS = REF + np.array([[4.0, -2.0], [-1.0, -3.0], [0.0, 0.0], [1.0, 3.0]])
LENGTHS = np.array([[5, 4], [3, 7], [2, 2], [6, 2]])


def test_rewards_rankings_and_changes():
    found = panel.of_pairs(0.5, LOGPS, REF, LENGTHS)
    expected = {
        "rewards/chosen": 0.5 * 1.0,
        "rewards/rejected": 0.5 * -0.5,
        "rewards/margins": 0.5 * 1.5,
        "rewards/accuracies": 0.5,  # the third pair is a tie
        "ranking/accuracy": 0.75,  # where it counts
        "ranking/accuracy_per_token": np.mean([-6 / 5 >= -10 / 4, -7 / 3 >= -10 / 7, True, -8 / 6 >= -1 / 2]),
        "ranking/flipped": 0.5,  # of pairs 1 and 4, which the reference has wrong
        "logps/chosen": -6.5,
        "logps/rejected": -6.5,
        "logps/chosen_change": 1.0,
        "logps/rejected_change": -0.5,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-12, err_msg=name)


def test_the_idealised_bound_is_a_range_over_beta():
    found = panel.of_pairs(0.5, LOGPS, REF, LENGTHS)
    # log 999 / beta against the reference's worst margin of -5: right down to beta = 1, wrong from 5 on.
    margins = REF[:, 0] - REF[:, 1]
    each = [np.mean(margins + np.log(999) / beta > 0) for beta in (0.01, 0.1, 1, 5, 10)]
    names = ("min", "median", "max")
    np.testing.assert_allclose(
        [found[f"ranking/idealised_{name}"] for name in names], [min(each), np.median(each), max(each)]
    )
    np.testing.assert_allclose(found["ranking/alignment_gap"], np.median(each) - 0.75)


def test_length_bias():
    found = panel.of_pairs(0.5, LOGPS, REF, LENGTHS)
    longer, margins = np.array([1, -4, 0, 4]), 0.5 * np.array([6.0, 2.0, 0.0, -2.0])
    np.testing.assert_allclose(found["length/longer_chosen"], 2 / 3)
    np.testing.assert_allclose(found["length/longer_rewarded"], 1 / 3)
    np.testing.assert_allclose(found["length/margin_correlation"], np.corrcoef(longer, margins)[0, 1])
    alike = panel.of_pairs(0.5, LOGPS, REF, np.full((4, 2), 3))
    assert [alike[f"length/{name}"] for name in ("longer_chosen", "longer_rewarded", "margin_correlation")] == [0] * 3


@hypothesis.given(strategies.permutations(range(4)), strategies.integers(1, 3))
def test_neither_the_order_of_pairs_nor_a_copy_of_all_changes_a_metric(order, copies):
    rows = np.tile(order, copies)
    expected = panel.of_pairs(0.5, LOGPS, REF, LENGTHS)
    assert panel.of_pairs(0.5, LOGPS[rows], REF[rows], LENGTHS[rows]) == pytest.approx(expected, rel=1e-12)


def test_what_rounding_leaves_of_a_margin_rewards_no_length():
    rng = np.random.default_rng(0)
    ref = -np.array([[40.0, 30.0]]) * np.ones((8, 1))
    lengths = np.array([[40, 30], [20, 60]] * 4)
    same = (ref.astype(np.float32) + rng.normal(0, 2e-5, ref.shape)).astype(np.float32)  # a few units in the last place
    found = panel.of_pairs(0.1, same, ref, lengths)
    assert (found["length/longer_rewarded"], found["length/margin_correlation"]) == (0, 0)
    assert found["length/longer_chosen"] == 0.5
    apart = ref + np.array([[1e-3, 0.0]])  # 70 or 80 tokens at 1e-5 nats each are less
    assert panel.of_pairs(0.1, apart, ref, lengths)["length/longer_rewarded"] == 0.5
    assert panel.of_pairs(0.1, ref + np.array([[5e-4, 0.0]]), ref, lengths)["length/longer_rewarded"] == 0


@pytest.mark.parametrize(
    ("chosen", "rejected", "regime"),
    [
        (1.0, -1.0, "Reinforcement: chosen rose and rejected fell (chosen +1.00, rejected -1.00 nats a completion)."),
        (-1.0, -3.0, "Likelihood displacement: both fell, so the mass went to other completions"),
        (-1.0, 0.0, "Likelihood displacement: chosen fell, rejected stayed"),
        (0.0, -1.0, "Suppression: rejected fell, chosen stayed"),
        (1.0, 0.0, "Reinforcement: chosen rose, rejected stayed"),
        (0.0, 0.0, "Neither moved beyond chance"),
        (1.0, 1.0, "Both rose"),
        (-1.0, 1.0, "the pairs are being unlearned"),
        (0.0, 1.0, "the pairs are being unlearned"),
    ],
)
def test_every_regime_has_its_sentence(chosen, rejected, regime):
    noise = np.array([[0.1, -0.1], [-0.1, 0.1]] * 10)
    assert regime in panel.displacement(np.array([chosen, rejected]) + noise + REF[:1], np.repeat(REF[:1], 20, axis=0))


def test_a_change_within_its_error_is_none():
    changes = np.array([[3.0, 0.0], [-2.0, 0.0], [2.5, 0.0], [-2.5, 0.0]])  # +0.25 on average
    assert panel.displacement(REF + changes, REF).startswith("Neither moved beyond chance (chosen +0.25")


@pytest.mark.parametrize(("change", "regime"), [(1.3, "Both rose"), (1.1, "Neither moved")])
def test_two_standard_errors_are_beyond_chance(change, regime):
    # Of changes +1, -1, +1, -1 about it the standard error is sqrt(4/3) / 2, twice of which is 1.155.
    around = np.array([[1.0, 1.0], [-1.0, -1.0]] * 2)
    assert panel.displacement(np.zeros((4, 2)) + change + around, np.zeros((4, 2))).startswith(regime)


def test_one_pair_has_no_error_and_two_have_one():
    assert panel.displacement(np.array([[0.1, -0.1]]), np.zeros((1, 2))).startswith("Reinforcement: chosen rose and")
    assert panel.displacement(np.array([[3.0, 0.0], [-1.0, 0.0]]), np.zeros((2, 2))).startswith("Neither moved")


def test_samples_of_one_prompt_tell_no_error():
    logps, mask = np.array([[[-1.0], [-3.0]]]), np.array([[[True], [False]]])
    batch = Batch.of(completion_tokens=np.zeros((1, 2, 1), np.int32), completion_mask=mask, old_logps=logps)
    found = panel.of_samples(batch, np.full((1, 2, 1), -1.5))
    assert (found["kl"], found["entropy"]) == (0.25, 1.0)  # a mean over two completions, and over one token
    assert np.isnan(found["kl_stderr"])


def test_kl_and_entropy_of_samples():
    mask = np.array([[[True, True]], [[True, False]]])
    logps = np.array([[[-1.0, -2.0]], [[-0.5, 7.0]]])
    batch = Batch.of(completion_tokens=np.zeros((2, 1, 2), np.int32), completion_mask=mask, old_logps=logps)
    found = panel.of_samples(batch, np.array([[[-1.5, -3.0]], [[-0.7, 9.0]]]))
    np.testing.assert_allclose(found["kl"], (1.5 + 0.2) / 2)
    np.testing.assert_allclose(found["kl_stderr"], 1.3 / 2)
    np.testing.assert_allclose(found["entropy"], 3.5 / 3)


def test_pairs_of_tokens_are_summed_one_by_one():
    """Three pairs, two at a time, under made-up models: log-probs are minus a multiple of the token ids."""
    rows = [((1, 2), (3,)), ((2,), (2, 2)), ((5,), (1,))]
    pairs = [
        Example(np.array([9], np.int32), tuple(np.array(ids, np.int32) for ids in row), {}, str(i))
        for i, row in enumerate(rows)
    ]
    policy = types.SimpleNamespace(logps=lambda params, batch: jnp.float32(-params["nats"] * batch.completion_tokens))
    context = types.SimpleNamespace(
        policy=policy, method=dpo.Config(beta=0.5), prepare=lambda batch: batch, buckets=Buckets.of(pairs)
    )
    metrics, words = panel.build(context, pairs, 2)({"nats": 2.0}, {"nats": 1.0})
    sums = np.array([[-3, -3], [-2, -4], [-5, -1]], np.float64)
    expected = panel.of_pairs(0.5, 2 * sums, sums, np.array([[2, 1], [1, 2], [1, 1]]))
    assert metrics == pytest.approx(expected)
    assert words == {"displacement": panel.displacement(2 * sums, sums)}
    context.method = types.SimpleNamespace()  # of no beta: log-ratios themselves
    metrics, _ = panel.build(context, pairs, 2)({"nats": 2.0}, {"nats": 1.0})
    assert metrics["rewards/margins"] == pytest.approx((0 + 2 - 4) / 3)
