"""Sums of log-probs spread over ragged tokens, so that published values for sums check losses of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjpo.types import Batch

# Three pairs: chosen and rejected, under the policy and the reference, and how long they are.
POLICY = np.array([[-12.5, -14.0], [-30.25, -25.75], [-8.0, -9.5]])
REFERENCE = np.array([[-13.0, -13.5], [-28.0, -27.0], [-8.25, -9.0]])
LENGTHS = np.array([[5, 6], [12, 10], [4, 4]])
EXTREME = np.array([[-100.0, -8100.0], [-8100.0, -100.0]])  # against -100 everywhere under the reference

in_both_dtypes = pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-8), ("float32", 1e-5)])


def tokens(sums, lengths, seed):
    """Token log-probs [..., T] with the sums given over the first `lengths`, and noise after them."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(*sums.shape, lengths.max()))
    for place in np.ndindex(sums.shape):
        own = values[place][: lengths[place]]
        own += (sums[place] - own.sum()) / len(own)
    return values


class Case:
    """The loss of sums [B, N] spread over tokens: `mean`, `each` row's own, `metrics`, `gradient` and its `mask`."""

    def __init__(self, module, config, policy=POLICY, reference=REFERENCE, lengths=LENGTHS, dtype="float64", **fields):
        self.mask = np.arange(lengths.max())[None, None] < lengths[:, :, None]

        def value(logps, ref_logps, rows=slice(None)):
            batch = Batch.of(
                completion_tokens=jnp.zeros(self.mask[rows].shape, jnp.int32),
                completion_mask=jnp.asarray(self.mask[rows]),
                **{name: jnp.asarray(values[rows]) for name, values in fields.items()},
            )
            ref_logps = None if ref_logps is None else ref_logps[rows]
            mean, metrics = module.loss(config, batch, logps[rows], ref_logps)
            return mean.value(), metrics

        with jax.enable_x64(dtype == "float64"):
            logps = jnp.asarray(tokens(policy, lengths, 0), dtype)
            ref_logps = None if reference is None else jnp.asarray(tokens(reference, lengths, 1), dtype)
            (self.mean, metrics), self.gradient = jax.value_and_grad(value, has_aux=True)(logps, ref_logps)
            self.metrics = {name: float(mean.value()) for name, mean in metrics.items()}
            self.each = np.array([value(logps, ref_logps, slice(i, i + 1))[0] for i in range(len(policy))])
        assert self.mean.dtype == dtype


def check(module, config, bound, *, mean, each=None, gradient=None, **inputs):
    """Compare with the values of sums: a token's gradient is its sum's, where it is counted, and zero elsewhere."""
    case = Case(module, config, **inputs)
    scale = {"rtol": 0 if case.mean.dtype == "float64" else bound, "atol": bound}
    np.testing.assert_allclose(case.mean, mean, **scale)
    if each is not None:
        np.testing.assert_allclose(case.each, each, **scale)
    if gradient is not None:
        gradient = np.asarray(gradient)[:, :, None]
        np.testing.assert_allclose(case.gradient, np.where(case.mask, gradient, 0), **scale)
    return case


def opposite(chosen):
    """Gradients [B, 2] that push chosen and rejected apart with the same force."""
    return np.array(chosen)[:, None] * [1, -1]
