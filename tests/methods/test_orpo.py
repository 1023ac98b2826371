"""ORPO against a loop in NumPy that follows the paper's equations, and at probabilities near one."""

import jax
import jax.numpy as jnp
import numpy as np

from pjpo.methods import orpo
from tests.methods import golden


@golden.in_both_dtypes
def test_the_papers_equations(dtype, bound):
    each, ratios, nlls = [], [], []
    for sums, lengths in zip(golden.POLICY, golden.LENGTHS, strict=True):
        chosen, rejected = np.exp(sums / lengths)  # Eq. 1: the likelihood is a geometric mean over tokens
        ratio = np.log(chosen / (1 - chosen)) - np.log(rejected / (1 - rejected))
        nlls.append(-np.log(chosen))
        ratios.append(ratio)
        each.append(-np.log(chosen) - 0.25 * np.log(1 / (1 + np.exp(-ratio))))
    config = orpo.Config(weight=0.25)
    case = golden.check(orpo, config, bound, dtype=dtype, reference=None, mean=np.mean(each), each=each)
    np.testing.assert_allclose(case.metrics["nll_loss"], np.mean(nlls), rtol=1e-5)
    np.testing.assert_allclose(case.metrics["log_odds_chosen"], np.mean(ratios), rtol=1e-5)
    np.testing.assert_allclose(case.metrics["log_odds_ratio"], -np.mean(np.log1p(np.exp(-np.array(ratios)))), rtol=1e-5)


def test_log_odds_are_finite_from_never_to_always():
    logps = jnp.array([-1e4, -50.0, -0.1, -1e-6, -1e-30, 0.0])
    odds, slopes = jax.vmap(jax.value_and_grad(orpo.log_odds))(logps)
    assert np.isfinite(odds).all()
    assert np.isfinite(slopes).all()
    np.testing.assert_allclose(odds[:3], [-1e4, -50, -0.1 - np.log(1 - np.exp(-0.1))], rtol=1e-6)
    assert np.all(np.diff(odds) >= 0)
