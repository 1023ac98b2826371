"""The Llama forward as one would write it on a blackboard: whole rows, no packing, no cache, no chunks, no Flax.

An oracle for tests: it reads the project's parameter tree (unscanned, without adapters) and nothing else of the
project. It computes in the dtype of the parameters, so float64 parameters under x64 give float64 numbers.
"""

import jax
import jax.numpy as jnp


def rms_norm(x, scale, eps):
    return jnp.einsum("bld,d->bld", x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps), scale)


def rotate(x, theta):
    """Turns coordinate j and j + hd/2 of [B, L, K, G, hd] by position * theta^(-2j/hd)."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=x.dtype) / half)
    angles = jnp.outer(jnp.arange(x.shape[1], dtype=x.dtype), frequencies)  # [L, hd/2]
    cos, sin = jnp.cos(angles)[None, :, None, None], jnp.sin(angles)[None, :, None, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(config, layer, x):
    qkv = jnp.einsum("bld,dkgh->blkgh", x, layer["qkv"]["kernel"])
    q = rotate(qkv[..., :-2, :], config.rope_theta)
    k = rotate(qkv[..., -2:-1, :], config.rope_theta)[..., 0, :]
    v = qkv[..., -1, :]
    scores = jnp.einsum("blkgh,bmkh->bkglm", q, k) / jnp.sqrt(jnp.asarray(q.shape[-1], x.dtype))
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None, None]
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkglm,bmkh,kghd->bld", weights, v, layer["out"]["kernel"])


def mlp(layer, x):
    gate, up = jnp.moveaxis(jnp.einsum("bld,dcf->blcf", x, layer["gate_up"]["kernel"]), 2, 0)
    return jnp.einsum("blf,fd->bld", jax.nn.silu(gate) * up, layer["down"]["kernel"])


def logits(config, params, tokens):
    """[B, L, V] from rows of tokens [B, L] that start at position 0."""
    weights = params["params"]
    x = weights["embed"]["table"][tokens]
    for i in range(config.num_layers):
        layer = weights[f"layers_{i}"]
        x = x + attention(config, layer, rms_norm(x, layer["attention_norm"]["scale"], config.norm_eps))
        x = x + mlp(layer, rms_norm(x, layer["mlp_norm"]["scale"], config.norm_eps))
    head = weights["embed" if config.tied_head else "head"]["table"]
    return jnp.einsum("bld,vd->blv", rms_norm(x, weights["final_norm"]["scale"], config.norm_eps), head)


def logps(config, params, tokens):
    """[B, L-1]: element i is the log-probability of tokens[i+1] after tokens[:i+1]."""
    log_softmax = jax.nn.log_softmax(logits(config, params, tokens[:, :-1]))
    return jnp.take_along_axis(log_softmax, tokens[:, 1:, None], axis=-1)[..., 0]
