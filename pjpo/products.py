"""Every matrix product of the models goes through here: float32 exactly, bfloat16 with float32 accumulation.

On GPU and TPU these are the ordinary products. XLA's CPU backend needs care. It transposes an operand in memory first
where several axes are contracted, so there they are merged into one. In bfloat16 it reaches the processor's matrix unit
only when a product takes bfloat16 to float32 and no transposition is folded into an operand, so there the weight
gradient transposes its left operand into a real array first. Without a matrix unit it multiplies bfloat16 at two thirds
of float32's speed, so there bfloat16 numbers are multiplied as float32, which changes only how their sums round.
"""

import functools
import pathlib
from collections.abc import Callable, Iterable

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
    return _as_fast(functools.partial(_dot, axes_a=axes_a, axes_b=axes_b), a, b)


def einsum(axes: str, a: Array, b: Array, *, many: bool) -> Array:
    """Float32, as from `dot`. `many` rows: a wider copy of an operand, as `dot` may make, costs little beside them."""
    multiply = functools.partial(_einsum, axes)
    return _as_fast(multiply, a, b) if many else multiply(a, b)


def _dot(a: Array, b: Array, axes_a: tuple[int, ...], axes_b: tuple[int, ...]) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, ((axes_a, axes_b), ((), ())), precision=precision, preferred_element_type=_wide(a))


def _einsum(axes: str, a: Array, b: Array) -> Array:
    precision = None if a.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(axes, a, b, precision=precision, preferred_element_type=wide)


def _as_fast(multiply: Callable[[Array, Array], Array], a: Array, b: Array) -> Array:
    """A product of many rows: of bfloat16 numbers as float32 ones, on a CPU without a matrix unit."""
    if not a.dtype == b.dtype == jnp.bfloat16 or has_matrix_unit():
        return multiply(a, b)
    widened = lambda a, b: multiply(a.astype(jnp.float32), b.astype(jnp.float32))  # noqa: E731
    return lax.platform_dependent(a, b, cpu=widened, default=multiply)


def contract_rows(a: Array, b: Array) -> Array:
    """a [*rows, A] and b [*rows, *B] -> sum over rows of their outer products [A, *B], float32: a weight's gradient."""
    rows = tuple(range(a.ndim - 1))
    plain = functools.partial(dot, axes_a=rows, axes_b=rows)
    on_cpu = _contract_transposed if a.dtype == jnp.bfloat16 and has_matrix_unit() else _contract_merged
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
    rows meet a bfloat16 kernel in three bfloat16 parts, which lose nothing: half the bytes, and the matrix unit.
    """

    def kernel_left(x, kernel, transposed):
        # The barriers: or XLA computes what made the rows again at each use, and turns the product around.
        rows = lax.optimization_barrier(x.reshape(-1, x.shape[-1]))
        left = transposed.reshape(-1, x.shape[-1])
        in_parts = (rows.dtype, left.dtype) == (jnp.float32, jnp.bfloat16)
        right = _bfloat16_parts(rows).reshape(-1, x.shape[-1]) if in_parts else rows.astype(left.dtype)
        out = lax.optimization_barrier(_dot(left, right, (1,), (1,)))
        out = out.reshape(len(left), -1, len(rows)).sum(1).T
        return out.reshape(*x.shape[:-1], *kernel.shape[1:])

    def ordinary(x, kernel, transposed):
        return _dot(x, kernel.astype(x.dtype), (x.ndim - 1,), (0,))

    return lax.platform_dependent(x, kernel, transposed, cpu=kernel_left, default=ordinary)


LANES = STREAMS = 16  # float32 numbers of a register; rows of a kernel that are read at a time, a register for each
WIDE = {"xla_cpu_prefer_vector_width": 32 * LANES}  # compiler options
MOST_STREAMED = 64  # rows; with more, XLA's own products are as fast
ZERO = np.uint32(0)
BLOCK = 512 * LANES  # sums of more outputs than this leave the processor's cache between two of its rows


def streamed_rows(x: Array, kernels: Array, which: int | Array = 0) -> Array:
    """A handful of rows x [.., D] times one of kernels [L, D, O], as outer products; float32, no gradient.

    XLA's products pack a kernel first and multiply after, so they wait for memory, then for the processor. Here 16 rows
    of the kernel are read at a time, from where they lie, as memory does not keep up with one stream alone. Sixteen
    numbers of each are multiplied, while they stay in registers, with what each row of x has for them. This is for
    programs compiled as `WIDE` says, for processors of `has_wide_registers`, and for at most `MOST_STREAMED` rows.
    Kernels are float32, or words of `in_words`. Where D or O is no multiple of 16, it is XLA's product.
    """
    _, width, num_lanes = kernels.shape
    packed = kernels.dtype == jnp.uint32
    x = x.astype(jnp.float32 if packed else kernels.dtype)
    if width % STREAMS or num_lanes % LANES:
        return dot(x, kernels[which], (x.ndim - 1,), (0,))
    kernels = kernels.reshape(-1, width // STREAMS, num_lanes // LANES, LANES)  # 16 streams of one, then of the next
    rows = x.reshape(-1, STREAMS, width // STREAMS).T  # [D / 16, 16, R]
    halves, most = (2, BLOCK // 2) if packed else (1, BLOCK)
    size = (most if num_lanes % most == 0 else num_lanes) // LANES

    def block(first: Array) -> Array:
        """Outputs from `first` on, [size, halves, R, LANES]."""

        def add(step: Array, sums: Array) -> Array:
            def outer(stream: int) -> Array:
                place = jnp.uint32(which * STREAMS + stream)
                weights = lax.dynamic_slice(kernels, (place, step, jnp.uint32(first), ZERO), (1, 1, size, LANES))
                weights = weights.reshape(size, 1, 1, LANES)
                factors = lax.dynamic_slice(rows, (step, jnp.uint32(stream), ZERO), (1, 1, rows.shape[-1]))
                return (_halves(weights) if packed else weights) * factors.reshape(1, 1, -1, 1)

            return add_up(sums, map(outer, range(STREAMS)))

        return count_up(width // STREAMS, add, jnp.zeros((size, halves, rows.shape[-1], LANES), x.dtype))

    blocks = jnp.arange(0, num_lanes // LANES, size)
    sums = block(blocks[0]) if len(blocks) == 1 else lax.map(block, blocks).reshape(-1, halves, rows.shape[-1], LANES)
    return sums.transpose(2, 0, 3, 1).reshape(*x.shape[:-1], -1)


def in_words(kernels: Array) -> Array:
    """Kernels [L, D, O] for `streamed_rows`: two bfloat16 numbers as they lie in a word, all else in float32."""
    *lead, num_out = kernels.shape
    if kernels.dtype != jnp.bfloat16 or kernels.shape[1] % STREAMS or num_out % (2 * LANES):
        return kernels.astype("float32")
    return lax.bitcast_convert_type(kernels.reshape(*lead, -1, 2), jnp.uint32)


def _halves(words: Array) -> Array:
    """Words [size, 1, 1, LANES] -> the two float32 numbers of each, [size, 2, 1, LANES].

    XLA shifts what is in registers, where it would widen a kernel of bfloat16 whole, at each step of the loop.
    """
    shifts = np.uint32([16, 0]).reshape(1, 2, 1, 1)
    return lax.bitcast_convert_type((words << shifts) & np.uint32(0xFFFF0000), jnp.float32)


def count_up(times: int | Array, body: Callable[[Array, Array], Array], start: Array) -> Array:
    """`lax.fori_loop` from 0 with an unsigned counter: with a signed one JAX asks of each index whether it is negative,
    which a CPU program does in a kernel of its own."""
    more = lambda now: now[0] < jnp.uint32(times)  # noqa: E731
    return lax.while_loop(more, lambda now: (now[0] + jnp.uint32(1), body(*now)), (ZERO, start))[1]


def add_up(sums: Array, terms: Iterable[Array]) -> Array:
    """Sums plus terms, in two chains that do not wait for each other."""
    terms = list(terms)
    return sum(terms[::2], sums) + sum(terms[1::2])


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
