"""The rejection sampler against golden uniforms, exact acceptance and the exact tilt; the pairs made of its draws."""

import math

import numpy as np
import pytest

from pjpo import rejection

GOLDEN = [0.3, 1.0, -0.5, 0.9, 0.3]
UNIFORMS = [0.95, 0.6, 0.04, 0.85, 0.3, 0.5, 0.5, 0.5, 0.5]
EIGHT = [0.1, 0.7, 0.4, 0.2, 0.9, 0.3, 0.8, 0.6]


def test_golden_passes():
    found = rejection.sample(GOLDEN, 3, 0.5, iter(UNIFORMS).__next__)
    assert found == rejection.Accepted([1, 2, 3], num_passes=2, num_uniforms=7)
    expected = [0.24659696, 1.0, 0.04978707, 0.81873075, 0.24659696]
    np.testing.assert_allclose(rejection.acceptance(np.array(GOLDEN), 0.5), expected, atol=1e-8)


def test_a_first_pass_accepts_as_often_as_the_tilt_says():
    rewards, rng = [0, 0.25, 0.5, 0.75, 1.0], np.random.default_rng(0)
    counts = np.zeros(5)
    for _ in range(20_000):
        uniforms = rng.random(5)
        counts += uniforms < rejection.acceptance(np.array(rewards), 0.5)
    np.testing.assert_allclose(counts / 20_000, [0.1353, 0.2231, 0.3679, 0.6065, 1.0], atol=0.01)


@pytest.mark.parametrize(("beta", "kept", "exact"), [(0.5, 2.59, 2.6928), (5.0, 1.21, 1.2107), (0.05, 2.75, 3.0)])
def test_what_is_kept_of_a_pool_has_the_reward_of_the_tilt_as_far_as_the_pool_goes(beta, kept, exact):
    levels, probabilities, rng = np.arange(4), np.array([0.4, 0.3, 0.2, 0.1]), np.random.default_rng(0)
    pools = rng.choice(levels, p=probabilities, size=(600, 64)).astype(float)
    chosen = np.take_along_axis(pools, rejection.select(pools, 8, beta, seed=0), axis=1)
    np.testing.assert_allclose(chosen.mean(), kept, atol=0.03)
    tilt = probabilities * np.exp(levels / beta - 3 / beta)
    np.testing.assert_allclose(tilt @ levels / tilt.sum(), exact, atol=1e-3)


def test_the_limits_of_beta_are_best_of_n_and_list_order():
    uniform = np.random.default_rng(0).random
    assert rejection.sample(EIGHT, 3, 0.0, uniform).indices == [4, 6, 1]
    assert rejection.sample(EIGHT, 3, math.inf, uniform).indices == [0, 1, 2]
    assert sorted(rejection.sample(EIGHT, 8, 0.1, np.random.default_rng(0).random).indices) == list(range(8))


def test_shuffled_candidates_of_equal_reward_are_kept_equally_often():
    chosen = rejection.select(np.zeros((4000, 4)), 2, 0.5, seed=1)
    np.testing.assert_allclose(np.bincount(chosen.ravel(), minlength=4) / 8000, 0.25, atol=0.02)


@pytest.mark.parametrize(
    ("rewards", "num_samples", "beta", "message"),
    [
        (GOLDEN, 6, 0.5, "num_samples must be within the pool, 1 to 5, got 6; sample more candidates"),
        (GOLDEN, 0, 0.5, "num_samples must be within the pool"),
        (GOLDEN, 2, -1.0, "beta must be >= 0, got -1.0"),
        (GOLDEN, 2, math.nan, "beta must be >= 0, got nan"),
        ([0.1, math.nan], 1, 0.5, "rewards must be finite"),
    ],
)
def test_what_cannot_be_sampled_is_refused(rewards, num_samples, beta, message):
    with pytest.raises(ValueError, match=message):
        rejection.sample(rewards, num_samples, beta, iter(UNIFORMS).__next__)


def test_golden_pairs():
    assert rejection.first_round(EIGHT) == [(1, 0), (2, 3), (4, 5), (6, 7)]
    expected = [(1, 0), (2, 3), (4, 5), (6, 7), (1, 2), (4, 6), (4, 1)]
    assert rejection.tournament(EIGHT) == expected


def test_an_odd_player_goes_on_unopposed():
    assert rejection.first_round([0.1, 0.2, 0.9]) == [(1, 0)]
    assert rejection.tournament([0.1, 0.2, 0.9]) == [(1, 0), (2, 1)]
    assert rejection.first_round([0.5, 0.5]) == [(0, 1)]  # the first of two equals


def test_golden_rewards_of_a_ranking_model():
    first, second = np.array([0.9, 0.4, 0.5]), np.array([0.2, 0.5, 0.5])
    np.testing.assert_allclose(rejection.rank_to_reward(first), [2.19722458, -0.40546511, 0], atol=1e-8)
    np.testing.assert_allclose(rejection.rank_to_reward(first, second), [1.73460106, -0.20067070, 0], atol=1e-8)
    assert rejection.rank_to_reward(np.array([1.0]))[0] == math.inf
    with pytest.raises(ValueError, match=r"within \[0, 1\]"):
        rejection.rank_to_reward(np.array([1.2]))
