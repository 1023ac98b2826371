"""Ranking, flips and thresholds of independent pairs, against the normal distribution."""

import numpy as np
import pytest
from scipy import stats

from experiments.claims import ranking as claims
from pjpo.evals import ranking


@pytest.mark.parametrize(
    ("mean_loss", "accuracy", "flipped"), [(0.6, 0.5390, 0.0780), (0.5, 0.5857, 0.1713), (0.4, 0.6386, 0.2773)]
)
def test_pairs_move_alike(mean_loss, accuracy, flipped):
    logps, ref_logps, reached = claims.descend(0, mean_loss)
    margin = -np.log(np.exp(reached) - 1) / claims.BETA
    found = ranking.accuracy(logps), ranking.flipped(logps, ref_logps)
    expected = stats.norm.cdf(margin / claims.WIDTH)
    np.testing.assert_allclose(found, [expected, 2 * expected - 1], atol=0.012)
    np.testing.assert_allclose(found, [accuracy, flipped], atol=0.025)
    assert ranking.reward_accuracy(logps, ref_logps) == 1


def test_idealised_accuracies():
    ref_logps = np.stack([np.zeros(20_000), np.random.default_rng(0).normal(0, 20, 20_000)], axis=1)
    found = [ranking.idealised_accuracy(ref_logps, np.full(20_000, 0.8), beta) for beta in ranking.BETAS]
    np.testing.assert_allclose(found, [1.0, 0.7559, 0.5276, 0.5055, 0.5028], atol=0.012)
