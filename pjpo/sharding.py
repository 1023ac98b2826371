"""The mesh, and where parameters, training state and batches lie on it, by the rules of `pjpo.layout`."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pjpo.layout import BATCH_AXES, MESH_AXES, RULES
from pjpo.models.decoder import AXES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    data: int = -1  # copies of the model, each with its part of the batch; -1 takes the devices that are left
    fsdp: int = 1  # parts that the weights are cut into, gathered at use; the batch is cut with them
    model: int = 1  # parts that heads, feed-forward and vocabulary are cut into


def make_mesh(config: Config = Config(), devices: list | None = None) -> Mesh:
    """A mesh over all devices, or those given: in their order; TPUs so that neighbours are wired together.

    Raises:
        ValueError: sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh: sizes must be at least 1, or -1 for one of them; got {_named(sizes)}")
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {_named(sizes)} does not fill the {len(devices)} devices; "
            f"choose sizes whose product is {len(devices)}, or leave one at -1"
        )
    if devices[0].platform == "tpu":
        return Mesh(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True), MESH_AXES)
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)


def check_axes(mesh: Mesh) -> None:
    """
    Raises:
        ValueError: a mesh of other axes than those that parameters and batches are cut along.
    """
    if mesh.axis_names != MESH_AXES:
        raise ValueError(
            f"mesh axes must be {', '.join(MESH_AXES)}, got {', '.join(map(str, mesh.axis_names))}; "
            "see pjpo.sharding.make_mesh"
        )


def num_batch_parts(mesh: Mesh) -> int:
    """How many devices a batch is cut over."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(mesh: Mesh, batch_size: int, num_microbatches: int = 1, name: str = "batch_size") -> None:
    """Refuse a batch that the mesh or gradient accumulation cannot cut evenly; `name` is that of the setting.

    Raises:
        ValueError: with sizes that would do.
    """
    if num_microbatches < 1:
        raise ValueError(f"num_microbatches must be >= 1, got {num_microbatches}; 1 is the batch in one piece")
    parts = num_batch_parts(mesh) * num_microbatches
    if batch_size < 1 or batch_size % parts:
        below = max(batch_size // parts * parts, 0)
        cuts = f" x {num_microbatches} microbatches" if num_microbatches > 1 else ""
        raise ValueError(
            f"{name} {batch_size} is not divisible by {parts} (mesh axes {_named(mesh.shape.values())}{cuts}); "
            f"use {f'{below} or ' if below else ''}{below + parts}"
        )


def spec(path: tuple, leaf) -> PartitionSpec:
    """How one leaf of a tree is cut, by the last two names on its path; whole where the table does not know them.

    It holds for parameters, gradients and optimizer moments alike; a leading axis of scanned layers stays whole, and so
    does a moment of fewer axes than its parameter (Adafactor's).
    """
    names = tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
    logical = AXES.get(names[-2:], ())
    stacked = [None] * ("layers" in names)
    if leaf.ndim != len(stacked) + len(logical):
        return PartitionSpec()
    return PartitionSpec(*stacked, *(RULES.get(axis) for axis in logical))


def shardings(tree, mesh: Mesh):
    """The sharding of every leaf of parameters or of a whole training state.

    Raises:
        ValueError: a mesh of other axes, or an axis of a parameter that its mesh axis does not divide.
    """
    check_axes(mesh)

    def of_leaf(path, leaf) -> NamedSharding:
        partition = spec(path, leaf)
        for size, axis in zip(leaf.shape, partition, strict=False):
            if axis and size % mesh.shape[axis]:
                raise ValueError(
                    f"{jax.tree_util.keystr(path)} has an axis of {size}, which mesh axis '{axis}' of "
                    f"{mesh.shape[axis]} does not divide; choose a divisor of {size} for '{axis}'"
                )
        return NamedSharding(mesh, partition)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def place(tree, mesh: Mesh):
    """Parameters or a training state, each leaf on its devices; every process holds the same values."""
    return jax.tree.map(_place, tree, shardings(tree, mesh))


def constrain(tree, mesh: Mesh):
    """The same inside jit: pin every leaf's sharding."""
    return jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))


def place_batch(batch, mesh: Mesh):
    """A batch, prompts cut over the mesh's batch axes; every process holds the whole of it."""
    check_axes(mesh)
    return jax.tree.map(lambda x: _place(x, NamedSharding(mesh, PartitionSpec(BATCH_AXES))), batch)


def place_share(batch, mesh: Mesh):
    """The batch of which each process holds its share of the prompts, see `share`."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec(BATCH_AXES)), batch)


def share(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """(index, count): which of how many equal shares of a batch the devices of a process take; of this one with None.

    Processes whose devices hold parts of the same model replica take the same share.

    Raises:
        ValueError: processes whose shares overlap in part, or differ in size.
    """
    parts = mesh.devices.reshape(num_batch_parts(mesh), -1)  # the batch axes come first
    shares: dict[int, frozenset] = {}
    for place, devices in enumerate(parts):
        for device in devices:
            shares[device.process_index] = shares.get(device.process_index, frozenset()) | {place}
    distinct = sorted(set(shares.values()), key=min)
    if len({len(one) for one in distinct}) > 1 or sum(map(len, distinct)) != len(parts):
        raise ValueError(
            f"mesh {_named(mesh.shape.values())} cuts a batch across processes; let the devices of a process "
            "make up whole parts, or each part whole processes"
        )
    return distinct.index(shares[jax.process_index() if process is None else process]), len(distinct)


def own_rows(mesh: Mesh, num_rows: int) -> np.ndarray:
    """The rows of a global array of `num_rows` that `place_share` fills from this process, ascending."""
    cut = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    parts = cut.addressable_devices_indices_map((num_rows,)).values()
    return np.unique(np.concatenate([np.arange(num_rows)[rows] for rows in parts]))


def _place(leaf, sharding: NamedSharding) -> jax.Array:
    """What `jax.device_put` does, which compares the values of all processes first: all weights over the network."""
    if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_place(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    values = np.asarray(leaf)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def _named(sizes) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
