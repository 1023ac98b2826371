"""Log-probs of tokens by NumPy loops in float64, the published golden values, and masked sums."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from pjpo import layout, sharding
from pjpo.logps import log_ratios, mean_completion, sum_completion, token_logps, widened


def by_loop(hidden, table, targets, weights, cap=None, temperature=1.0):
    """Log-probs, and the gradients of their sum under `weights`, one position at a time."""
    logps, dhidden, dtable = np.zeros(targets.shape), np.zeros(hidden.shape), np.zeros(table.shape)
    for place in np.ndindex(targets.shape):
        logits = table @ hidden[place]
        slope = 1.0
        if cap is not None:
            logits, slope = cap * np.tanh(logits / cap), 1 / np.cosh(logits / cap) ** 2
        logits, slope = logits / temperature, slope / temperature
        total = np.log(np.sum(np.exp(logits - logits.max()))) + logits.max()
        logps[place] = logits[targets[place]] - total
        dlogits = -np.exp(logits - total)
        dlogits[targets[place]] += 1
        dlogits *= slope
        dhidden[place] = weights[place] * table.T @ dlogits
        dtable += weights[place] * np.outer(dlogits, hidden[place])
    return logps, dhidden, dtable


def example(groups=2, positions=7, width=5, vocab_size=11):
    rng = np.random.default_rng(0)
    hidden, table = rng.normal(size=(groups, positions, width)), rng.normal(size=(vocab_size, width))
    return hidden, table, rng.integers(0, vocab_size, (groups, positions)), rng.normal(size=(groups, positions))


# 2 groups of 7 positions with 11 tokens are 154 logits: all at once, in blocks of 4 (the last one padded) and of 1.
@pytest.mark.parametrize("block_numbers", [1000, 100, 22])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("float64", 1e-13)])
@pytest.mark.parametrize(("cap", "temperature"), [(None, 1.0), (1.5, 1.0), (1.5, 0.6)])
def test_values_and_gradients_equal_a_loop(block_numbers, dtype, bound, cap, temperature):
    hidden, table, targets, weights = example()
    with jax.enable_x64(dtype == "float64"):
        logps, pullback = jax.vjp(
            lambda hidden, table: token_logps(hidden, table, targets.astype(np.int32), block_numbers, cap, temperature),
            *(jnp.asarray(x, dtype) for x in (hidden, table)),
        )
        found = logps, *pullback(jnp.asarray(weights, dtype))
    for one, other in zip(found, by_loop(hidden, table, targets, weights, cap, temperature), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=bound)


@pytest.mark.parametrize("cap", [None, 1.5])
def test_devices_that_share_rows_width_and_vocabulary_add_up(cap):
    hidden, table, targets, weights = example(groups=4, width=4, vocab_size=6)
    mesh = sharding.make_mesh(sharding.Config(data=2, fsdp=2, model=2))

    def place(x, dtype, spec):
        return jax.device_put(jnp.asarray(x, dtype), NamedSharding(mesh, spec))

    @jax.jit
    def found(hidden, table, targets, weights):
        with layout.on(mesh):
            logps, pullback = jax.vjp(lambda *x: token_logps(*x, targets, 40, cap, 0.6), hidden, table)
            return logps, *pullback(weights)

    given = place(hidden, "float32", layout.ROWS), place(table, "float32", layout.TABLE)
    given += place(targets, "int32", layout.ROWS), place(weights, "float32", layout.ROWS)
    for one, other in zip(found(*given), by_loop(hidden, table, targets, weights, cap, 0.6), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=5e-6)


# In 80 numbers fit 3 positions of both groups; in 21 not even one, and one is the least that there is.
@pytest.mark.parametrize(("block_numbers", "most"), [(1000, 154), (100, 88), (80, 66), (22, 22), (21, 22)])
def test_no_more_logits_than_asked_for(block_numbers, most):
    hidden, table, targets, weights = example()

    def loss(hidden, table):
        return (weights * token_logps(hidden, table, jnp.int32(targets), block_numbers)).sum()

    text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(jnp.float32(hidden), jnp.float32(table)).as_text()
    shapes = [[*map(int, shape.split("x")), 11] for shape in re.findall(r"tensor<([\dx]+)x11x\w+>", text)]
    assert max(map(np.prod, shapes)) == most


def test_bfloat16_takes_the_softmax_in_float32():
    hidden, table, targets, weights = example()
    hidden, table = (jnp.asarray(x, jnp.bfloat16) for x in (hidden, table))
    expected = by_loop(*(np.asarray(x, np.float64) for x in (hidden, table)), targets, weights)
    logps, pullback = jax.vjp(lambda hidden, table: token_logps(hidden, table, jnp.int32(targets), 100), hidden, table)
    gradients = pullback(jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(logps, expected[0], rtol=0, atol=2e-6)  # products of bfloat16 numbers, summed exactly
    for one, other in zip(gradients, expected[1:], strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=0.02, atol=0.02)


def test_every_product_takes_the_dtype_of_the_states():
    """A float32 cotangent would give no worse numbers, but float32 products, which matrix units are slow at.

    For a GPU: a CPU without a matrix unit takes float32 on purpose, see `pjpo.products`.
    """
    hidden, table, targets, _ = example()

    def total(hidden, table):
        return token_logps(hidden, table, jnp.int32(targets), 100).sum()

    arguments = (jnp.asarray(x, jnp.bfloat16) for x in (hidden, table))
    text = jax.jit(jax.grad(total, (0, 1))).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    operands = re.findall(r"dot_general .*: \(tensor<[\dx]+x(\w+)>, tensor<[\dx]+x(\w+)>\)", text)
    assert len(operands) >= 4  # forward, forward again, and for the gradients of states and table
    assert {dtype for pair in operands for dtype in pair} == {"bf16"}


def test_extreme_logits_stay_finite():
    hidden, table = jnp.array([[[1e4], [-1e4]]]), jnp.array([[1.0], [0.0]])
    targets = jnp.zeros((1, 2), jnp.int32)
    logps, pullback = jax.vjp(lambda h, t: token_logps(h, t, targets, 100), hidden, table)
    np.testing.assert_array_equal(logps, [[0.0, -1e4]])
    np.testing.assert_array_equal(pullback(jnp.ones((1, 2)))[0][0, :, 0], [0, 1])


def test_golden_sequence_logps():
    logits = np.array(
        [
            [[0.2, -0.1, 0.5], [1.0, 0.0, -1.0], [0.3, 0.3, 0.3], [-0.4, 0.9, 0.1]],
            [[0.0, 1.0, 2.0], [-1.5, 0.5, 0.25], [2.0, -2.0, 0.0], [0.7, 0.6, 0.5]],
        ]
    )
    labels = np.array([[-100, -100, 2, 0], [-100, 1, 2, -100]])[:, 1:]
    mask = jnp.asarray(labels >= 0)[:, None]
    with jax.enable_x64(True):
        hidden, targets = jnp.asarray(logits[:, :-1]), jnp.asarray(labels.clip(0), jnp.int32)
        logps = token_logps(hidden, jnp.eye(3), targets, 1000)[:, None]  # the states are the logits
        tokens = np.where(mask, logps, 0)[:, 0]
        np.testing.assert_allclose(tokens, [[0, -2.40760596, -1.09861229], [-1.40760596, -0.89926638, 0]], atol=1e-8)
        np.testing.assert_allclose(sum_completion(logps, mask)[:, 0], [-3.50621825, -2.30687234], atol=1e-8)
        np.testing.assert_allclose(mean_completion(logps, mask)[:, 0], [-1.75310913, -1.15343617], atol=1e-8)


def test_masked_sums_and_means():
    values = jnp.array([[[1.0, 2.0, jnp.nan], [jnp.inf, 5.0, 7.0]], [[jnp.nan] * 3, [3.0, 4.0, 5.0]]])
    mask = jnp.array([[[True, True, False], [False, True, True]], [[False] * 3, [True] * 3]])
    np.testing.assert_array_equal(sum_completion(values, mask), [[3, 12], [0, 12]])
    np.testing.assert_array_equal(mean_completion(values, mask), [[1.5, 6], [0, 4]])
    of_one = mask.at[:, :, 1].set(False).at[1, 1, 0].set(False)
    np.testing.assert_array_equal(mean_completion(values, of_one), [[1, 7], [0, 5]])


@pytest.mark.usefixtures("unchecked")
def test_log_ratios_hold_the_reference_constant_and_ask_for_one():
    logps, ref_logps = jnp.array([[[-1.0, -2.0]]]), jnp.array([[[-1.5, -1.0]]])
    np.testing.assert_array_equal(log_ratios(logps, ref_logps), [[[0.5, -1]]])
    for argument, expected in ((0, 1), (1, 0)):
        gradient = jax.grad(lambda *x: log_ratios(*x).sum(), argument)(logps, ref_logps)
        np.testing.assert_array_equal(gradient, [[[expected] * 2]])
    with pytest.raises(ValueError, match="ref_logps is None; score the batch under it"):
        log_ratios(logps, None)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("reduce", [sum_completion, mean_completion])
def test_values_of_other_completions_than_the_mask_s_are_refused(reduce):
    """Two of which would otherwise be one and the same."""
    with pytest.raises(ValueError, match=r"must have the mask's shape \(1, 2, 3\), got \(1, 1, 3\)"):
        reduce(jnp.zeros((1, 1, 3)), np.ones((1, 2, 3), bool))


@pytest.mark.parametrize(
    ("dtype", "narrow", "wide"),
    [
        ("bfloat16", "float32", "float32"),
        ("float32", "float32", "float32"),
        ("float64", "float32", "float64"),
        ("int32", "float32", "float64"),
        ("bool", "float32", "float64"),
    ],
)
def test_what_losses_compute_in(dtype, narrow, wide):
    for x64, expected in ((False, narrow), (True, wide)):
        with jax.enable_x64(x64):
            assert widened(jnp.ones(3, jnp.dtype(dtype) if x64 or dtype != "float64" else "float32")).dtype == expected
