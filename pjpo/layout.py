"""How activations lie on the mesh, whose axes are named only here: the batch is cut, and weights come to it for use.

The compiler knows how parameters and batches are cut, and chooses the rest. Left alone it likes to leave weights where
they are and to move the activations instead, which costs more as soon as a device has more tokens than the model is
wide. Code that runs under `on(mesh)` says otherwise; without it, or on one device, nothing here does anything.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

MESH_AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")  # a batch is cut over both: fsdp differs in that it cuts the weights too
BATCH, FSDP, MODEL = BATCH_AXES, "fsdp", "model"  # ways to cut an axis of an array
ROWS = PartitionSpec(BATCH)  # how arrays [G, ..] are cut,
TABLE = PartitionSpec(MODEL, FSDP)  # tables [V, D],
HEADS = PartitionSpec(BATCH, None, MODEL)  # and projections [G, M, K, ..]
# From the logical axes of parameters to axes of the mesh; every other axis is whole everywhere.
RULES = {"vocab": MODEL, "kv_heads": MODEL, "mlp": MODEL, "embed": FSDP}


def on(mesh: Mesh | AbstractMesh | None):
    """Within it, activations are pinned to the mesh."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def of(params) -> AbstractMesh | None:
    """The mesh that parameters were placed on, if any; None inside jit, where arrays do not say."""
    for leaf in jax.tree.leaves(params):
        where = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        return where.mesh.abstract_mesh if isinstance(where, NamedSharding) else None
    return None


def size(*axes: str) -> int:
    """On how many devices of the mesh at hand these axes lie."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in axes)


def pin(x: Array, *axes) -> Array:
    """x, cut along each of its axes as said: BATCH, FSDP, MODEL or None; left alone where that does not divide it."""
    cut = [size(*((axis,) if isinstance(axis, str) else axis or ())) for axis in axes]
    if math.prod(cut) == 1 or any(length % parts for length, parts in zip(x.shape, cut, strict=True)):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def on_devices(*, ins: tuple, outs, num_rows: int) -> Callable[[Callable], Callable]:
    """Decorate a function so that each device calls it with its own parts of the arrays, and they talk by what follows.

    Args:
        ins: how each argument is cut.
        outs: the same of the result, or a tuple of it for each of several.
        num_rows: rows over all devices; where these cannot be dealt out evenly, the function is called on the whole.
    """

    def decorate(function: Callable) -> Callable:
        if num_rows % size(*BATCH) or size(*MESH_AXES) == 1:
            return function
        return jax.shard_map(function, in_specs=ins, out_specs=outs, check_vma=False)

    return decorate


def gather(x: Array, axis: int) -> Array:
    """On devices: the whole of an array of which FSDP cuts `axis`."""
    return jax.lax.all_gather(x, FSDP, axis=axis, tiled=True) if _apart() else x


def sum_rows(x: Array, axis: int) -> Array:
    """On devices: the sum over those that the batch is cut over; of it each keeps the part of `axis` that FSDP cuts."""
    if not _apart():
        return x
    return sum_data(jax.lax.psum_scatter(x, FSDP, scatter_dimension=axis, tiled=True))


def sum_data(x: Array) -> Array:
    """On devices: the sum over copies of the weights."""
    return jax.lax.psum(x, "data") if _apart() else x


def columns_to_rows(x: Array) -> Array:
    """On devices that FSDP cuts over: from all their rows [G, .., D/n] and own columns to own rows [G/n, .., D]."""
    return jax.lax.all_to_all(x, FSDP, 0, x.ndim - 1, tiled=True) if _apart() else x


def rows_to_columns(x: Array) -> Array:
    """The inverse of `columns_to_rows`."""
    return jax.lax.all_to_all(x, FSDP, x.ndim - 1, 0, tiled=True) if _apart() else x


def sum_model(x: Array) -> Array:
    """On devices: the sum over those that MODEL cuts over."""
    return jax.lax.psum(x, MODEL) if _apart() else x


def join_logsumexp(x: Array) -> Array:
    """On devices: logsumexp over all that MODEL cuts from that of each part."""
    if not _apart():
        return x
    peak = jax.lax.pmax(x, MODEL)
    return peak + jnp.log(jax.lax.psum(jnp.exp(x - peak), MODEL))


def offset(length: int) -> Array | int:
    """On devices: where this one's part begins in an axis that MODEL cuts into parts of `length`."""
    return jax.lax.axis_index(MODEL) * length if _apart() else 0


def _apart() -> bool:
    return MODEL in jax.sharding.get_abstract_mesh().manual_axes
