"""KL estimators against published values: of tokens, and their expectations, variances and gradients, exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjpo import kl
from tests import online


@online.cases("kl_estimators")
def test_values_of_tokens(inputs, expected, dtype):
    with online.x64(dtype):
        logps, ref_logps = online.arrays(inputs, dtype, "logp", "ref_logp")
        for name, estimator in kl.ESTIMATORS.items():
            online.check(estimator(logps, ref_logps), expected[name], dtype)


def expectation(estimator, logits, ref_logits):
    """Under the policy, exactly."""
    logps, ref_logps = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref_logits)
    return jnp.exp(logps) @ estimator(logps, ref_logps)


def expected_gradient(estimator, logits, ref_logits):
    """What a loss on samples does on average: the samples' probabilities are constants to it."""
    return jax.grad(
        lambda x: (
            jnp.exp(jax.lax.stop_gradient(jax.nn.log_softmax(x)))
            @ estimator(jax.nn.log_softmax(x), jax.nn.log_softmax(ref_logits))
        )
    )(logits)


@online.cases("kl_exact")
def test_expectations_and_gradients(inputs, expected, dtype):
    with online.x64(dtype):
        logits, ref_logits = online.arrays(inputs, dtype, "logits", "ref_logits")
        for name, estimator in kl.ESTIMATORS.items():
            online.check(expectation(estimator, logits, ref_logits), expected[f"E_pi[{name}]"], dtype)
        online.check(expectation(kl.k1, ref_logits, logits), expected["KL(ref||pi)"], dtype)
        true = jax.grad(lambda x: expectation(kl.k1, x, ref_logits))(logits)
        online.check(true, expected["grad_logits KL(pi||ref) (= E_pi[d k2])"], dtype)
        for name, key in {
            "k1": "E_pi[d k1/d logits]",
            "k2": "grad_logits KL(pi||ref) (= E_pi[d k2])",
            "k3": "E_pi[d k3/d logits] (= pi - ref)",
        }.items():
            online.check(expected_gradient(kl.ESTIMATORS[name], logits, ref_logits), expected[key], dtype)
        online.check(
            expected_gradient(kl.k3, logits, ref_logits), jax.nn.softmax(logits) - jax.nn.softmax(ref_logits), dtype
        )


def test_an_example_with_its_variances():
    with online.x64("float64"):
        p, q = jnp.array([0.5, 0.3, 0.2]), jnp.array([0.2, 0.5, 0.3])
        means = {name: p @ f(jnp.log(p), jnp.log(q)) for name, f in kl.ESTIMATORS.items()}
        variances = {name: p @ (f(jnp.log(p), jnp.log(q)) - means[name]) ** 2 for name, f in kl.ESTIMATORS.items()}
        np.testing.assert_allclose(list(means.values()), [0.22380466, 0.26547879, 0.22380466], atol=1e-8)
        np.testing.assert_allclose([variances["k1"], variances["k3"]], [0.48086906, 0.00900469], atol=1e-8)
        slopes = {name: expected_gradient(f, jnp.log(p), jnp.log(q)) for name, f in kl.ESTIMATORS.items()}
        np.testing.assert_allclose(slopes["k1"], 0, atol=1e-12)
        np.testing.assert_allclose(slopes["k2"], [0.34624304, -0.22038908, -0.12585395], atol=1e-8)
        np.testing.assert_allclose(slopes["k3"], [0.3, -0.2, -0.1], atol=1e-12)


@pytest.mark.parametrize(("logp", "ref_logp"), [(-1e4, -1.0), (-1.0, -1e4)])
def test_finite_far_apart(logp, ref_logp):
    for estimator in kl.ESTIMATORS.values():
        value, slope = jax.value_and_grad(estimator)(jnp.float32(logp), jnp.float32(ref_logp))
        assert np.isfinite([value, slope]).all()
    np.testing.assert_allclose(kl.k3(jnp.float32(-1e4), jnp.float32(-1)), np.exp(20) - 21, rtol=1e-6)
