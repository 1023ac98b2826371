"""GGUF files of the llama architecture, any quantisation that the `gguf` package can undo."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from pjpo.models.weights import Checkpoint
from pjpo.tokenizer import Tokenizer

NAMES = {
    "embed": "token_embd.weight",
    "attention_norm": "blk.{}.attn_norm.weight",
    "q": "blk.{}.attn_q.weight",
    "k": "blk.{}.attn_k.weight",
    "v": "blk.{}.attn_v.weight",
    "o": "blk.{}.attn_output.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
}


def read(path: Path) -> Checkpoint:
    """Checks and describes the file; weights stay on disk until they are asked for.

    Raises:
        ValueError: a damaged file, another architecture, or a setting that the decoder lacks.
    """
    from gguf import GGUFReader  # here, so that importing pjpo stays fast
    from gguf.quants import dequantize

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, struct.error) as error:
        size = path.stat().st_size
        raise ValueError(f"{path} ({size:,} bytes) is damaged or cut short, fetch it again: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def load(name: str) -> np.ndarray:
        return dequantize(tensors[name].data, tensors[name].tensor_type)

    return Checkpoint(
        path=path,
        config=_config(path, fields, tied_head=NAMES["head"] not in tensors),
        names=NAMES,
        stored=tensors.keys(),
        read=load,
        out_in=True,
        adjacent_pairs=True,
        tokenizer=Tokenizer.from_gguf(fields),
    )


def _config(path: Path, fields: dict[str, Any], tied_head: bool) -> dict[str, Any]:
    def get(name: str, default: Any = None) -> Any:
        value = fields.get(f"llama.{name}", default)
        if value is None:
            raise ValueError(f"{path}: the file does not say 'llama.{name}'")
        return value

    if fields.get("general.architecture") != "llama":
        raise ValueError(f"{path}: architecture {fields.get('general.architecture')!r} is not supported, only 'llama'")
    num_heads, model_dim = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", model_dim // num_heads)
    only = {
        "rope.scaling.type": "none",
        "rope.scaling.factor": 1.0,
        "rope.scale_linear": 1.0,
        "rope.dimension_count": head_dim,
        "attention.value_length": head_dim,
        "expert_count": 0,
    }
    for name, allowed in only.items():
        if (value := get(name, allowed)) != allowed:
            raise ValueError(f"{path}: llama.{name} = {value!r} is not supported by this decoder, only {allowed!r}")
    return {
        "vocab_size": get("vocab_size", len(fields.get("tokenizer.ggml.tokens", ()))),
        "num_layers": get("block_count"),
        "model_dim": model_dim,
        "num_heads": num_heads,
        "num_kv_heads": get("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "mlp_dim": get("feed_forward_length"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "norm_eps": float(str(np.float32(get("attention.layer_norm_rms_epsilon")))),  # 1e-5, not 9.99999974e-06
        "tied_head": tied_head,
        "max_positions": get("context_length"),
    }
