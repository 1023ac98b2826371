"""Ranking accuracy, its idealised bound and Theorem 4.1 against golden values, and the theorem on any pairs."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from hypothesis.extra import numpy as arrays

from pjpo.evals import ranking

LOGPS = np.array([[-52.0, -36.0], [-30.25, -25.75], [-8.0, -9.5], [-20.0, -19.0]])
REF = np.array([[-60.0, -30.0], [-28.0, -27.0], [-8.25, -9.0], [-21.5, -17.25]])
LENGTHS = np.array([[40, 15], [12, 10], [4, 4], [9, 8]])
ALPHA = np.array([0.75, 0.75, 1.0, 0.625])


def losses(logps, ref_logps, beta):
    ratios = logps - ref_logps
    return np.logaddexp(0, -beta * (ratios[:, 0] - ratios[:, 1]))


def test_golden_values():
    np.testing.assert_allclose(ranking.difficulty(REF), [30, 1, -0.75, 4.25])
    expected = [0.04858735, 0.64439666, 0.73135014, 0.50305740]
    np.testing.assert_allclose(ranking.loss_threshold(REF, 0.1), expected, atol=1e-8)
    np.testing.assert_allclose(losses(LOGPS, REF, 0.1), [0.22041741, 0.88338216, 0.65635014, 0.54379260], atol=1e-8)
    assert ranking.ranked(LOGPS).tolist() == [False, False, True, False]
    assert ranking.accuracy(LOGPS) == 0.25


@pytest.mark.parametrize(
    ("beta", "raw", "normalised"), [(0.01, 1, 1), (0.1, 0.75, 1), (1, 0.5, 1), (5, 0.25, 0.75), (10, 0.25, 0.75)]
)
def test_golden_idealised_accuracies(beta, raw, normalised):
    assert ranking.idealised_accuracy(REF, ALPHA, beta) == raw  # not 1: log-probs are compared, not their ratio
    assert ranking.idealised_accuracy(REF, ALPHA, beta, LENGTHS) == normalised


def test_the_papers_constants():
    # Section 3: the range of beta; alpha of 0.999 where all raters agree; Definition C.1: alike within 0.01.
    assert (ranking.BETAS, ranking.CERTAIN, ranking.ALIKE) == ((0.01, 0.1, 1.0, 5.0, 10.0), 0.001, 0.01)


def test_rewards_are_ratios_and_raters_may_all_prefer_the_rejected():
    assert ranking.reward_accuracy(LOGPS, REF) == 0.75  # ratios 8 and -6; -2.25 and 1.25; 0.25 and -0.5; 1.5 and -1.75
    none, all_ = (ranking.idealised_margins(REF * 0, np.full(4, alpha), 1.0) for alpha in (0.0, 1.0))
    np.testing.assert_allclose(all_, np.log(999))
    np.testing.assert_allclose(none, -all_)
    assert ranking.idealised_accuracy(REF * 0, np.full(4, 0.5), 1.0) == 0  # a tie


def test_completions_of_one_token_and_of_none():
    logps = np.array([[-1.0, -3.0], [-2.0, 0.0]])
    np.testing.assert_array_equal(ranking.ranked(logps, np.array([[1, 4], [1, 0]])), [False, False])
    margins = ranking.idealised_margins(logps, np.full(2, 0.5), 1.0, np.array([[1, 4], [1, 0]]))
    np.testing.assert_allclose(margins, [-1 + 3 / 4, -2])


def test_where_the_reference_is_right_everywhere_nothing_is_flipped():
    right = np.array([[-1.0, -2.0]] * 2)
    assert ranking.flipped(right, right) == 0
    assert ranking.flipped(right, np.array([[-2.0, -1.0], [-1.0, -2.0]])) == 1


def test_the_gap_is_of_the_median():
    assert ranking.idealised_range(REF, ALPHA) == {"min": 0.25, "median": 0.5, "max": 1.0}
    assert ranking.alignment_gap(LOGPS, REF, ALPHA) == 0.25


def test_the_idealised_policy_is_the_optimum_of_the_dpo_objective():
    """Two responses: the optimum tilts the reference by the Bradley-Terry reward, log(alpha / (1 - alpha))."""
    ref, alpha, beta = np.array([0.3, 0.7]), 0.8, 0.5
    tilted = ref * np.exp(np.array([np.log(alpha / (1 - alpha)), 0]) / beta)
    tilted /= tilted.sum()
    found = ranking.idealised_margins(np.log(ref)[None], np.array([alpha]), beta)
    np.testing.assert_allclose(found, np.log(tilted[0] / tilted[1]), rtol=1e-12)


nats = strategies.floats(-200, -0.01)


@hypothesis.given(
    arrays.arrays(np.float64, (20, 2), elements=nats),
    arrays.arrays(np.float64, (20, 2), elements=nats),
    strategies.sampled_from([0.01, 0.1, 1.0]),
)
def test_a_pair_is_ranked_rightly_exactly_where_its_loss_is_below_the_threshold(logps, ref_logps, beta):
    margins = logps[:, 0] - logps[:, 1]
    clear = np.abs(margins) > 1e-9  # nearer, rounding decides
    below = losses(logps, ref_logps, beta) <= ranking.loss_threshold(ref_logps, beta)
    distinct = np.abs(losses(logps, ref_logps, beta) - ranking.loss_threshold(ref_logps, beta)) > 0
    kept = clear & distinct
    np.testing.assert_array_equal(ranking.ranked(logps)[kept], below[kept])
    right_reference = ranking.difficulty(ref_logps) <= 0
    low = losses(logps, ref_logps, beta) <= 0.6
    assert ranking.ranked(logps)[right_reference & low].all()  # Proposition 2.6


def test_no_pair_contradicts_the_theorem_and_those_that_would_are_counted(monkeypatch):
    rng = np.random.default_rng(0)
    logps, ref_logps = -np.exp(rng.normal(3, 1, (2, 500, 2)))
    for beta in (0.01, 1.0, 1e4):  # at the last most losses are below what float64 holds
        assert ranking.threshold_violations(logps, ref_logps, beta) == 0
    monkeypatch.setattr(ranking, "difficulty", lambda ref_logps: ref_logps[:, 0] - ref_logps[:, 1])
    found = ranking.threshold_violations(logps, ref_logps, 0.1)
    assert 0 < found < 500
    margins, ref_margins = logps[:, 0] - logps[:, 1], ref_logps[:, 0] - ref_logps[:, 1]
    contradict = (margins >= 0) != (margins >= 2 * ref_margins)
    assert found == np.sum(contradict)
    within = np.median(np.abs(margins)[contradict][:-1])  # an even number has no pair of its own in the middle
    assert within in np.abs(margins)
    apart = ranking.threshold_violations(logps, ref_logps, 0.1, within=within)
    assert 0 < apart == np.sum(contradict & (np.abs(margins) > within))
    assert ranking.threshold_violations(logps, ref_logps, 0.1, within=1e6) == 0


def test_the_papers_thresholds():
    ref = np.stack([-np.array([5.0, 30.0, 50.0]), np.zeros(3)], axis=1)
    np.testing.assert_allclose(ranking.loss_threshold(ref, 0.1), [0.474, 0.0486, 0.0067], atol=5e-4)


def test_ties_orders_and_lengths():
    tie = np.array([[-1.0, -1.0]])
    assert ranking.accuracy(tie) == 1.0
    assert ranking.reward_accuracy(tie, tie) == 0.0
    assert ranking.accuracy(np.array([[-10.0, -6.0]]), np.array([[10, 5]])) == 1.0
    assert ranking.accuracy(np.array([[-10.0, -6.0]])) == 0.0
    halves = np.log(np.array([[0.500, 0.495], [0.9, 0.1]]))
    assert ranking.accuracy_with_ties(halves, np.array([0.5, 0.5])) == 0.5
    assert ranking.order_accuracy(np.array([[-1.0, -2, -3], [-1, -3, -2], [-1, -1, -2]])) == pytest.approx(2 / 3)
    assert ranking.flipped(np.array([[-1.0, -2], [-3, -2]]), np.array([[-2.0, -1], [-2, -1]])) == 0.5


def test_what_is_no_share_or_no_beta_is_refused():
    with pytest.raises(ValueError, match=r"alpha is a share of raters, within \[0, 1\]"):
        ranking.idealised_accuracy(REF, np.array([0.5, 0.5, 0.5, 1.5]), 0.1)
    with pytest.raises(ValueError, match="beta must be > 0, got 0"):
        ranking.idealised_accuracy(REF, ALPHA, 0.0)


@hypothesis.given(
    arrays.arrays(np.float64, (12, 2), elements=nats),
    arrays.arrays(np.float64, (12, 2), elements=nats),
    strategies.permutations(range(12)),
    strategies.integers(1, 11),
)
def test_shares_of_pairs_know_neither_their_order_nor_how_they_are_cut(logps, ref_logps, order, cut):
    parts = [np.array(order[:cut]), np.array(order[cut:])]
    for share in (
        lambda rows: ranking.accuracy(logps[rows]),
        lambda rows: ranking.reward_accuracy(logps[rows], ref_logps[rows]),
    ):
        pooled = sum(len(rows) * share(rows) for rows in parts) / 12
        np.testing.assert_allclose(pooled, share(np.arange(12)), rtol=1e-12)


@hypothesis.given(arrays.arrays(np.float64, (12, 2), elements=strategies.sampled_from([-3.0, -2.0, -1.0])))
def test_turned_round_a_pair_is_ranked_the_other_way_and_a_tie_is_right_both_ways(logps):
    ties = np.mean(logps[:, 0] == logps[:, 1])
    assert ranking.accuracy(logps) + ranking.accuracy(logps[:, ::-1]) == pytest.approx(1 + ties)
    assert ranking.order_accuracy(logps) == ranking.accuracy(logps)
