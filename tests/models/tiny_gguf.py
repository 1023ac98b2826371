"""A Hugging Face folder written again as llama.cpp's converter writes it: keys, names, orders of rows, norms."""

import json
import math

import gguf
import numpy as np
from safetensors.numpy import load_file

ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}  # where the name differs from model_type


def permute(weight, num_heads):
    """What the converter does to q and k of the llama architecture: half-split heads to adjacent pairs."""
    split = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def rope_divisors(rope, head_dim):
    """What the converter stores of Llama 3's scaling."""
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    divisors = []
    for frequency in 1 / rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim):
        wavelength = 2 * math.pi / frequency
        smooth = rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]
        smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        divisors.append(1 if wavelength < high else rope["factor"] if wavelength > low else between)
    return np.array(divisors, np.float32)


def write(path, folder, tokens, merges, *, architecture=None, settings=(), change=(), divisors=None):
    """`settings`: further keys, (name, (value, type)). `change`: tensors by HF's name, None leaves one out."""
    config = json.loads((folder / "config.json").read_text())
    weights = {}
    for file in sorted(folder.glob("model*.safetensors")):
        weights |= {name: value.astype(np.float32) for name, value in load_file(file).items()}
    weights |= dict(change)
    family = config["model_type"]
    name = ARCHITECTURES.get(family, family)
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta")}
    rope, local = rope.get("full_attention", rope), rope.get("sliding_attention")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]

    writer = gguf.GGUFWriter(path, architecture or name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "llama3":
        divisors = rope_divisors(rope, head_dim)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    if name.startswith("gemma"):
        writer.add_sliding_window(config["sliding_window"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if name == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if name == "gemma3":
        writer.add_sliding_window_pattern(config["sliding_window_pattern"])
        writer.add_rope_freq_base_swa(local["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(1)
    for key, value in settings:
        writer.add_key_value(key, *value)

    architectures = {arch: known for known, arch in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[name], config["num_hidden_layers"])
    for tensor, value in weights.items():
        if value is None:
            continue
        if name == "llama" and ("q_proj" in tensor or "k_proj" in tensor):
            value = permute(value, num_heads if "q_proj" in tensor else num_kv_heads)
        if name.startswith("gemma") and tensor.endswith("norm.weight"):
            value = value + 1
        writer.add_tensor(names.get_name(tensor, try_suffixes=(".weight", ".bias")), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
