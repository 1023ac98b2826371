"""RSO's known answers: which policy each source of pairs leads to."""

import numpy as np
import pytest

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
