"""The decoder: RMSNorm, rotary grouped-query attention and a gated feed-forward, in Flax Linen.

Letters beside those of `pjpo.types`: K key/value heads, Q query heads for each, H numbers a head, F feed-forward width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pjpo import layout
from pjpo.models import lora
from pjpo.models.attention import Scoring
from pjpo.models.decoder_config import Config
from pjpo.models.embedding import lookup
from pjpo.models.rope import rotary, rotate
from pjpo.products import few_rows, in_words, product, scale_columns, streamed_rows

# Logical axes of each parameter by its name; `pjpo.sharding` maps them to axes of the mesh.
AXES = {
    ("embed", "table"): ("vocab", "embed"),
    ("head", "table"): ("vocab", "embed"),
    ("scalar_head", "kernel"): ("embed",),
    ("qkv", "kernel"): ("embed", "kv_heads", "heads_of_kv", "head_dim"),
    ("qkv", "bias"): ("kv_heads", "heads_of_kv", "head_dim"),
    ("q_norm", "scale"): ("norm",),
    ("k_norm", "scale"): ("norm",),
    ("out", "kernel"): ("kv_heads", "heads_of_kv", "head_dim", "embed"),
    ("gate_up", "kernel"): ("embed", "gate_and_up", "mlp"),
    ("down", "kernel"): ("mlp", "embed"),
    ("attention_norm", "scale"): ("norm",),
    ("attention_post_norm", "scale"): ("norm",),
    ("mlp_norm", "scale"): ("norm",),
    ("mlp_post_norm", "scale"): ("norm",),
    ("final_norm", "scale"): ("norm",),
    ("q_adapter", "a"): ("embed", "rank"),
    ("k_adapter", "a"): ("embed", "rank"),
    ("v_adapter", "a"): ("embed", "rank"),
    ("o_adapter", "a"): ("flat_heads", "rank"),
    ("gate_adapter", "a"): ("embed", "rank"),
    ("up_adapter", "a"): ("embed", "rank"),
    ("down_adapter", "a"): ("mlp", "rank"),
    ("q_adapter", "b"): ("rank", "kv_heads", "heads_of_kv", "head_dim"),
    ("k_adapter", "b"): ("rank", "kv_heads", "heads_of_kv", "head_dim"),
    ("v_adapter", "b"): ("rank", "kv_heads", "heads_of_kv", "head_dim"),
    ("o_adapter", "b"): ("rank", "embed"),
    ("gate_adapter", "b"): ("rank", "gate_and_up", "mlp"),
    ("up_adapter", "b"): ("rank", "gate_and_up", "mlp"),
    ("down_adapter", "b"): ("rank", "embed"),
}

ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": functools.partial(nn.gelu, approximate=True)}


class RMSNorm(nn.Module):
    """x / rms(x) * scale, in float32. Zhang and Sennrich 2019, Eq. 4. With `plus_one`, times 1 + scale."""

    eps: float
    param_dtype: Any
    plus_one: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        init = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale = scale.astype(wide.dtype)
        return scale_columns(normed, 1 + scale if self.plus_one else scale).astype(x.dtype)


class Kernel(nn.Module):
    """x [*rows, *D] times a kernel [*D, *out]; for decoding see `transpose_kernels` and `stream_kernels`."""

    shape: tuple[int, ...]
    num_in: int  # how many leading axes of the kernel are contracted
    param_dtype: Any
    bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        axes = tuple(range(self.num_in)), tuple(range(self.num_in, len(self.shape)))
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=axes[0], out_axis=axes[1])
        kernel = self.param("kernel", init, self.shape, self.param_dtype)
        x = x.reshape(*x.shape[: x.ndim - self.num_in], -1)
        kernel = kernel.reshape(-1, *self.shape[self.num_in :])
        if self.has_variable("streamed", "kernel"):
            out = streamed_rows(x, self.get_variable("streamed", "kernel"), self.get_variable("layer", "kernel", 0))
            out = out.astype(x.dtype).reshape(*x.shape[:-1], *kernel.shape[1:])
        elif self.has_variable("transposed", "kernel"):
            out = few_rows(x, kernel, self.get_variable("transposed", "kernel")).astype(x.dtype)
        else:
            parts = [layout.RULES.get(axis) for axis in AXES[self.name, "kernel"]]
            inputs = next(filter(None, parts[: self.num_in]), None)
            out = product(x, kernel, (inputs, *parts[self.num_in :]))
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, self.shape[self.num_in :], self.param_dtype)
            out += jnp.expand_dims(bias.astype(out.dtype), range(out.ndim - bias.ndim))
        return out


class Block(nn.Module):
    """One layer. `attend(qkv, cache, scoring) -> (out, cache)` decides who sees whom: see `pjpo.models.attention`."""

    config: Config
    local: bool | None  # whether the window holds; None where that is not known before `is_local` comes

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "G M D"],
        turns: tuple[tuple[Array, Array], ...],
        is_local: Bool[Array, ""] | None,
        attend: Callable,
        cache: Any,
        keep: Callable | None = None,
    ):
        """`turns` are those of global and of local layers, or one pair for all; `keep` picks what goes on after it."""
        c = self.config
        many = cache is None  # tokens; one of each sequence, when decoding, may rather move than have the weights moved
        dtype = jnp.dtype(c.param_dtype)
        norm = functools.partial(RMSNorm, c.norm_eps, dtype, c.norm_plus_one)
        k, q, h = c.num_kv_heads, c.heads_of_kv, c.head_dim
        if is_local is None:
            own_turns, window = (turns[-1], c.sliding_window) if self.local else (turns[0], None)
        else:
            own_turns = jax.tree.map(lambda far, near: jnp.where(is_local, near, far), turns[0], turns[-1])
            window = jnp.where(is_local, c.sliding_window, c.max_positions)
        scoring = Scoring(h**-0.5 if c.query_scale is None else c.query_scale, c.attention_softcap, window)

        def adapter(projection: str, x: Array, *out: int) -> Array | None:
            if c.lora is None or projection not in c.lora.targets:
                return None
            at_rest = jnp.promote_types(dtype, jnp.float32)  # they are trained, so never coarser than this
            return lora.Adapter(c.lora, out, at_rest, name=f"{projection}_adapter")(x)

        normed = norm(name="attention_norm")(x)
        qkv = Kernel((c.model_dim, k, q + 2, h), 1, dtype, c.qkv_bias, name="qkv")(normed)
        queries, key, value = (
            adapter("q", normed, k, q, h),
            adapter("k", normed, k, 1, h),
            adapter("v", normed, k, 1, h),
        )
        qkv = _add_parts(qkv, [(queries, q), (key, 1), (value, 1)])
        if c.qk_norm:
            queries, key, value = jnp.split(qkv, [q, q + 1], axis=-2)
            qkv = jnp.concatenate([norm(name="q_norm")(queries), norm(name="k_norm")(key), value], axis=-2)
        attended, cache = attend(rotate(qkv, own_turns), cache, scoring)
        if keep is not None:
            x, attended = keep(x), keep(attended)
        flat = attended.reshape(*attended.shape[:-3], -1)
        mixed = _add(Kernel((k, q, h, c.model_dim), 3, dtype, name="out")(attended), adapter("o", flat, c.model_dim))
        x = x + (norm(name="attention_post_norm")(mixed) if c.post_norms else mixed)

        normed = norm(name="mlp_norm")(x)
        gate_up = Kernel((c.model_dim, 2, c.mlp_dim), 1, dtype, name="gate_up")(normed)
        gate_up = _add_parts(
            gate_up, [(adapter("gate", normed, 1, c.mlp_dim), 1), (adapter("up", normed, 1, c.mlp_dim), 1)]
        )
        hidden = gated(gate_up, c.activation)
        down = Kernel((c.mlp_dim, c.model_dim), 1, dtype, name="down")(hidden)
        mixed = _add(down, adapter("down", hidden, c.model_dim))
        x = x + (norm(name="mlp_post_norm")(mixed) if c.post_norms else mixed)
        return (layout.pin(x, layout.BATCH, None, None) if many else x), cache


def gated(gate_up: Float[Array, "*rows 2 F"], activation: str) -> Float[Array, "*rows F"]:
    """activation(gate) * up, in float32. Shazeer 2020, arXiv:2002.05202, Eq. 6: SwiGLU and GEGLU."""
    wide = gate_up.astype(jnp.promote_types(gate_up.dtype, jnp.float32))
    gate, up = jnp.split(wide, 2, axis=-2)  # not indexing: the gradient of a split is one concatenation
    return (ACTIVATIONS[activation](gate) * up).reshape(*gate_up.shape[:-2], -1).astype(gate_up.dtype)


def _add(x: Array, update: Array | None) -> Array:
    """A projection and its adapter, added to each other first: a zero update must not change how bfloat16 rounds."""
    return x if update is None else x + update


def _add_parts(x: Array, parts: list[tuple[Array | None, int]]) -> Array:
    """Add each update to its part of axis -2, given as (update or None, width of the part)."""
    if all(update is None for update, _ in parts):
        return x
    blank = [jnp.zeros((*x.shape[:-2], width, x.shape[-1]), x.dtype) if u is None else u for u, width in parts]
    return x + jnp.concatenate(blank, axis=-2)


class Decoder(nn.Module):
    """Tokens to final hidden states; the head is `head_table` with `pjpo.logps` or a plain product."""

    config: Config

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "G M"],
        positions: Int[Array, "G M"],
        attend: Callable,
        caches: Any = None,
        keep: Callable | None = None,
    ):
        """Hidden states [G, M, D] and every layer's cache: a tuple, or stacked on axis 0 when layers are scanned.

        `keep` picks the positions that are asked for, [G, M, ..] -> [G, C, ..]: of the others the last layer needs keys
        and values alone.
        """
        c = self.config
        embed = Table((c.vocab_size, c.model_dim), jnp.dtype(c.param_dtype), name="embed")
        x = lookup(embed(), tokens).astype(c.dtype)
        if caches is None:
            x = layout.pin(x, layout.BATCH, None, None)
        if c.embed_scale != 1:
            x *= c.embed_scale
        turns = (rotary(positions, c.head_dim, c.rope_theta, c.dtype, c.rope_scaling),)
        if c.rope_theta_local is not None:
            turns += (rotary(positions, c.head_dim, c.rope_theta_local, c.dtype),)
        block = nn.remat(Block, prevent_cse=not c.scan_layers) if c.remat else Block
        if c.scan_layers:
            layers = nn.scan(
                block,
                variable_axes={"params": 0, "lora": 0, "transposed": 0, "layer": 0},
                variable_broadcast="streamed",
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0, nn.broadcast, 0),
                length=c.num_layers,
            )
            alike = len(set(c.local_layers)) == 1
            local, is_local = (c.local_layers[0], None) if alike else (None, jnp.array(c.local_layers))
            x, caches = layers(c, local, name="layers")(x, turns, is_local, attend, caches)
            x = x if keep is None else keep(x)
        else:
            each = []
            for i, local in enumerate(c.local_layers):
                cache = None if caches is None else caches[i]
                last = i == c.num_layers - 1
                x, cache = block(c, local, name=f"layers_{i}")(x, turns, None, attend, cache, keep if last else None)
                each.append(cache)
            caches = tuple(each)
        if c.language_head and not c.tied_head:
            Table((c.vocab_size, c.model_dim), jnp.dtype(c.param_dtype), name="head")()
        if c.scalar_head and self.is_initializing():  # read in `pjpo.models.policy`; scores start at zero
            self.variable("scalar_head", "kernel", jnp.zeros, (c.model_dim,), jnp.dtype(c.param_dtype))
        final_norm = RMSNorm(c.norm_eps, jnp.dtype(c.param_dtype), c.norm_plus_one, name="final_norm")
        return final_norm(x), caches


class Table(nn.Module):
    """A row for each token."""

    shape: tuple[int, int]
    param_dtype: Any

    @nn.compact
    def __call__(self) -> Float[Array, "V D"]:
        return self.param("table", nn.initializers.normal(0.02), self.shape, self.param_dtype)


def head_table(config: Config, params: dict) -> Float[Array, "V D"]:
    """The output head's rows: the embedding where the two are tied.

    Raises:
        ValueError: the model has none.
    """
    if not config.language_head:
        raise ValueError(
            "this is a reward model, without a language head: it scores completions (`policy.scores`), and has neither "
            "log-probs nor samples; load a language model for these"
        )
    return params["params"]["embed" if config.tied_head else "head"]["table"]


def transpose_kernels(config: Config, params: dict) -> dict:
    """Parameters for decoding: beside each layer's kernel [*D, *out], its transpose [*out, D] in `decoding_dtype`.

    On a CPU that is a copy of the layers for as long as a call takes; elsewhere nothing reads it, so there is none.
    """

    def transpose(path: tuple, kernel: Array) -> Array:
        first = 1 if config.scan_layers else 0
        num_in = first + (3 if path[-2].key == "out" else 1)
        layers, inputs, out = kernel.shape[:first], math.prod(kernel.shape[first:num_in]), kernel.shape[num_in:]
        matrix = jnp.moveaxis(kernel.reshape(*layers, inputs, *out), first, -1).astype(config.decoding_dtype)
        return jax.lax.optimization_barrier(matrix)

    return params | {"transposed": jax.tree_util.tree_map_with_path(transpose, _kernels(params))}


def stream_kernels(config: Config, params: dict) -> dict:
    """Parameters for decoding by `pjpo.products.streamed_rows`: beside each layer's kernel itself as [L, D, O].

    Those of scanned layers stay together, and each layer has its number, as one that is cut out would be copied.
    """
    num_layers = config.num_layers if config.scan_layers else 1

    def stream(path: tuple, kernel: Array) -> Array:
        num_in = (1 if config.scan_layers else 0) + (3 if path[-2].key == "out" else 1)
        flat = kernel.reshape(num_layers, -1, math.prod(kernel.shape[num_in:]))
        return jax.lax.optimization_barrier(in_words(flat))

    kernels = _kernels(params)
    numbers = {"layer": jax.tree.map(lambda kernel: jnp.arange(len(kernel)), kernels)} if config.scan_layers else {}
    return params | {"streamed": jax.tree_util.tree_map_with_path(stream, kernels)} | numbers


def _kernels(params: dict) -> dict:
    names = {name: tree for name, tree in params["params"].items() if name.startswith("layers")}
    return {
        layer: {name: {"kernel": leaves["kernel"]} for name, leaves in tree.items() if "kernel" in leaves}
        for layer, tree in names.items()
    }


def stack_layers(params: dict) -> dict:
    """Parameters of unrolled layers (`layers_0`, ...) -> those of scanned ones (`layers`, stacked on axis 0)."""

    def stack(tree: dict) -> dict:
        names = sorted((name for name in tree if name.startswith("layers_")), key=lambda name: int(name[7:]))
        rest = {name: value for name, value in tree.items() if name not in names}
        return rest | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *(tree[name] for name in names))}

    return {collection: stack(tree) for collection, tree in params.items()}


def unstack_layers(params: dict) -> dict:
    """The inverse of `stack_layers`."""

    def unstack(tree: dict) -> dict:
        rest = {name: value for name, value in tree.items() if name != "layers"}
        num_layers = len(jax.tree.leaves(tree["layers"])[0])
        return rest | {f"layers_{i}": jax.tree.map(lambda x: x[i], tree["layers"]) for i in range(num_layers)}  # noqa: B023

    return {collection: unstack(tree) for collection, tree in params.items()}
