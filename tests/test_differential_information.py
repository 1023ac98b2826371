"""Differential information against golden values and its identities."""

import math

import numpy as np
import pytest

from pjpo import differential_information as did

REF, TARGET = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])


def test_golden_values():
    q = did.information(TARGET, REF)
    np.testing.assert_allclose(q, [0.03896104, 0.10389610, 0.23376623, 0.62337662], atol=1e-8)
    rejected = did.rejected_distribution(REF, TARGET, 0.5)
    np.testing.assert_allclose(rejected, [0.57940668, 0.26610951, 0.11827089, 0.03621292], atol=1e-8)
    np.testing.assert_allclose(did.entropy(q), 0.99606894, atol=1e-8)
    np.testing.assert_allclose([did.entropy(REF), did.entropy(TARGET)], 1.27985423, atol=1e-8)
    row = did.preference(REF, rejected)[0]
    np.testing.assert_allclose(row, [0.5, 0.37979590, 0.28989795, 0.2], atol=1e-8)
    np.testing.assert_allclose(did.jensen_shannon(TARGET, REF), 0.10644014, atol=1e-8)
    np.testing.assert_allclose(did.kl(REF, TARGET), 0.45643482, atol=1e-8)


def test_the_condition_and_the_inverse():
    rejected = did.rejected_distribution(REF, TARGET, 0.5)
    tilted = did.information(TARGET, REF) ** 0.5
    np.testing.assert_allclose(did.information(REF, rejected), tilted / tilted.sum(), rtol=1e-12)
    np.testing.assert_allclose(did.target_distribution(REF, rejected, 0.5), TARGET, rtol=1e-12)
    margins = [np.log(p[0] / p[3]) for p in (TARGET, REF, rejected)]
    np.testing.assert_allclose(margins[0] - margins[1], (margins[1] - margins[2]) / 0.5, rtol=1e-12)


def test_the_estimate_is_exact_within_its_error_where_weights_are_tame():
    rng = np.random.default_rng(0)
    draws = rng.choice(4, p=REF, size=50_000)
    estimate, error = did.estimate_entropy(np.log(TARGET)[draws], np.log(REF)[draws], np.log(REF)[draws])
    assert abs(estimate - 0.99606894) < 4 * error
    assert 0 < error < 0.02
    estimates = [
        did.estimate_entropy(np.log(TARGET)[d], np.log(REF)[d], np.log(REF)[d])[0]
        for d in rng.choice(4, p=REF, size=(400, 2000))
    ]
    np.testing.assert_allclose(np.std(estimates), error * 5, rtol=0.15)  # a twenty-fifth of the samples


def test_what_cannot_be_divided_by_is_refused():
    gap = np.array([0.5, 0.0, 0.25, 0.25])
    for function in (did.target_distribution, did.rejected_distribution):
        for beta in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match=f"beta must be > 0 and finite, got {beta}"):
                function(REF, TARGET, beta)
        with pytest.raises(ValueError, match=r"probabilities of ref must be > 0, as they are divided by, got 0.0 at 1"):
            function(gap, TARGET, 0.5)
    with pytest.raises(ValueError, match="probabilities of rejected must be > 0"):
        did.target_distribution(REF, gap, 0.5)
    with pytest.raises(ValueError, match="probabilities of target must be > 0"):
        did.rejected_distribution(REF, gap, 0.5)


def test_a_target_of_no_mass_has_no_entropy_there():
    assert did.entropy(np.array([1.0, 0.0])) == 0
    assert did.kl(np.array([1.0, 0.0]), np.array([0.5, 0.5])) == pytest.approx(np.log(2))
