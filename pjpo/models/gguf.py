"""GGUF files as llama.cpp writes them, any quantisation that the `gguf` package can undo."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from pjpo.models import families, names
from pjpo.models.fields import Fields
from pjpo.models.rope import Scaling
from pjpo.models.weights import Checkpoint
from pjpo.tokenizer import Tokenizer

ARCHITECTURES = {  # llama.cpp's name -> ours; its "llama" is Mistral too
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
# What files of these do not always say: one layer in so many has no window; the layers of the 27B model; soft caps.
GEMMA = {
    "gemma2": {"period": 2, "largest": 46, "attention_softcap": 50.0, "logit_softcap": 30.0},
    "gemma3": {"period": 6, "largest": 62, "attention_softcap": 0.0, "logit_softcap": 0.0},
}
ROPE_DIVISORS = "rope_freqs.weight"
MOST_ITEMS = 2**20  # texts of a file, each of which takes 1.4 kB of memory; the largest vocabularies have two thirds


def read(path: Path) -> Checkpoint:
    """Checks and describes the file; weights stay on disk until they are asked for.

    Raises:
        ValueError: a damaged file, another architecture, or a setting that the decoder lacks.
    """
    from gguf import GGUFReader, GGUFValueType  # here, so that importing pjpo stays fast
    from gguf.quants import dequantize

    class Reader(GGUFReader):
        """Refuses what lies beyond the file's end, which `gguf` reads as nothing, as often as a damaged count says.

        Arrays of numbers come whole, where `gguf` makes an object of 600 bytes of each; of other arrays there is a
        limit to all their items.
        """

        items = 0

        def _get_field_parts(self, orig_offs: Any, raw_type: Any) -> tuple[int, list, list[int], list]:
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            if (dtype := self.gguf_scalar_to_np.get(GGUFValueType(int(kind[0])))) is not None:
                values = self._get(orig_offs + 12, dtype, count[0])
                types = [GGUFValueType.ARRAY, GGUFValueType(int(kind[0]))]
                return 12 + values.nbytes, [kind, count, values], [2], types
            self.items += int(count[0])
            if self.items > MOST_ITEMS:
                raise ValueError(f"its arrays have {self.items:,} texts or more, allowed: {MOST_ITEMS:,}")
            return super()._get_field_parts(orig_offs, raw_type)

        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> np.ndarray:
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data):
                raise ValueError(f"it should go on to byte {end:,}")
            return super()._get(offset, dtype, count, override_order)

    try:
        reader = Reader(path)
    except (ValueError, LookupError, OverflowError, RecursionError, struct.error) as error:
        size = path.stat().st_size
        raise ValueError(f"{path} ({size:,} bytes) is damaged or cut short, fetch it again: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: (tensor.tensor_type, tensor.data_offset, tensor.data.dtype, tensor.data.shape)
        for tensor in reader.tensors
    }

    def load(name: str) -> np.ndarray:
        kind, offset, dtype, shape = tensors[name]
        # Not through the reader, which maps the whole file: whatever was read of it would stay in memory.
        stored = np.fromfile(path, dtype, math.prod(shape), offset=offset).reshape(shape)
        try:
            return dequantize(stored, kind)
        except NotImplementedError as error:
            raise ValueError(f"{path}: tensor {name!r} is quantised as {kind.name}, which is not supported") from error

    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture {architecture!r} is not supported, allowed: {', '.join(ARCHITECTURES)}")
    divisors = load(ROPE_DIVISORS) if ROPE_DIVISORS in tensors else None
    return Checkpoint(
        path=path,
        config=_config(path, architecture, fields, names.GGUF["head"] not in tensors, divisors),
        names=names.GGUF,
        stored=tensors.keys() - {ROPE_DIVISORS},
        read=load,
        out_in=True,
        adjacent_pairs=architecture == "llama",
        whole_norms=True,
        tokenizer=Tokenizer.from_gguf(fields),
    )


def _config(
    path: Path, architecture: str, fields: dict[str, Any], tied_head: bool, divisors: np.ndarray | None
) -> dict[str, Any]:
    file = Fields(fields, path, f"{architecture}.")
    num_heads, model_dim = file.size("attention.head_count"), file.size("embedding_length")
    head_dim = file.size("attention.key_length", max(1, model_dim // num_heads))
    for name in ("rope.dimension_count", "attention.value_length"):
        file.only(name, head_dim)
    file.only("rope.scale_linear", 1.0)
    file.only("expert_count", 0)
    factor = _decimal(file, "rope.scaling.factor", 1.0)
    scaled = file.only("rope.scaling.type", "linear", "none") == "linear" and factor != 1
    settings = families.FAMILIES[ARCHITECTURES[architecture]] | {
        "vocab_size": file.size("vocab_size", len(fields.get("tokenizer.ggml.tokens", ()))),
        "num_layers": file.size("block_count", most=families.MOST_LAYERS),
        "model_dim": model_dim,
        "num_heads": num_heads,
        "num_kv_heads": file.size("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "mlp_dim": file.size("feed_forward_length"),
        "rope_theta": _decimal(file, "rope.freq_base", 10000.0),
        "norm_eps": _decimal(file, "attention.layer_norm_rms_epsilon"),
        "tied_head": tied_head,
        "max_positions": file.size("context_length"),
        "rope_scaling": Scaling(kind="linear", factor=factor) if scaled else None,
    }
    if divisors is not None:
        settings["rope_scaling"] = _llama3(path, settings, divisors)
    if architecture in GEMMA:
        settings |= _gemma(architecture, settings, file)
    elif file.number("attention.sliding_window", 0.0):
        settings["sliding_window"] = file.size("attention.sliding_window")
    return settings


def _gemma(architecture: str, settings: dict[str, Any], file: Fields) -> dict[str, Any]:
    known, num_layers, model_dim = GEMMA[architecture], settings["num_layers"], settings["model_dim"]
    # No key holds what scores are divided by: the root of a head's size, but in the largest models of a head's share.
    divided = model_dim // settings["num_heads"] if num_layers == known["largest"] else settings["head_dim"]
    period = file.size("attention.sliding_window_pattern", known["period"])
    return {
        "embed_scale": model_dim**0.5,
        "query_scale": divided**-0.5,
        "attention_softcap": _decimal(file, "attn_logit_softcapping", known["attention_softcap"]) or None,
        "logit_softcap": _decimal(file, "final_logit_softcapping", known["logit_softcap"]) or None,
        "sliding_window": file.size("attention.sliding_window", 4096),
        "global_layers": tuple(range(period - 1, num_layers, period)),
        "rope_theta_local": _decimal(file, "rope.freq_base_swa", 10000.0) if architecture == "gemma3" else None,
    }


def _decimal(file: Fields, name: str, default: float | None = None) -> float:
    return float(str(np.float32(file.number(name, default))))  # 1e-5, where float32 made it 9.99999974e-06


def _llama3(path: Path, settings: dict[str, Any], divisors: np.ndarray) -> Scaling:
    """The scaling that such divisors of RoPE's frequencies come from; Llama 3's models differ in the factor alone."""
    half = settings["head_dim"] // 2
    scaling = Scaling(kind="llama3", factor=float(divisors.max()))
    frequencies = settings["rope_theta"] ** (-np.arange(half) / half)
    if divisors.shape != (half,) or not np.allclose(frequencies / scaling.apply(frequencies), divisors, rtol=1e-4):
        raise ValueError(f"{path}: {ROPE_DIVISORS} holds another scaling than Llama 3's, which is not supported")
    return scaling
