"""The rejection sampler against golden uniforms, exact acceptance and the exact tilt; the pairs made of its draws."""

import collections
import itertools
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


def law(rewards, beta):
    """Exact probabilities of what the sampler keeps, two in order of three candidates, by all ways a pass can go."""

    def passes(places):
        """(probability, accepted) of one pass over these candidates, each accepted by itself."""
        chances = [math.exp((rewards[i] - max(rewards[j] for j in places)) / beta) for i in places]
        for kept in itertools.product([True, False], repeat=len(places)):
            each = [chance if keep else 1 - chance for chance, keep in zip(chances, kept, strict=True)]
            yield math.prod(each), [i for i, keep in zip(places, kept, strict=True) if keep]

    found = dict.fromkeys(itertools.permutations(range(3), 2), 0.0)
    for chance, accepted in passes((0, 1, 2)):
        if len(accepted) >= 2:
            found[tuple(accepted[:2])] += chance
        elif chance > 0:  # the best of a pass is always accepted
            rest = tuple(i for i in range(3) if i != accepted[0])
            for again, more in passes(rest):
                if again > 0:
                    found[accepted[0], more[0]] += chance * again
    return found


@pytest.mark.parametrize("rewards", [[0.2, 0.5, 0.9], [0.2, 0.9, 0.5]])
def test_the_sampler_keeps_ordered_pairs_as_often_as_its_law_says(rewards):
    num_trials, rng = 20_000, np.random.default_rng(0)
    exact = law(rewards, 0.5)
    assert sum(exact.values()) == pytest.approx(1)
    draws = (tuple(rejection.sample(rewards, 2, 0.5, rng.random).indices) for _ in range(num_trials))
    counts = collections.Counter(draws)
    for pair, chance in exact.items():
        error = math.sqrt(chance * (1 - chance) / num_trials)
        assert abs(counts[pair] / num_trials - chance) <= 4 * error, pair  # never, where it cannot be


def test_pools_may_be_lists_of_different_lengths():
    pools = [[0.1, 0.9, 0.4], [0.3, 0.2, 0.8, 0.7]]
    found = rejection.select(pools, 2, 0.0, seed=1)
    assert [set(row) for row in found.tolist()] == [{1, 2}, {2, 3}]
    array = np.array([[0.1, 0.9, 0.4], [0.3, 0.2, 0.8]])
    np.testing.assert_array_equal(
        rejection.select(array.tolist(), 2, 0.5, seed=1), rejection.select(array, 2, 0.5, seed=1)
    )


def test_nobody_plays_against_nan():
    for play in (rejection.first_round, rejection.tournament):
        with pytest.raises(ValueError, match="the reward at place 1 is nan; leave out"):
            play([0.5, math.nan, 0.1])
    assert rejection.tournament([-math.inf, math.inf]) == [(1, 0)]


def test_a_pairwise_model_of_scores_and_its_rewards_against_a_baseline():
    scores = np.array([[0.3, 1.5, -2.0], [400.0, 0.0, -400.0]])
    wins = rejection.rho(scores)
    np.testing.assert_allclose(wins[0, 0, 1], 1 / (1 + math.exp(1.2)))
    np.testing.assert_allclose(wins + wins.transpose(0, 2, 1), 1)
    for baseline in range(3):
        rewards = rejection.rank_to_reward(wins[0, :, baseline], wins[0, baseline])
        np.testing.assert_allclose(rewards, scores[0] - scores[0, baseline], atol=1e-12)
    assert wins[1, 0, 1] == 1.0
    assert 0 < wins[1, 1, 0] < 1e-150


def test_identical_candidates_are_counted_within_a_prompt():
    tokens = np.array([[[5, 6, 0], [5, 6, 9], [5, 6, 0], [5, 0, 0]], [[5, 6, 0], [7, 0, 0], [7, 0, 0], [7, 0, 0]]])
    mask = np.array([[[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]], [[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]]], bool)
    assert rejection.num_identical(tokens, mask) == 1 + 2


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
