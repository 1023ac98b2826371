"""Hidden states to log-probabilities without the [.., V] logits, and masked sums over completions.

The one place where a vocabulary is touched. Alignment is the caller's: state i predicts target i.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pjpo.products import contract_rows, dot


def sum_completion(values: Float[Array, "B N T"], mask: Bool[Array, "B N T"]) -> Float[Array, "B N"]:
    """Sum over the tokens of each completion where `mask` is true."""
    return jnp.where(mask, values, 0).sum(-1)


def mean_completion(values: Float[Array, "B N T"], mask: Bool[Array, "B N T"]) -> Float[Array, "B N"]:
    """Mean over the tokens of each completion where `mask` is true; 0 for an empty completion."""
    return sum_completion(values, mask) / jnp.maximum(mask.sum(-1), 1)


def soft_cap(logits: Float[Array, "*rows V"], cap: float | None) -> Float[Array, "*rows V"]:
    """cap * tanh(logits / cap), which stays within -cap and cap; the logits as they are where there is no cap."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def token_logps(
    hidden: Float[Array, "G C D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "G C"],
    block_numbers: int,
    softcap: float | None = None,
) -> Float[Array, "G C"]:
    """log softmax(hidden @ table.T)[targets], nats, float32.

    Works through blocks of positions and recomputes each block's logits in the backward pass, so neither pass holds
    more than `block_numbers` logits (4 bytes each), whatever C is. A block takes one position of every group at least,
    G x V logits, as a mesh may cut the groups.

    Args:
        hidden: final hidden states in the compute dtype; the product is in that dtype, the softmax in float32.
        table: the output head, a row per token; any float dtype.
        targets: the token that each state predicts.
        block_numbers: how many logits may exist at once, over all devices.
        softcap: of the logits, see `soft_cap`.
    """
    return _forward(hidden, table, targets, block_numbers, softcap)[0]


def _forward(hidden, table, targets, block_numbers, softcap):
    head = table.astype(hidden.dtype)

    def block(states, targets):
        logits = soft_cap(dot(states, head, (2,), (1,)), softcap)
        total = jax.nn.logsumexp(logits, axis=-1)
        return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - total, total

    logps, totals = _map_blocks(block, (hidden, targets), _num_blocks(hidden, table, block_numbers))
    return logps, (hidden, table, targets, totals)


def _backward(block_numbers, softcap, residuals, cotangents):
    hidden, table, targets, totals = residuals
    head = table.astype(hidden.dtype)

    def block(dtable, xs):
        states, targets, totals, cotangents = xs
        logits = soft_cap(dot(states, head, (2,), (1,)), softcap)
        probabilities = jnp.exp(logits - totals[..., None])
        is_target = lax.broadcasted_iota(targets.dtype, logits.shape, 2) == targets[..., None]
        dlogits = cotangents[..., None] * (is_target - probabilities)
        if softcap is not None:
            dlogits *= 1 - jnp.square(logits / softcap)  # the derivative of tanh
        dlogits = dlogits.astype(hidden.dtype)
        dstates = dot(dlogits, head, (2,), (0,)).astype(hidden.dtype)
        return dtable + contract_rows(dlogits, states), dstates

    num_blocks = _num_blocks(hidden, table, block_numbers)
    dtable = jnp.zeros(table.shape, jnp.promote_types(hidden.dtype, jnp.float32))
    dtable, dhidden = _scan_blocks(block, dtable, (hidden, targets, totals, cotangents), num_blocks)
    return dhidden, dtable.astype(table.dtype), None


token_logps.defvjp(_forward, _backward)


def _num_blocks(hidden: Array, table: Array, block_numbers: int) -> int:
    groups, positions, _ = hidden.shape
    at_once = max(1, block_numbers // max(1, groups * table.shape[0]))
    return max(1, math.ceil(positions / at_once))


def _map_blocks(function, arrays, num_blocks: int):
    return _scan_blocks(lambda carry, xs: (carry, function(*xs)), (), arrays, num_blocks)[1]


def _scan_blocks(function, carry, arrays, num_blocks: int):
    """Scan over equal blocks of axis 1 (the last one padded), which no mesh axis cuts; results joined on axis 1."""
    if num_blocks == 1:
        return function(carry, arrays)
    positions = arrays[0].shape[1]
    size = math.ceil(positions / num_blocks)

    def split(x):
        padded = jnp.pad(x, [(0, 0), (0, size * num_blocks - positions)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(x.shape[0], num_blocks, size, *x.shape[2:]), 1, 0)

    def join(y):
        y = jnp.moveaxis(y, 0, 1)
        return y.reshape(y.shape[0], num_blocks * size, *y.shape[3:])[:, :positions]

    carry, results = lax.scan(function, carry, jax.tree.map(split, arrays))
    return carry, jax.tree.map(join, results)
