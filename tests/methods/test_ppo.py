"""PPO: the critic's loss against published values, token rewards by hand, and recomputed ratios that never clip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjpo.methods import ppo
from pjpo.types import Batch
from tests import online
from tests.methods.contract import Contract


def adapted(config):
    return config.adapted(0.1, 1.1, 64)


CONTRACT = Contract(
    configs=(
        ppo.Config(aggregation="sequence", old_logps="recompute", missing_end_score=-10.0),
        ppo.Config(aggregation="sequence_sum", beta=0.0),
    ),
    start=ppo.Config(kl_target=1.0),
    fields=lambda rng, shape: {"labels": rng.normal(size=shape).astype(np.float32)},
    arguments=lambda rng, shape: {"values": rng.normal(size=shape).astype(np.float32)},
    rollout=lambda rng, shape: {"truncated": rng.random(shape[:2]) < 0.3},
    also=adapted,
    nudged={
        "gamma": 0.9,
        "lam": 0.9,
        "aggregation": "sequence",
        "old_logps": "recompute",
        "missing_end_score": -10.0,
    },
    bad={
        "gamma": (-0.1, 1.1, float("nan")),
        "lam": (-0.1, 1.1, float("nan")),
        "aggregation": ("constant",),
        "old_logps": ("old",),
        "kl_target": (0.0, float("nan")),
        "kl_horizon": (0,),
        "missing_end_score": (float("nan"), float("inf")),
    },
)


@online.cases("value_loss")
def test_golden_value_losses(inputs, expected, dtype):
    with online.x64(dtype):
        names = ("values", "old_values", "returns", "mask")
        values, old_values, returns, mask = (x[:, None] for x in online.arrays(inputs, dtype, *names))
        zeros = jnp.zeros_like(values)
        batch = Batch.of(
            completion_tokens=jnp.zeros(mask.shape, jnp.int32),
            completion_mask=mask,
            advantages=zeros,
            values=old_values,
            labels=returns,
        )
        for how, key in (("token", "token-mean"), ("sequence", "seq-mean-token-mean")):
            config = ppo.Config(aggregation=how, value_clip=inputs["clip"], value_weight=0.5)
            mean, metrics = ppo.loss(config, batch, zeros, None, values)
            online.check(metrics["loss/value_avg"].value(), expected[key], dtype)
            online.check(2 * mean.value(), expected[key], dtype)


def test_defaults():
    """Those that the paper trained with."""
    found = ppo.Config()
    assert (found.epsilon_low, found.epsilon_high, found.value_clip, found.value_weight) == (0.2, 0.2, 0.2, 0.1)
    assert (found.gamma, found.lam, found.beta, found.aggregation) == (1.0, 0.95, 0.05, "token")
    assert (found.kl_target, found.missing_end_score, found.old_logps) == (None, None, "rollout")
    assert found.kl_horizon == 10_000
    assert ppo.Config(kl_horizon=1).kl_horizon == 1  # the least that is allowed


def test_needs_the_reference_for_the_pull():
    assert ppo.Config().needs_reference
    assert not ppo.Config(beta=0.0).needs_reference


def rollout(seed=0, shape=(4, 2, 6)):
    rng = np.random.default_rng(seed)
    mask = np.arange(shape[2])[None, None] < rng.integers(1, shape[2] + 1, shape[:2])[..., None]
    logps = -np.exp(rng.normal(size=shape))
    return Batch.of(
        completion_tokens=np.zeros(shape, np.int32),
        completion_mask=mask,
        rewards=rng.normal(size=shape[:2]),
        old_logps=logps,
        ref_logps=logps + 0.3 * rng.normal(size=shape),
        values=rng.normal(size=shape),
    )


def test_advantages_by_hand():
    with online.x64("float64"):
        batch = rollout()
        truncated = np.zeros((4, 2), bool)
        truncated[1, 1] = True
        config = ppo.Config(beta=0.2, gamma=0.9, lam=0.8, missing_end_score=-10.0)
        found = config.advantages(batch, truncated=truncated)
        advantages = np.zeros(batch.loss_mask.shape)
        for b, n in np.ndindex(4, 2):
            length = batch.loss_mask[b, n].sum()
            rewards = -0.2 * (batch.old_logps - batch.ref_logps)[b, n]
            rewards[length - 1] += -10.0 if truncated[b, n] else batch.rewards[b, n]
            after = 0.0
            for t in reversed(range(length)):
                value = batch.values[b, n, t]
                following = batch.values[b, n, t + 1] if t + 1 < length else 0.0
                after = advantages[b, n, t] = rewards[t] + 0.9 * following - value + 0.9 * 0.8 * after
        mask = batch.loss_mask
        rewards = ppo.token_rewards(config, batch, jnp.asarray(batch.rewards))
        np.testing.assert_array_equal(rewards[~mask], 0)
        np.testing.assert_allclose(found.labels, np.where(mask, advantages + batch.values, 0), rtol=1e-12)
        white = (advantages - advantages[mask].mean()) / advantages[mask].std(ddof=1)
        np.testing.assert_allclose(found.advantages, np.where(mask, white, 0), atol=1e-7)


def test_the_return_is_the_sum_of_a_completions_token_rewards():
    with online.x64("float64"):
        batch, truncated = rollout(), np.zeros((4, 2), bool)
        truncated[1, 1], loss_mask = True, batch.loss_mask.copy()
        loss_mask[0, 0] = False
        batch = dataclasses.replace(batch, loss_mask=loss_mask)
        found = ppo.Config(missing_end_score=-10.0).rollout_metrics(batch, beta=0.3, truncated=truncated)
        drift = np.where(loss_mask, batch.old_logps - batch.ref_logps, 0).sum(-1)
        returns = np.where(truncated, -10.0, batch.rewards) - 0.3 * drift
        np.testing.assert_allclose(found["returns/mean"].value(), returns.reshape(-1)[1:].mean(), rtol=1e-12)


def test_beta_may_be_what_it_has_adapted_to():
    batch = rollout()
    found, expected = ppo.Config().advantages(batch, beta=0.3), ppo.Config(beta=0.3).advantages(batch)
    np.testing.assert_array_equal(found.advantages, expected.advantages)


def test_the_controller_moves_beta_towards_its_target():
    config = ppo.Config(kl_target=6.0, kl_horizon=10_000)
    # Ziegler et al. 2019, section 2.2: the error is clipped to +-0.2.
    np.testing.assert_allclose(config.adapted(0.1, 6.6, 256), 0.1 * (1 + 0.1 * 256 / 10_000), rtol=1e-6)
    np.testing.assert_allclose(config.adapted(0.1, 60.0, 256), 0.1 * (1 + 0.2 * 256 / 10_000), rtol=1e-6)
    np.testing.assert_allclose(config.adapted(0.1, 0.0, 256), 0.1 * (1 - 0.2 * 256 / 10_000), rtol=1e-6)
    assert ppo.Config().adapted(0.1, 60.0, 256) == 0.1


def test_recomputed_ratios_make_it_an_actor_critic_that_never_clips():
    with online.x64("float64"):
        batch = ppo.Config().advantages(rollout(1))
        rng = np.random.default_rng(2)
        logps, values = (jnp.asarray(x + rng.normal(size=x.shape)) for x in (batch.old_logps, batch.values))
        config = ppo.Config(old_logps="recompute")

        def loss(config, logps, values):
            mean, metrics = ppo.loss(config, batch, logps, None, values)
            return mean.value(), metrics

        def actor_critic(logps, values):  # A2C: log-prob times advantage, and half the squared error
            policy, critic = -batch.advantages * logps, 0.5 * (values - batch.labels) ** 2
            return jnp.where(batch.loss_mask, policy + 0.1 * critic, 0).sum() / batch.loss_mask.sum()

        gradient, metrics = jax.grad(loss, argnums=(1, 2), has_aux=True)(config, logps, values)
        expected = jax.grad(actor_critic, argnums=(0, 1))(logps, values)
        for found, slope in zip(gradient, expected, strict=True):
            np.testing.assert_allclose(found, slope, atol=1e-12)
        for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "val/clipfrac_avg"):
            assert metrics[name].value() == 0
        _, metrics = jax.grad(loss, argnums=1, has_aux=True)(ppo.Config(), logps, values)
        assert metrics["clip_ratio/region_mean"].value() > 0.1
        assert metrics["val/clipfrac_avg"].value() > 0.1


def test_what_is_missing_is_refused():
    batch = rollout()

    def without(name):
        return dataclasses.replace(batch, **{name: None})

    with pytest.raises(ValueError, match="ppo: the rollout has no rewards"):
        ppo.Config().advantages(without("rewards"))
    with pytest.raises(ValueError, match="ppo: the rollout has no values"):
        ppo.Config().advantages(without("values"))
    with pytest.raises(ValueError, match=r"ppo: beta 0.05 needs the rollout's old_logps and ref_logps"):
        ppo.Config().advantages(without("ref_logps"))
    with pytest.raises(ValueError, match="ppo: missing_end_score asks which completions were cut off"):
        ppo.Config(missing_end_score=-10.0).advantages(batch)
    scored = ppo.Config().advantages(batch)
    for name, what in (("advantages", "advantages"), ("labels", "returns")):
        one = dataclasses.replace(scored, **{name: None})
        with pytest.raises(ValueError, match=f"ppo: the batch has no {what}"):
            ppo.loss(ppo.Config(), one, jnp.asarray(batch.old_logps), None, jnp.asarray(batch.values))
    with pytest.raises(ValueError, match="ppo: beta must be > 0"):
        ppo.Config(kl_target=6.0, beta=0.0)
