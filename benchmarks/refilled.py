"""A prototype of generation in rows that are refilled: as a completion ends, the next one that waits takes its row.

It computes what `Policy.generate` does, from the same parts: a sequence's tokens depend on its key and prompt alone.
Prompts are prefilled together, and a row holds a copy of its prompt's cache, as rows of one prompt need not stand side
by side. Each row is at a step of its own, so a step writes its keys and values to a place of each row's own. When
nothing waits any more, rows halve as in `pjpo.sampling`. See README.md for how it compares; nothing in `pjpo` uses it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from pjpo.logps import soft_cap
from pjpo.models import attention
from pjpo.models.decoder import Decoder, head_table, transpose_kernels
from pjpo.packing import prompt_keys
from pjpo.products import few_rows
from pjpo.sampling import Completions, Prompts, Sampling, choose


class _Rows(NamedTuple):
    """Completions that grow in R rows; those that wait have numbers from `waiting` on."""

    number: jax.Array  # [R], of the row's completion
    step: jax.Array  # [R], its newest token's
    inputs: jax.Array  # [R], its newest token
    ended: jax.Array  # [R] bool
    caches: tuple  # of each layer, rows on axis 0
    waiting: jax.Array
    out: Completions  # of all completions, [B*N, T]


@functools.partial(jax.jit, static_argnums=(0, 1, 5, 6))
def generate(config, sampling: Sampling, params: dict, prompts: Prompts, keys: jax.Array, num_rows: int, at_once: int):
    """Completions [B, N, T] as `Policy.generate` has them.

    Args:
        config: the policy's, layers not scanned.
        sampling: `halvings` are of the time when nothing waits.
        params, prompts: as `Policy.generate` has them.
        keys: of the sequences, [B, N].
        num_rows: that are decoded together.
        at_once: rows that end before they are refilled.
    """
    num_prompts, width = prompts.tokens.shape
    total, length = keys.size, sampling.max_completion_tokens
    of_prompt, keys = jnp.arange(total) // keys.shape[1], keys.reshape(-1)
    decoder, table = Decoder(config), head_table(config, params).astype(config.decoding_dtype)
    positions = (prompts.mask.cumsum(1) - 1).clip(0)
    _, prefilled = decoder.apply(params, prompts.tokens, positions, Partial(attention.prefill, prompts.mask), None)
    visible, num_tokens = prompt_keys(prompts.mask), prompts.mask.sum(1)
    last = width - 1 - jnp.argmax(prompts.mask[:, ::-1], axis=1)
    first = jnp.take_along_axis(prompts.tokens, last[:, None], axis=1)[:, 0]
    of_prompts = tuple(attention.decode_cache(cache, 1, length, in_blocks=False) for cache in prefilled)
    blank = jax.tree.map(lambda x: jnp.zeros((num_rows, *x.shape[1:]), x.dtype), of_prompts)
    params = transpose_kernels(config, params)

    def fill(now: _Rows) -> _Rows:
        """Ended rows take the completions that wait, as far as there are any."""
        number = now.waiting + jnp.cumsum(now.ended) - 1
        new = now.ended & (number < total)
        number = jnp.where(new, number, now.number)
        prompt = of_prompt[number]

        def chosen(fresh: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(new.reshape(-1, *[1] * (old.ndim - 1)), fresh[prompt], old)

        caches = tuple(  # what a row kept of its own is written over, unseen
            attention.DecodeCache(chosen(fresh.prompt_k, old.prompt_k), chosen(fresh.prompt_v, old.prompt_v), old.own)
            for fresh, old in zip(of_prompts, now.caches, strict=True)
        )
        return now._replace(
            number=number,
            step=jnp.where(new, 0, now.step),
            inputs=jnp.where(new, first[prompt], now.inputs),
            ended=now.ended & ~new,
            caches=caches,
            waiting=now.waiting + new.sum(),
        )

    def grow(now: _Rows) -> _Rows:
        prompt = of_prompt[now.number]
        attend = Partial(_decode_rows, visible[prompt], now.step)
        positions = (num_tokens[prompt] - 1 + now.step)[:, None]
        hidden, caches = decoder.apply(params, now.inputs[:, None], positions, attend, now.caches)
        logits = soft_cap(few_rows(hidden, table.T, table), config.logit_softcap) / config.temperature  # [R, 1, V]
        own = jax.vmap(jax.random.fold_in)(keys[now.number], now.step)
        tokens = choose(sampling, logits, own[:, None])[:, 0]
        logps = jnp.take_along_axis(logits[:, 0], tokens[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits[:, 0], -1)
        place = jnp.where(now.ended, total, now.number), now.step  # beyond the last one, nothing is written
        new = Completions(tokens, ~now.ended, logps)
        out = jax.tree.map(lambda whole, x: whole.at[place].set(x.astype(whole.dtype), mode="drop"), now.out, new)
        step = now.step + ~now.ended
        stopped = jnp.isin(tokens, jnp.array(sampling.stop_tokens, jnp.int32)) | (step >= length)
        return now._replace(
            inputs=tokens, step=step.clip(max=length - 1), ended=now.ended | stopped, caches=caches, out=out
        )

    def until(now: _Rows, num_ended: int) -> _Rows:
        return jax.lax.while_loop(lambda now: now.ended.sum() < num_ended, grow, now)

    def finish(now: _Rows, halvings: int) -> Completions:
        rows = len(now.ended)
        left = rows // 2 if halvings else 0
        now = until(now, rows - left)
        if not left:
            return now.out
        kept = jnp.argsort(now.ended, stable=True)[:left]
        some = jax.tree.map(lambda x: x[kept], now._replace(waiting=(), out=()))
        return finish(some._replace(waiting=now.waiting, out=now.out), halvings - 1)

    zeros = jnp.zeros(num_rows, jnp.int32)
    nothing = jnp.zeros((total, length))
    now = _Rows(
        number=zeros,
        step=zeros,
        inputs=zeros,
        ended=zeros == 0,
        caches=blank,
        waiting=jnp.int32(0),
        out=Completions(nothing.astype(jnp.int32), nothing.astype(bool), nothing),
    )
    now = jax.lax.while_loop(lambda now: now.waiting < total, lambda now: until(fill(now), at_once), now)
    # The last fill may have left completions that grow.
    return jax.tree.map(lambda x: x.reshape(num_prompts, -1, length), finish(now, sampling.halvings))


def _decode_rows(visible: jax.Array, steps: jax.Array, qkv: jax.Array, cache: Any, scoring: Any):
    """`attention.decode` of rows, each at its own step."""

    def one(visible, step, qkv, cache):
        found, cache = attention.decode(visible[None], step, qkv[None], jax.tree.map(lambda x: x[None], cache), scoring)
        return found[0], jax.tree.map(lambda x: x[0], cache)

    return jax.vmap(one)(visible, steps, qkv, cache)
