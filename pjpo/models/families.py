"""What sets the families of models apart, and Hugging Face's config.json as settings of the one decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pjpo.models.fields import Fields
from pjpo.models.rope import Scaling

MOST_LAYERS = 10_000  # more are a mistake, or an attempt to fill memory

_GEMMA = {"post_norms": True, "norm_plus_one": True, "activation": "gelu_tanh"}
# By family: the settings of `decoder.Config` that hold for all of its models.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA | {"qk_norm": True},
}
_GEMMA_SILENT = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "tie_word_embeddings": True}
# By family: what `transformers` takes where config.json is silent and it takes something else for Llama.
_SILENT: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4096},
    "qwen2": {"sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "gemma2": _GEMMA_SILENT | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA_SILENT
    | {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
    | {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072},
}
# Settings of config.json that would change the numbers, and the one value of each that this decoder computes.
_ONLY = {
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "use_bidirectional_attention": False,
    "quantization_config": None,
}
_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}  # ours: theirs
SCALINGS = {  # of RoPE, by type: config.json's names of what it needs -> ours
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_positions",
    },
}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def from_config_json(stored: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of `decoder.Config` that a config.json decides; `path` is named in errors.

    Of a Gemma 3 that sees images too, those of its text part. `...ForSequenceClassification` is a reward model.

    Raises:
        ValueError: another architecture, a setting that the decoder lacks, or one that is missing.
    """
    is_reward = any(name.endswith("ForSequenceClassification") for name in stored.get("architectures") or ())
    if stored.get("model_type") == "gemma3" and isinstance(stored.get("text_config"), dict):  # sees images too
        stored = stored["text_config"] | {"model_type": "gemma3_text"}
    family = stored.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{path}: model_type {family!r} is not supported, allowed: {', '.join(FAMILIES)}")
    config = Fields(_SILENT.get(family, {}) | stored, path)
    for name, allowed in _ONLY.items():
        config.only(name, allowed)
    if family == "llama":
        config.only("sliding_window", None)
    settings = FAMILIES[family]
    activation = _ACTIVATIONS[settings.get("activation", "silu")]
    config.only("hidden_activation" if "activation" in settings else "hidden_act", activation)
    num_heads, model_dim = config.size("num_attention_heads"), config.size("hidden_size")
    settings = settings | {
        "vocab_size": config.size("vocab_size"),
        "num_layers": config.size("num_hidden_layers", most=MOST_LAYERS),
        "model_dim": model_dim,
        "num_heads": num_heads,
        "num_kv_heads": config.size("num_key_value_heads", num_heads),
        "head_dim": config.size("head_dim", max(1, model_dim // num_heads)),
        "mlp_dim": config.size("intermediate_size"),
        "norm_eps": config.number("rms_norm_eps", 1e-6),
        "tied_head": config.only("tie_word_embeddings", False, True),
        "max_positions": config.size("max_position_embeddings", 2048),
    }
    if family.startswith("gemma"):
        settings |= {
            "embed_scale": model_dim**0.5,
            "query_scale": config.size("query_pre_attn_scalar") ** -0.5,
            "attention_softcap": config.optional("attn_logit_softcapping"),
            "logit_softcap": config.optional("final_logit_softcapping"),
        }
    if is_reward:
        settings |= {"scalar_head": True, "language_head": False}
    window, rope = _window(family, config, path), _rope(config, path)
    if not window:
        rope.pop("rope_theta_local", None)  # no layer is local
    return settings | window | rope


def _window(family: str, config: Fields, path: Path) -> dict[str, Any]:
    """The sliding window and the layers without it, where there is a layer that it holds for."""
    off = family.startswith("qwen") and not config.only("use_sliding_window", False, True)
    if off or config.get("sliding_window") is None:
        return {}
    num_layers = config.size("num_hidden_layers")
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.number("max_window_layers", 0.0)
        period = 2 if family == "gemma2" else num_layers + 1
        if family == "gemma3_text":
            period = config.size("sliding_window_pattern", 6)
        kinds = [_LOCAL if i >= first and (i + 1) % period else _GLOBAL for i in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in (_LOCAL, _GLOBAL) for kind in kinds):
        raise ValueError(f"{path}: layer_types must be {_LOCAL!r} or {_GLOBAL!r} for {num_layers} layers, got {kinds}")
    if _LOCAL not in kinds:
        return {}
    without = tuple(i for i, kind in enumerate(kinds) if kind == _GLOBAL)
    return {"sliding_window": config.size("sliding_window"), "global_layers": without}


def _rope(config: Fields, path: Path) -> dict[str, Any]:
    """Bases and scaling: one by one, or as since version 5 of `transformers` in a dict, or a dict by kind of layer."""
    old, new = config.get("rope_scaling", {}), config.get("rope_parameters", {})
    nested = new if isinstance(new, dict) and _GLOBAL in new else {_GLOBAL: new}
    everywhere, near = nested[_GLOBAL], nested.get(_LOCAL) or {}
    for value in (old, everywhere, near):
        if not isinstance(value, dict):
            raise ValueError(f"{path}: what config.json says about RoPE must be objects, got {value!r}")
    everywhere = {"rope_theta": config.get("rope_theta", 10000.0)} | old | everywhere
    near = {"rope_theta": config.get("rope_local_base_freq")} | near
    if _scaling(near, config, path) is not None:
        raise ValueError(f"{path}: RoPE scaling of {_LOCAL!r} layers is not supported, only of {_GLOBAL!r} ones")
    settings = {
        "rope_theta": Fields(everywhere, path).number("rope_theta"),
        "rope_scaling": _scaling(everywhere, config, path),
    }
    local = Fields(near, path).optional("rope_theta")
    return settings if local is None else settings | {"rope_theta_local": local}


def _scaling(rope: dict[str, Any], config: Fields, path: Path) -> Scaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in list(SCALINGS):  # a list takes what is not hashable
        raise ValueError(f"{path}: RoPE scaling of type {kind!r} is not supported, allowed: {', '.join(SCALINGS)}")
    names = SCALINGS[kind]
    for name in rope.keys() - {"rope_type", "type", "rope_theta", "original_max_position_embeddings", *names}:
        Fields(rope, path).only(name, None, 1.0)
    if kind == "default":
        return None
    fields = Fields({"original_max_position_embeddings": config.get("max_position_embeddings")} | rope, path)
    read = {"original_max_position_embeddings": fields.size}
    return Scaling(kind=kind, **{ours: read.get(theirs, fields.number)(theirs) for theirs, ours in names.items()})
