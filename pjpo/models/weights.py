"""The tensors of a Llama-family checkpoint, whatever file they lie in, to the decoder's parameter tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjpo.models import decoder
from pjpo.tokenizer import Tokenizer

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a reader (`gguf`, `huggingface`, `glassllm`) knows of a file, before any weight is read."""

    path: Path  # named in errors
    config: dict[str, Any]  # the fields of `decoder.Config` that the file decides
    names: dict[str, str]  # our name of a tensor -> the file's; "{}" stands for the number of the layer
    stored: Collection[str]  # the file's names of all its tensors that carry weights
    read: Callable[[str], np.ndarray]  # one tensor by the file's name
    out_in: bool  # matrices are (out, in); (in, out) otherwise
    adjacent_pairs: bool  # RoPE turns coordinates 2j and 2j+1 of a head; j and j + hd/2, as our decoder, otherwise
    tokenizer: Tokenizer


def to_params(checkpoint: Checkpoint, config: decoder.Config, put: Callable = np.asarray) -> dict:
    """Parameters in `config.param_dtype`, read layer by layer; `put` takes each array off the host as it is ready.

    Raises:
        ValueError: a tensor that is missing, left over, of another shape than `config` asks for, or not of floats.
    """
    shapes = _shapes(config)
    wanted = [
        checkpoint.names[name].format(i)
        for name in shapes
        for i in range(config.num_layers if "{}" in checkpoint.names[name] else 1)
    ]
    _check_names(checkpoint.path, set(wanted), set(checkpoint.stored))
    split = config.num_kv_heads, config.heads_of_kv, config.head_dim
    dtype = jnp.dtype(config.param_dtype)

    def tensor(name: str, layer: int = 0) -> np.ndarray:
        turned = checkpoint.out_in and name in MATRICES
        stored, shape = checkpoint.names[name].format(layer), shapes[name][::-1] if turned else shapes[name]
        value = checkpoint.read(stored)
        if value.shape != shape:
            raise ValueError(
                f"{checkpoint.path}: tensor {stored!r} has shape {value.shape}, the model's config asks for {shape}"
            )
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"{checkpoint.path}: tensor {stored!r} holds {value.dtype}, allowed: floating point")
        return np.array(value.T if turned else value, dtype, order="C")  # a copy, never a view of the file

    def heads(name: str, layer: int) -> np.ndarray:  # [D, K, heads of one kv head, hd]
        matrix = tensor(name, layer)
        if checkpoint.adjacent_pairs and name != "v":
            matrix = matrix.reshape(-1, config.head_dim // 2, 2).swapaxes(1, 2)
        return matrix.reshape(config.model_dim, config.num_kv_heads, -1, config.head_dim)

    def block(i: int) -> dict:
        return {
            "attention_norm": {"scale": tensor("attention_norm", i)},
            "qkv": {"kernel": np.concatenate([heads(name, i) for name in "qkv"], axis=2)},
            "out": {"kernel": tensor("o", i).reshape(*split, config.model_dim)},
            "mlp_norm": {"scale": tensor("mlp_norm", i)},
            "gate_up": {"kernel": np.stack([tensor("gate", i), tensor("up", i)], axis=1)},
            "down": {"kernel": tensor("down", i)},
        }

    tree = {"embed": {"table": put(tensor("embed"))}, "final_norm": {"scale": put(tensor("final_norm"))}}
    if not config.tied_head:
        tree["head"] = {"table": put(tensor("head"))}
    if config.scan_layers:
        tree["layers"] = jax.tree.map(put, _stack(block, config.num_layers))
    else:
        tree |= {f"layers_{i}": jax.tree.map(put, block(i)) for i in range(config.num_layers)}
    return {"params": tree}


def _shapes(config: decoder.Config) -> dict[str, tuple[int, ...]]:
    """Of every tensor by our name, matrices (in, out)."""
    model, mlp, vocab = config.model_dim, config.mlp_dim, config.vocab_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {"embed": (vocab, model), "final_norm": (model,), "attention_norm": (model,), "mlp_norm": (model,)}
    shapes |= {"q": (model, queries), "k": (model, keys), "v": (model, keys), "o": (queries, model)}
    shapes |= {"gate": (model, mlp), "up": (model, mlp), "down": (mlp, model)}
    return shapes if config.tied_head else shapes | {"head": (vocab, model)}


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


def _stack(block: Callable[[int], dict], num_layers: int) -> dict:
    """All layers as one tree with a leading layer axis, filled in layer by layer."""
    first = block(0)
    stacked = jax.tree.map(lambda x: np.empty((num_layers, *x.shape), x.dtype), first)
    for i in range(num_layers):
        for whole, part in zip(jax.tree.leaves(stacked), jax.tree.leaves(block(i) if i else first), strict=True):
            whole[i] = part
    return stacked
