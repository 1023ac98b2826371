"""GRPO and its relatives: the published values through loss and advantages, KL by place, presets, and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjpo import kl
from pjpo.methods import grpo
from pjpo.types import Batch
from tests import online
from tests.methods.contract import Contract

START = grpo.Config(aggregation="constant", max_completion_tokens=7)
CONTRACT = Contract(
    configs=(
        grpo.RLOO,
        dataclasses.replace(grpo.REINFORCE_PP, importance="cispo", kl="k2"),
        grpo.Config(baseline="reinforce_pp_baseline", importance="sequence_token", dual_clip=3.0, kl="k2"),
        dataclasses.replace(grpo.DR_GRPO, importance="sequence", std="batch", max_completion_tokens=7),
    ),
    start=START,
    nudged={
        "baseline": "leave_one_out",
        "std": "none",
        "importance": "sequence",
        "dual_clip": 1.01,
        "aggregation": "token",
        "kl": "k2",
        "kl_in": "reward",
    },
    bad={
        "baseline": ("mean",),
        "std": ("prompt",),
        "importance": ("tokens",),
        "aggregation": ("mean",),
        "kl": ("k4",),
        "kl_in": ("losses",),
        "dual_clip": (1.0, -3.0, float("nan")),
        "max_completion_tokens": (0, -1),
    },
)


@online.cases("clipped_surrogate")
def test_golden_losses(inputs, expected, dtype):
    with online.x64(dtype):
        logps, old_logps, mask = (x[:, None] for x in online.arrays(inputs, dtype, "logp", "old_logp", "mask"))
        batch = Batch.of(
            completion_tokens=jnp.zeros(mask.shape, jnp.int32),
            completion_mask=mask,
            advantages=jnp.asarray(inputs["advantages_per_sequence"], dtype)[:, None],
            old_logps=old_logps,
        )
        limit = {"max_completion_tokens": inputs["dr_grpo_max_len"]}
        for config, key in (
            (dataclasses.replace(grpo.GRPO, beta=0.0), "loss(eps=0.2)/seq-mean-token-mean"),
            (dataclasses.replace(grpo.DR_GRPO, **limit), "loss(eps=0.2)/dr-grpo"),
            (grpo.DAPO, "loss(low=0.2,high=0.28)/token-mean"),
            (grpo.GSPO, "gspo_loss(low=3e-4,high=4e-4)/seq-mean-token-mean"),
            (grpo.RLOO, "loss(eps=0.2)/seq-mean-token-sum"),
            (grpo.REINFORCE_PP, "loss(eps=0.2)/token-mean"),
            (dataclasses.replace(grpo.DAPO, epsilon_high=0.2, dual_clip=3.0), "loss(eps=0.2,dual_clip=3)/token-mean"),
        ):
            mean, _ = grpo.loss(config, batch, logps, None)
            online.check(mean.value(), expected[key], dtype)


@online.cases("group_advantage")
def test_golden_advantages(inputs, expected, dtype):
    with online.x64(dtype):
        (rewards,) = online.arrays(inputs, dtype, "rewards")
        rollout = Batch.of(completion_tokens=jnp.zeros((*rewards.shape, 3), jnp.int32), rewards=rewards)
        for config, key in (
            (grpo.GRPO, "grpo(ddof=1,eps=1e-4)"),
            (dataclasses.replace(grpo.GRPO, std_ddof=0, std_eps=1e-8), "grpo(ddof=0,eps=1e-8)"),
            (dataclasses.replace(grpo.GRPO, std="batch"), "batch_std(ddof=1,eps=1e-4)"),
            (grpo.DR_GRPO, "dr_grpo"),
            (dataclasses.replace(grpo.RLOO, beta=0.0), "rloo"),
        ):
            online.check(config.advantages(rollout).advantages, expected[key], dtype)
            if np.asarray(inputs["rewards"]).dtype.kind == "i":  # also as they are
                whole = dataclasses.replace(rollout, rewards=jnp.asarray(inputs["rewards"]))
                online.check(config.advantages(whole).advantages, expected[key], dtype)


@pytest.mark.parametrize("baseline", ["group", "leave_one_out", "reinforce_pp_baseline"])
def test_a_completion_that_is_masked_for_its_length_stays_in_its_prompts_mean(baseline):
    loss_mask = np.ones((2, 4, 1), bool)
    loss_mask[0, 2] = False
    rewards = np.array([[1, 0, -9, 0.5], [1, -1, 1, -1]])
    batch = Batch.of(
        completion_tokens=np.zeros(loss_mask.shape, np.int32),
        completion_mask=np.ones(loss_mask.shape, bool),
        loss_mask=loss_mask,
        rewards=rewards,
    )
    found = grpo.Config(baseline=baseline, std="none", beta=0.0).advantages(batch).advantages.reshape(2, 4)
    centred = rewards - rewards.mean(1, keepdims=True)
    scale = (found[1, 0] - found[1, 1]) / (centred[1, 0] - centred[1, 1])  # whitening shifts and scales all alike
    np.testing.assert_allclose(found[0, [0, 1, 3]] - found[1, 0], scale * (centred[0, [0, 1, 3]] - 1), rtol=1e-5)


def test_presets_differ_in_numbers():
    found = {
        name: (c.epsilon_low, c.epsilon_high, c.beta, c.kl, c.kl_in)
        for name in ("GRPO", "DR_GRPO", "DAPO", "GSPO", "RLOO", "REINFORCE_PP")
        for c in [getattr(grpo, name)]
    }
    assert found == {
        "GRPO": (0.2, 0.2, 0.04, "k3", "loss"),
        "DR_GRPO": (0.2, 0.2, 0.0, "k3", "loss"),
        "DAPO": (0.2, 0.28, 0.0, "k3", "loss"),
        "GSPO": (3e-4, 4e-4, 0.0, "k3", "loss"),
        "RLOO": (0.2, 0.2, 0.05, "k1", "reward"),
        "REINFORCE_PP": (0.2, 0.2, 0.01, "k1", "reward"),
    }
    assert [name for name in found if getattr(grpo, name).needs_reference] == ["GRPO", "RLOO", "REINFORCE_PP"]
    assert (grpo.GRPO.std_ddof, grpo.GRPO.std_eps, grpo.DR_GRPO.max_completion_tokens) == (1, 1e-4, 3000)


def rollout(seed=0, shape=(4, 3, 5)):
    rng = np.random.default_rng(seed)
    mask = np.arange(shape[2])[None, None] < rng.integers(1, shape[2] + 1, shape[:2])[..., None]
    logps = -np.exp(rng.normal(size=shape))
    return Batch.of(
        completion_tokens=np.zeros(shape, np.int32),
        completion_mask=mask,
        rewards=rng.normal(size=shape[:2]),
        old_logps=logps,
        ref_logps=logps + 0.3 * rng.normal(size=shape),
    )


def test_kl_in_the_reward_is_a_completions_or_a_tokens():
    with online.x64("float64"):
        batch = rollout()
        mask, k1 = batch.loss_mask, batch.old_logps - batch.ref_logps
        less = batch.rewards - 0.05 * np.where(mask, k1, 0).sum(-1)
        others = (less.sum(1, keepdims=True) - less) / 2
        np.testing.assert_allclose(grpo.RLOO.advantages(batch).advantages, less - others, rtol=1e-12)

        sums = np.zeros(mask.shape)
        for b, n in np.ndindex(less.shape):
            own = -0.01 * k1[b, n][mask[b, n]]
            own[-1] += batch.rewards[b, n]
            sums[b, n, : len(own)] = own[::-1].cumsum()[::-1]
        white = (sums - sums[mask].mean()) / sums[mask].std(ddof=1)
        found = grpo.REINFORCE_PP.advantages(batch).advantages
        np.testing.assert_allclose(found, np.where(mask, white, 0), atol=1e-7)


def test_without_kl_in_the_reward_lengths_change_no_advantage():
    with online.x64("float64"):
        batch = rollout(3)
        assert np.ptp(batch.loss_mask.sum(-1))
        centred = batch.rewards - batch.rewards.mean(1, keepdims=True)
        np.testing.assert_allclose(grpo.DR_GRPO.advantages(batch).advantages, centred, rtol=1e-12)


@pytest.mark.parametrize("name", kl.ESTIMATORS)
def test_kl_in_the_loss_is_added_to_each_token(name):
    with online.x64("float64"):
        batch = rollout(1)
        batch = dataclasses.replace(batch, advantages=batch.rewards)
        logps, ref_logps = jnp.asarray(batch.old_logps), jnp.asarray(batch.ref_logps)
        without, _ = grpo.loss(grpo.Config(beta=0.0), batch, logps, None)
        config = grpo.Config(beta=0.3, kl=name)
        found, metrics = grpo.loss(config, batch, logps, ref_logps)
        each = np.asarray(kl.ESTIMATORS[name](logps, ref_logps))
        means = np.where(batch.loss_mask, each, 0).sum(-1) / batch.loss_mask.sum(-1)
        np.testing.assert_allclose(found.value() - without.value(), 0.3 * means.mean(), rtol=1e-10)
        k3 = np.asarray(kl.k3(logps, ref_logps))[batch.loss_mask].mean()
        np.testing.assert_allclose(metrics["kl"].value(), k3, rtol=1e-10)


def test_a_reward_that_failed_is_left_out():
    with online.x64("float64"):
        batch = rollout(2)
        rewards = batch.rewards.copy()
        rewards[1, 2] = np.nan
        for config in (grpo.DR_GRPO, grpo.RLOO):
            config = dataclasses.replace(config, beta=0.0)
            found = config.advantages(dataclasses.replace(batch, rewards=rewards))
            alone = jax.tree.map(lambda x: x[1:2, :2], dataclasses.replace(batch, prompt_tokens=None, prompt_mask=None))
            np.testing.assert_allclose(found.advantages[1, :2], config.advantages(alone).advantages[0])
            assert found.advantages[1, 2] == 0
        found = grpo.REINFORCE_PP.advantages(dataclasses.replace(batch, rewards=rewards)).advantages
        assert np.isfinite(found).all()
        np.testing.assert_array_equal(found[1, 2], 0)


def test_dr_grpo_divides_by_all_completions_also_those_that_are_masked():
    with online.x64("float64"):
        batch = dataclasses.replace(rollout(4), advantages=rollout(4).rewards)
        loss_mask = batch.loss_mask.copy()
        loss_mask[0, 1] = False  # cut off, and masked for it
        batch = dataclasses.replace(batch, loss_mask=loss_mask)
        mean, metrics = grpo.loss(grpo.DR_GRPO, batch, jnp.asarray(batch.old_logps), None)
        total = -(batch.advantages[..., None] * loss_mask).sum()  # where each ratio is 1
        np.testing.assert_allclose(mean.value(), total / (12 * 3000), rtol=1e-12)
        assert metrics["ratios/max"].value() == 1


def test_what_is_missing_is_refused():
    batch = dataclasses.replace(rollout(), rewards=None)
    with pytest.raises(ValueError, match="grpo: the rollout has no rewards"):
        grpo.GRPO.advantages(batch)
    with pytest.raises(ValueError, match="grpo: the batch has no advantages"):
        grpo.loss(grpo.GRPO, batch, jnp.asarray(batch.old_logps), None)
    one = jax.tree.map(lambda x: x[:, :1], dataclasses.replace(rollout(), prompt_tokens=None, prompt_mask=None))
    with pytest.raises(ValueError, match=r"grpo: baseline 'group' compares .* needs 2 or more of each, got 1"):
        grpo.GRPO.advantages(one)
    assert grpo.REINFORCE_PP.advantages(one).advantages.shape == one.loss_mask.shape
    with pytest.raises(ValueError, match="KL in the reward needs the rollout's old_logps and ref_logps"):
        grpo.RLOO.advantages(dataclasses.replace(rollout(), ref_logps=None))
    scored = grpo.GRPO.advantages(rollout())
    with pytest.raises(ValueError, match=r"grpo: beta 0.04 pulls towards a reference, but there is none"):
        grpo.loss(grpo.GRPO, scored, jnp.asarray(scored.old_logps), None)
    with pytest.raises(ValueError, match="aggregation 'constant' divides by max_completion_tokens, got None"):
        grpo.Config(aggregation="constant")
    assert grpo.Config(aggregation="constant", max_completion_tokens=1).max_completion_tokens == 1
    with pytest.raises(ValueError, match=r"dual_clip must be None for 'cispo', .* got 3.0"):
        grpo.Config(importance="cispo", dual_clip=3.0)
