"""SFT against a loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np

from pjpo.methods import sft
from pjpo.types import Batch

LOGPS = jnp.log(jnp.array([[[0.5, 0.25, 0.1], [0.2, 0.5, 0.7]], [[0.3, 0.9, 0.4], [0.6, 0.8, 0.5]]]))
MASK = np.array([[[True, True, False], [False, True, False]], [[True, True, True], [False] * 3]])


def loss(logps):
    return sft.loss(
        sft.Config(),
        Batch.of(completion_tokens=jnp.zeros((2, 2, 3), jnp.int32), completion_mask=jnp.array(MASK)),
        logps,
        None,
    )


def test_the_mean_is_over_tokens_of_the_whole_batch():
    mean, metrics = loss(LOGPS)
    tokens = [0.5, 0.25, 0.5, 0.3, 0.9, 0.4]
    np.testing.assert_allclose(mean.value(), -np.mean(np.log(tokens)), rtol=1e-6)
    assert mean.count == 6
    completions = [np.log(0.5 * 0.25), np.log(0.5), np.log(0.3 * 0.9 * 0.4)]  # the empty one is not counted
    np.testing.assert_allclose(metrics["logps/completion"].value(), np.mean(completions), rtol=1e-6)


def test_every_token_pulls_alike():
    gradient = jax.grad(lambda logps: loss(logps)[0].value())(LOGPS)
    np.testing.assert_allclose(gradient, np.where(MASK, -1 / 6, 0), rtol=1e-6)
