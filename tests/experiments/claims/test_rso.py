"""RSO's known answers: which policy each source of pairs leads to."""

import jax
import numpy as np
import pytest
from scipy import optimize

from experiments.claims import rso


@pytest.mark.parametrize(
    ("form", "source", "reward", "a"),
    [
        ("sigmoid_norm", "direct", 0.196064, 0.0045),
        ("sigmoid_norm", "sft-sample-rank", 0.414940, 0.5625),
        ("sigmoid_norm", "rso-sample-rank", 0.812242, 1.2633),
        ("hinge_norm", "direct", 0.478708, 0.6897),
        ("hinge_norm", "sft-sample-rank", 0.623926, 0.9524),
        ("hinge_norm", "rso-sample-rank", 0.856049, 1.3333),
    ],
)
def test_population_optima(form, source, reward, a):
    found = rso.population(form, source)
    np.testing.assert_allclose(found[1], a, atol=1e-4)
    np.testing.assert_allclose(found[0], reward, atol=2e-5)


@pytest.mark.parametrize("source", rso.SOURCES)
def test_the_hinge_s_optimum_reads_no_reference(source):
    """A plain search over the tilt for the least mean of max(0, 1 - gamma (log pi(winner) - log pi(loser)))."""
    tilts = np.linspace(-3, 6, 901)
    logps = np.log(rso.SFT)[None] + tilts[:, None] * rso.GRID
    margins = logps[:, :, None] - logps[:, None]  # the normaliser cancels
    p, rewards = rso.SOURCES[source], rso.REWARDS
    weights = np.outer(p, p) / (1 + np.exp(rewards[None] - rewards[:, None]))
    np.fill_diagonal(weights, 0)
    best = tilts[np.argmin((weights * np.maximum(0, 1 - 0.5 * margins)).sum((1, 2)))]
    assert rso.population("hinge", source)[1] == pytest.approx(best, abs=0.011)


def test_the_best_that_the_class_can_do():
    """Expected reward less beta times the KL to the SFT policy, which no policy of the class exceeds."""

    def objective(a):
        p = np.asarray(rso.policy(a), np.float64)
        return p @ rso.REWARDS - rso.BETA * p @ (np.log(p) - np.log(rso.SFT))

    with jax.enable_x64(True):
        found = optimize.minimize_scalar(lambda a: -objective(a), bounds=(-3, 6), method="bounded")
        np.testing.assert_allclose(-found.fun, 0.467403, atol=1e-6)
        reached = {source: objective(rso.population("sigmoid_norm", source)[1]) for source in rso.SOURCES}
    assert reached["direct"] < reached["sft-sample-rank"] < -found.fun
    assert reached["rso-sample-rank"] < -found.fun
