"""DPO against published golden values, its gradient by the paper's formula, and the optimum that the theory names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjpo.methods import dpo
from pjpo.types import Batch
from tests.methods import golden


def make_batch(mask):
    return Batch.of(completion_tokens=jnp.zeros(mask.shape, jnp.int32), completion_mask=jnp.asarray(mask))


@golden.in_both_dtypes
def test_golden_values(dtype, bound):
    case = golden.check(
        dpo,
        dpo.Config(beta=0.1),
        bound,
        dtype=dtype,
        mean=0.72804299,
        each=[0.64439666, 0.88338216, 0.65635014],
        gradient=golden.opposite([-0.01583403, -0.01955392, -0.01604196]),
    )
    expected = {
        "rewards/chosen": np.mean([0.05, -0.225, 0.025]),
        "rewards/rejected": np.mean([-0.05, 0.125, -0.05]),
        "rewards/margins": np.mean([0.1, -0.35, 0.075]),
        "rewards/accuracies": 0.66666667,
        "logps/chosen": golden.POLICY[:, 0].mean(),
        "logps/rejected": golden.POLICY[:, 1].mean(),
    }
    assert case.metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(case.metrics[name], value, rtol=1e-6, atol=bound, err_msg=name)


@golden.in_both_dtypes
def test_golden_values_at_extremes(dtype, bound):
    # In float32 sums near 1e4 of ten tokens keep 1e-3, a tenth of which is left by beta.
    golden.check(
        dpo,
        dpo.Config(beta=0.1),
        bound if dtype == "float64" else 1e-3,
        dtype=dtype,
        policy=golden.EXTREME,
        reference=np.full((2, 2), -100.0),
        lengths=np.full((2, 2), 10),
        mean=400,
        each=[0, 800],
        gradient=golden.opposite([0, -0.05]),
    )


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0, 5.0])
def test_the_gradient_is_the_papers(beta):
    # Its section 4: -beta sigmoid(r_rejected - r_chosen) [grad log pi(chosen) - grad log pi(rejected)], averaged.
    rng = np.random.default_rng(0)
    policy, reference = rng.normal(size=(2, 6, 2)) * 5 - 20
    lengths = rng.integers(1, 9, (6, 2))
    case = golden.Case(dpo, dpo.Config(beta=beta), policy, reference, lengths)
    rewards = beta * (policy - reference)
    weight = 1 / (1 + np.exp(rewards[:, 0] - rewards[:, 1]))
    expected = -beta / 6 * weight[:, None] * [1, -1]
    np.testing.assert_allclose(case.gradient, np.where(case.mask, expected[:, :, None], 0), rtol=0, atol=1e-12)


def test_equal_policy_and_reference_lose_log_2_and_win_nothing():
    case = golden.Case(dpo, dpo.Config(), reference=golden.POLICY, dtype="float32")
    np.testing.assert_allclose(case.mean, np.log(2), rtol=0, atol=1e-6)
    logps = jnp.zeros((2, 2, 3))
    batch = make_batch(np.ones((2, 2, 3), bool))
    assert dpo.loss(dpo.Config(), batch, logps, logps)[1]["rewards/accuracies"].value() == 0  # a tie is no success


@pytest.mark.parametrize(
    ("beta", "reward", "kl"),
    [
        (0.25, 2.96268749, 2.11636471),
        (0.5, 2.69277466, 1.39880433),
        (1.0, 2.08359884, 0.53564290),
        (2.0, 1.55129941, 0.14095738),
        (5.0, 1.21073713, 0.02140865),
    ],
)
def test_the_optimum_is_the_reference_tilted_by_the_reward(beta, reward, kl):
    """One prompt, four responses, all ordered pairs with soft labels; convex, so Newton's method finds the minimum."""
    with jax.enable_x64(True):
        ref, rewards = jnp.array([0.4, 0.3, 0.2, 0.1]), jnp.arange(4.0)
        chosen, rejected = np.array([(i, j) for i in range(4) for j in range(4) if i != j]).T
        weights = ref[chosen] * ref[rejected] * jax.nn.sigmoid(rewards[chosen] - rewards[rejected])

        def pair(logps, i, j):
            batch = make_batch(np.ones((1, 2, 1), bool))
            pairs = jnp.stack([i, j])[None, :, None]
            return dpo.loss(dpo.Config(beta=beta), batch, logps[pairs], jnp.log(ref)[pairs])[0].value()

        def population(free):
            logps = jax.nn.log_softmax(jnp.concatenate([jnp.zeros(1), free]))
            # With soft labels a pair counts in both orders, which the sum over ordered pairs holds already.
            losses = jax.vmap(pair, in_axes=(None, 0, 0))(logps, jnp.asarray(chosen), jnp.asarray(rejected))
            return jnp.sum(weights * losses)

        slope, curvature = jax.jit(jax.grad(population)), jax.jit(jax.hessian(population))
        free = jnp.log(ref[1:] / ref[0])
        for _ in range(50):
            step = jnp.linalg.solve(curvature(free), slope(free))
            free = free - step * jnp.minimum(1, 2 / jnp.abs(step).max())
        found = jax.nn.softmax(jnp.concatenate([jnp.zeros(1), free]))
        tilted = ref * jnp.exp(rewards / beta)
        np.testing.assert_allclose(found, tilted / tilted.sum(), rtol=0, atol=1e-6)
        np.testing.assert_allclose(found @ rewards, reward, rtol=0, atol=1e-7)
        np.testing.assert_allclose(found @ jnp.log(found / ref), kl, rtol=0, atol=1e-7)
