"""Matrix products and their gradients against NumPy in float64."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pjpo import layout, products, sharding
from pjpo.products import (
    BLOCK,
    LANES,
    WIDE,
    contract_rows,
    dot,
    einsum,
    few_rows,
    has_matrix_unit,
    has_wide_registers,
    in_words,
    product,
    scale_columns,
    streamed_rows,
)


def draw(*shapes, dtype):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def wide(x):
    return np.asarray(x, np.float64)


def as_on_other_devices(monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))


@pytest.fixture(params=["of CPUs", "of CPUs with a matrix unit", "of other devices"])
def branch(request, monkeypatch):
    """What a program would run on these, run here."""
    jax.clear_caches()  # of the other branches
    monkeypatch.setattr(products, "has_matrix_unit", lambda: request.param == "of CPUs with a matrix unit")
    if request.param == "of other devices":
        as_on_other_devices(monkeypatch)
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("bfloat16", 0.02)])
@pytest.mark.parametrize(("rows", "out"), [((5,), (3,)), ((2, 7), (2, 3, 4)), ((1, 1), (3,))])
def test_a_product_and_its_gradients(dtype, bound, rows, out):
    x, kernel, cotangent = draw((*rows, 6), (6, *out), (*rows, *out), dtype=dtype)
    y, pullback = jax.vjp(jax.jit(product), x, kernel)
    dx, dkernel = pullback(cotangent)
    axes = tuple(range(len(rows)))
    expected = [
        np.tensordot(wide(x), wide(kernel), 1),
        np.tensordot(
            wide(cotangent), wide(kernel), (tuple(range(len(rows), cotangent.ndim)), tuple(range(1, kernel.ndim)))
        ),
        np.tensordot(wide(x), wide(cotangent), (axes, axes)),
    ]
    for found, by_numpy in zip((y, dx, dkernel), expected, strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(wide(found), by_numpy, rtol=bound, atol=bound)


@pytest.mark.parametrize("kernel_dtype", ["float32", "bfloat16"])
def test_few_rows_of_float32_lose_nothing_to_a_kernel_of_either_dtype(kernel_dtype):
    (x,), (kernel,) = draw((2, 3, 300), dtype="float32"), draw((300, 2, 4), dtype=kernel_dtype)
    spread = x * jnp.float32(10.0) ** jnp.linspace(-4, 4, 300)[None, None]  # summands of every size
    for rows in (x, spread, x.at[0, 0, 0].set(jnp.nan)):
        found = jax.jit(few_rows)(rows, kernel, jnp.moveaxis(kernel, 0, -1))
        assert found.dtype == jnp.float32
        size = np.tensordot(np.abs(wide(rows)), np.abs(wide(kernel)), 1)
        np.testing.assert_array_less(
            np.abs(wide(found) - np.tensordot(wide(rows), wide(kernel), 1))[1:], 3e-7 * size[1:]
        )
        np.testing.assert_array_equal(np.isnan(found), np.isnan(size))


@pytest.mark.parametrize(
    ("width", "out", "num_rows"),
    [
        (576, 48, 16),
        (48, 32, 17),
        (16, 2 * BLOCK, 2),
        (32, BLOCK + LANES, 1),
        (30, 16, 16),
        (32, 15, 2),
    ],
)
def test_few_rows_as_outer_products(width, out, num_rows):
    (x,), (kernel,) = draw((num_rows, 1, width), dtype="float32"), draw((width, out), dtype="float32")
    streamed = jax.jit(streamed_rows, compiler_options=WIDE)
    kernels = jnp.stack([jnp.zeros_like(kernel), kernel])
    found = streamed(x.at[0, 0, 0].set(jnp.nan), kernels, 1)
    assert (found.shape, found.dtype) == ((num_rows, 1, out), jnp.float32)
    assert np.isnan(found[0]).all()
    size = np.tensordot(np.abs(wide(x)), np.abs(wide(kernel)), 1)
    np.testing.assert_array_less(np.abs(wide(found) - np.tensordot(wide(x), wide(kernel), 1))[1:], 3e-7 * size[1:])
    coarse = x.astype("bfloat16")
    expected = streamed(coarse.astype("float32"), kernels, 1)
    np.testing.assert_allclose(streamed(coarse, kernel[None]), expected, rtol=0, atol=3e-7 * size.max())


@pytest.mark.skipif(not has_wide_registers(), reason="the processor has no registers of 512 bits")
@pytest.mark.parametrize("out", [32, BLOCK, 2 * BLOCK, BLOCK + 2 * LANES])
def test_kernels_of_bfloat16_are_read_as_they_lie(out):
    (x,), (kernels,) = draw((5, 1, 32), dtype="float32"), draw((2, 32, out), dtype="bfloat16")
    words = in_words(kernels)
    assert (words.shape, words.dtype) == ((2, 32, out // 2), jnp.uint32)
    kernels = kernels.at[1, 3, 5].set(jnp.inf)
    streamed = jax.jit(streamed_rows, compiler_options=WIDE)
    found = streamed(x, in_words(kernels), 1)
    np.testing.assert_array_equal(found, streamed(x, kernels.astype("float32"), 1))
    np.testing.assert_array_equal(np.isinf(found).all((0, 1)), np.arange(out) == 5)


def test_what_fills_no_words_is_read_in_float32():
    for shape, dtype in (((1, 32, 48), "bfloat16"), ((1, 24, 32), "bfloat16"), ((1, 32, 32), "float32")):
        (kernels,) = draw(shape, dtype=dtype)
        assert in_words(kernels).dtype == jnp.float32
        np.testing.assert_array_equal(in_words(kernels), wide(kernels))


def test_weights_of_another_dtype_are_cast_at_use_and_get_gradients_of_their_own():
    (x,), (kernel,) = draw((4, 6), dtype="bfloat16"), draw((6, 3), dtype="float32")
    y, pullback = jax.vjp(product, x, kernel)
    dx, dkernel = pullback(jnp.ones_like(y))
    assert (y.dtype, dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(dkernel, np.repeat(wide(x).sum(0)[:, None], 3, axis=1), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_weights_are_summed_in_float32(dtype):
    # 1000 rows of products near 1: a bfloat16 sum would stop at 256. Both inputs are exact in bfloat16.
    a, b = jnp.ones((1000, 3), dtype), jnp.full((1000, 2), 1.5, dtype)
    for function in (contract_rows, jax.jit(contract_rows)):
        np.testing.assert_array_equal(function(a, b), np.full((3, 2), 1500.0, np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_and_infinity_pass_through(dtype):
    a, b = draw((5, 4), (5, 3), dtype=dtype)
    np.testing.assert_array_equal(
        np.isnan(contract_rows(a.at[0, 0].set(jnp.nan), b)), (np.arange(4) == 0)[:, None] & np.ones(3, bool)
    )
    assert np.isinf(dot(a.at[1, 2].set(jnp.inf), b[:4], (1,), (0,))[1]).all()


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("rows", [(5,), (1, 700), (2, 3, 4)])
def test_scaled_columns_and_their_gradients(rows):
    rng = np.random.default_rng(0)
    x, cotangent = rng.normal(size=(2, *rows, 6)).astype(np.float32)
    scale = rng.normal(size=6).astype(np.float32)
    out, pull_back = jax.vjp(jax.jit(scale_columns), x, scale)
    dx, dscale = pull_back(cotangent)
    np.testing.assert_allclose(out, x * scale, rtol=1e-6)
    np.testing.assert_allclose(dx, cotangent * scale, rtol=1e-6)
    expected = (x.astype(np.float64) * cotangent).reshape(-1, 6).sum(0)
    np.testing.assert_allclose(dscale, expected, rtol=1e-5, atol=1e-5)


MULTIPLY = {
    "dot": lambda a, b: dot(a, b, (1,), (0,)),
    "einsum": lambda a, b: einsum("ab,bc->ac", a, b, many=True),
    "einsum of few": lambda a, b: einsum("ab,bc->ac", a, b, many=False),
}


@pytest.mark.parametrize("multiply", MULTIPLY.values(), ids=MULTIPLY)
def test_float32_is_multiplied_as_float32_on_every_device(multiply, monkeypatch):
    """By default a GPU would take TF32 and a TPU bfloat16; products of bfloat16 need no more than they have."""
    as_on_other_devices(monkeypatch)
    for dtype, precision in (("float32", jax.lax.Precision.HIGHEST), ("bfloat16", None)):
        (equation,) = jax.make_jaxpr(multiply)(*draw((2, 3), (3, 4), dtype=dtype)).eqns
        assert equation.params["precision"] in (precision, precision and (precision, precision))
        assert equation.params["preferred_element_type"] == jnp.float32


@pytest.mark.parametrize("has_it", [False, True])
@pytest.mark.parametrize("name", MULTIPLY)
def test_bfloat16_is_multiplied_as_float32_where_a_cpu_has_no_unit_for_it(name, has_it, monkeypatch):
    monkeypatch.setattr(products, "has_matrix_unit", lambda: has_it)
    traced = jax.jit(lambda a, b: MULTIPLY[name](a, b)).trace(*draw((2, 3), (3, 4), dtype="bfloat16"))
    for platform in ("cpu", "tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        (line,) = [line for line in text.splitlines() if "dot_general" in line]
        as_float32 = platform == "cpu" and name != "einsum of few" and not has_it
        assert ("tensor<3x4xbf16>" in line) is not as_float32, platform


@pytest.mark.parametrize("name", MULTIPLY)
def test_bfloat16_rounds_before_it_is_multiplied(name, monkeypatch):
    """So XLA must not drop a conversion to bfloat16 that one to float32 follows."""
    monkeypatch.setattr(products, "has_matrix_unit", lambda: False)
    a, b = draw((5, 64), (64, 6), dtype="float32")
    narrow = functools.partial(jnp.asarray, dtype=jnp.bfloat16)
    found = jax.jit(lambda a, b: MULTIPLY[name](narrow(a), narrow(b)))(a, b)
    np.testing.assert_allclose(found, wide(narrow(a)) @ wide(narrow(b)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", [(layout.FSDP, layout.MODEL, None), (layout.MODEL, layout.FSDP)])
def test_a_kernels_gradient_is_summed_into_the_parts_that_a_mesh_cuts_it_into(cut):
    mesh = sharding.make_mesh(sharding.Config(data=2, fsdp=2, model=2))
    out = (6, 5)[: len(cut) - 1]
    x, kernel, cotangent = draw((8, 3, 4), (4, *out), (8, 3, *out), dtype="float32")
    placed = [
        jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))
        for array, axes in ((x, (layout.BATCH,)), (kernel, cut), (cotangent, (layout.BATCH,)))
    ]
    with layout.on(mesh):
        pull = jax.jit(lambda x, kernel, cotangent: jax.vjp(lambda *a: product(*a, cut), x, kernel)[1](cotangent))
        dx, dkernel = pull(*placed)
    axes = list(range(1, kernel.ndim))
    expected = np.tensordot(cotangent, kernel, ([axis + 1 for axis in axes], axes))
    np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dkernel, np.tensordot(x, cotangent, ((0, 1), (0, 1))), rtol=1e-5, atol=1e-5)
    assert dkernel.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*cut)), dkernel.ndim)


@pytest.mark.parametrize(("text", "has_it"), [("flags : avx512f amx_bf16\n", True), ("flags : avx512f\n", False)])
def test_linux_says_whether_there_is_a_matrix_unit(text, has_it, tmp_path, monkeypatch):
    monkeypatch.setattr(products, "pathlib", types.SimpleNamespace(Path=lambda _: tmp_path / "cpuinfo"))
    assert not has_matrix_unit.__wrapped__()  # another system
    (tmp_path / "cpuinfo").write_text(text)
    assert has_matrix_unit.__wrapped__() is has_it


@pytest.mark.parametrize(("found", "has_them"), [(["SSE42", "AVX512F"], True), (["SSE42", "AVX2"], False)])
def test_numpy_says_whether_registers_are_wide(found, has_them, monkeypatch):
    monkeypatch.setattr(np, "show_config", lambda mode: {"SIMD Extensions": {"baseline": ["SSE"], "found": found}})
    assert has_wide_registers.__wrapped__() is has_them
