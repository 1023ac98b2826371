"""Decoding under jit: each prompt is prefilled once for its N completions, which grow token by token in a KV cache.

A sequence's tokens depend on its own key and prompt alone, never on what else is in the batch or how it is padded. As
completions end, those that still grow move together, into half the rows (`Sampling.halvings`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from pjpo.logps import soft_cap
from pjpo.models import attention
from pjpo.models.decoder import Decoder, head_table, stream_kernels, transpose_kernels
from pjpo.models.embedding import check_ids
from pjpo.packing import prompt_keys
from pjpo.products import (
    LANES,
    MOST_STREAMED,
    WIDE,
    few_rows,
    has_matrix_unit,
    has_wide_registers,
    in_words,
    streamed_rows,
)
from pjpo.types import Batch, as_field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the next token. Filters apply after the temperature, in the order top_k, top_p, min_p.

    Numbers of NumPy and JAX become Python's; `stop_tokens` may be one id, a list or an array.
    """

    max_completion_tokens: int
    num_completions: int = 1  # of each prompt
    temperature: float = 1.0  # of this choice alone, log-probs do not know it (see `Policy.at`); 0 is greedy
    top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: float = 1.0  # keep the likeliest tokens that together reach this probability
    min_p: float = 0.0  # drop tokens less likely than this fraction of the likeliest
    stop_tokens: tuple[int, ...] = ()  # a completion ends with the first of these, which it includes
    halvings: int = 0  # how often the batch may shrink by half, once as few grow; each is compiled by itself

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(field.name, getattr(self, field.name), field.default))
        checks = {
            "max_completion_tokens": (self.max_completion_tokens >= 1, ">= 1"),
            "num_completions": (self.num_completions >= 1, ">= 1"),
            "temperature": (0 <= self.temperature < math.inf, ">= 0 and finite"),
            "top_k": (self.top_k >= 0, ">= 0"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p < 1, "in [0, 1)"),
            "halvings": (self.halvings >= 0, ">= 0"),
            "stop_tokens": (all(token >= 0 for token in self.stop_tokens), "token ids, >= 0"),
        }
        for name, (good, allowed) in checks.items():
            if not good:
                raise ValueError(f"sampling: {name} must be {allowed}, got {getattr(self, name)}")


class Prompts(NamedTuple):
    """Prompts padded on either side; every row has at least one real token."""

    tokens: Int[Array, "B P"]
    mask: Bool[Array, "B P"]


class Completions(NamedTuple):
    tokens: Int[Array, "B N T"]  # 0 after the end
    mask: Bool[Array, "B N T"]  # the stop token included
    logps: Float[Array, "B N T"]  # of the tokens under the policy's whole distribution, nats; 0 after the end


def sequence_keys(key: Array, num_prompts: int, num_completions: int) -> Array:
    """One key [B, N] for each sequence: `key` folded with the prompt's row, then with the completion's number."""
    rows = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(num_prompts))
    return jax.vmap(lambda row: jax.vmap(lambda n: jax.random.fold_in(row, n))(jnp.arange(num_completions)))(rows)


def generate(policy, params: dict, prompts: Any, key: Any, sampling: Sampling) -> Completions:
    """Completions of each prompt; see `pjpo.models.Policy.generate`."""
    tokens, mask = _tokens_and_mask(prompts)
    if tokens.shape != mask.shape or tokens.ndim != 2:
        raise ValueError(f"prompts must be tokens and mask of one shape [B, P], got {tokens.shape} and {mask.shape}")
    if not isinstance(mask, jax.core.Tracer) and not np.asarray(mask).any(1).all():
        raise ValueError(
            f"prompt {int(np.argmin(np.asarray(mask).any(1)))} is empty; generation needs a token to start from"
        )
    check_ids("prompt_tokens", tokens, mask, policy.config.vocab_size)
    length = tokens.shape[1] + sampling.max_completion_tokens
    if length > policy.config.max_positions:
        raise ValueError(
            f"prompt width {tokens.shape[1]} + max_completion_tokens {sampling.max_completion_tokens} = {length} "
            f"exceeds the model's {policy.config.max_positions} positions; shorten one of them"
        )
    beyond = [token for token in sampling.stop_tokens if token >= policy.config.vocab_size]
    if beyond:
        raise ValueError(f"sampling: stop_tokens {beyond} are outside the vocabulary of {policy.config.vocab_size}")
    key = _as_key(key)
    keys = sequence_keys(key, len(tokens), sampling.num_completions) if key.ndim == 0 else key
    if keys.shape != (len(tokens), sampling.num_completions):
        raise ValueError(
            f"key must be one key or keys [B, N] = {(len(tokens), sampling.num_completions)}, got {keys.shape}"
        )
    prompts = Prompts(jnp.asarray(tokens), jnp.asarray(mask))
    return program(policy.config, params, prompts, keys)(policy.config, sampling, params, prompts, keys)


def program(config, params: dict, prompts: Prompts, keys: Array) -> Any:
    """The jitted function that decodes these: `streamed` where `products.streamed_rows` is fast, else `transposed`.

    That is for few rows in float32 on one CPU, in a program with its own options; and for bfloat16, where the processor
    has no matrix unit for it.
    """
    leaves = jax.tree.leaves((params, prompts, keys, jnp.zeros(())))  # the last is traced where everything is
    dtypes = {config.dtype, config.param_dtype}
    suits = dtypes == {"float32"} or ("float64" not in dtypes and not has_matrix_unit())
    if not suits or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return transposed
    devices = set().union(*(leaf.devices() for leaf in leaves if isinstance(leaf, jax.Array)))
    on_one_cpu = [device.platform for device in devices] == ["cpu"]
    fits = 1 < keys.size <= MOST_STREAMED and has_wide_registers()
    return streamed if on_one_cpu and fits else transposed


def _plain(name: str, value: Any, default: Any) -> Any:
    """A setting as what Python can hash: jit knows it by its value."""
    array = np.asarray(value)
    if name == "stop_tokens":
        if array.ndim > 1 or (array.size and not jnp.issubdtype(array.dtype, jnp.integer)):
            raise ValueError(f"sampling: stop_tokens must be token ids, got {value!r}")
        return tuple(array.reshape(-1).tolist())
    kind, allowed = (float, "a number") if isinstance(default, float) else (int, "a whole number")
    is_number = array.ndim == 0 and jnp.issubdtype(array.dtype, jnp.number)
    if not is_number or (kind is int and not (np.isfinite(array) and array == np.floor(array))):
        raise ValueError(f"sampling: {name} must be {allowed}, got {value!r}")
    return kind(array)


def _tokens_and_mask(prompts: Any) -> tuple[Any, Any]:
    if isinstance(prompts, Batch):
        prompts = prompts.prompt_tokens, prompts.prompt_mask
    elif not isinstance(prompts, tuple):
        prompts = prompts, None
    if len(prompts) != 2:
        raise ValueError(f"prompts must be tokens, or a pair of tokens and mask, got a tuple of {len(prompts)}")
    tokens, mask = prompts
    tokens = as_field("prompt_tokens", tokens)
    return tokens, np.ones(tokens.shape, bool) if mask is None else as_field("prompt_mask", mask)


def _as_key(key: Any) -> Array:
    if isinstance(key, int):
        return jax.random.key(key)
    dtype = getattr(key, "dtype", np.dtype(object))
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return key
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"key must be a jax.random.key, keys [B, N], or a whole number as a seed, got {key!r}")
    return jax.random.wrap_key_data(jnp.asarray(key)) if key.ndim else jax.random.key(key)  # PRNGKey's, or a seed


def _decode(config, sampling: Sampling, params: dict, prompts: Prompts, keys: Array, by_streams: bool) -> Completions:
    num_prompts, width = prompts.tokens.shape
    decoder = Decoder(config)
    table = head_table(config, params)
    positions = (prompts.mask.cumsum(1) - 1).clip(0)
    _, caches = decoder.apply(params, prompts.tokens, positions, Partial(attention.prefill, prompts.mask), None)
    visible = prompt_keys(prompts.mask)
    last = width - 1 - jnp.argmax(prompts.mask[:, ::-1], axis=1)
    first = jnp.take_along_axis(prompts.tokens, last[:, None], axis=1)  # [B, 1]
    length = prompts.mask.sum(1)[:, None]
    shape = (num_prompts, sampling.num_completions)

    def with_room(cache):
        return attention.decode_cache(cache, sampling.num_completions, sampling.max_completion_tokens, by_streams)

    caches = jax.vmap(with_room)(caches) if config.scan_layers else tuple(map(with_room, caches))
    if by_streams:
        params = stream_kernels(config, params)
        whole_words = jnp.pad(table.T, ((0, 0), (0, -len(table) % (2 * LANES))))[None]
        kernels = jax.lax.optimization_barrier(in_words(whole_words))
        head, logsumexp = lambda hidden: streamed_rows(hidden, kernels)[..., : len(table)], _logsumexp_in_blocks
    else:
        params, table = transpose_kernels(config, params), table.astype(config.decoding_dtype)
        head = lambda hidden: few_rows(hidden, table.T, table)  # noqa: E731  a TPU need not copy it, turned round here
        logsumexp = functools.partial(jax.nn.logsumexp, axis=-1)
    blank = jnp.zeros((*shape, sampling.max_completion_tokens))
    start = Completions(blank.astype(jnp.int32), blank.astype(bool), blank)
    growing = _Growing(
        visible, length, keys, jnp.broadcast_to(first, shape), jnp.zeros(shape, bool), caches, jnp.int32(0), start
    )

    def grow(now: _Growing) -> _Growing:
        attend = Partial(attention.decode, now.visible, now.step)
        positions = jnp.broadcast_to(now.length - 1 + now.step, now.ended.shape)
        hidden, caches = decoder.apply(params, now.inputs, positions, attend, now.caches)
        logits = soft_cap(head(hidden), config.logit_softcap) / config.temperature  # [B, N, V]
        tokens = jnp.where(now.ended, 0, choose(sampling, logits, _step_keys(now.keys, now.step)))
        at_token = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        logps = jnp.where(now.ended, 0, at_token - logsumexp(logits))
        new = Completions(tokens, ~now.ended, logps)
        out = jax.tree.map(lambda whole, x: whole.at[:, :, now.step].set(x.astype(whole.dtype)), now.out, new)
        ended = now.ended | jnp.isin(tokens, jnp.array(sampling.stop_tokens, jnp.int32))
        return now._replace(inputs=tokens, ended=ended, caches=caches, step=now.step + 1, out=out)

    def finish(now: _Growing, halvings: int) -> Completions:
        num_rows = now.ended.size
        enough = num_rows // 2 if halvings else 0  # go on until so few grow

        def more(now: _Growing):
            return (now.step < sampling.max_completion_tokens) & ((~now.ended).sum() > enough)

        now = jax.lax.while_loop(more, grow, now)
        if not enough:
            return now.out
        rows = jnp.argsort(now.ended.reshape(-1), stable=True)[:enough]  # those that grow come first
        rest = finish(now.only(rows, layers_axis=config.scan_layers), halvings - 1)
        return jax.tree.map(
            lambda whole, part: whole.reshape(num_rows, -1).at[rows].set(part[:, 0]).reshape(whole.shape), now.out, rest
        )

    return finish(growing, sampling.halvings)


transposed = jax.jit(functools.partial(_decode, by_streams=False), static_argnums=(0, 1))
streamed = jax.jit(functools.partial(_decode, by_streams=True), static_argnums=(0, 1), compiler_options=WIDE)


class _Growing(NamedTuple):
    """Completions on their way: N of each of B prompts."""

    visible: Bool[Array, "B P"]  # prompt tokens that completions look back at
    length: Int[Array, "B 1"]  # of each prompt
    keys: Array  # [B, N]
    inputs: Int[Array, "B N"]  # the newest tokens
    ended: Bool[Array, "B N"]
    caches: Any  # each layer's `attention.DecodeCache`; stacked on axis 0 where layers are scanned
    step: Int[Array, ""]
    out: Completions

    def only(self, rows: Int[Array, " R"], *, layers_axis: bool) -> _Growing:
        """Some of the B*N completions, each with its prompt's cache for itself: R prompts, of one completion each."""
        of_prompts = rows // self.ended.shape[1]

        def own(x: Array) -> Array:  # [B, N, ..] -> [R, 1, ..]
            return x.reshape(-1, 1, *x.shape[2:])[rows]

        def cached(x: Array, rows: Array) -> Array:
            return x[:, rows] if layers_axis else x[rows]

        def cache(layer: attention.DecodeCache) -> attention.DecodeCache:
            return attention.DecodeCache(
                prompt_k=cached(layer.prompt_k, of_prompts),
                prompt_v=cached(layer.prompt_v, of_prompts),
                own=jax.tree.map(lambda x: cached(x, rows), layer.own),
            )

        return _Growing(
            visible=self.visible[of_prompts],
            length=self.length[of_prompts],
            keys=own(self.keys),
            inputs=own(self.inputs),
            ended=own(self.ended),
            caches=cache(self.caches) if layers_axis else tuple(map(cache, self.caches)),
            step=self.step,
            out=jax.tree.map(own, self.out),
        )


def choose(sampling: Sampling, logits: Float[Array, "B N V"], keys: Array) -> Int[Array, "B N"]:
    """The next token of each sequence: the likeliest, or one drawn with its own key."""
    if sampling.temperature < jnp.finfo(logits.dtype).tiny:  # 0, or taken for it by the division below
        return _likeliest(logits)
    logits = logits - logits.max(-1, keepdims=True)  # first, so that no temperature is too small
    return _draw(_keep_likely(sampling, logits / sampling.temperature), keys)


def _step_keys(keys: Array, step: Array) -> Array:
    return jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, step)))(keys)


def _keep_likely(sampling: Sampling, logits: Array) -> Array:
    """Logits, the largest being 0, with those that the filters drop at -inf."""
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = jnp.where(logits < jax.lax.top_k(logits, sampling.top_k)[0][..., -1:], -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        needed = probabilities.cumsum(-1) - probabilities < sampling.top_p
        lowest = jnp.where(needed, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    if sampling.min_p > 0:
        logits = jnp.where(logits < math.log(sampling.min_p), -jnp.inf, logits)
    return logits


def _in_blocks(logits: Array, block: int = 256) -> Array:
    """[B, N, V] -> [B, N, blocks, block]; what the last lacks is less than all.

    Whatever reads logits of `streamed_rows` whole reads them so: XLA writes them out anew for each shape.
    """
    logits = jnp.pad(logits, ((0, 0), (0, 0), (0, -logits.shape[-1] % block)), constant_values=-jnp.inf)
    return logits.reshape(*logits.shape[:2], -1, block)


def _logsumexp_in_blocks(logits: Array) -> Array:
    logits = _in_blocks(logits)
    peak = logits.max(-1).max(-1)
    return peak + jnp.log(jnp.exp(logits - peak[..., None, None]).sum((-2, -1)))


def _likeliest(logits: Array) -> Array:
    """The first of the largest: of the blocks', then inside one. On a CPU XLA's argmax takes ten times a maximum."""
    logits = _in_blocks(logits)
    row = jnp.argmax(logits.max(-1), axis=-1)[..., None]
    inside = jnp.take_along_axis(logits, row[..., None], axis=-2)[..., 0, :]
    return (row[..., 0] * logits.shape[-1] + jnp.argmax(inside, axis=-1)).astype(jnp.int32)


def _draw(logits: Array, keys: Array, block: int = 256) -> Array:
    """One uniform number a sequence through the inverse distribution function; Gumbel noise would need V of them.

    The running sum goes over blocks, then inside one block, so that float32 loses little and no long scan is needed.
    """
    vocab_size = logits.shape[-1]
    weights = jnp.exp(logits)  # the largest is 1
    weights = jnp.pad(weights, ((0, 0), (0, 0), (0, -vocab_size % block)))
    weights = weights.reshape(*weights.shape[:2], -1, block)  # [B, N, blocks, block]
    ends = weights.sum(-1).cumsum(-1)
    uniform = jax.vmap(jax.vmap(jax.random.uniform))(keys)[..., None]
    target = uniform * ends[..., -1:]  # less than the end: the uniform number is at most 1 - 2^-23
    row = jnp.argmax(ends > target, axis=-1)[..., None]
    before = jnp.where(row > 0, jnp.take_along_axis(ends, row - 1, axis=-1), 0.0)
    inside = jnp.take_along_axis(weights, row[..., None], axis=-2)[..., 0, :]  # [B, N, block]
    passed = inside.cumsum(-1) > target - before
    last = block - 1 - jnp.argmax(inside[..., ::-1] > 0, axis=-1)  # where rounding leaves the target beyond the block
    column = jnp.where(passed.any(-1), jnp.argmax(passed, axis=-1), last)
    return (row[..., 0] * block + column).astype(jnp.int32)
