"""The decoder's forward as one would write it on a blackboard: whole rows, no packing, no cache, no chunks, no Flax.

An oracle for tests: it reads the project's parameter tree (unscanned, without adapters) and nothing else of the
project. It computes in the dtype of the parameters, so float64 parameters under x64 give float64 numbers.
"""

import jax
import jax.numpy as jnp


def rms_norm(config, x, scale):
    normed = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.norm_eps)
    return jnp.einsum("...d,d->...d", normed, 1 + scale if config.norm_plus_one else scale)


def slowed(frequencies, scaling):
    """Rotary frequencies after scaling, by the cases of Llama 3's code."""
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    wavelengths, low, high = 2 * jnp.pi / frequencies, scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_positions / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    slow = jnp.where(wavelengths > scaling.original_positions / low, frequencies / scaling.factor, between)
    return jnp.where(wavelengths < scaling.original_positions / high, frequencies, slow)


def rotate(x, theta, scaling):
    """Turns coordinate j and j + hd/2 of [B, L, K, G, hd] by position * theta^(-2j/hd)."""
    half = x.shape[-1] // 2
    frequencies = slowed(theta ** (-jnp.arange(half, dtype=x.dtype) / half), scaling)
    angles = jnp.outer(jnp.arange(x.shape[1], dtype=x.dtype), frequencies)  # [L, hd/2]
    cos, sin = jnp.cos(angles)[None, :, None, None], jnp.sin(angles)[None, :, None, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def capped(x, cap):
    return x if cap is None else jnp.tanh(x / cap) * cap


def attention(config, layer, x, is_local):
    qkv = jnp.einsum("bld,dkgh->blkgh", x, layer["qkv"]["kernel"])
    if config.qkv_bias:
        qkv += layer["qkv"]["bias"][None, None]
    q, k, v = qkv[..., :-2, :], qkv[..., -2:-1, :], qkv[..., -1, :]
    if config.qk_norm:
        q, k = rms_norm(config, q, layer["q_norm"]["scale"]), rms_norm(config, k, layer["k_norm"]["scale"])
    turn = (config.rope_theta_local, None) if is_local and config.rope_theta_local else None
    q, k = (rotate(part, *(turn or (config.rope_theta, config.rope_scaling))) for part in (q, k))
    scale = config.query_scale or 1 / jnp.sqrt(jnp.asarray(q.shape[-1], x.dtype))
    scores = capped(jnp.einsum("blkgh,bmkh->bkglm", q, k[..., 0, :]) * scale, config.attention_softcap)
    length = x.shape[1]
    back = jnp.arange(length)[:, None] - jnp.arange(length)[None]  # how far back the key lies
    seen = (back >= 0) & (back < (config.sliding_window if is_local else length))
    weights = jax.nn.softmax(jnp.where(seen[None, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkglm,bmkh,kghd->bld", weights, v, layer["out"]["kernel"])


def mlp(config, layer, x):
    gate, up = jnp.moveaxis(jnp.einsum("bld,dcf->blcf", x, layer["gate_up"]["kernel"]), 2, 0)
    if config.activation == "gelu_tanh":
        gate = gate / 2 * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (gate + 0.044715 * gate**3)))
    else:
        gate = gate / (1 + jnp.exp(-gate))
    return jnp.einsum("blf,fd->bld", gate * up, layer["down"]["kernel"])


def logits(config, params, tokens):
    """[B, L, V] from rows of tokens [B, L] that start at position 0."""
    weights = params["params"]
    x = weights["embed"]["table"][tokens] * config.embed_scale
    for i in range(config.num_layers):
        layer = weights[f"layers_{i}"]
        is_local = config.sliding_window is not None and i not in config.global_layers

        def after(name, x):
            return rms_norm(config, x, layer[f"{name}_post_norm"]["scale"]) if config.post_norms else x  # noqa: B023

        normed = rms_norm(config, x, layer["attention_norm"]["scale"])
        x = x + after("attention", attention(config, layer, normed, is_local))
        normed = rms_norm(config, x, layer["mlp_norm"]["scale"])
        x = x + after("mlp", mlp(config, layer, normed))
    head = weights["embed" if config.tied_head else "head"]["table"]
    x = rms_norm(config, x, weights["final_norm"]["scale"])
    return capped(jnp.einsum("bld,vd->blv", x, head), config.logit_softcap) / config.temperature


def logps(config, params, tokens):
    """[B, L-1]: element i is the log-probability of tokens[i+1] after tokens[:i+1]."""
    log_softmax = jax.nn.log_softmax(logits(config, params, tokens[:, :-1]))
    return jnp.take_along_axis(log_softmax, tokens[:, 1:, None], axis=-1)[..., 0]
