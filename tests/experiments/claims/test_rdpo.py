"""rDPO's known answers: minimisers by closed form and table, biased and unbiased estimation, and divergence."""

import numpy as np
import pytest

from experiments.claims import rdpo


@pytest.mark.parametrize(
    ("logit", "flip_rate", "dpo", "cdpo", "robust"),
    [
        (2, 0.1, 1.41553609, 1.06534224, 2),
        (2, 0.3, 0.62924757, 0.24492725, 2),
        (2, 0.4, 0.30702698, 0.06094639, 2),
        (0.5, 0.3, 0.19656540, 0.07841413, 0.5),
    ],
)
def test_population_minimisers(logit, flip_rate, dpo, cdpo, robust):
    found = [rdpo.population_margin(name, logit, flip_rate) for name in ("dpo", "cdpo", "rdpo")]
    np.testing.assert_allclose(found, [dpo, cdpo, robust], rtol=0, atol=1e-7)


def test_estimation_is_biased_but_for_rdpo():
    runs = [rdpo.estimation(seed, sizes=(8000,)) for seed in range(6)]
    means = {name: np.mean([run[name] for run in runs]) for name in runs[0]}
    # Means (a median for rDPO) over 50 other draws are 0.07, 1.48, 1.80 and 0.26.
    np.testing.assert_allclose(means["clean dpo 8000"], 0.07, atol=0.03)
    np.testing.assert_allclose(means["dpo 8000"], 1.48, atol=0.06)
    np.testing.assert_allclose(means["cdpo 8000"], 1.80, atol=0.06)
    np.testing.assert_allclose(means["rdpo 8000"], 0.26, atol=0.12)


@pytest.mark.parametrize(("flip_rate", "distance"), [(0.1, 0.11), (0.4, 0.54)])
def test_the_error_grows_with_the_flip_rate(flip_rate, distance):
    """Median distance to the true weights at 8,000 pairs, of 50 other draws; here of 9."""
    found = []
    for seed in range(9):
        truth, _, noisy = rdpo.data(seed, 8000, flip_rate)
        found.append(np.linalg.norm(rdpo.fit("rdpo", noisy, flip_rate) - truth))
    np.testing.assert_allclose(np.median(found), distance, rtol=0.35)


def test_the_loss_has_a_minimum_where_the_condition_says_so():
    agreeing = np.abs(np.random.default_rng(0).normal(size=(20, 1)))
    for weight, expected in ((0.35, False), (0.5, True)):  # 0.3 / 0.7 = 0.43 of the agreeing mass is needed
        x = np.concatenate([agreeing, -weight * agreeing])
        assert rdpo.has_minimum(x, 0.3) == expected
        assert np.isfinite(rdpo.fit("rdpo", x, 0.3)).all() == expected
    assert rdpo.divergence(0, num_sets=4)["share where the condition agrees"] == 1
