"""The update: the same numbers on every mesh and however the batch is cut, and those of a plain loop in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pjpo import optim, sharding
from pjpo.methods import dpo, grpo, kto, sft
from pjpo.models import lora
from pjpo.packing import pack
from pjpo.step import init_state, make_update, reference_logps
from tests import tiny
from tests.models import plain_llama
from tests.models.test_policy import rows_of
from tests.test_sharding import MESHES, make_mesh

METHOD = dpo.Config(beta=0.5)
OPTIMIZER = optim.Config(learning_rate=3e-3, weight_decay=0.1, warmup_steps=2, max_grad_norm=0.5)
NUM_STEPS = 20
SCHEDULE = optim.make_schedule(OPTIMIZER, NUM_STEPS)

# Sums over devices and microbatches are taken in another order, 6e-8 of a sum each time. Over the 20 steps that was
# measured as at most 8e-6 in any metric (gradient norms near 10 among them) and 3e-7 in any parameter, of which another
# seed of the start moves some by 3. AdamW lets no error grow here, as clipping keeps its steps below the learning rate.
METRICS_BOUND, PARAMS_BOUND = 2e-5, 3e-6
# The first step's gradient, before any error could grow, of each leaf's largest number: measured as at most 2e-6.
GRADIENT_BOUND = 4e-6
# Adapters whose B is drawn as here, at the usual alpha / rank of 8, put activations where an error grows threefold a
# step, on whatever devices; at 1 it stays below 6e-6 in any metric and 2e-7 in any parameter.
ADAPTERS = {"reference": "adapter", "lora": lora.Config(rank=2, alpha=2.0), "num_layers": 1}


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


def make_batch(seed, **others):
    return tiny.ragged(np.random.default_rng(seed), num_prompts=8, vocab_size=64, **others)


def setup(mesh, reference="online", loss=dpo.loss, method=METHOD, num_microbatches=1, seed=0, **settings):
    """(policy, state, reference parameters or None, update)."""
    policy = tiny.make_policy(**tiny.DIVISIBLE, **settings)
    optimizer = optim.make_optimizer(OPTIMIZER, SCHEDULE)
    state = init_state(policy, tiny.make_params(policy, seed), optimizer, jax.random.key(0), mesh)
    ref_params = sharding.place(tiny.make_params(policy, 1), mesh) if reference == "online" else None
    options = {"reference": reference, "schedule": SCHEDULE, "num_microbatches": num_microbatches}
    return policy, state, ref_params, make_update(loss, method, policy, optimizer, mesh, **options)


def trajectory(mesh, num_steps=NUM_STEPS, change=lambda batch: batch, **settings):
    """Metrics of every step, [steps] each, the parameters after them and the first gradient as NumPy arrays."""
    _, state, ref_params, update = setup(mesh, **settings)
    logged, gradient = [], None
    for step in range(num_steps):
        state, metrics = update(state, ref_params, sharding.place_batch(change(make_batch(step)), mesh))
        logged.append({name: float(mean.value()) for name, mean in metrics.items()})
        if gradient is None:  # a tenth of it, as it was clipped, is AdamW's first moment by now
            scale = 10 * max(1, logged[0]["grad_norm"] / OPTIMIZER.max_grad_norm)
            gradient = jax.tree.map(lambda leaf: scale * np.asarray(leaf), optax.tree.get(state.opt_state, "mu"))  # noqa: B023
    assert state.step == num_steps
    metrics = {name: np.array([row[name] for row in logged]) for name in logged[0]}
    return metrics, jax.device_get(state.params), gradient


@pytest.fixture(scope="module")
def alone():
    """The trajectory on one device; of one layer, which halves the time to compile."""
    return trajectory(one_device(), num_layers=1)


@pytest.fixture(scope="module")
def adapted():
    """The same of adapters."""
    return trajectory(one_device(), **ADAPTERS)


def assert_same_trajectory(found, expected):
    for name, values in expected[0].items():
        np.testing.assert_allclose(found[0][name], values, rtol=METRICS_BOUND, atol=METRICS_BOUND, err_msg=name)
    for one, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=PARAMS_BOUND)
    for one, other in zip(jax.tree.leaves(found[2]), jax.tree.leaves(expected[2]), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=GRADIENT_BOUND * np.abs(other).max())


@pytest.mark.parametrize("name", MESHES)
def test_twenty_steps_agree_on_every_mesh(alone, name):
    assert_same_trajectory(trajectory(make_mesh(name), num_layers=1), alone)


ALL_AXES = ("4x2x1", "2x2x2")  # which between them cut along every axis; the others are of the same kind, and slow


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ALL_AXES else pytest.mark.slow) for n in MESHES])
def test_twenty_steps_of_adapters_agree_on_every_mesh(adapted, name):
    assert_same_trajectory(trajectory(make_mesh(name), **ADAPTERS), adapted)


@pytest.mark.parametrize(
    "order", [pytest.param([7, 6, 5, 4, 3, 2, 1, 0], marks=pytest.mark.slow), [3, 0, 6, 5, 1, 7, 2, 4]]
)
@pytest.mark.parametrize(("one", "settings"), [("alone", {"num_layers": 1}), ("adapted", ADAPTERS)])
def test_twenty_steps_agree_on_devices_in_any_order(one, settings, order, request):
    """Of all weights and of adapters alone, within METRICS_BOUND and PARAMS_BOUND of one device."""
    devices = [jax.devices()[place] for place in order]
    found = trajectory(make_mesh("2x2x2", devices), **settings)
    assert_same_trajectory(found, request.getfixturevalue(one))


@functools.cache
def short_trajectory(num_microbatches=1, num_groups=0, mesh=None, **settings):
    def change(batch):
        labels = np.arange(batch.loss_mask[..., 0].size).reshape(batch.loss_mask.shape[:2]) % 3 == 0
        batch = dataclasses.replace(batch, labels=labels)
        return pack(batch, num_groups=num_groups, prompt_step=1, completion_step=8) if num_groups else batch

    settings |= {"num_layers": 1, "num_microbatches": num_microbatches}
    return trajectory(make_mesh(mesh) if mesh else one_device(), num_steps=2, change=change, **settings)


@pytest.mark.parametrize(
    ("num_microbatches", "num_groups", "mesh"),
    [(2, 0, None), (4, 0, None), (2, 4, None), (4, 4, None), (2, 8, "2x2x2")],
)
def test_accumulated_gradients_are_those_of_the_whole_batch(num_microbatches, num_groups, mesh):
    # Rows are ragged and some are empty, so microbatches hold different counts: a mean of their means would be wrong.
    assert_same_trajectory(short_trajectory(num_microbatches, num_groups, mesh), short_trajectory())


@pytest.mark.parametrize(("num_groups", "mesh"), [(0, None), (8, "2x2x2")])
def test_a_loss_that_depends_on_its_batch_is_accumulated_exactly(num_groups, mesh):
    settings = {"loss": kto.loss, "method": kto.Config(beta=0.5)}  # its reference point is a mean over the batch
    assert_same_trajectory(short_trajectory(4, num_groups, mesh, **settings), short_trajectory(**settings))


def plain_sums(config, params, rows, places, mask):
    """Log-probs of whole completions [B, N] by the oracle, with what `rows_of` says of them."""
    logps = plain_llama.logps(config, params, rows).reshape(*mask.shape[:2], -1)
    return jnp.where(mask, jnp.take_along_axis(logps, places - 1, axis=2), 0).sum(-1)


def plain_loop(num_steps):
    """[(loss, gradient norm)] of each step and the parameters, in float64: no code of the project but its tree."""
    policy = tiny.make_policy(**tiny.DIVISIBLE)
    params, ref_params = (
        jax.tree.map(lambda x: np.asarray(x, np.float64), tiny.make_params(policy, i)) for i in (0, 1)
    )
    first, second = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    logged = []
    with jax.enable_x64(True):

        @jax.jit
        @jax.value_and_grad
        def gradient(params, ref_params, *rows):
            ratios = plain_sums(policy.config, params, *rows) - plain_sums(policy.config, ref_params, *rows)
            losses = jnp.log1p(jnp.exp(-METHOD.beta * (ratios[:, 0] - ratios[:, 1])))
            counted = rows[-1].any((1, 2))
            return jnp.where(counted, losses, 0).sum() / counted.sum()

        for step in range(1, num_steps + 1):
            batch = make_batch(step - 1)
            loss, grads = gradient(params, ref_params, *rows_of(batch), batch.completion_mask)
            norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(grads)))
            logged.append((float(loss), float(norm)))
            grads = jax.tree.map(lambda g: np.asarray(g) * min(1, 0.5 / norm), grads)  # noqa: B023
            first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
            second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, grads)
            rate = 3e-3 * min(step / 2, 1)

            def move(path, p, m, v):
                decay = 0 if path[-1].key == "scale" else 0.1
                return p - rate * (m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8) + decay * p)  # noqa: B023

            params = jax.tree_util.tree_map_with_path(move, params, first, second)
    return logged, params


STORED = [
    (1.0011207746920672, 9.478497667025701),
    (1.588305366774613, 13.568845960285088),
]  # loss and gradient norm of two steps by `plain_loop`
STORED_SUM = 977.8788095703794  # of the squares of all parameters after them


def test_two_updates_equal_a_plain_loop_and_the_stored_numbers():
    logged, params = plain_loop(2)
    np.testing.assert_allclose(logged, STORED, rtol=1e-9)
    np.testing.assert_allclose(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(params)), STORED_SUM, rtol=1e-9)
    metrics, found, _ = trajectory(one_device(), num_steps=2)
    np.testing.assert_allclose(np.stack([metrics["loss"], metrics["grad_norm"]], 1), STORED, rtol=1e-5)
    np.testing.assert_allclose(metrics["learning_rate"], [1.5e-3, 3e-3], rtol=1e-6)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_equal_policy_and_reference_lose_log_2_at_step_0():
    mesh = make_mesh("2x2x2")
    policy, state, _, update = setup(mesh, num_layers=1)
    _, metrics = update(
        state, sharding.place(tiny.make_params(policy), mesh), sharding.place_batch(make_batch(0), mesh)
    )
    np.testing.assert_allclose(metrics["loss"].value(), np.log(2), rtol=0, atol=1e-6)
    assert metrics["rewards/accuracies"].value() == 0


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_a_batch_in_which_nothing_counts_moves_nothing_but_the_step(num_microbatches):
    mesh = one_device()
    _, state, ref_params, update = setup(mesh, num_layers=1, num_microbatches=num_microbatches)
    empty = dataclasses.replace(make_batch(0), loss_mask=np.zeros_like(make_batch(0).loss_mask))
    for batch in (make_batch(0), make_batch(1)):  # so that there is momentum, and weights that could decay
        state, _ = update(state, ref_params, batch)
    before = jax.device_get((state.params, state.opt_state))
    state, metrics = update(state, ref_params, empty)
    assert state.step == 3
    assert metrics["loss"].count == metrics["grad_norm"].count == 0
    after = jax.device_get((state.params, state.opt_state))
    counts = optax.tree.get_all_with_path(state.opt_state, "count")
    (place,) = [value for path, value in counts if path[-1].tuple_name == "ScaleByScheduleState"]
    assert place == 3  # the learning rate is that of the step
    changed = [np.any(one != other) for one, other in zip(*map(jax.tree.leaves, (after, before)), strict=True)]
    assert sum(changed) == 1  # which that is
    state, metrics = update(state, ref_params, make_batch(2))
    np.testing.assert_allclose(metrics["learning_rate"].value(), SCHEDULE(3), rtol=1e-6)
    assert any(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (state.params, before[0])), strict=True))


@pytest.mark.parametrize(("method", "moves"), [(grpo.DAPO, False), (grpo.Config(beta=0.5, kl="k2"), True)])
def test_rewards_that_are_all_equal_move_nothing_unless_something_else_pulls(method, moves):
    mesh, settings = one_device(), {"num_layers": 1, "loss": grpo.loss, "method": method}
    _, state, ref_params, update = setup(mesh, **settings, reference="online" if method.needs_reference else "none")
    batch = make_batch(0)
    mixed = np.random.default_rng(0).normal(size=batch.loss_mask.shape[:2]).astype(np.float32)
    state, metrics = update(state, ref_params, dataclasses.replace(batch, advantages=mixed))
    assert metrics["grad_norm"].count == 1
    before = jax.device_get(state.params)
    state, metrics = update(state, ref_params, dataclasses.replace(batch, advantages=np.zeros_like(mixed)))
    moved = [np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (state.params, before)), strict=True)]
    assert (any(moved), bool(metrics["grad_norm"].count)) == (moves, moves)
    assert state.step == 2


def test_the_state_is_donated_and_nothing_else():
    mesh = one_device()
    policy = tiny.make_policy(**tiny.DIVISIBLE, num_layers=1)
    optimizer = optax.adam(1e-3)
    params, key = sharding.place(tiny.make_params(policy), mesh), jax.random.key(0)
    state = init_state(policy, params, optimizer, key, mesh)
    batch = sharding.place_batch(make_batch(0), mesh)
    before = jax.device_get(params)
    update = make_update(dpo.loss, METHOD, policy, optimizer, mesh, reference="online")
    new, _ = update(state, params, batch)  # the start is the reference: one set of arrays, no copy by the caller
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, batch, key, new)))
    jax.tree.map(np.testing.assert_array_equal, params, before)
    again, _ = update(new, params, batch)
    assert (int(again.step), again.key.dtype) == (2, key.dtype)
    np.testing.assert_array_equal(jax.random.key_data(again.key), jax.random.key_data(key))


def test_a_state_that_takes_the_parameters_over_holds_no_second_copy():
    mesh = one_device()
    policy = tiny.make_policy(**tiny.DIVISIBLE, num_layers=1, lora=lora.Config(rank=2))
    optimizer = optax.adam(1e-3)
    params = sharding.place(jax.tree.map(jnp.copy, tiny.make_params(policy)), mesh)  # those are every test's
    pointers = jax.tree.map(lambda leaf: leaf.unsafe_buffer_pointer(), params)
    state = init_state(policy, params, optimizer, jax.random.key(0), mesh, keep_params=False)
    assert jax.tree.map(lambda leaf: leaf.unsafe_buffer_pointer(), state.params) == pointers
    update = make_update(dpo.loss, METHOD, policy, optimizer, mesh, reference="adapter")
    new, _ = update(state, None, sharding.place_batch(make_batch(0), mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    base = jax.tree.map(lambda leaf: leaf.unsafe_buffer_pointer(), new.params["params"])
    assert base == pointers["params"]  # the reference is these very arrays, so it costs nothing


def test_references_of_every_kind_give_the_same_update_and_leave_the_base_weights_alone():
    mesh, settings = one_device(), {"lora": lora.Config(rank=2, targets=("q", "up")), "num_layers": 1}
    batch, outcomes = make_batch(0), {}
    for reference in ("online", "stored", "adapter"):
        policy, state, _, update = setup(mesh, reference, **settings)
        base = tiny.make_params(policy)
        ref_params = policy.without_adapters(base) if reference == "online" else None
        stored = reference_logps(policy, "online", base, policy.without_adapters(base), batch)
        state, metrics = update(state, ref_params, make_batch(0, ref_logps=stored) if reference == "stored" else batch)
        jax.tree.map(np.testing.assert_array_equal, state.params["params"], base["params"])
        assert all(
            np.any(one != other)
            for one, other in zip(*map(jax.tree.leaves, (state.params["lora"], base["lora"])), strict=True)
        )
        assert {leaf.shape for leaf in jax.tree.leaves(state.opt_state)} - {()} == {
            x.shape for x in jax.tree.leaves(base["lora"])
        }
        outcomes[reference] = {name: mean.value() for name, mean in metrics.items()}, state.params["lora"]
    assert outcomes["online"][0]["loss"] != np.log(2)
    for other in ("stored", "adapter"):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6), outcomes[other], outcomes["online"]
        )


def test_without_a_reference_the_loss_is_of_the_policy_alone():
    mesh = one_device()
    policy, state, ref_params, update = setup(mesh, "none", sft.loss, sft.Config(), num_layers=1)
    batch = make_batch(0)
    assert reference_logps(policy, "none", state.params, None, batch) is ref_params is None
    expected = -np.asarray(policy.logps(state.params, batch))[batch.loss_mask].mean()
    _, metrics = update(state, None, batch)
    np.testing.assert_allclose(metrics["loss"].value(), expected, rtol=1e-5)


def test_the_reference_gets_no_gradient():
    policy = tiny.make_policy(**tiny.DIVISIBLE, num_layers=1, lora=lora.Config(rank=2))
    params = tiny.make_params(policy)
    for reference, ref_params in (("online", policy.without_adapters(params)), ("adapter", None)):
        gradient = jax.grad(lambda p: reference_logps(policy, reference, p[0], p[1], make_batch(0)).sum())  # noqa: B023
        jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), gradient((params, ref_params)))


@pytest.mark.parametrize(
    ("reference", "ref_params", "message"),
    [
        ("online", None, "reference is 'online', so ref_params must be given"),
        ("stored", {}, "reference is 'stored', so ref_params must be None"),
        ("none", {}, "reference is 'none', so ref_params must be None"),
        ("stored", None, "reference is 'stored', but the batch holds no ref_logps; attach them or choose 'online'"),
        (
            "adapter",
            None,
            "reference is 'adapter', but there are no adapters; set model.lora.rank or choose 'online'",
        ),
    ],
)
def test_combinations_that_cannot_work_are_refused(reference, ref_params, message):
    _, state, _, update = setup(one_device(), reference)
    others = {"ref_logps": np.zeros((8, 2, 4), np.float32)} if ref_params is not None else {}
    with pytest.raises(ValueError, match=message):
        update(state, ref_params, make_batch(0, **others))


@pytest.mark.usefixtures("unchecked")
def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="reference must be one of none, online, stored, adapter, got 'offline'"):
        setup(one_device(), "offline")
    with pytest.raises(ValueError, match="num_microbatches must be at least 1, got 0"):
        setup(one_device(), num_microbatches=0)


@pytest.mark.parametrize(
    ("num_groups", "message"),
    [(0, "8 prompts cannot be cut into 3 microbatches"), (2, "2 packed groups cannot be cut into 3 microbatches")],
)
def test_batches_that_accumulation_cannot_cut_are_refused(num_groups, message):
    _, state, ref_params, update = setup(one_device(), num_microbatches=3)
    batch = make_batch(0)
    with pytest.raises(ValueError, match=message):
        update(state, ref_params, pack(batch, num_groups=num_groups) if num_groups else batch)
