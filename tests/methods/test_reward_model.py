"""The Bradley-Terry loss against golden values: margins, centring, and ties that count half."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjpo.methods import reward_model
from pjpo.types import Batch
from tests.methods import golden
from tests.methods.contract import Contract

CONTRACT = Contract(
    configs=(reward_model.Config(center_weight=0.1, annotated_margins=True),),
    arguments=lambda rng, shape: {"scores": rng.normal(size=shape[:2]).astype(np.float32)},
)
SCORES = np.array([[1.2, 0.7], [-0.3, 0.4], [0.5, 0.5]])


def loss(config, dtype, rewards=None, rows=slice(None)):
    scores = jnp.asarray(SCORES[rows], dtype)
    batch = Batch.of(completion_tokens=jnp.zeros((*scores.shape, 1), jnp.int32), rewards=rewards)
    mean, metrics = reward_model.loss(config, batch, None, None, scores)
    assert mean.sum.dtype == dtype
    return mean.value(), {name: metric.value() for name, metric in metrics.items()}


@golden.in_both_dtypes
def test_golden_values(dtype, bound):
    with jax.enable_x64(dtype == "float64"):
        each = [loss(reward_model.Config(), dtype, rows=slice(i, i + 1))[0] for i in range(3)]
        np.testing.assert_allclose(each, [0.47407698, 1.10318605, 0.69314718], rtol=0, atol=bound)
        mean, metrics = loss(reward_model.Config(), dtype)
        np.testing.assert_allclose(mean, 0.75680340, rtol=0, atol=bound)
        np.testing.assert_allclose(metrics["accuracy"], 0.5)  # a win, a loss and a tie
        np.testing.assert_allclose(metrics["margin"], -0.2 / 3, atol=1e-6)
        np.testing.assert_allclose(metrics["mean_reward"], 0.5, atol=1e-6)
        needed = jnp.asarray([[0.2, 0.0], [0.3, 0.3], [1.5, 0.5]], dtype)
        mean, _ = loss(reward_model.Config(annotated_margins=True), dtype, needed)
        np.testing.assert_allclose(mean, 0.99026766, rtol=0, atol=bound)
        mean, _ = loss(reward_model.Config(center_weight=0.01), dtype)
        np.testing.assert_allclose(mean, 0.77220340, rtol=0, atol=bound)


def test_padding_reaches_no_gradient_whatever_it_holds():
    mask = np.array([[[True], [True]], [[False], [False]]])
    rewards = jnp.asarray([[1.0, 0.5], [jnp.nan, jnp.nan]])
    batch = Batch.of(completion_tokens=np.zeros(mask.shape, np.int32), completion_mask=mask, rewards=rewards)
    config = reward_model.Config(annotated_margins=True, center_weight=0.1)
    scores = jnp.asarray([[0.3, 0.1], [jnp.nan, jnp.inf]])
    gradient = jax.grad(lambda scores: reward_model.loss(config, batch, None, None, scores)[0].sum)(scores)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[1], 0)
    assert (gradient[0] != 0).all()


def test_margins_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="annotated_margins needs the batch's rewards"):
        loss(reward_model.Config(annotated_margins=True), "float32")
