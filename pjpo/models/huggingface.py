"""Folders as `transformers` saves them: config.json, safetensors (one file or several), tokenizer files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pjpo.models.weights import Checkpoint
from pjpo.tokenizer import Tokenizer, read_json

NAMES = {
    "embed": "model.embed_tokens.weight",
    "attention_norm": "model.layers.{}.input_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight",
    "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight",
    "o": "model.layers.{}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
# Settings of config.json that would change the numbers, and the one value of each that this decoder computes.
ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "sliding_window": None,
    "quantization_config": None,
}
PLAIN_ROPE = (None, "default", 1.0)  # what may stand in config.json beside rope_theta


def read(folder: Path) -> Checkpoint:
    """Checks and describes the folder; weights stay on disk until they are asked for.

    Raises:
        FileNotFoundError: a file of the folder that is missing.
        ValueError: a damaged file, another architecture, or a setting that the decoder lacks.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json; a model's folder holds config.json, model.safetensors and tokenizer.json"
        )
    config = _config(folder / "config.json")
    files = {name: opened for opened in _open_files(folder) for name in opened.keys()}  # noqa: SIM118

    def load(name: str) -> np.ndarray:
        return files[name].get_tensor(name)

    # Old files also store RoPE's frequencies, which follow from the config, and tied ones the embedding a second time.
    derived = {name for name in files if name.endswith("rotary_emb.inv_freq")}
    derived |= {NAMES["head"]} if config["tied_head"] else set()
    return Checkpoint(
        path=folder,
        config=config,
        names=NAMES,
        stored=files.keys() - derived,
        read=load,
        out_in=True,
        adjacent_pairs=False,
        tokenizer=Tokenizer.from_folder(folder),
    )


def _config(path: Path) -> dict[str, Any]:
    config = read_json(path)

    def get(name: str, default: Any = None) -> Any:
        value = default if config.get(name) is None else config[name]
        if value is None:
            raise ValueError(f"{path}: the file does not say {name!r}")
        return value

    if config.get("model_type") != "llama":
        raise ValueError(f"{path}: model_type {config.get('model_type')!r} is not supported, only 'llama'")
    for name, allowed in ONLY.items():
        if config.get(name, allowed) not in (allowed, None):
            raise ValueError(f"{path}: {name} = {config[name]!r} is not supported by this decoder, only {allowed!r}")
    rope = {"rope_theta": config.get("rope_theta")}  # since version 5 of transformers in a dict of its own
    for name in ("rope_scaling", "rope_parameters"):
        rope |= config.get(name) or {}
    if scaling := {name: value for name, value in rope.items() if name != "rope_theta" and value not in PLAIN_ROPE}:
        raise ValueError(f"{path}: RoPE with {json.dumps(scaling)} is not supported by this decoder, only plain RoPE")
    num_heads, model_dim = get("num_attention_heads"), get("hidden_size")
    return {
        "vocab_size": get("vocab_size"),
        "num_layers": get("num_hidden_layers"),
        "model_dim": model_dim,
        "num_heads": num_heads,
        "num_kv_heads": get("num_key_value_heads", num_heads),
        "head_dim": get("head_dim", model_dim // num_heads),
        "mlp_dim": get("intermediate_size"),
        "rope_theta": float(rope["rope_theta"] or 10000.0),
        "norm_eps": get("rms_norm_eps", 1e-6),
        "tied_head": get("tie_word_embeddings", False),
        "max_positions": get("max_position_embeddings", 2048),
    }


def _open_files(folder: Path) -> list[Any]:
    from safetensors import SafetensorError, safe_open  # here, so that importing pjpo stays fast

    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    opened = []
    for path in (folder / name for name in names):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; weights are read from safetensors files alone")
        try:
            opened.append(safe_open(path, framework="np"))
        except SafetensorError as error:
            size = path.stat().st_size
            raise ValueError(f"{path} ({size:,} bytes) is damaged or cut short, fetch it again: {error}") from error
    return opened
