"""Hidden states to log-probabilities without the [.., V] logits, and masked sums over completions.

The one place where a vocabulary is touched. Alignment is the caller's: state i predicts target i.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from pjpo import layout
from pjpo.layout import ROWS, TABLE
from pjpo.products import contract_rows, dot

Mask = Bool[Array, "B N T"] | Bool[np.ndarray, "B N T"]


def widened(values: ArrayLike) -> Array:
    """As float32, or wider where it is: what losses compute in, whatever the model's dtype; ints as `float`."""
    values = jnp.asarray(values)
    is_float = jnp.issubdtype(values.dtype, jnp.floating)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32) if is_float else float)


def sum_completion(values: Float[Array, "B N T"], mask: Mask) -> Float[Array, "B N"]:
    """Sum over the tokens of each completion where `mask` is true; float32 or wider.

    Raises:
        ValueError: values of other completions than the mask's.
    """
    if values.shape != mask.shape:
        raise ValueError(f"values of tokens must have the mask's shape {mask.shape}, got {values.shape}")
    return jnp.where(mask, widened(values), 0).sum(-1)


def mean_completion(values: Float[Array, "B N T"], mask: Mask) -> Float[Array, "B N"]:
    """`sum_completion` over the number of tokens that it sums; 0 for an empty completion."""
    sums = sum_completion(values, mask)
    return sums / jnp.maximum(mask.sum(-1), 1).astype(sums.dtype)


def log_ratios(logps: Float[Array, "B N T"], ref_logps: Float[Array, "B N T"] | None) -> Float[Array, "B N T"]:
    """log(policy / reference) of each token, nats, float32 or wider; the reference is a constant to the gradient.

    Raises:
        ValueError: no reference.
    """
    return widened(logps) - constant(ref_logps)


def constant(ref_logps: Float[Array, "B N T"] | None) -> Float[Array, "B N T"]:
    """Log-probs of the reference, float32 or wider, as a constant to the gradient.

    Raises:
        ValueError: no reference.
    """
    if ref_logps is None:
        raise ValueError(
            "log-ratios need the log-probs of the reference, but ref_logps is None; score the batch under it"
        )
    return jax.lax.stop_gradient(widened(ref_logps))


def soft_cap(logits: Float[Array, "*rows V"], cap: float | None) -> Float[Array, "*rows V"]:
    """cap * tanh(logits / cap), which stays within -cap and cap; the logits as they are where there is no cap."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def token_logps(
    hidden: Float[Array, "G C D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "G C"],
    block_numbers: int,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Float[Array, "G C"]:
    """log softmax(hidden @ table.T / temperature)[targets], nats, float32.

    Works through blocks of positions and recomputes each block's logits in the backward pass, so neither pass holds
    more than `block_numbers` logits (4 bytes each) on a device, whatever C is. A block takes one position of every
    group at least, G x V logits. On a mesh each device has its own groups and its own part of the vocabulary; the table
    is gathered once, and its gradient summed once.

    Args:
        hidden: final hidden states in the compute dtype; the product is in that dtype, the softmax in float32.
        table: the output head, a row per token; any float dtype.
        targets: the token that each state predicts.
        block_numbers: how many logits may exist at once on a device.
        softcap: of the logits, see `soft_cap`.
        temperature: what the logits, capped, are divided by; > 0.
    """
    return _forward(hidden, table, targets, block_numbers, softcap, temperature)[0]


def _forward(hidden, table, targets, block_numbers, softcap, temperature):
    @layout.on_devices(ins=(ROWS, TABLE, ROWS), outs=(ROWS, ROWS), num_rows=len(hidden))
    def each(hidden, table, targets):
        head = layout.gather(table.astype(hidden.dtype), axis=1)
        first = layout.offset(len(head))

        def block(states, targets):
            logits = soft_cap(dot(states, head, (2,), (1,)), softcap) / temperature
            total = layout.join_logsumexp(jax.nn.logsumexp(logits, axis=-1))
            row = targets - first
            logit = jnp.take_along_axis(logits, row.clip(0, len(head) - 1)[..., None], axis=-1)[..., 0]
            logit = layout.sum_model(jnp.where((row >= 0) & (row < len(head)), logit, 0))
            return logit - total, total

        return _map_blocks(block, (hidden, targets), _num_blocks(hidden, table, block_numbers))

    logps, totals = each(hidden, table, targets)
    return logps, (hidden, table, targets, totals)


def _backward(block_numbers, softcap, temperature, residuals, cotangents):
    @layout.on_devices(ins=(ROWS, TABLE, ROWS, ROWS, ROWS), outs=(ROWS, TABLE), num_rows=len(cotangents))
    def each(hidden, table, targets, totals, cotangents):
        head = layout.gather(table.astype(hidden.dtype), axis=1)
        first = layout.offset(len(head))

        def block(dtable, xs):
            states, targets, totals, cotangents = xs
            logits = soft_cap(dot(states, head, (2,), (1,)), softcap)
            probabilities = jnp.exp(logits / temperature - totals[..., None])
            is_target = lax.broadcasted_iota(targets.dtype, logits.shape, 2) == (targets - first)[..., None]
            dlogits = cotangents[..., None] / temperature * (is_target - probabilities)
            if softcap is not None:
                dlogits *= 1 - jnp.square(logits / softcap)  # the derivative of tanh
            dlogits = dlogits.astype(hidden.dtype)
            dstates = layout.sum_model(dot(dlogits, head, (2,), (0,))).astype(hidden.dtype)
            return dtable + contract_rows(dlogits, states), dstates

        num_blocks = _num_blocks(hidden, table, block_numbers)
        dtable = jnp.zeros(head.shape, jnp.promote_types(hidden.dtype, jnp.float32))
        dtable, dhidden = _scan_blocks(block, dtable, (hidden, targets, totals, cotangents), num_blocks)
        return dhidden, layout.sum_rows(dtable, axis=1).astype(table.dtype)

    dhidden, dtable = each(*residuals, cotangents)
    return dhidden, dtable, None


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
