"""Every matrix product of the models goes through here: float32 exactly, bfloat16 with float32 accumulation.

On GPU and TPU these are the ordinary products. XLA's CPU backend needs care. It transposes an operand in memory first
where several axes are contracted, so there they are merged into one. In bfloat16 it reaches the processor's matrix unit
only when a product takes bfloat16 to float32 and no transposition is folded into an operand, so there the weight
gradient transposes its left operand into a real array first.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from pjpo import layout
from pjpo.layout import BATCH, FSDP, MODEL


def dot(a: Array, b: Array, axes_a: tuple[int, ...], axes_b: tuple[int, ...]) -> Array:
    """Contract `axes_a` of a with `axes_b` of b; float32 result, never through TF32 or a bfloat16 pass for float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, ((axes_a, axes_b), ((), ())), precision=precision, preferred_element_type=_wide(a))


def contract_rows(a: Array, b: Array) -> Array:
    """a [*rows, A] and b [*rows, *B] -> sum over rows of their outer products [A, *B], float32: a weight's gradient."""
    rows = tuple(range(a.ndim - 1))
    plain = functools.partial(dot, axes_a=rows, axes_b=rows)
    on_cpu = _contract_transposed if a.dtype == jnp.bfloat16 else _contract_merged
    return lax.platform_dependent(a, b, cpu=on_cpu, default=plain)


@jax.custom_vjp
def scale_columns(x: Array, scale: Array) -> Array:
    """x [*rows, D] times scale [D]. XLA's CPU backend sums over rows slowly, but not as a product with ones."""
    return x * jnp.expand_dims(scale, range(x.ndim - 1))


def _scale_columns_backward(residuals, cotangent):
    x, scale = residuals
    rows = (x * cotangent).reshape(-1, x.shape[-1])
    by_ones = lambda rows: dot(jnp.ones((8, len(rows)), rows.dtype), rows, (1,), (0,))[0]  # noqa: E731  8: as fast as 1
    return scale_columns(cotangent, scale), lax.platform_dependent(
        rows, cpu=by_ones, default=functools.partial(jnp.sum, axis=0)
    )


scale_columns.defvjp(lambda x, scale: (scale_columns(x, scale), (x, scale)), _scale_columns_backward)


def few_rows(x: Array, kernel: Array, transposed: Array) -> Array:
    """A handful of rows x [.., D] times kernel [D, *out], given also as `transposed` [*out, D]; float32, no gradient.

    A CPU spends such a product on reading the kernel, which is fastest where the kernel is the left operand. Float32
    rows meet a bfloat16 kernel in three bfloat16 parts, which lose nothing: half the bytes, and the matrix unit. A
    float32 kernel may come in pieces instead, see `to_streams`.
    """

    def kernel_left(x, kernel, transposed):
        # The barriers: or XLA computes what made the rows again at each use, and turns the product around.
        rows = lax.optimization_barrier(x.reshape(-1, x.shape[-1]))
        if transposed.ndim > kernel.ndim:
            out = _from_streams(rows, transposed.reshape(len(transposed), -1, transposed.shape[-1]))
        else:
            left = transposed.reshape(-1, x.shape[-1])
            in_parts = (rows.dtype, left.dtype) == (jnp.float32, jnp.bfloat16)
            right = _bfloat16_parts(rows).reshape(-1, x.shape[-1]) if in_parts else rows.astype(left.dtype)
            out = lax.optimization_barrier(dot(left, right, (1,), (1,)))
            out = out.reshape(len(left), -1, len(rows)).sum(1).T
        return out.reshape(*x.shape[:-1], *kernel.shape[1:])

    def ordinary(x, kernel, transposed):
        return dot(x, kernel.astype(x.dtype), (x.ndim - 1,), (0,))

    return lax.platform_dependent(x, kernel, transposed, cpu=kernel_left, default=ordinary)


# What `to_streams` needs of the compiler: sums that may be reordered, nan and infinity as they are, wide registers.
REORDERED = {
    "xla_cpu_enable_fast_math": True,
    **{f"xla_cpu_fast_math_honor_{what}": True for what in ("infs", "nans", "division", "functions")},
    "xla_cpu_prefer_vector_width": 512,
}
REGISTER = 16  # float32 numbers
MOST_STREAMED = 2 * REGISTER  # rows; for more, the kernel would be read too often, once for each 16
WIDEST_STREAMED = 1024  # of which 16 rows stay near the processor


def to_streams(transposed: Array, axis: int = 0) -> Array:
    """float32 [*layers, *out, D] -> [*layers, S, *out, D/S], S at `axis`: as `few_rows` reads it fastest on a CPU.

    Kernels wider than `WIDEST_STREAMED` stay as they are.

    XLA's products pack a kernel first and multiply after, so they wait for memory, then for the processor. Sums that
    are written out are one loop over the kernel as it lies, with a register for each row. That loop reads all pieces at
    a time, as memory does not keep up with one alone. This is for programs that are compiled as `REORDERED` says, for
    processors of `has_wide_registers`, and for `MOST_STREAMED` rows at most; elsewhere it is far slower.
    """
    width = transposed.shape[-1]
    if width > WIDEST_STREAMED:
        return transposed
    pieces = next((n for n in (4, 3, 2, 5, 7) if width % (n * REGISTER) == 0), 1)
    return jnp.moveaxis(transposed.reshape(*transposed.shape[:-1], pieces, -1), -2, axis)


@functools.cache
def has_wide_registers() -> bool:
    """Whether the processor has registers of 512 bits, as NumPy finds."""
    return any(
        name.startswith(("AVX512", "X86_V4")) for name in np.show_config(mode="dicts")["SIMD Extensions"]["found"]
    )


@functools.cache
def has_matrix_unit() -> bool:
    """Whether the processor multiplies matrices of bfloat16 in hardware (AMX), as Linux tells."""
    path = pathlib.Path("/proc/cpuinfo")
    return path.exists() and "amx_bf16" in path.read_text()


def _from_streams(rows: Array, streams: Array) -> Array:
    """rows [R, D] times streams [S, O, D/S] -> [R, O]."""
    parts = rows.astype(streams.dtype).reshape(len(rows), len(streams), -1)
    if len(rows) == 1:
        of_pieces = [dot(part, piece, (1,), (1,)) for part, piece in zip(parts.swapaxes(0, 1), streams, strict=True)]
        return jnp.stack(of_pieces).sum(0)
    out = []
    for group in np.array_split(np.arange(len(rows)), -(-len(rows) // REGISTER)):
        products = [sum(piece * part[None] for piece, part in zip(streams, parts[i], strict=True)) for i in group]
        nought = [jnp.zeros((), streams.dtype)] * len(group)
        out += lax.reduce(products, nought, lambda a, b: [x + y for x, y in zip(a, b, strict=True)], (1,))
    return jnp.stack(lax.optimization_barrier(out))


def _product(x: Array, kernel: Array, cut: tuple[str | None, ...] = ()) -> Array:
    """x [..., D] times kernel [D, *out] -> [..., *out], in x's dtype; the kernel is cast to it at use.

    `cut` says how a mesh cuts each axis of the kernel, see `pjpo.layout`: its gradient is summed into these parts.
    """
    return dot(x, kernel.astype(x.dtype), (x.ndim - 1,), (0,)).astype(x.dtype)


product = jax.custom_vjp(_product, nondiff_argnums=(2,))


def _product_forward(x, kernel, cut):
    return product(x, kernel, cut), (x, kernel)


def _product_backward(cut, residuals, cotangent):
    x, kernel = residuals
    cotangent = cotangent.astype(x.dtype)
    plain = functools.partial(dot, axes_a=tuple(range(x.ndim - 1, cotangent.ndim)), axes_b=tuple(range(1, kernel.ndim)))
    on_cpu = plain if layout.size(MODEL) > 1 else _dot_merged  # an axis that is cut merges with no other
    dx = lax.platform_dependent(cotangent, kernel.astype(x.dtype), cpu=on_cpu, default=plain)
    return dx.astype(x.dtype), _weight_gradient(x, cotangent, cut).astype(kernel.dtype)


def _weight_gradient(x, cotangent, cut):
    if not cut:
        return contract_rows(x, cotangent)
    own = [MODEL if axis == MODEL else None for axis in cut]  # rows come whole but for what MODEL cuts
    between = [None] * (x.ndim - 2)
    ins = PartitionSpec(BATCH, *between, own[0]), PartitionSpec(BATCH, *between, *own[1:])

    @layout.on_devices(ins=ins, outs=PartitionSpec(*cut), num_rows=len(x))
    def each(x, cotangent):
        return layout.sum_rows(contract_rows(x, cotangent), axis=cut.index(FSDP))

    return each(x, cotangent)


product.defvjp(_product_forward, _product_backward)


def _wide(a: Array) -> jnp.dtype:
    return jnp.promote_types(a.dtype, jnp.float32)


def _bfloat16_parts(x: Array) -> Array:
    """float32 x -> [3, *x.shape], bfloat16, whose sum over axis 0 is x: 8 of its 24 significant bits in each."""
    bits = functools.partial(lax.bitcast_convert_type, new_dtype=jnp.uint32)
    first = lambda x: lax.bitcast_convert_type(bits(x) >> 16 << 16, jnp.float32)  # noqa: E731  its first 8 bits
    high = first(x)
    middle = first(x - high)
    which = jnp.arange(3).reshape(3, *[1] * x.ndim)  # one loop without branches, where a concatenation makes three
    part = jnp.where(which == 0, high, jnp.where(which == 1, middle, x - high - middle))
    return lax.bitcast_convert_type((bits(part) >> 16).astype(jnp.uint16), jnp.bfloat16)


def _dot_merged(a: Array, b: Array) -> Array:
    """a [*rows, *out] times b [D, *out] -> [*rows, D]."""
    rows = a.shape[: a.ndim - b.ndim + 1]
    return dot(a.reshape(*rows, -1), b.reshape(len(b), -1), (len(rows),), (1,))


def _contract_merged(a: Array, b: Array) -> Array:
    out, a = b.shape[a.ndim - 1 :], a.reshape(-1, a.shape[-1])
    return dot(a, b.reshape(len(a), -1), (0,), (0,)).reshape(a.shape[1], *out)


def _contract_transposed(a: Array, b: Array) -> Array:
    out, a = b.shape[a.ndim - 1 :], a.reshape(-1, a.shape[-1])
    # XLA folds a plain transposition back into the product. A slice that starts at a number it cannot know (0, as
    # dynamic_slice clamps a full-size window, nan or not) keeps the transposed array real.
    start = (a[0, 0] != a[0, 0]).astype(jnp.int32)
    transposed = lax.dynamic_slice(lax.optimization_barrier(a.T), (start, start), a.shape[::-1])
    return dot(transposed, b.reshape(a.shape[0], -1), (1,), (0,)).reshape(a.shape[1], *out)
