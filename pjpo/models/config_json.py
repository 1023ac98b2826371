"""The decoder's config as a Hugging Face config.json: the inverse of `pjpo.models.families`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pjpo.models import decoder, families

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
REWARD_MODELS = {
    family: name.replace("Gemma3", "Gemma3Text").replace("ForCausalLM", "ForSequenceClassification")
    for family, name in ARCHITECTURES.items()
}
# How it computes, not what.
OURS = ("dtype", "param_dtype", "scan_layers", "remat", "attention", "head_block_numbers", "lora")


def to_config_json(config: decoder.Config) -> dict[str, Any]:
    """What `transformers` needs to compute the same numbers, in the names that its versions 4 and 5 both read.

    Raises:
        ValueError: settings that no family has.
    """
    stored = _stored(_family(config), config)
    wanted = {field.name for field in dataclasses.fields(decoder.Config)} - set(OURS)
    again = decoder.Config(**families.from_config_json(stored, Path("config.json")))
    if different := [name for name in sorted(wanted) if getattr(again, name) != getattr(config, name)]:
        listed = ", ".join(f"{name} = {getattr(config, name)!r}" for name in different)
        raise ValueError(
            f"a {stored['model_type']!r} model of transformers cannot have {listed}; save fits only what can"
        )
    return stored


def _family(config: decoder.Config) -> str:
    plain = {field.name: field.default for field in dataclasses.fields(decoder.Config)}
    told = {name for settings in families.FAMILIES.values() for name in settings}
    found = [
        family
        for family, settings in families.FAMILIES.items()
        if all(getattr(config, name) == settings.get(name, plain[name]) for name in told)
    ]
    if not found:
        has = ", ".join(f"{name}={getattr(config, name)!r}" for name in sorted(told))
        raise ValueError(f"no family has {has}; known: {', '.join(families.FAMILIES)}")
    # Llama and Mistral differ in the window alone.
    return "mistral" if "mistral" in found and config.sliding_window is not None else found[0]


def _stored(family: str, config: decoder.Config) -> dict[str, Any]:
    activation = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[config.activation]
    stored = {
        "model_type": family,
        "architectures": [ARCHITECTURES[family] if config.language_head else REWARD_MODELS[family]],
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "attention_bias": False,
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling(config),
        "torch_dtype": config.param_dtype,
    }
    if not config.language_head:
        stored |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}  # one label; silence would mean two
    if family == "llama":
        return stored | {"hidden_act": activation, "mlp_bias": False}
    stored |= {"sliding_window": config.sliding_window}
    if family == "mistral":
        return stored | {"hidden_act": activation}
    kinds = ["sliding_attention" if local else "full_attention" for local in config.local_layers]
    stored |= {"layer_types": kinds}
    if family.startswith("qwen"):
        first = kinds.index("sliding_attention") if config.sliding_window else config.num_layers
        window = {"use_sliding_window": config.sliding_window is not None, "max_window_layers": first}
        return stored | window | {"hidden_act": activation}
    scalar = (config.query_scale or config.head_dim**-0.5) ** -2
    stored |= {
        "hidden_activation": activation,
        "query_pre_attn_scalar": round(scalar),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }
    local = {"rope_local_base_freq": config.rope_theta_local or config.rope_theta} if family == "gemma3_text" else {}
    return stored | local


def _scaling(config: decoder.Config) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    names = families.SCALINGS[scaling.kind]
    return {"rope_type": scaling.kind} | {theirs: getattr(scaling, ours) for theirs, ours in names.items()}
