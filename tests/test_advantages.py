"""Advantages against published values, and what they promise about masks, equal rewards and groups of one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjpo import advantages as adv
from tests import online


@online.cases("gae")
def test_gae(inputs, expected, dtype):
    with online.x64(dtype):
        rewards, values, mask = online.arrays(inputs, dtype, "rewards", "values", "mask")
        advantages, returns = adv.gae(rewards, values, mask, gamma=inputs["gamma"], lam=inputs["lam"])
        online.check(advantages, expected["advantages"], dtype)
        online.check(returns, expected["returns"], dtype)
        online.check(adv.whiten(advantages, mask), expected["whitened"], dtype)


@online.cases("group_advantage")
def test_group_relative_and_leave_one_out(inputs, expected, dtype):
    with online.x64(dtype):
        (rewards,) = online.arrays(inputs, dtype, "rewards")
        for name, settings in {
            "grpo(ddof=1,eps=1e-6)": {"eps": 1e-6},
            "grpo(ddof=1,eps=1e-4)": {},
            "grpo(ddof=0,eps=1e-8)": {"ddof": 0, "eps": 1e-8},
            "dr_grpo": {"std": "none"},
            "batch_std(ddof=1,eps=1e-4)": {"std": "batch"},
        }.items():
            online.check(adv.group_relative(rewards, **settings), expected[name], dtype)
        online.check(adv.leave_one_out(rewards), expected["rloo"], dtype)


@pytest.mark.parametrize("leading", [(), (2, 3)])
@pytest.mark.parametrize("settings", [{}, {"std": "none"}, {"std": "batch"}, None])
def test_groups_of_any_leading_axes(leading, settings):
    rng = np.random.default_rng(0)
    rewards, mask = (
        jnp.asarray(rng.normal(size=(*leading, 4)), jnp.float32),
        jnp.asarray(rng.random((*leading, 4)) < 0.8),
    )
    rows = rewards.reshape(-1, 4), mask.reshape(-1, 4)
    baseline = adv.leave_one_out if settings is None else functools.partial(adv.group_relative, **settings)
    np.testing.assert_allclose(baseline(rewards, mask), baseline(*rows).reshape(rewards.shape), rtol=1e-6)
    np.testing.assert_array_equal(adv.mixed(rewards, mask), adv.mixed(*rows).reshape(leading))


@pytest.mark.parametrize("baseline", [adv.group_relative, adv.leave_one_out])
def test_groups_of_one_are_refused_whatever_the_leading_axes(baseline):
    with pytest.raises(ValueError, match="needs 2 of them or more, got 1"):
        baseline(jnp.zeros((2, 3, 1)))


@online.cases("reinforce_pp")
def test_reinforce_pp(inputs, expected, dtype):
    with online.x64(dtype):
        rewards, mask = online.arrays(inputs, dtype, "token_rewards", "mask")
        advantages, returns = adv.reinforce_pp(rewards, mask, gamma=inputs["gamma"])
        online.check(advantages, expected["advantages"], dtype)
        online.check(returns, expected["returns"], dtype)


@online.cases("reinforce_pp_baseline")
def test_reinforce_pp_baseline(inputs, expected, dtype):
    with online.x64(dtype):
        rewards, mask = online.arrays(inputs, dtype, "rewards", "mask")
        found = adv.reinforce_pp_baseline(rewards, mask.reshape(2, 2, 4))
        online.check(found.reshape(4, 4), expected["advantages"], dtype)


def test_gae_of_any_leading_axes_and_by_default():
    rng = np.random.default_rng(0)
    rewards, values = jnp.asarray(rng.normal(size=(2, 3, 2, 5))), jnp.asarray(rng.normal(size=(2, 3, 2, 5)))
    mask = jnp.asarray(rng.random((2, 3, 2, 5)) < 0.7)
    found = adv.gae(rewards, values, mask)
    for place in np.ndindex(2, 3, 2):
        one = adv.gae(rewards[place], values[place], mask[place], gamma=1.0, lam=0.95)
        np.testing.assert_allclose(found[0][place], one[0], atol=1e-6)
        np.testing.assert_allclose(found[1][place], one[1], atol=1e-6)
    whole = adv.reinforce_pp(rewards, mask)
    np.testing.assert_array_equal(whole[0], adv.reinforce_pp(rewards, mask, gamma=1.0)[0])
    np.testing.assert_allclose(whole[1][..., 0], jnp.where(mask, rewards, 0).sum(-1) * mask[..., 0], atol=1e-5)


def test_a_discount_of_numpy_widens_nothing():
    with online.x64("float64"):
        rewards = jnp.ones((1, 3), jnp.float32)
        found, _ = adv.gae(rewards, rewards, jnp.ones((1, 3), bool), gamma=np.float64(0.9), lam=np.float64(0.5))
    assert found.dtype == jnp.float32


def test_whitening_of_one_value_and_of_next_to_no_deviation():
    np.testing.assert_array_equal(adv.whiten(jnp.array([3.0, 5.0]), jnp.array([False, True])), 0)
    values = jnp.array([-1e-4, 1e-4])  # with a variance of 2e-8, to which 1e-8 is added
    np.testing.assert_allclose(adv.whiten(values, jnp.ones(2, bool)), values / np.sqrt(3e-8), rtol=1e-5)


def test_gae_steps_over_tokens_that_are_not_the_policys():
    # [a, x, b] with x masked is [a, b] with a hole, whatever x is.
    rewards, values = jnp.array([[0.3, jnp.nan, -0.4]]), jnp.array([[0.1, jnp.nan, 0.6]])
    mask = jnp.array([[True, False, True]])
    found = adv.gae(rewards, values, mask, gamma=0.9, lam=0.8)
    without = adv.gae(rewards[:, ::2], values[:, ::2], mask[:, ::2], gamma=0.9, lam=0.8)
    for one, other in zip(found, without, strict=True):
        np.testing.assert_allclose(one, [[other[0, 0], 0, other[0, 1]]], rtol=1e-6)
    last = -0.4 - 0.6
    np.testing.assert_allclose(found[0][0, 0], 0.3 + 0.9 * 0.6 - 0.1 + 0.9 * 0.8 * last, rtol=1e-6)


def test_completions_without_a_reward_are_no_baseline():
    rewards = jnp.array([[1.0, 0.0, 7.0, 0.5], [2.0, 9.0, 9.0, 9.0]])
    mask = jnp.array([[True, True, False, True], [True, False, False, False]])
    for function in (adv.group_relative, adv.leave_one_out, lambda *x: adv.group_relative(*x, std="batch")):
        found = function(rewards, mask)
        np.testing.assert_array_equal(found[~mask], 0)
        np.testing.assert_array_equal(found[1], 0)
    np.testing.assert_allclose(adv.leave_one_out(rewards, mask)[0], [0.75, -0.75, 0, 0], atol=1e-7)
    np.testing.assert_allclose(adv.group_relative(rewards, mask, eps=0)[0], [1, -1, 0, 0], atol=1e-6)
    of_all = np.std([1.0, 0.0, 0.5, 2.0], ddof=1)
    found = adv.group_relative(rewards, mask, std="batch", eps=0)
    np.testing.assert_allclose(found[0], np.array([0.5, -0.5, 0, 0]) / of_all, atol=1e-6)


def test_of_two_completions_each_is_the_others_baseline():
    np.testing.assert_allclose(adv.leave_one_out(jnp.array([[3.0, 1.0]])), [[2.0, -2.0]])


def test_equal_rewards_teach_exactly_nothing():
    # The float32 mean of three 0.1 is not 0.1, and the deviation from it is all that there is to divide by.
    rewards = jnp.full((1, 3), 0.1)
    assert rewards.mean() != rewards[0, 0]
    for found in (
        adv.group_relative(rewards, eps=0),
        adv.group_relative(jnp.ones((1, 3)), eps=0),
        adv.leave_one_out(rewards),
    ):
        np.testing.assert_array_equal(found, 0)
    assert not adv.mixed(rewards, jnp.ones((1, 3), bool)).any()
    assert adv.mixed(jnp.array([[0.0, 1.0]]), jnp.ones((1, 2), bool)).all()
    assert not adv.mixed(jnp.array([[0.0, 1.0]]), jnp.array([[True, False]])).any()


def test_a_group_of_one_and_an_unknown_deviation_are_refused():
    for function in (adv.group_relative, adv.leave_one_out):
        with pytest.raises(ValueError, match=f"{function.__name__}: .* needs 2 of them or more, got 1"):
            function(jnp.ones((3, 1)))
    with pytest.raises(ValueError, match=r"reinforce_pp_baseline: .* got 1"):
        adv.reinforce_pp_baseline(jnp.ones((3, 1)), jnp.ones((3, 1, 2), bool))


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_deviation_is_refused():
    with pytest.raises(ValueError, match="std must be one of group, batch, none, got 'prompt'"):
        adv.group_relative(jnp.ones((3, 2)), std="prompt")


def test_scores_are_rewards_of_last_tokens():
    mask = jnp.array([[True, False, True, False], [False] * 4, [True] * 4, [True, True, False, False]])
    found = adv.at_last(jnp.array([1.0, 2.0, 3.0, 4.0]), mask)
    expected = [[0, 0, 1, 0], [0] * 4, [0, 0, 0, 3], [0, 4, 0, 0]]
    np.testing.assert_array_equal(found, expected)
    halves = adv.at_last(jnp.array([[1.0, 2.0], [3.0, 4.0]]), mask.reshape(2, 2, 4))
    np.testing.assert_array_equal(halves.reshape(4, 4), expected)


def test_shares_of_useful_groups():
    # 1 - q^8 - (1 - q)^8 of groups of 8 with success rate q are mixed; 100,000 drawn groups are within 0.006 of it.
    rng = np.random.default_rng(0)
    for rate, share in ((0.02, 0.149), (0.1, 0.570), (0.25, 0.900), (0.5, 0.992), (0.625, 0.976), (0.98, 0.149)):
        np.testing.assert_allclose(1 - rate**8 - (1 - rate) ** 8, share, atol=5e-4)
        rewards = jnp.asarray(rng.random((100_000, 8)) < rate, jnp.float32)
        found = adv.mixed(rewards, jnp.ones(rewards.shape, bool)).mean()
        np.testing.assert_allclose(found, share, atol=6e-3)


@pytest.mark.usefixtures("unchecked")
def test_lists_masks_of_numbers_and_one_group_will_do():
    rewards, values, mask = [[1.0, 2.0, 4.0]], [[0.5, 0.25, 9.0]], [[1.0, 1.0, 0.0]]
    arrays = np.float32(rewards), np.float32(values), np.array(mask, bool)
    expected = adv.gae(*arrays, gamma=0.5, lam=0.25)
    jax.tree.map(np.testing.assert_array_equal, adv.gae(rewards, values, mask, 0.5, 0.25), expected)
    jax.tree.map(
        np.testing.assert_array_equal, adv.reinforce_pp(rewards, mask, 0.5), adv.reinforce_pp(*arrays[::2], gamma=0.5)
    )
    np.testing.assert_array_equal(adv.whiten(values, mask), adv.whiten(*arrays[1:]))
    np.testing.assert_array_equal(adv.at_last([3.0], mask), [[0, 3, 0]])
    for function in (adv.group_relative, adv.leave_one_out):
        np.testing.assert_array_equal(function(rewards[0]), function(arrays[0])[0])
        np.testing.assert_array_equal(function(rewards, mask), function(arrays[0], arrays[2]))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_whole_numbers_are_worth_as_much_as_others(dtype):
    rewards, values, mask = [[2, 0, 1], [1, 1, 0]], [[1, 3, 0], [0, 2, 2]], np.ones((2, 3), bool)
    with online.x64(dtype):
        for function, *whole in (
            (adv.gae, rewards, values, mask),
            (adv.reinforce_pp, rewards, mask),
            (adv.whiten, values, mask),
            (adv.group_relative, rewards),
            (functools.partial(adv.group_relative, std="batch"), rewards),
            (adv.leave_one_out, rewards),
            (adv.reinforce_pp_baseline, rewards, np.ones((2, 3, 2), bool)),
            (adv.at_last, values[0], mask.repeat(2, 0)[:3]),
        ):
            found = function(*map(np.asarray, whole))
            expected = function(*(x if np.asarray(x).dtype == bool else jnp.asarray(x, dtype) for x in whole))
            assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(found))
            jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.usefixtures("unchecked")
def test_rewards_and_values_of_two_dtypes_meet_in_the_wider_one():
    rewards, values, mask = np.float32([[1, 2]]), jnp.asarray([[0.5, 0.25]], jnp.bfloat16), np.ones((1, 2), bool)
    for found, expected in zip(adv.gae(rewards, values, mask), adv.gae(rewards, np.float32(values), mask), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, expected)


@pytest.mark.usefixtures("unchecked")
def test_a_completion_that_counts_in_no_loss_may_count_in_its_prompts_mean():
    rewards, mask = np.float32([[1, 0, -9, 0.5]]), np.ones((1, 4, 2), bool)
    mask[0, 2] = False
    scored = np.ones((1, 4), bool)
    alone = adv.whiten(np.broadcast_to(rewards[..., None], mask.shape), mask)  # whatever the mean, it is taken off
    np.testing.assert_allclose(adv.reinforce_pp_baseline(rewards, mask), alone, atol=1e-6)
    two = np.concatenate([rewards, np.zeros_like(rewards)]), np.concatenate([mask, mask])
    found = adv.reinforce_pp_baseline(*two, np.concatenate([scored, scored]))
    centred = np.concatenate([rewards - rewards.mean(), np.zeros_like(rewards)])
    expected = adv.whiten(np.broadcast_to(centred[..., None], two[1].shape), two[1])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(np.asarray(adv.reinforce_pp_baseline(*two)) - found).max() > 0.1


@pytest.mark.parametrize("size", [1e8, 1e12, 1e20, 1e30, 1e38])
def test_huge_rewards_are_not_too_large_for_float32(size):
    rewards = (np.array([[1.0, -0.5, 0.5, 0.25], [1.0, 1.0, 1.0, 0.0]]) * [[size], [1.0]]).astype(np.float32)
    exact, rewards = rewards.astype(np.float64), jnp.asarray(rewards)
    centred = exact - exact.mean(-1, keepdims=True)
    expected = {
        "group": centred / (exact.std(-1, ddof=1, keepdims=True) + 1e-4),
        "batch": centred / (exact.std(ddof=1) + 1e-4),
        "none": centred,
    }
    for std, advantages in expected.items():
        np.testing.assert_allclose(adv.group_relative(rewards, std=std), advantages, rtol=1e-6, atol=1e-37)
    np.testing.assert_allclose(adv.leave_one_out(rewards), centred * 4 / 3, rtol=1e-6)
    mask = jnp.ones((2, 4, 1), bool)
    whitened = (exact - exact.mean()) / exact.std(ddof=1)
    np.testing.assert_allclose(adv.whiten(rewards, mask[..., 0]), whitened, rtol=1e-5)
    np.testing.assert_allclose(adv.reinforce_pp(rewards[..., None], mask)[0][..., 0], whitened, rtol=1e-5)
    whitened = (centred - centred.mean()) / centred.std(ddof=1)
    found = adv.reinforce_pp_baseline(rewards, mask)[..., 0]
    np.testing.assert_allclose(found, whitened, rtol=1e-5, atol=1e-7)


def test_the_largest_rewards_of_float32():
    # The mean is 1.5e38, and the others are 1.5e38 three times and -4.5e38: over a deviation of 3e38.
    rewards = jnp.array([3e38, 3e38, 3e38, -3e38], jnp.float32)
    np.testing.assert_allclose(adv.group_relative(rewards), [0.5, 0.5, 0.5, -1.5], rtol=1e-6)


def test_no_tokens_have_no_advantages():
    rewards, mask = jnp.zeros((2, 0)), jnp.zeros((2, 0), bool)
    for advantages in (*adv.gae(rewards, rewards, mask), *adv.reinforce_pp(rewards, mask)):
        assert advantages.shape == (2, 0)
        assert advantages.dtype == jnp.float32
