"""Tiny decoders, weights large enough that every part of them matters, ragged batches, and adapters merged by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pjpo.models import Policy
from pjpo.models.decoder import Config, unstack_layers
from pjpo.types import Batch

SIZES = {"vocab_size": 37, "num_layers": 2, "model_dim": 12, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
# Every axis that a mesh of 8 may cut divides by 8.
DIVISIBLE = {"vocab_size": 64, "model_dim": 16, "num_heads": 16, "num_kv_heads": 8, "head_dim": 4, "mlp_dim": 24}


def make_policy(**settings) -> Policy:
    rest = {"mlp_dim": 20, "rope_theta": 100.0, "norm_eps": 1e-5, "tied_head": True, "max_positions": 64}
    return Policy(Config(**(SIZES | rest | settings)))


@functools.cache
def make_params(policy, seed=0):
    """NumPy draws for every leaf, adapters' B included, of a size that keeps activations and log-probs of order 1."""
    rng = np.random.default_rng(seed)
    num_in = {"out": 3, "qkv": 1, "gate_up": 1, "down": 1}

    def draw(path, leaf):
        module, name = (entry.key for entry in path[-2:])
        own = leaf.shape[any(entry.key == "layers" for entry in path) :]  # without the axis of scanned layers
        values = rng.normal(size=leaf.shape)
        if name == "scale":
            return 1 + 0.2 * values
        if name == "table":
            return 0.7 * values
        fan_in = np.prod(own[: num_in[module]]) if name == "kernel" else own[0]
        return values * fan_in**-0.5

    abstract = jax.eval_shape(policy.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(lambda path, leaf: jnp.asarray(draw(path, leaf), leaf.dtype), abstract)


def ragged(rng, num_prompts=4, width=5, num_completions=2, length=4, vocab_size=37, **others) -> Batch:
    """Prompts of 1 to `width` tokens padded on either side, completions of 0 to `length`; noise under the padding."""
    sizes = rng.integers(1, width + 1, num_prompts)
    starts = np.where(rng.integers(0, 2, num_prompts), width - sizes, 0)
    places = np.arange(width)[None]
    lengths = rng.integers(0, length + 1, (num_prompts, num_completions))
    return Batch.of(
        prompt_tokens=rng.integers(0, vocab_size, (num_prompts, width)).astype(np.int32),
        prompt_mask=(places >= starts[:, None]) & (places < (starts + sizes)[:, None]),
        completion_tokens=rng.integers(0, vocab_size, (num_prompts, num_completions, length)).astype(np.int32),
        completion_mask=np.arange(length)[None, None] < lengths[:, :, None],
        **others,
    )


def merge_adapters(config, params):
    """{"params": weights} in which each adapter's alpha / rank * A B has been added to its part of a kernel."""
    if "lora" not in params:
        return params
    scale = config.lora.alpha / config.lora.rank
    heads = config.heads_of_kv
    part = {
        "q": ("qkv", np.s_[:, :, :heads]),
        "k": ("qkv", np.s_[:, :, heads : heads + 1]),
        "v": ("qkv", np.s_[:, :, heads + 1 :]),
        "o": ("out", np.s_[:]),
        "gate": ("gate_up", np.s_[:, :1]),
        "up": ("gate_up", np.s_[:, 1:]),
        "down": ("down", np.s_[:]),
    }
    weights = jax.tree.map(lambda x: x, params["params"])
    for layer, adapters in params["lora"].items():
        for name, adapter in adapters.items():
            kernel, where = part[name.removesuffix("_adapter")]
            update = scale * jnp.tensordot(adapter["a"], adapter["b"], 1)
            old = weights[layer][kernel]["kernel"]
            weights[layer][kernel]["kernel"] = old.at[where].add(update.reshape(old[where].shape))
    return {"params": weights}


def plain_params(config, params):
    """The tree that `plain_llama` reads: unscanned, adapters merged."""
    return merge_adapters(config, unstack_layers(params) if config.scan_layers else params)
