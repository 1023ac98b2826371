"""Means that add up."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from hypothesis.extra import numpy as arrays

from pjpo.metrics import Largest, Mean, Smallest

SIZE = 12
WHOLE_NUMBERS = arrays.arrays(np.float32, SIZE, elements=strategies.integers(-1000, 1000))  # sums of them are exact
MASKS = arrays.arrays(bool, SIZE)


def test_a_mean_is_over_what_the_mask_keeps():
    values, mask = jnp.array([[1.0, 2.0], [4.0, jnp.inf]]), jnp.array([[True, True], [True, False]])
    np.testing.assert_allclose(Mean.of(values, mask).value(), 7 / 3, rtol=1e-7)
    np.testing.assert_allclose(Mean.of(values[:1]).value(), 1.5)
    assert Mean.of(values[1, :1]).value() == 4


def test_parts_add_up_to_the_whole_however_uneven():
    rng = np.random.default_rng(0)
    values, mask = rng.normal(size=12).astype(np.float32), rng.random(12) < 0.6
    parts = [Mean.of(values[cut], mask[cut]) for cut in (slice(0, 1), slice(1, 9), slice(9, 12))]
    whole = parts[0] + parts[1] + parts[2]
    np.testing.assert_allclose(whole.value(), values[mask].mean(), rtol=1e-6)
    assert whole.count == mask.sum()
    assert sum(parts) == whole
    with pytest.raises(TypeError):
        1 + whole


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    values=WHOLE_NUMBERS,
    mask=MASKS,
    order=strategies.permutations(range(SIZE)),
    cuts=strategies.lists(strategies.integers(0, SIZE), max_size=4).map(sorted),
    turned=strategies.randoms(use_true_random=False),
)
def test_parts_in_any_split_and_order_add_up_to_the_whole(values, mask, order, cuts, turned):
    parts = [Mean.of(values[rows], mask[rows]) for rows in np.split(np.array(order), cuts)]  # empty ones among them
    turned.shuffle(parts)
    total = functools.reduce(Mean.__add__, parts)
    assert (total.sum, total.count) == (values[mask].sum(), mask.sum())
    assert total.value() == np.float32(values[mask].mean() if mask.any() else 0)


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    values=WHOLE_NUMBERS,
    mask=MASKS,
    beneath=arrays.arrays(np.float32, SIZE, elements=strategies.sampled_from([7.0, 3e38, np.nan, np.inf, -np.inf])),
)
def test_what_lies_beneath_the_mask_changes_neither_a_mean_nor_its_gradient(values, mask, beneath):
    def mean(values):
        return Mean.of(values, mask).value()

    changed = np.where(mask, values, beneath)
    assert mean(changed) == mean(values)
    np.testing.assert_array_equal(jax.grad(mean)(changed), jax.grad(mean)(values))


def test_nothing_counted_is_zero_with_a_zero_gradient():
    def mean(values):
        return Mean.of(values, jnp.zeros(3, bool)).value()

    assert mean(jnp.full(3, jnp.nan)) == 0
    np.testing.assert_array_equal(jax.grad(mean)(jnp.ones(3)), 0)
    assert jax.value_and_grad(lambda sum: Mean(sum, jnp.float32(0)).value())(jnp.float32(3)) == (0, 0)


@pytest.mark.parametrize(
    "values", [np.array([True, False, True, True]), np.array([1, 0, 1, 1]), np.float16([1, 0, 1, 1])]
)
def test_flags_whole_numbers_and_halves_are_summed_in_float32(values):
    mean = Mean.of(values)
    assert (mean.sum.dtype, mean.count.dtype) == (jnp.float32, jnp.float32)
    assert mean.value() == 0.75


@pytest.mark.parametrize("values", [np.array([True, False, True]), np.array([1, 0, 1])])
def test_flags_and_whole_numbers_are_summed_in_float64_where_there_is_one(values):
    with jax.enable_x64(True):
        mean = Mean.of(values)
        assert (mean.sum.dtype, mean.count.dtype) == (jnp.float64, jnp.float64)
        assert mean.value() == 2 / 3


def test_bfloat16_does_not_lose_the_small_terms():
    assert Mean.of(jnp.ones(1000, jnp.bfloat16)).value() == 1


def test_a_mask_of_another_shape_is_a_bug():
    with pytest.raises(AssertionError, match=r"mask \(3,\) does not fit values \(2, 3\)"):
        Mean.of(jnp.ones((2, 3)), jnp.ones(3, bool))


@pytest.mark.parametrize(("kind", "extreme"), [(Largest, np.max), (Smallest, np.min)])
def test_extremes_of_parts_add_up_to_that_of_the_whole(kind, extreme):
    rng = np.random.default_rng(1)
    for shift in (-5.0, 5.0):  # so that a 0 for what is not there would show
        values, mask = (rng.normal(size=12) + shift).astype(np.float32), rng.random(12) < 0.6
        mask[9:] = False  # a part of which nothing counts
        parts = [kind.of(values[cut], mask[cut]) for cut in (slice(0, 1), slice(1, 9), slice(9, 12))]
        for whole in (kind.of(values, mask), parts[0] + parts[1] + parts[2], parts[2] + parts[1] + parts[0]):
            assert isinstance(whole, kind)
            assert whole.value() == extreme(values[mask])
            assert whole.count == 1
    assert kind.of(values).value() == extreme(values)
    nothing = kind.of(np.zeros((0, 3), np.float32))
    assert nothing.sum == nothing.count == nothing.value() == 0
