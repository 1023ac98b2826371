"""The tensors of a checkpoint, whatever file they lie in, to the decoder's parameter tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjpo.models import decoder, names
from pjpo.tokenizer import Tokenizer

Place = tuple[slice, ...]  # of a part in an array, a slice with both ends for every axis


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a reader (`gguf`, `huggingface`, `glassllm`) knows of a file, before any weight is read."""

    path: Path  # named in errors
    config: dict[str, Any]  # the fields of `decoder.Config` that the file decides
    names: dict[str, str]  # our name of a tensor -> the file's, as in `pjpo.models.names`
    stored: Collection[str]  # the file's names of all its tensors that carry weights
    read: Callable[[str], np.ndarray]  # one tensor by the file's name
    out_in: bool  # matrices are (out, in); (in, out) otherwise
    adjacent_pairs: bool  # RoPE turns coordinates 2j and 2j+1 of a head; j and j + hd/2, as our decoder, otherwise
    whole_norms: bool = False  # norms are stored as what they multiply by, also where ours multiply by 1 + scale
    tokenizer: Tokenizer


def to_params(checkpoint: Checkpoint, config: decoder.Config, abstract: dict, shardings: Any = None) -> dict:
    """The parameters; a host reads one tensor at a time and keeps only what its own devices hold.

    Args:
        checkpoint: the file.
        config: the model.
        abstract: what its `init` gives: shapes and dtypes.
        shardings: of every leaf; the default device, uncommitted, without them.

    Raises:
        ValueError: a tensor that is missing, left over, of another shape than `config` asks for, or not of floats.
    """
    tensors = names.tensors(config)
    wanted = {
        checkpoint.names[name].format(i)
        for name in tensors
        for i in range(config.num_layers if "{}" in checkpoint.names[name] else 1)
    }
    _check_names(checkpoint.path, wanted, set(checkpoint.stored))

    def fill(path: tuple, leaf: Any, sharding: Any = None) -> jax.Array:
        *_, scope, module, kind = ("params", *(entry.key for entry in path))
        layers = {"params": [0], "layers": range(config.num_layers)}.get(scope) or [int(scope.removeprefix("layers_"))]
        parts = (
            (
                (slice(i, i + 1), *tensor.where) if scope == "layers" else tensor.where,
                _read(checkpoint, config, name, tensor, i),
            )
            for name, tensor in tensors.items()
            if tensor.path == (module, kind)
            for i in layers
        )
        return _assemble(leaf, parts, sharding)

    return jax.tree_util.tree_map_with_path(fill, abstract, *([] if shardings is None else [shardings]))


def _read(checkpoint: Checkpoint, config: decoder.Config, name: str, tensor: names.Tensor, layer: int) -> np.ndarray:
    """One tensor, of the shape of its part of our leaf."""
    stored_name = checkpoint.names[name].format(layer)
    value = checkpoint.read(stored_name)
    turned = tensor.matrix and not checkpoint.out_in
    shape = tensor.stored[::-1] if turned else tensor.stored
    if value.shape != shape:
        raise ValueError(
            f"{checkpoint.path}: tensor {stored_name!r} has shape {value.shape}, the model's config asks for {shape}"
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{checkpoint.path}: tensor {stored_name!r} holds {value.dtype}, allowed: floating point")
    part = tensor.fold(value.T if turned else value)
    if checkpoint.adjacent_pairs and name in ("q", "k"):
        part = part.reshape(*part.shape[:-1], config.head_dim // 2, 2).swapaxes(-1, -2).reshape(part.shape)
    if checkpoint.whole_norms and config.norm_plus_one and tensor.path[1] == "scale":
        part = part - 1
    return part


def _assemble(leaf: Any, parts: Iterable[tuple[Place, np.ndarray]], sharding: Any) -> jax.Array:
    """A leaf from its parts, each copied into this host's shards before the next one is read."""
    everywhere = {None: (slice(None),) * leaf.ndim}
    places = everywhere if sharding is None else sharding.addressable_devices_indices_map(leaf.shape)
    places = {device: _with_ends(place, leaf.shape) for device, place in places.items()}
    shards: dict[str, tuple[np.ndarray, Place]] = {}
    for where, part in parts:
        if not shards:  # not before the first part is here: a config that lies about sizes is refused by then
            shards = {str(place): (np.empty(_sizes(place), leaf.dtype), place) for place in places.values()}
        for shard, place in shards.values():
            _copy(part.reshape(_sizes(where)), where, shard, place)
        del part  # or it would live until the next one has been read
    arrays = [jax.device_put(shards[str(place)][0], device) for device, place in places.items()]
    return arrays[0] if sharding is None else jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _copy(part: np.ndarray, where: Place, shard: np.ndarray, place: Place) -> None:
    """The numbers that a part, `where` in a leaf, shares with a shard at `place`."""
    starts = [max(a.start, b.start) for a, b in zip(where, place, strict=True)]
    stops = [max(start, min(a.stop, b.stop)) for start, a, b in zip(starts, where, place, strict=True)]

    def inside(outer: Place) -> Place:
        return tuple(slice(a - o.start, b - o.start) for a, b, o in zip(starts, stops, outer, strict=True))

    shard[inside(place)] = part[inside(where)]


def _with_ends(place: Place, shape: tuple[int, ...]) -> Place:
    return tuple(slice(*axis.indices(size)[:2]) for axis, size in zip(place, shape, strict=True))


def _sizes(place: Place) -> list[int]:
    return [axis.stop - axis.start for axis in place]


def _check_names(path: Path, wanted: set[str], stored: set[str]) -> None:
    def some(names: set[str]) -> str:
        return ", ".join(map(repr, sorted(names)[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    if missing := wanted - stored:
        left_over = f"; left over are {some(stored - wanted)}" if stored - wanted else ""
        raise ValueError(f"{path}: missing {some(missing)}, which the model's config asks for{left_over}")
    if left_over := stored - wanted:
        raise ValueError(
            f"{path}: the decoder has no place for {some(left_over)}; without them its numbers would be wrong"
        )
