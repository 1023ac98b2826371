"""The clipped objective against published values, and what ratios of whole completions are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjpo import surrogate
from tests import online

HOWS = {
    "token-mean": ("token", None),
    "seq-mean-token-mean": ("sequence", None),
    "seq-mean-token-sum": ("sequence_sum", None),
}


@online.cases("clipped_surrogate")
def test_losses(inputs, expected, dtype):
    with online.x64(dtype):
        logps, old_logps, mask = (x[:, None] for x in online.arrays(inputs, dtype, "logp", "old_logp", "mask"))
        advantages = surrogate.per_token(jnp.asarray(inputs["advantages_per_sequence"], dtype)[:, None], mask)

        def loss(how, *settings, importance="token"):
            ratios = surrogate.ratios(logps, old_logps, mask, importance)
            losses = surrogate.clipped(ratios, advantages, *settings)
            return surrogate.aggregate(losses, mask, *how).value()

        ratios = surrogate.ratios(logps, old_logps, mask)
        online.check(jnp.where(mask, ratios, 0)[:, 0], expected["ratio"], dtype)
        losses = surrogate.clipped(ratios, advantages, 0.2, 0.2)
        online.check(jnp.where(mask, losses, 0)[:, 0], expected["token_loss(eps=0.2)"], dtype)
        for name, how in (HOWS | {"dr-grpo": ("constant", inputs["dr_grpo_max_len"])}).items():
            online.check(loss(how, 0.2, 0.2), expected[f"loss(eps=0.2)/{name}"], dtype)
        token, sequence = HOWS["token-mean"], HOWS["seq-mean-token-mean"]
        online.check(loss(token, 0.2, 0.28), expected["loss(low=0.2,high=0.28)/token-mean"], dtype)
        online.check(loss(token, 0.2, 0.2, 3.0), expected["loss(eps=0.2,dual_clip=3)/token-mean"], dtype)
        of_completions = surrogate.ratios(logps, old_logps, mask, "sequence")
        online.check(of_completions[:, 0, 0], expected["gspo_ratio"], dtype)
        for clip, shown in (((0.2, 0.2), "eps=0.2"), ((3e-4, 4e-4), "low=3e-4,high=4e-4")):
            for importance in ("sequence", "sequence_token"):
                found = loss(sequence, *clip, importance=importance)
                online.check(found, expected[f"gspo_loss({shown})/seq-mean-token-mean"], dtype)


def draw(seed=0, shape=(3, 4, 6), noise=0.3):
    rng = np.random.default_rng(seed)
    mask = np.arange(shape[2])[None, None] < rng.integers(1, shape[2] + 1, shape[:2])[..., None]
    logps = -np.exp(rng.normal(size=shape))
    return jnp.asarray(logps), jnp.asarray(logps + noise * rng.normal(size=shape)), jnp.asarray(mask), rng


def test_a_completions_ratio_has_the_gradient_of_its_mean_and_a_tokens_its_own():
    with online.x64("float64"):
        logps, old_logps, mask, rng = draw()
        weights = jnp.where(mask, rng.normal(size=mask.shape), 0)
        lengths = mask.sum(-1, keepdims=True)
        whole = jnp.exp(jnp.where(mask, logps - old_logps, 0).sum(-1, keepdims=True) / lengths)

        def slope(importance):
            return jax.grad(lambda x: (weights * surrogate.ratios(x, old_logps, mask, importance)).sum())(logps)

        shared = jnp.where(mask, whole * weights.sum(-1, keepdims=True) / lengths, 0)
        np.testing.assert_allclose(slope("sequence"), shared, rtol=1e-12)
        np.testing.assert_allclose(slope("sequence_token"), whole * weights, rtol=1e-12)
        np.testing.assert_allclose(slope("token"), jnp.exp(logps - old_logps) * weights, rtol=1e-12)


@pytest.mark.parametrize("how", surrogate.AGGREGATIONS[:3])
def test_a_rollouts_first_update_is_not_moved_by_clips_or_importance(how):
    with online.x64("float64"):
        logps, _, mask, rng = draw()
        advantages = surrogate.per_token(jnp.asarray(rng.normal(size=mask.shape[:2])), mask)

        def slope(importance, epsilon, dual_clip=None):
            def loss(x):
                ratios = surrogate.ratios(x, logps, mask, importance)
                losses = surrogate.clipped(ratios, advantages, epsilon, epsilon, dual_clip)
                return surrogate.aggregate(losses, mask, how).value()

            return jax.grad(loss)(logps)

        expected = jax.grad(lambda x: surrogate.aggregate(-advantages * jnp.where(mask, x, 0), mask, how).value())(
            logps
        )  # the plain policy gradient
        for found in (slope("token", 0.2), slope("token", 3e-4, 3.0), slope("sequence_token", 0.2)):
            np.testing.assert_allclose(found, expected, atol=1e-12)
        if how != "token":  # where completions weigh alike, as a completion's ratio makes them
            np.testing.assert_allclose(slope("sequence", 0.2), expected, atol=1e-12)
        of_cispo = jax.grad(
            lambda x: surrogate.aggregate(
                surrogate.cispo(x, surrogate.ratios(x, logps, mask, "cispo"), advantages, 0.2, 0.2), mask, how
            ).value()
        )(logps)
        np.testing.assert_allclose(of_cispo, expected, atol=1e-12)


def test_without_old_log_probs_the_policy_is_its_own():
    with online.x64("float64"):
        logps, _, mask, _ = draw()
        for importance in surrogate.IMPORTANCES:
            np.testing.assert_array_equal(surrogate.ratios(logps, None, mask, importance), 1)
            slope = jax.grad(lambda x: jnp.where(mask, surrogate.ratios(x, None, mask, importance), 0).sum())(logps)  # noqa: B023
            np.testing.assert_allclose(slope, mask, atol=1e-12)


def test_ratios_stay_finite_and_advantages_may_be_tokens():
    mask = jnp.ones((1, 1, 2), bool)
    for importance in ("token", "sequence"):
        found = surrogate.ratios(jnp.zeros((1, 1, 2)), jnp.full((1, 1, 2), -1e4), mask, importance)
        np.testing.assert_allclose(found, np.exp(20), rtol=1e-6)
    tokens = jnp.array([[[1.0, 2.0]]])
    np.testing.assert_array_equal(surrogate.per_token(tokens, mask), tokens)
    np.testing.assert_array_equal(surrogate.per_token(tokens[..., 0], mask), [[[1, 1]]])


def test_cispo_keeps_the_gradient_of_what_it_clips():
    with online.x64("float64"):
        logps, old_logps, mask, rng = draw(noise=1.0)
        advantages = jnp.asarray(rng.normal(size=mask.shape))
        ratios = surrogate.ratios(logps, old_logps, mask, "cispo")
        slope = jax.grad(lambda x: surrogate.cispo(x, ratios, advantages, 0.5, 0.25).sum())(logps)
        np.testing.assert_allclose(slope, -np.clip(ratios, 0.5, 1.25) * advantages, rtol=1e-12)
        assert (ratios > 1.25).any()


def test_noise_of_tokens_averages_out_in_a_completions_ratio():
    # Log-ratios of scale 0.3: over a completion their mean has 0.3 / sqrt(L), their sum 0.3 sqrt(L).
    for length, expected in ((16, 0.0750), (64, 0.0375), (256, 0.01875)):
        noise = jnp.asarray(0.3 * np.random.default_rng(length).normal(size=(20_000, 1, length)), jnp.float32)
        ratios = surrogate.ratios(noise, jnp.zeros_like(noise), jnp.ones(noise.shape, bool), "sequence")
        np.testing.assert_allclose(jnp.log(ratios[:, 0, 0]).std(), expected, rtol=0.02)


def test_shares_of_what_is_clipped():
    ratios = jnp.array([[[0.5, 0.5, 1.5, 1.5]], [[1.0, 1.5, 9.0, 9.0]]])
    advantages = jnp.array([[[-1.0, 1.0, 1.0, -1.0]], [[1.0, 1.0, 1.0, 1.0]]])
    mask = jnp.array([[[True] * 4], [[True, True, False, False]]])
    found = {
        importance: surrogate.clip_metrics(ratios, advantages, mask, 0.2, 0.28, importance)
        for importance in ("token", "sequence", "cispo")
    }
    found = {importance: {name: float(mean.value()) for name, mean in of.items()} for importance, of in found.items()}
    # Low in (1, 0) of (4, 2) tokens where the advantage is negative, high in (1, 1) where it is positive; else (2, 0)
    # and (2, 1). The largest ratio that counts is 1.5.
    expected = {"low_mean": 1 / 6, "high_mean": 2 / 6, "region_mean": 3 / 6, "low_min": 0, "high_max": 1 / 2}
    of_completions = expected | {"low_mean": 1 / 8, "high_mean": (1 / 4 + 1 / 2) / 2, "region_mean": 1 / 2}
    weights = expected | {"low_mean": 2 / 6, "high_mean": 3 / 6, "region_mean": 5 / 6}
    for importance, shares in (("token", expected), ("sequence", of_completions), ("cispo", weights)):
        named = {f"clip_ratio/{name}": share for name, share in shares.items()} | {"ratios/max": 1.5}
        named |= {"cispo_clip_ratio": 2 / 6} if importance == "cispo" else {}  # TRL's: high, and worth it
        assert found[importance] == pytest.approx(named), importance
    all_low = surrogate.clip_metrics(ratios / 9, -jnp.abs(advantages), mask, 0.2, 0.28)
    assert all_low["clip_ratio/low_min"].value() == 1


def test_the_share_that_a_dual_clip_bounds():
    ratios = jnp.array([[[2.0, 3.0, 3.5, 9.0]]])
    for advantage, share in ((-1.0, 0.5), (0.0, 0.0), (0.5, 0.0)):
        advantages = jnp.full(ratios.shape, advantage)
        found = surrogate.clip_metrics(ratios, advantages, ratios > 0, 0.2, 0.2, dual_clip=3.0)
        assert found["clip_ratio/dual_mean"].value() == share
        losses = [surrogate.clipped(ratios, advantages, 0.2, 0.2, dual) for dual in (3.0, None)]
        assert (losses[0] != losses[1]).mean() == share
    assert "clip_ratio/dual_mean" not in surrogate.clip_metrics(ratios, advantages, ratios > 0, 0.2, 0.2)


def test_a_ratio_at_its_bound_and_an_advantage_of_zero_are_not_clipped():
    ratios = jnp.array([[[0.75, 1.5, 0.25, 4.0, 0.25]]])
    advantages = jnp.array([[[-1.0, 1.0, 0.0, 0.0, 0.5]]])
    found = surrogate.clip_metrics(ratios, advantages, jnp.ones(ratios.shape, bool), 0.25, 0.5)
    assert {float(mean.value()) for name, mean in found.items() if name != "ratios/max"} == {0}


def test_a_constant_counts_completions_that_are_masked_but_no_empty_rows():
    losses, mask = jnp.ones((2, 2, 3)), jnp.zeros((2, 2, 3), bool).at[0, 0, :2].set(True).at[0, 1, 0].set(True)
    exists = jnp.array([[True, True], [True, False]])  # one is cut off and masked, and a row fills the batch up
    found = {how: surrogate.aggregate(losses, mask, how, 10, exists).value() for how in surrogate.AGGREGATIONS}
    assert found == pytest.approx({"token": 1, "sequence": 1, "sequence_sum": 3 / 2, "constant": 3 / (3 * 10)})
    assert surrogate.aggregate(losses, mask, "constant", 10).value() == pytest.approx(3 / (4 * 10))
