"""What sets the families of models apart, and Hugging Face's config.json as settings of the one decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pjpo.models.rope import Scaling

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
# By family: what `transformers` takes where config.json is silent and it takes something else for Llama.
_SILENT: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4096},
    "qwen2": {"sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "gemma2": {"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {"sliding_window": 4096, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
}
for _gemma in ("gemma2", "gemma3_text"):
    _SILENT[_gemma] |= {"head_dim": 256, "query_pre_attn_scalar": 256, "tie_word_embeddings": True}
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

    Raises:
        ValueError: another architecture, a setting that the decoder lacks, or one that is missing.
    """
    family = stored.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{path}: model_type {family!r} is not supported, allowed: {', '.join(FAMILIES)}")
    config = _SILENT.get(family, {}) | stored
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(name), dict | None):
            raise ValueError(f"{path}: {name} must be an object or null, got {config[name]!r}")

    def get(name: str, default: Any = None) -> Any:
        value = default if config.get(name) is None else config[name]
        if value is None:
            raise ValueError(f"{path}: the file does not say {name!r}")
        if not isinstance(value, int | float):
            raise ValueError(f"{path}: {name} must be a number, got {value!r}")
        return value

    settings = FAMILIES[family]
    activation = _ACTIVATIONS[settings.get("activation", "silu")]
    only = _ONLY | {"hidden_activation" if "activation" in settings else "hidden_act": activation}
    if family == "llama":
        only["sliding_window"] = None
    for name, allowed in only.items():
        if config.get(name, allowed) not in (allowed, None):
            raise ValueError(f"{path}: {name} = {config[name]!r} is not supported by this decoder, only {allowed!r}")
    num_heads, model_dim = get("num_attention_heads"), get("hidden_size")
    settings = settings | {
        "vocab_size": get("vocab_size"),
        "num_layers": get("num_hidden_layers"),
        "model_dim": model_dim,
        "num_heads": num_heads,
        "num_kv_heads": get("num_key_value_heads", num_heads),
        "head_dim": get("head_dim", model_dim // num_heads),
        "mlp_dim": get("intermediate_size"),
        "norm_eps": get("rms_norm_eps", 1e-6),
        "tied_head": get("tie_word_embeddings", False),
        "max_positions": get("max_position_embeddings", 2048),
    }
    if family.startswith("gemma"):
        settings |= {
            "embed_scale": model_dim**0.5,
            "query_scale": get("query_pre_attn_scalar") ** -0.5,
            "attention_softcap": config.get("attn_logit_softcapping"),
            "logit_softcap": config.get("final_logit_softcapping"),
        }
    window = _window(family, config, path)
    rope = _rope(config, path)
    if not window:
        rope.pop("rope_theta_local", None)  # no layer is local
    return settings | window | rope


def _window(family: str, config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The sliding window and the layers without it, where there is a layer that it holds for."""
    num_layers = config["num_hidden_layers"]
    off = "max_window_layers" in config and not config.get("use_sliding_window")  # Qwen's
    if off or config.get("sliding_window") is None:
        return {}
    first = config.get("max_window_layers", 0)
    period = {"gemma2": 2, "gemma3_text": config.get("sliding_window_pattern", 6)}.get(family, num_layers + 1)
    by_rule = [_LOCAL if i >= first and (i + 1) % period else _GLOBAL for i in range(num_layers)]
    kinds = config.get("layer_types") or by_rule
    if len(kinds) != num_layers or not set(kinds) <= {_LOCAL, _GLOBAL}:
        raise ValueError(f"{path}: layer_types must be {_LOCAL!r} or {_GLOBAL!r} for {num_layers} layers, got {kinds}")
    if _LOCAL not in kinds:
        return {}
    without = tuple(i for i, kind in enumerate(kinds) if kind == _GLOBAL)
    return {"sliding_window": config["sliding_window"], "global_layers": without}


def _rope(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Bases and scaling: one by one, or as since version 5 of `transformers` in a dict, or a dict by kind of layer."""
    near = {"rope_theta": config.get("rope_local_base_freq")}
    rope = {"rope_theta": config.get("rope_theta")} | (config.get("rope_scaling") or {})
    parameters = config.get("rope_parameters") or {}
    rope |= (parameters.get(_GLOBAL) or {}) if _GLOBAL in parameters else parameters
    near |= parameters.get(_LOCAL) or {}
    if _scaling(near, config, path) is not None:
        raise ValueError(f"{path}: RoPE scaling of {_LOCAL!r} layers is not supported, only of {_GLOBAL!r} ones")
    theta = {"rope_theta": rope.get("rope_theta") or 10000.0, "rope_theta_local": near["rope_theta"]}
    theta = {name: float(value) for name, value in theta.items() if value is not None}
    return theta | {"rope_scaling": _scaling(rope, config, path)}


def _scaling(rope: dict[str, Any], config: dict[str, Any], path: Path) -> Scaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in SCALINGS:
        raise ValueError(f"{path}: RoPE scaling of type {kind!r} is not supported, allowed: {', '.join(SCALINGS)}")
    names = SCALINGS[kind]
    rope = {"original_max_position_embeddings": config.get("max_position_embeddings")} | rope if names else rope
    for name in names:
        if rope.get(name) is None:
            raise ValueError(f"{path}: RoPE scaling of type {kind!r} needs {name!r}, which the file does not say")
    plain = {"rope_type", "type", "rope_theta", "original_max_position_embeddings", *names}
    for name, value in rope.items():
        if name not in plain and value not in (None, 1.0):
            raise ValueError(f"{path}: RoPE with {name} = {value!r} is not supported by this decoder")
    return Scaling(kind=kind, **{ours: rope[name] for name, ours in names.items()}) if names else None
