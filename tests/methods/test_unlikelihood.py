"""Unlikelihood against the sums worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from pjpo.methods import unlikelihood
from pjpo.types import Batch

LOGPS = jnp.log(jnp.array([[[0.5, 0.25, 0.1], [0.2, 0.5, 0.7]], [[0.3, 0.9, 0.4], [0.6, 0.8, 0.5]]]))
MASK = np.array([[[True, True, False], [False, True, False]], [[True, True, True], [True, True, False]]])


def loss(logps):
    batch = Batch.of(completion_tokens=jnp.zeros((2, 2, 3), jnp.int32), completion_mask=jnp.array(MASK))
    return unlikelihood.loss(unlikelihood.Config(weight=0.1), batch, logps, None)


def test_chosen_up_and_a_tenth_of_that_rejected_down():
    mean, metrics = loss(LOGPS)
    chosen, rejected = np.log([0.5 * 0.25, 0.3 * 0.9 * 0.4]), np.log([0.5, 0.6 * 0.8])
    np.testing.assert_allclose(mean.value(), np.mean(0.1 * rejected - chosen), rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/margins"].value(), np.mean(chosen - rejected), rtol=1e-6)
    gradient = jax.grad(lambda logps: loss(logps)[0].value())(LOGPS)
    np.testing.assert_allclose(gradient, np.where(MASK, np.array([-0.5, 0.05])[None, :, None], 0), rtol=1e-6)
