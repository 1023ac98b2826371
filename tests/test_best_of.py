"""Best of n against published values and all subsets."""

import itertools

import numpy as np
import pytest

from pjpo import best_of
from tests.online import CASES


def test_golden_values():
    (case,) = CASES["best_of_n"]
    rewards, nums, expected = np.array(case["inputs"]["rewards"]), case["inputs"]["n"], case["expected"]
    np.testing.assert_allclose([best_of.expected_best(rewards, n) for n in nums], expected["E[max of n]"], atol=2e-8)
    np.testing.assert_allclose([best_of.kl_bound(n) for n in nums], expected["KL bound"], atol=2e-8)


def test_all_subsets():
    rewards = np.random.default_rng(0).normal(size=(3, 6))
    for n in range(1, 7):
        expected = np.mean([rewards[:, subset].max(1) for subset in map(list, itertools.combinations(range(6), n))], 0)
        np.testing.assert_allclose(best_of.expected_best(rewards, n), expected, rtol=1e-12)


def test_many_samples():
    weights = best_of.weights(4096, 16)  # C(4096, 16) has 144 bits
    assert weights.dtype == np.float64
    np.testing.assert_allclose([weights.sum(), weights[-1]], [1, 16 / 4096], rtol=1e-12)


def test_the_best_of_n_as_a_policy():
    rng = np.random.default_rng(1)
    probabilities, rewards = rng.dirichlet(np.ones(5)), np.array([0.3, -1.0, 0.3, 2.0, 0.7])
    expected = np.zeros(5)
    for draws in itertools.product(range(5), repeat=3):  # the first of the best; with ties, each is it as often
        expected[max(draws, key=lambda i: rewards[i])] += probabilities[list(draws)].prod()
    found = best_of.distribution(probabilities, rewards, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    kl = (found * np.log(found / probabilities)).sum()
    assert 0 < kl <= best_of.kl_bound(3)
    np.testing.assert_allclose(best_of.distribution(probabilities, rewards, 1), probabilities, rtol=1e-12)


def test_a_completion_that_the_policy_never_gives_is_never_the_best():
    found = best_of.distribution(np.array([0.5, 0.5, 0.0]), np.array([0.0, 1.0, 2.0]), 2)
    np.testing.assert_allclose(found, [0.25, 0.75, 0], rtol=1e-12)


def test_what_cannot_be_is_refused():
    for n in (0, 5):
        with pytest.raises(ValueError, match=f"n must be in 1 to the 4 samples that there are, got {n}"):
            best_of.weights(4, n)
