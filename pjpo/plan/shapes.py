"""Public models by their sizes alone, to plan for what is not on this disk; numbers from each model's config.json.

The scaling of their rotations is left out: it costs nothing.
"""

LLAMA_3 = {"vocab_size": 128256, "num_kv_heads": 8, "rope_theta": 5e5, "norm_eps": 1e-5, "max_positions": 131072}
SHAPES = {
    "Llama-3.2-1B": LLAMA_3
    | {"num_layers": 16, "model_dim": 2048, "num_heads": 32, "head_dim": 64, "mlp_dim": 8192, "tied_head": True},
    "Llama-3.1-8B": LLAMA_3
    | {"num_layers": 32, "model_dim": 4096, "num_heads": 32, "head_dim": 128, "mlp_dim": 14336, "tied_head": False},
    "Llama-3.1-70B": LLAMA_3
    | {"num_layers": 80, "model_dim": 8192, "num_heads": 64, "head_dim": 128, "mlp_dim": 28672, "tied_head": False},
}
