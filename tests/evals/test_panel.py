"""The diagnostics of pairs and samples against numbers by hand."""

import types

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from pjpo.data.buckets import Buckets
from pjpo.data.examples import Example
from pjpo.evals import panel
from pjpo.evals.token_rewards import largest_share
from pjpo.methods import dpo, dpo_attenuated, orpo, rso, simpo
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


def test_the_same_by_mean_log_probs():
    found = panel.of_pairs(0.5, LOGPS, REF, LENGTHS)
    means = REF / LENGTHS
    each = [np.mean(means[:, 0] - means[:, 1] + np.log(999) / beta > 0) for beta in (0.01, 0.1, 1, 5, 10)]
    assert min(each) < np.median(each)
    np.testing.assert_allclose(found["ranking/idealised_min_per_token"], min(each))
    np.testing.assert_allclose(found["ranking/idealised_median_per_token"], np.median(each))
    gap = np.median(each) - found["ranking/accuracy_per_token"]
    np.testing.assert_allclose(found["ranking/alignment_gap_per_token"], gap)


def test_difficulty_is_by_how_much_the_reference_is_wrong():
    found = panel.of_pairs(0.5, LOGPS, REF, LENGTHS)
    np.testing.assert_allclose(found["ranking/difficulty"], np.mean([2.0, -1.0, 0.0, 5.0]))
    assert found["ranking/theorem_4_1_violations"] == 0


def rows(logps, *, largest_shares):
    """As `panel.rows_of` has them, all of a completion's log-prob at one of three tokens."""
    tokens = [np.stack([np.zeros_like(x), x, np.zeros_like(x)], axis=-1) for x in (logps, REF)]
    return {
        "logps": tokens[0],
        "ref_logps": tokens[1],
        "lengths": LENGTHS,
        "largest_shares": np.array(largest_shares),
    }


def test_log_probs_are_summed_in_float64():
    """Two runs' margins must not differ by what float32 loses of long sums."""
    tokens = np.tile(np.float32([-1.1, -0.7]), (4, 2, 500))
    found, _ = panel.of_rows("pairs", dpo.Config(), [rows(LOGPS, largest_shares=[0.5] * 4) | {"logps": tokens}], 4)
    np.testing.assert_allclose(found["logps/chosen"], tokens[0, 0].astype(np.float64).sum(), rtol=1e-12)


@pytest.mark.parametrize(
    ("method", "name", "scale"),
    [
        (dpo.Config(beta=0.3), "rewards", 0.3),
        (rso.Config(gamma=0.05), "rewards", 0.05),
        (rso.Config(gamma=0.05, form="hinge"), "implicit", 1.0),  # without a reference
        (simpo.Config(beta=2.0), "implicit", 1.0),
        (orpo.Config(), "implicit", 1.0),
        (dpo_attenuated.Config(gamma=0.5), "implicit", 1.0),
        (dpo_attenuated.Config(beta=0.2, gamma=1.0), "rewards", 0.2),
    ],
)
def test_what_is_no_reward_of_the_method_has_another_name(method, name, scale):
    metrics, words = panel.of_rows("pairs", method, [rows(LOGPS, largest_shares=[0.5, 1.0, np.nan, 0.6])], 4)
    assert metrics[f"{name}/margins"] == pytest.approx(scale * 1.5)
    assert not any(metric.startswith("implicit/" if name == "rewards" else "rewards/") for metric in metrics)
    assert metrics["token_rewards/largest_share"] == pytest.approx(0.7)  # of the three pairs that have one
    assert "nats a completion" in words["displacement"]


def test_what_nothing_was_counted_for_is_left_out():
    metrics, _ = panel.of_rows("pairs", dpo.Config(), [rows(REF, largest_shares=[np.nan] * 4)], 4)
    assert "token_rewards/largest_share" not in metrics
    one_kind = panel.of_labelled(0.5, LOGPS[:, 0], REF[:, 0], LENGTHS[:, 0], np.ones(4, bool))
    assert not any("rejected" in name or "margins" in name for name in one_kind)


def test_completions_with_labels():
    """The eight completions of the pairs, as if nobody had paired them."""
    logps, ref, lengths, labels = LOGPS.reshape(-1), REF.reshape(-1), LENGTHS.reshape(-1), np.array([True, False] * 4)
    found = panel.of_labelled(0.5, logps, ref, lengths, labels)
    expected = {
        "rewards/chosen": 0.5 * 1.0,
        "rewards/rejected": 0.5 * -0.5,
        "rewards/margins": 0.5 * 1.5,
        "logps/chosen": -6.5,
        "logps/rejected": -6.5,
        "logps/chosen_change": 1.0,
        "logps/rejected_change": -0.5,
        "length/chosen": 4.0,
        "length/rejected": 15 / 4,
        "length/reward_correlation": np.corrcoef(logps - ref, lengths)[0, 1],
    }
    assert found == pytest.approx(expected)
    same = panel.of_labelled(0.5, ref + 1e-6, ref, lengths, labels)
    assert same["length/reward_correlation"] == 0  # of rounding


def test_the_regime_of_completions_with_labels():
    noise, labels = np.tile([0.1, -0.1], 20), np.repeat([True, False], 20)
    lengths, ref = np.full(40, 5), np.full(40, -9.0)
    moved = ref + np.where(labels, -1.0, -3.0) + noise
    expected = "Likelihood displacement: both fell, so the mass went to other completions (chosen -1.00, rejected -3.00"
    assert expected in panel.displacement_of_labelled(moved, ref, lengths, labels)
    said = panel.displacement_of_labelled(moved, ref, lengths, np.ones(40, bool))
    assert said == "All held-out completions have one label, desirable."


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


def test_what_is_small_is_not_printed_as_nought_and_half_a_hundredth_is_rounded():
    for change, said in ((0.004, "+0.004"), (0.005, "+0.01"), (-0.006, "-0.01")):
        changes = np.full((4, 2), change)
        assert f"chosen {said}, rejected {said} nats" in panel.displacement(changes, np.zeros((4, 2)))
    assert panel.displacement(np.full((4, 2), 1e-9), np.zeros((4, 2))).startswith("Both rose")  # nothing says lengths


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


def test_a_change_within_rounding_is_none_and_a_small_one_is_no_nought():
    ref, lengths = np.full((9, 2), -30.0), np.full((9, 2), 40)
    small = ref + np.array([3e-4, 0.0])
    assert "Reinforcement" in panel.displacement(small, ref)
    assert panel.displacement(small, ref, lengths).startswith("Neither moved beyond chance")  # 40 tokens at 1e-5
    said = panel.displacement(ref + np.array([-3e-3, 0.0]), ref, lengths)
    assert "chosen fell, rejected stayed (chosen -0.003, rejected +0.00 nats" in said


@pytest.mark.parametrize(("change", "said"), [(0.004, "+0.004"), (0.005, "+0.01"), (0.007, "+0.01")])
def test_less_than_half_a_hundredth_is_said_to_one_digit(change, said):
    ref = np.full((4, 2), -0.5)
    assert f"(chosen {said}, rejected +0.00 " in panel.displacement(ref + np.array([change, 0.0]), ref)


def test_a_small_change_is_one_where_no_lengths_are_told():
    ref = np.full((4, 2), -0.5)
    assert panel.displacement(ref + np.array([4e-6, 0.0]), ref).startswith("Reinforcement: chosen rose, rejected stay")


def test_contradictions_of_the_theorem_within_rounding_are_not_counted(monkeypatch):
    asked = []
    monkeypatch.setattr(panel.ranking, "threshold_violations", lambda *_, within: asked.append(within) or 7)
    assert panel.of_pairs(0.5, LOGPS, REF, LENGTHS)["ranking/theorem_4_1_violations"] == 7
    np.testing.assert_allclose(asked[0], panel.ROUNDING * LENGTHS.sum(1))


def test_what_rounding_leaves_of_a_change_is_no_reward_of_a_labelled_completion():
    ref, lengths, labels = np.full(4, -9.0), np.array([10, 20, 30, 40]), np.array([True, False] * 2)

    def correlation(tokens):  # changes of 1e-5 nats for so many tokens
        found = panel.of_labelled(0.1, ref + panel.ROUNDING * np.asarray(tokens), ref, lengths, labels)
        return found["length/reward_correlation"]

    assert correlation(0.9 * lengths) == 0
    assert correlation(1.1 * lengths) == pytest.approx(1)


def test_the_largest_share_of_token_rewards():
    ratios = jnp.array([[[3.0, -1.0], [0.5, 9.0]], [[1.0, 1.0], [-1.0, 1.0]], [[1e-6, 0.0], [0.0, 0.0]]])
    mask = jnp.array([[[True, True], [True, False]], [[True, True], [True, True]], [[True, True], [True, True]]])
    found = largest_share(ratios, mask, panel.ROUNDING)
    np.testing.assert_allclose(found, [3 / 4.5, 1 / 4, np.nan], rtol=1e-6)


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
    lengths = np.array([[2, 1], [1, 2], [1, 1]])
    expected = panel.of_pairs(0.5, 2 * sums, sums, lengths)
    expected["token_rewards/largest_share"] = np.mean([3 / 6, 2 / 6, 5 / 6])
    assert metrics == pytest.approx(expected)
    assert words == {"displacement": panel.displacement(2 * sums, sums, lengths)}
    context.method = types.SimpleNamespace()  # of no beta: log-ratios themselves
    metrics, _ = panel.build(context, pairs, 2)({"nats": 2.0}, {"nats": 1.0})
    assert metrics["implicit/margins"] == pytest.approx((0 + 2 - 4) / 3)


def test_of_a_labelled_row_only_its_own_completion_is_looked_at():
    """Beside it KTO has a completion of another prompt."""
    tokens, mask = np.ones((2, 2, 3), np.int32), np.array([[[1, 1, 0], [1, 1, 1]], [[1, 1, 1], [1, 0, 0]]], bool)
    labels = np.array([[True, True], [False, True]])
    given = {"prompt_tokens": np.ones((2, 1), np.int32), "labels": labels}
    both = jax.tree.map(jnp.asarray, Batch.of(completion_tokens=tokens, completion_mask=mask, **given))
    logps, ref_logps = np.random.default_rng(0).normal(-2, 1, (2, 2, 2, 3)).astype(np.float32)
    found = panel.rows_of("labelled", both, jnp.asarray(logps), jnp.asarray(ref_logps))
    ratios = np.where(mask, logps - ref_logps, 0)[:, 0]
    np.testing.assert_array_equal(found["logps"], np.where(mask, logps, 0)[:, 0])
    np.testing.assert_array_equal(found["ref_logps"], np.where(mask, ref_logps, 0)[:, 0])
    np.testing.assert_allclose(found["largest_shares"], np.abs(ratios).max(-1) / np.abs(ratios).sum(-1), rtol=1e-6)
    assert found["lengths"].tolist() == [2, 3]
    assert found["labels"].tolist() == [True, False]
