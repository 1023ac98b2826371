"""Recovery of the target by reward and beta, and entropies by target, against known answers."""

import jax
import numpy as np
import pytest

from experiments.claims import differential_information as claims
from pjpo import differential_information as did


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_recovery(beta):
    expected = {
        "log-ratio": 0.0,
        "half reference": 0.0430,
        "reference-free": 0.1965,
        "log-odds": {0.1: 0.2451, 0.5: 0.1498, 1.0: 0.1576}[beta],
    }
    with jax.enable_x64(True):
        ref, target, weights = claims.problem(1, beta)
        np.testing.assert_allclose(did.jensen_shannon(ref, target), 0.32338201, atol=1e-7)
        for reward, divergence in expected.items():
            found = did.jensen_shannon(claims.minimiser(reward, ref, weights, beta), target)
            np.testing.assert_allclose(found, divergence, atol=1e-7 if reward == "log-ratio" else 6e-5, err_msg=reward)


@pytest.mark.parametrize(
    ("power", "information", "target", "mode"),
    [
        (2.0, 0.336374, 0.073667, 0.768541),
        (1.5, 0.890440, 0.138162, 0.573999),
        (0.8, 0.996574, 0.541361, -0.615863),
        (0.5, 0.985777, 0.890440, -2.646358),
    ],
)
def test_entropies(power, information, target, mode):
    found = claims.regime(power)
    np.testing.assert_allclose(list(found.values()), [information, target, mode], atol=1e-6)


def test_estimates_scatter_by_more_than_their_errors_say():
    found = claims.estimation(0)
    np.testing.assert_allclose(found["exact"], 8.2013, atol=1e-4)
    assert abs(found["100000 samples"] - found["exact"]) < abs(found["32 samples"] - found["exact"])
