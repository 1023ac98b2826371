"""The small English model of the glassllm package: Llama's block, float16, for tests and demonstrations."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path

import numpy as np

from pjpo.models.weights import Checkpoint
from pjpo.tokenizer import Tokenizer

NAMES = {
    "embed": "E",
    "attention_norm": "blocks.{}.norm1.gamma",
    "q": "blocks.{}.attn.W_Q",
    "k": "blocks.{}.attn.W_K",
    "v": "blocks.{}.attn.W_V",
    "o": "blocks.{}.attn.W_O",
    "mlp_norm": "blocks.{}.norm2.gamma",
    "gate": "blocks.{}.ffn.W1",
    "up": "blocks.{}.ffn.W3",
    "down": "blocks.{}.ffn.W2",
    "final_norm": "norm_f.gamma",
}


def read(path: Path) -> Checkpoint:
    """From an .npz archive with its config inside and `<name>.tokenizer.json` beside it.

    Raises:
        ValueError: a damaged file.
    """
    try:
        with path.open("rb") as file, np.load(file) as archive:
            arrays = dict(archive)
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        size = path.stat().st_size
        raise ValueError(f"{path} ({size:,} bytes) is damaged or cut short, fetch it again: {error}") from error
    config = json.loads(str(arrays.pop("__config__")))
    return Checkpoint(
        path=path,
        config={
            "vocab_size": config["vocab_size"],
            "num_layers": config["n_layers"],
            "model_dim": config["d_model"],
            "num_heads": config["n_heads"],
            "num_kv_heads": config["n_kv_heads"],
            "head_dim": config["d_model"] // config["n_heads"],
            "mlp_dim": int(8 * config["d_model"] / 3),
            "rope_theta": config["rope_base"],
            "norm_eps": config["eps"],
            "tied_head": True,
            "max_positions": config["max_len"],
        },
        names=NAMES,
        stored=arrays.keys(),
        read=arrays.__getitem__,
        out_in=False,
        adjacent_pairs=True,
        tokenizer=Tokenizer.from_glassllm(path.with_suffix(".tokenizer.json")),
    )
