"""What every method in `pjpo/methods/` promises; a new one is found by being there. See `contract.py`."""

import dataclasses
import functools
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pjpo import sharding
from pjpo.evals.preferences import implicit_rewards
from pjpo.metrics import Mean
from pjpo.step import init_state, make_update
from pjpo.types import CHOSEN
from tests.methods.contract import NAMES, SHAPE, Method

ROUNDING = {"rtol": 2e-6, "atol": 1e-6}  # the same float32 terms, added in another order


@pytest.fixture(autouse=True)
def strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module", params=NAMES)
def method(request):
    return Method(request.param)


def on_device(example, rows=slice(None)):
    """The arguments of a loss, or some of their rows: cut on the host, which needs no compilation for every cut."""
    arguments = (example.batch, example.logps, example.ref_logps, example.others)
    return jax.tree.map(lambda x: jnp.asarray(x[rows]), arguments)


def outcome(method, config, arguments, jit=False):
    """(loss and metrics as `Mean`s, gradient of the loss's sum by all that a policy computes)."""

    def total(outputs, batch, ref_logps):
        mean, metrics = method.loss(config, batch, outputs["logps"], ref_logps, **without_logps(outputs))
        return mean.sum, {"loss": mean, **metrics}

    batch, logps, ref_logps, others = arguments
    differentiate = jax.value_and_grad(total, has_aux=True)
    outputs = {"logps": logps, **others}
    (_, means), gradient = (jax.jit(differentiate) if jit else differentiate)(outputs, batch, ref_logps)
    return means, gradient


def without_logps(outputs):
    return {name: value for name, value in outputs.items() if name != "logps"}


def of_tokens(tree, batch):
    """The leaves with a number for each token; others may have one for each completion."""
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.shape == batch.loss_mask.shape]


def depends_on_the_batch(config):
    """Whether a row's loss depends on the other rows; see `pjpo.step`."""
    return getattr(config, "whole_batch", False)


def assert_same(found, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **ROUNDING), found, expected)


def outcome_of(method, config, start, stop):
    """The outcome of some rows of the example, as NumPy arrays."""
    return jax.device_get(outcome(method, config, on_device(method.example(), slice(start, stop))))


def joined(outcomes):
    """The outcome of a batch from those of its parts."""
    means, gradients = zip(*outcomes, strict=True)
    total = jax.tree.map(
        lambda *parts: functools.reduce(operator.add, parts), *means, is_leaf=lambda x: isinstance(x, Mean)
    )
    return total, jax.tree.map(lambda *parts: np.concatenate(parts), *gradients)


def test_the_folder_has_methods():
    assert {"dpo", "sft"} <= set(NAMES)


def test_the_loss_takes_what_its_config_says_it_reads(method):
    others = [name for name in method.outputs if name != "logps"]
    assert method.arguments == ["config", "batch", "logps", "ref_logps", *others]


def test_loss_and_metrics_are_means_of_float32(method):
    for config in method.configs:
        means, gradient = outcome(method, config, on_device(method.example()))
        assert all(isinstance(mean, Mean) for mean in means.values())
        for leaf in jax.tree.leaves((means, gradient)):
            assert leaf.dtype == jnp.float32
        assert all(mean.sum.shape == mean.count.shape == () for mean in means.values())
        assert means["loss"].count > 0


def test_what_a_model_computes_in_bfloat16_is_added_up_in_float32(method):
    example = method.example()
    batch = example.batch
    read = {name: getattr(batch, name) for name in ("old_logps", "ref_logps", "values")}
    read = read, example.logps, example.ref_logps, example.others
    coarse = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), read)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), coarse)
    batch = jax.tree.map(jnp.asarray, batch)
    with jax.numpy_dtype_promotion("standard"):
        for config in method.configs:
            found, expected = (
                outcome(method, config, (dataclasses.replace(batch, **fields), *arguments))[0]
                for fields, *arguments in (coarse, wide)
            )
            assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))
            assert_same(found, expected)


def test_rewards_are_implicit_rewards_exactly_where_the_config_says_so(method):
    example = method.example()
    batch = example.batch
    for config in method.configs:
        *arguments, others = on_device(example)
        _, metrics = method.loss(config, *arguments, **others)
        if "rewards/chosen" not in metrics:
            continue
        name, scale = implicit_rewards(config)
        rewards = scale * np.where(batch.loss_mask, example.logps - batch.ref_logps, 0)[:, CHOSEN].sum(-1)
        chosen = batch.labels[:, CHOSEN] if method.name == "kto" else np.ones(len(rewards), bool)
        found = metrics["rewards/chosen"].sum
        assert np.isclose(found, rewards[chosen].sum(), rtol=1e-5) == (name == "rewards"), f"{config}: {name} {scale}"


@pytest.mark.parametrize("where", ["first completions", "other completions", "everywhere", "reference", "old"])
def test_finite_at_extremes_and_with_empty_completions(method, where):
    example = method.example()
    assert not example.batch.completion_mask.any((1, 2)).all()
    assert not example.batch.completion_mask.any(2)[1, 0]
    first = np.arange(method.shape[1])[None, :, None] == 0
    whole = np.ones((1, 1, 1), bool)

    def sunk(values, at):
        if values is None:
            return None
        at = example.batch.completion_mask & at
        return np.where(at if values.ndim == 3 else at.any(-1), np.float32(-1e4), values)

    at = {"first completions": first, "other completions": ~first, "everywhere": whole}.get(where, ~whole)
    batch = dataclasses.replace(example.batch, old_logps=sunk(example.batch.old_logps, whole & (where == "old")))
    example = dataclasses.replace(
        example,
        batch=batch,
        logps=sunk(example.logps, at),
        ref_logps=sunk(example.ref_logps, whole & (where == "reference")),
        others={name: sunk(values, at) for name, values in example.others.items()},
    )
    for config in method.configs:
        for leaf in jax.tree.leaves(outcome(method, config, on_device(example))):
            assert np.isfinite(leaf).all()


def test_nothing_to_score_is_a_mean_of_nothing(method):
    example = method.example()
    nothing = np.zeros_like(example.batch.loss_mask)
    batch = dataclasses.replace(example.batch, completion_mask=nothing, loss_mask=nothing)
    for config in method.configs:
        means, gradient = outcome(method, config, on_device(dataclasses.replace(example, batch=batch)))
        assert means["loss"].sum == means["loss"].count == 0
        for leaf in jax.tree.leaves(gradient):
            np.testing.assert_array_equal(leaf, 0)
        for mean in means.values():
            assert mean.value() == 0


@pytest.mark.parametrize("noise", ["moderate", np.nan, -np.inf])
def test_masked_tokens_get_no_gradient_and_have_no_effect(method, noise):
    example = method.example()
    batch, logps, ref_logps, others = on_device(example)
    if noise == "moderate":
        noise = -np.exp(np.random.default_rng(1).normal(size=batch.loss_mask.shape)).astype(np.float32)
    noise = jnp.where(batch.loss_mask, 0, jnp.broadcast_to(jnp.float32(noise), batch.loss_mask.shape))
    logps_2, ref_logps_2, others_2 = jax.tree.map(
        lambda x: x + noise if x.shape == noise.shape else x, (logps, ref_logps, others)
    )
    other = batch, logps_2, ref_logps_2, others_2
    for config in method.configs:
        means, gradient = outcome(method, config, (batch, logps, ref_logps, others))
        for leaf in of_tokens(gradient, batch):
            np.testing.assert_array_equal(leaf[~batch.loss_mask], 0)
        assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient))
        assert_same(outcome(method, config, other), (means, gradient))


def test_the_reference_gets_no_gradient(method):
    batch, logps, ref_logps, others = on_device(method.example())
    if ref_logps is None:
        assert all(
            "ref_logps" not in str(jax.tree_util.keystr(path))
            for path, _ in jax.tree_util.tree_leaves_with_path(others)
        )
        return
    for config in method.configs:
        gradient = jax.grad(lambda x: method.loss(config, batch, logps, x, **others)[0].value())(ref_logps)  # noqa: B023
        np.testing.assert_array_equal(gradient, 0)


def test_jit_equals_no_jit(method):
    arguments = on_device(method.example())
    for config in method.configs:
        assert_same(outcome(method, config, arguments, jit=True), outcome(method, config, arguments))


def test_eight_devices_equal_one(method):
    arguments = on_device(method.example())
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(arguments, NamedSharding(mesh, PartitionSpec("data")))
    assert len(jax.devices()) == 8
    for config in method.configs:
        assert_same(outcome(method, config, spread, jit=True), outcome(method, config, arguments))


def test_microbatches_add_up_to_one_batch(method):
    arguments = on_device(method.example())
    for config in (config for config in method.configs if not depends_on_the_batch(config)):
        part = functools.cache(functools.partial(outcome_of, method, config))
        expected = outcome(method, config, arguments)
        for cuts in (range(1, 8), [4], [1, 5, 6, 7], [1, 2, 3, 4]):  # of two sizes, as each is compiled
            assert_same(joined(list(map(part, [0, *cuts], [*cuts, SHAPE[0]]))), expected)


def test_a_loss_that_depends_on_its_batch_says_so(method):
    arguments = on_device(method.example())
    for config in (config for config in method.configs if depends_on_the_batch(config)):
        found = joined([outcome_of(method, config, i, i + 1) for i in range(SHAPE[0])])
        with pytest.raises(AssertionError):
            assert_same(found[1], outcome(method, config, arguments)[1])


class Lookup:
    """A policy whose parameters are what it computes: one number for each token, or for each completion."""

    def __init__(self, outputs):
        for name, values in outputs.items():
            setattr(self, name, functools.partial(self._read, name, values.ndim))

    @staticmethod
    def _read(name, ndim, params, batch):
        return params[name][batch.completion_tokens if ndim == 3 else batch.completion_tokens[:, :, 0]]

    def trainable(self, params):
        return params, {}


def test_an_update_is_the_same_in_any_number_of_microbatches(method):
    batch, logps, ref_logps, others = on_device(method.example())
    batch = dataclasses.replace(
        batch, completion_tokens=jnp.arange(batch.loss_mask.size).reshape(batch.loss_mask.shape)
    )
    outputs = others if logps is None else {"logps": logps, **others}
    policy, mesh, optimizer = Lookup(outputs), sharding.make_mesh(devices=jax.devices()[:1]), optax.sgd(1.0)
    params = {
        name: jnp.repeat(values.reshape(-1), batch.loss_mask.size // values.size) for name, values in outputs.items()
    }
    for config in method.configs:
        results = []
        for num_microbatches in (1, 4):
            state = init_state(policy, params, optimizer, jax.random.key(0), mesh)
            reference = "none" if ref_logps is None else "stored"
            options = {"reference": reference, "num_microbatches": num_microbatches}
            state, metrics = make_update(method.loss, config, policy, optimizer, mesh, **options)(state, None, batch)
            results.append((jax.tree.map(jnp.subtract, state.params, params), metrics))
        for result in results[1:]:
            assert_same(result, results[0])


def test_the_order_of_rows_changes_nothing(method):
    arguments = on_device(method.example())
    order = np.random.default_rng(0).permutation(SHAPE[0])
    for config in method.configs:
        means, gradient = outcome(method, config, arguments)
        expected = means, jax.tree.map(lambda x: x[order], gradient)
        assert_same(outcome(method, config, on_device(method.example(), order)), expected)


def test_every_field_has_an_effect(method):
    arguments = on_device(method.example())

    def effects(config):
        batch, *others = arguments
        if hasattr(config, "advantages"):
            batch = config.advantages(batch, **method.rollout())
        means, gradient = outcome(method, config, (batch, *others))
        return jax.tree.leaves((means["loss"].value(), gradient, method.contract.also(config)))

    expected = effects(method.start)
    for field, config in method.nudged():
        assert any(jnp.any(x != y) for x, y in zip(effects(config), expected, strict=True)), f"nothing reads {field}"


class TestAdvantages:
    """Of methods that make advantages of a scored rollout."""

    @pytest.fixture(params=[name for name in NAMES if hasattr(Method(name).Config, "advantages")])
    def method(self, request):
        return Method(request.param)

    @staticmethod
    def found(method, config, example, rows=slice(None), jit=False, place=jnp.asarray):
        """(advantages, labels) of some rows as a rollout."""
        batch, others = jax.tree.map(lambda x: place(x[rows]), (example.batch, method.rollout()))
        batch = dataclasses.replace(batch, advantages=None, labels=None)
        batch = (jax.jit(config.advantages) if jit else config.advantages)(batch, **others)
        return batch.advantages, batch.labels

    def test_they_are_float32_of_completions_or_tokens_and_zero_where_nothing_is(self, method):
        example = method.example()
        mask = example.batch.loss_mask
        for config in method.configs:
            for found in jax.tree.leaves(self.found(method, config, example)):
                assert found.dtype == jnp.float32
                assert found.shape in (mask.shape, mask.shape[:2])
                np.testing.assert_array_equal(found[~(mask if found.ndim == 3 else mask.any(-1))], 0)

    def test_masked_tokens_have_no_effect(self, method):
        example = method.example()
        batch = example.batch
        noise = np.where(batch.loss_mask, 0, np.float32(np.nan))
        names = ("old_logps", "ref_logps", "values")
        noisy = dataclasses.replace(batch, **{name: getattr(batch, name) + noise for name in names})
        for config in method.configs:
            found = self.found(method, config, dataclasses.replace(example, batch=noisy))
            assert_same(found, self.found(method, config, example))

    def test_finite_at_extremes(self, method):
        example = method.example()
        batch = example.batch
        for field, value in (("old_logps", -1e4), ("ref_logps", -1e4), ("values", 1e4), ("rewards", 1e4)):
            values = getattr(batch, field).copy()
            values[::2] = value
            for config in method.configs:
                found = self.found(
                    method, config, dataclasses.replace(example, batch=dataclasses.replace(batch, **{field: values}))
                )
                assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))

    def test_jit_and_eight_devices_and_another_order_change_nothing(self, method):
        example, order = method.example(), np.random.default_rng(0).permutation(SHAPE[0])
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spread = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("data")))
        for config in method.configs:
            expected = self.found(method, config, example)
            assert_same(self.found(method, config, example, jit=True, place=spread), expected)
            shuffled = self.found(method, config, example, order)
            assert_same(shuffled, jax.tree.map(lambda x: x[order], expected))


@pytest.mark.usefixtures("unchecked")
def test_rows_of_another_number_of_completions_are_refused_by_name(method):
    for number in {1, 3} if method.has_fixed_rows else ():
        batch, logps, ref_logps, others = on_device(method.example(num_completions=number))
        for config in method.configs:
            with pytest.raises(ValueError, match=rf"^{method.name}: .*, got {number} completions"):
                method.loss(config, batch, logps, ref_logps, **others)


@pytest.mark.usefixtures("unchecked")
def test_values_of_another_type_are_refused_by_name(method):
    for field, value in method.no_numbers():
        with pytest.raises(
            ValueError, match=rf"^{method.name}: {field} must be a number, got {re.escape(repr(value))}"
        ):
            dataclasses.replace(method.start, **{field: value})


@pytest.mark.usefixtures("unchecked")
def test_every_bad_value_is_refused_by_name(method):
    for field, value in method.bad_values():
        with pytest.raises(ValueError, match=rf"{method.name}: .*{field}.*{value}"):
            dataclasses.replace(method.Config(), **{field: value})


def test_the_config_is_static(method):
    for config in method.configs:
        assert hash(config) == hash(dataclasses.replace(config))
        assert jax.tree.leaves(config) == [config]
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.anything = 1
