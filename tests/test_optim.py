"""Schedules and optimizers by hand, and settings refused by name."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pjpo import optim

PARAMS = {"qkv": {"kernel": jnp.array([2.0, -3.0])}, "norm": {"scale": jnp.array([5.0])}}
GRADS = {"qkv": {"kernel": jnp.array([3.0, 0.0])}, "norm": {"scale": jnp.array([4.0])}}  # of global norm 5


def updates(steps=1, **settings):
    """The updates of `steps` steps with the same gradients at learning rate 0.1."""
    optimizer = optim.make_optimizer(optim.Config(learning_rate=0.1, **settings), lambda _: 0.1)
    state, out = optimizer.init(PARAMS), []
    for _ in range(steps):
        update, state = optimizer.update(GRADS, state, PARAMS)
        out.append([float(x) for leaf in (update["qkv"]["kernel"], update["norm"]["scale"]) for x in leaf])
    return out


def test_schedules_by_hand():
    def rates(schedule, warmup_steps):
        config = optim.Config(learning_rate=2.0, schedule=schedule, warmup_steps=warmup_steps)
        return [float(optim.make_schedule(config, 6)(jnp.int32(step))) for step in range(6)]

    np.testing.assert_allclose(rates("constant", 0), [2] * 6)
    np.testing.assert_allclose(rates("constant", 4), [0.5, 1, 1.5, 2, 2, 2])
    np.testing.assert_allclose(rates("constant", 1), [2] * 6)
    np.testing.assert_allclose(rates("linear", 0), [2, 10 / 6, 8 / 6, 1, 4 / 6, 2 / 6], rtol=1e-6)
    np.testing.assert_allclose(rates("linear", 2), [1, 2, 2, 1.5, 1, 0.5], rtol=1e-6)
    np.testing.assert_allclose(
        rates("cosine", 2), [1, 2] + [1 + math.cos(math.pi * i / 4) for i in range(4)], rtol=1e-6
    )


def test_a_warmup_that_outlasts_the_run_is_refused():
    with pytest.raises(ValueError, match="optimizer: warmup_steps 6 must be below num_steps 6"):
        optim.make_schedule(optim.Config(learning_rate=1.0, warmup_steps=6), 6)


def test_gradients_are_clipped_to_the_global_norm():
    # Plain SGD: the update is -0.1 times the gradient, which has the norm 5.
    np.testing.assert_allclose(updates(name="sgd", beta1=0.0, max_grad_norm=2.5), [[-0.15, 0, -0.2]], rtol=1e-6)
    np.testing.assert_allclose(updates(name="sgd", beta1=0.0, max_grad_norm=6.0), [[-0.3, 0, -0.4]], rtol=1e-6)
    np.testing.assert_allclose(updates(name="sgd", beta1=0.0, max_grad_norm=math.inf), [[-0.3, 0, -0.4]], rtol=1e-6)


def test_sgd_keeps_its_momentum():
    expected = [[-0.3, 0, -0.4], [-0.45, 0, -0.6]]  # the second is 1 + 1/2 times the first
    np.testing.assert_allclose(updates(2, name="sgd", beta1=0.5, max_grad_norm=math.inf), expected, rtol=1e-6)


def test_rmsprop_divides_by_the_root_of_the_mean_square():
    def expected(mean_square):
        return [-0.1 * g / math.sqrt(mean_square * g * g + 0.5) for g in (3.0, 0.0, 4.0)]

    found = updates(2, name="rmsprop", beta2=0.75, epsilon=0.5, max_grad_norm=math.inf)
    np.testing.assert_allclose(found, [expected(0.25), expected(0.25 + 0.75 * 0.25)], rtol=1e-5)


def test_adamw_by_hand_spares_the_scales_from_decay():
    # With the same gradient every time Adam's corrected moments are g and g^2: the step is -0.1 sign(g), the decay
    # -0.1 * 0.5 * parameter, and the scale's is none.
    expected = [-0.1 - 0.05 * 2, 0.05 * 3, -0.1]
    found = updates(3, weight_decay=0.5, max_grad_norm=math.inf, beta1=0.8, beta2=0.9)
    np.testing.assert_allclose(found, [expected] * 3, rtol=1e-5)


def test_epsilon_betas_and_learning_rate_reach_adamw():
    # epsilon 1 with g = 3: the step is 3 / (3 + 1) of the learning rate.
    np.testing.assert_allclose(updates(epsilon=1.0, max_grad_norm=math.inf)[0], [-0.075, 0, -0.08], rtol=1e-5)
    assert updates(2, beta1=0.1, epsilon=1.0, max_grad_norm=1.0)[1] == pytest.approx(
        updates(2, beta1=0.9, epsilon=1.0, max_grad_norm=1.0)[1]
    )  # equal gradients: the corrected moments do not remember
    optimizer = optim.make_optimizer(optim.Config(learning_rate=1.0, beta1=0.6, beta2=0.7), lambda _: 0.1)
    moments = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)[1][1][0]
    clipped = 3 / 5
    np.testing.assert_allclose(moments.mu["qkv"]["kernel"][0], 0.4 * clipped, rtol=1e-5)
    np.testing.assert_allclose(moments.nu["qkv"]["kernel"][0], 0.3 * clipped**2, rtol=1e-5)


def test_adafactor_moves_against_the_gradient():
    [update] = updates(name="adafactor")
    assert update[0] < 0
    assert update[2] < 0


def test_the_rate_follows_the_schedule():
    config = optim.Config(learning_rate=1.0, name="sgd", beta1=0.0, max_grad_norm=math.inf, warmup_steps=2)
    optimizer = optim.make_optimizer(config, optim.make_schedule(config, 10))
    state = optimizer.init(PARAMS)
    first, state = optimizer.update(GRADS, state, PARAMS)
    second, _ = optimizer.update(GRADS, state, PARAMS)
    assert [float(x["norm"]["scale"][0]) for x in (first, second)] == [-2, -4]


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "adafactor", "sgd"])
def test_twice_the_rate_is_twice_the_update_whatever_the_rule(name):
    def first(rate):
        optimizer = optim.make_optimizer(optim.Config(learning_rate=1.0, name=name), lambda _: rate)
        return optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)[0]

    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, 2 * y, rtol=1e-6), first(0.2), first(0.1))


def test_moments_are_those_of_the_trained_leaves():
    state = optim.make_optimizer(optim.Config(learning_rate=1.0), lambda _: 1.0).init({"norm": PARAMS["norm"]})
    assert {leaf.shape for leaf in jax.tree.leaves(state)} == {(), (1,)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *[
            ({"learning_rate": value}, f"learning_rate must be > 0.*, got {value}")
            for value in (0.0, -1.0, math.nan, math.inf)
        ],
        ({"warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
        *[
            ({"weight_decay": value}, f"weight_decay must be >= 0 and finite, got {value}")
            for value in (-0.1, math.nan, math.inf)
        ],
        *[({"max_grad_norm": value}, f"max_grad_norm must be > 0, got {value}") for value in (0.0, -1.0, math.nan)],
        *[({"beta1": value}, rf"beta1 must be in \[0, 1\), got {value}") for value in (-0.1, 1.0, math.nan)],
        *[({"beta2": value}, rf"beta2 must be in \[0, 1\), got {value}") for value in (-0.1, 1.0, math.nan)],
        *[({"epsilon": value}, f"epsilon must be > 0.*, got {value}") for value in (0.0, -1e-8, math.nan, math.inf)],
        *[
            ({"critic_learning_rate": value}, f"critic_learning_rate must be > 0 and finite, or None, got {value}")
            for value in (0.0, -1.0, math.nan, math.inf)
        ],
        ({"weight_decay": 0.1, "name": "sgd"}, "weight_decay is adamw's, sgd has none; set it to 0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=f"^optimizer: {message}"):
        optim.Config(**{"learning_rate": 1.0} | settings)


@pytest.mark.usefixtures("unchecked")
def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="optim: name must be one of adamw, rmsprop, adafactor, sgd, got 'adam'"):
        optim.Config(learning_rate=1.0, name="adam")
    with pytest.raises(ValueError, match="optim: schedule must be one of constant, linear, cosine, got 'step'"):
        optim.Config(learning_rate=1.0, schedule="step")


def test_what_is_left_unsaid_is_optaxs_adamw_at_a_constant_rate():
    small = jax.tree.map(lambda x: 1e-8 * x, GRADS)  # where epsilon counts
    rules = optim.make_optimizer(optim.Config(learning_rate=0.1), lambda _: 0.1), optax.adamw(0.1, weight_decay=0)
    update, expected = (rule.update(small, rule.init(PARAMS), PARAMS)[0] for rule in rules)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), update, expected)
    assert float(optim.make_schedule(optim.Config(learning_rate=0.1, schedule="linear"), 2)(1)) == pytest.approx(0.05)


def test_settings_at_the_edge_of_what_is_allowed():
    for settings in ({"beta1": 0.0}, {"beta2": 0.0}, {"critic_learning_rate": 1e-9}, {"critic_learning_rate": 1.0}):
        assert np.isfinite(updates(**settings)).all()


def test_scales_and_biases_are_spared_at_any_depth():
    leaves = {"scale": 1, "kernel": 2, "bias": 3}
    assert optim.decays({"layers": {"norm": leaves}, "scale": leaves}) == {
        "layers": {"norm": {"scale": False, "kernel": True, "bias": False}},
        "scale": {"scale": False, "kernel": True, "bias": False},
    }


def test_the_critic_follows_the_schedule_at_its_own_rate():
    config = optim.Config(name="sgd", beta1=0.0, learning_rate=0.2, critic_learning_rate=0.5, max_grad_norm=math.inf)
    optimizer = optim.make_optimizer(config, lambda at: jnp.where(at == 0, 0.2, 0.1))
    params = {"rest": {"kernel": jnp.ones(1)}, "critic": {"kernel": jnp.ones(1)}}
    state, found = optimizer.init(params), []
    for _ in range(2):
        update, state = optimizer.update(params, state, params)
        found.append([float(update[part]["kernel"][0]) for part in ("rest", "critic")])
    np.testing.assert_allclose(found, [[-0.2, -0.5], [-0.1, -0.25]], rtol=1e-6)
