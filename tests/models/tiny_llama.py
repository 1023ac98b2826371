"""A tiny Llama as Hugging Face lays it out, and its forward pass in NumPy by the formulas of HF's own code."""

import json

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 264,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,  # not hidden_size / num_attention_heads
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
}


def tensors(config=CONFIG, seed=0):
    """Random weights by HF's names, matrices (out, in)."""
    model, mlp = config["hidden_size"], config["intermediate_size"]
    queries, keys = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], model), "model.norm.weight": (model,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], model)
    for i in range(config["num_hidden_layers"]):
        layer = {"input_layernorm": (model,), "post_attention_layernorm": (model,)}
        layer |= {"self_attn.q_proj": (queries, model), "self_attn.k_proj": (keys, model)}
        layer |= {"self_attn.v_proj": (keys, model), "self_attn.o_proj": (model, queries)}
        layer |= {"mlp.gate_proj": (mlp, model), "mlp.up_proj": (mlp, model), "mlp.down_proj": (model, mlp)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    draw = np.random.default_rng(seed).normal
    return {name: draw(size=shape, scale=shape[-1] ** -0.5).astype(np.float32) for name, shape in shapes.items()}


def logits(config, weights, tokens):
    """[L, V] for one row of tokens, float64, head by head."""
    weights = {name: value.astype(np.float64) for name, value in weights.items()}
    heads, size = config["num_attention_heads"], config["head_dim"]
    per_kv = heads // config["num_key_value_heads"]
    angles = np.outer(np.arange(len(tokens)), config["rope_theta"] ** (-np.arange(0, size, 2) / size))
    cos, sin = np.cos(np.concatenate([angles, angles], 1)), np.sin(np.concatenate([angles, angles], 1))

    def norm(x, name):
        return weights[name] * x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"])

    def turn(x):
        return x * cos + np.concatenate([-x[:, size // 2 :], x[:, : size // 2]], 1) * sin

    x = weights["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        normed = norm(x, at + "input_layernorm.weight")
        q, k, v = (normed @ weights[f"{at}self_attn.{name}_proj.weight"].T for name in "qkv")
        mixed = []
        for h in range(heads):
            mine, shared = slice(h * size, (h + 1) * size), slice(h // per_kv * size, (h // per_kv + 1) * size)
            scores = turn(q[:, mine]) @ turn(k[:, shared]).T / np.sqrt(size)
            scores = np.exp(np.where(np.tri(len(tokens), dtype=bool), scores, -np.inf))
            mixed.append(scores / scores.sum(-1, keepdims=True) @ v[:, shared])
        x = x + np.concatenate(mixed, 1) @ weights[at + "self_attn.o_proj.weight"].T
        normed = norm(x, at + "post_attention_layernorm.weight")
        gate, up = (normed @ weights[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[at + "mlp.down_proj.weight"].T
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return norm(x, "model.norm.weight") @ weights[head].T


def vocabulary():
    """Two special tokens, all bytes and one merge."""
    return ["<|endoftext|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]


def write_folder(folder, config=CONFIG, weights=None):
    """The model as `transformers` would save it."""
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors(config) if weights is None else weights, folder / "model.safetensors")
    write_tokenizer(folder, vocabulary(), [("h", "e")], num_special=2)
    return folder


def write_tokenizer(folder, tokens, merges, num_special=0):
    """A byte-level tokenizer.json; the first tokens are special ones."""
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in tokens[:num_special]])
    tokenizer.save(str(folder / "tokenizer.json"))
