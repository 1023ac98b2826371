"""A policy: a frozen description of a model whose functions are pure in its parameters."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float

from pjpo import layout
from pjpo import sampling as decoding  # the module, whose names come later: it imports this package
from pjpo.logps import token_logps
from pjpo.models import attention, flash
from pjpo.models.decoder import Config, Decoder, head_table
from pjpo.models.embedding import are_ids, check_ids
from pjpo.models.streams import Streams
from pjpo.types import Batch


@dataclasses.dataclass(frozen=True)
class Policy:
    """Parameters are Flax variables: {"params": weights}, with "lora" beside them for adapters, "scalar_head" for that.

    Adapters count only where they are passed in: the same weights without "lora" are the reference model.
    """

    config: Config

    def init(self, key: Array) -> dict:
        """Random parameters; adapters start as no change at all."""
        token = jnp.zeros((1, 1), jnp.int32)
        attend = Partial(attention.prefill, jnp.ones((1, 1), bool))
        return jax.jit(lambda key: Decoder(self.config).init(key, token, token, attend, None))(key)

    def logps(self, params: dict, batch: Batch) -> Float[Array, "B N T"]:
        """Log-probability of each completion token, nats, float32; 0 where there is no token.

        Each prompt is computed once for its N completions, and the vocabulary is never materialised.

        Raises:
            ValueError: no prompt tokens to predict from, more positions than the model has, flash attention that the
                GPU cannot do, or a token outside the vocabulary, which inside jit gives nan.
        """
        self._check(batch)
        if not batch.completion_tokens.size:
            return jnp.zeros(batch.completion_tokens.shape)
        with layout.on(layout.of(params)):
            return _logps(self.config, params, batch)

    def values(self, params: dict, batch: Batch) -> Float[Array, "B N T"]:
        """The scalar head before each completion token is read, for critics; float32, 0 where there is no token.

        Raises:
            ValueError: no scalar head, or as `logps` does.
        """
        self._check(batch)
        params = self._with_scalar_head(params)
        if not batch.completion_tokens.size:
            return jnp.zeros(batch.completion_tokens.shape)
        with layout.on(layout.of(params)):
            return _values(self.config, params, batch)

    def scores(self, params: dict, batch: Batch) -> Float[Array, "B N"]:
        """The scalar head after the last token of each completion, as a reward; float32, 0 for an empty completion.

        Raises:
            ValueError: as `values` does.
        """
        self._check(batch)
        params = self._with_scalar_head(params)
        if not batch.completion_tokens.size:
            return jnp.zeros(batch.completion_tokens.shape[:2])
        # One more place for each completion: the value before the token that would come next. Packing knows none.
        mask, rest = jnp.asarray(batch.completion_mask), [(0, 0), (0, 0)]
        longer = jnp.pad(mask, [*rest, (1, 0)], constant_values=True) & mask.any(-1, keepdims=True)
        tokens = jnp.pad(batch.completion_tokens, [*rest, (0, 1)])
        extended = Batch.of(
            prompt_tokens=batch.prompt_tokens,
            prompt_mask=batch.prompt_mask,
            completion_tokens=tokens,
            completion_mask=longer,
        )
        with layout.on(layout.of(params)):
            values = _values(self.config, params, extended)  # [B, N, T+1]
        return jnp.take_along_axis(values, mask.sum(-1, keepdims=True), axis=-1)[..., 0]

    def _check(self, batch: Batch) -> None:
        flash.check(self.config)
        width, length = batch.prompt_tokens.shape[1], batch.completion_tokens.shape[2]
        if width + length > self.config.max_positions:
            raise ValueError(
                f"prompt width {width} + completion width {length} exceeds the model's {self.config.max_positions} "
                "positions; shorten one of them"
            )
        vocab_size = self.config.vocab_size
        check_ids("prompt_tokens", batch.prompt_tokens, batch.prompt_mask, vocab_size)
        check_ids("completion_tokens", batch.completion_tokens, batch.completion_mask, vocab_size)

    def _with_scalar_head(self, params: dict) -> dict:
        if "scalar_head" not in params:
            raise ValueError(f"the model has no scalar head, only {', '.join(params)}; set model.scalar_head")
        return params

    def generate(
        self, params: dict, prompts: decoding.Prompts | Any, key: Array | int, sampling: decoding.Sampling
    ) -> decoding.Completions:
        """N completions of each prompt, with masks and log-probs that teacher forcing repeats.

        Args:
            params: parameters.
            prompts: a pair, tokens and mask, [B, P], as `pjpo.sampling.Prompts` is; tokens alone, none of them padding,
                as an array or nested lists; or a `Batch`, whose completions are not looked at.
            key: one key, from which sequence (b, n) gets fold_in(fold_in(key, b), n); or one for each, [B, N]; or a
                whole number, the seed of one.
            sampling: how many tokens, how they are chosen, where to stop.

        Raises:
            ValueError: prompts or a key that are none of these, an empty prompt, more positions than the model has, a
                token or a stop token outside the vocabulary.
        """
        with layout.on(layout.of(params)):
            return decoding.generate(self, params, prompts, key, sampling)

    def at(self, temperature: float) -> Policy:
        """The policy whose logits are divided by this, for sampling and log-probs alike; parameters stay the same.

        Raises:
            ValueError: it is not > 0.
        """
        return Policy(dataclasses.replace(self.config, temperature=temperature))

    def trainable(self, params: dict) -> tuple[dict, dict]:
        """(what the optimizer changes, what stays): where there are adapters, the weights stay."""
        if "lora" in params:
            return {name: tree for name, tree in params.items() if name != "params"}, {"params": params["params"]}
        return params, {}

    def without_adapters(self, params: dict) -> dict:
        """The reference model's parameters: the same arrays, adapters and scalar head left out."""
        return {"params": params["params"]}


def joined(trainable: dict, frozen: dict) -> dict:
    """The inverse of `trainable`, also where params are of several models, by name."""
    both = trainable.keys() & frozen.keys()
    return trainable | frozen | {name: joined(trainable[name], frozen[name]) for name in both}


@functools.partial(jax.jit, static_argnums=0)
def _logps(config: Config, params: dict, batch: Batch) -> Array:
    streams, hidden = _hidden(config, params, batch)
    slots = streams.join(jnp.zeros_like(batch.prompt_tokens), batch.completion_tokens)
    targets = streams.completions_of(streams.to_places(slots))
    logits = config.head_block_numbers, config.logit_softcap, config.temperature
    logps = _to_completions(streams, token_logps(hidden, head_table(config, params), targets, *logits))
    # Without a prompt, nothing predicts the first token of a completion: nan there, rather than a made-up number.
    unpredicted = ~jnp.asarray(batch.prompt_mask).any(1)[:, None, None] & (jnp.arange(logps.shape[2]) == 0)[None, None]
    return jnp.where(batch.completion_mask, jnp.where(unpredicted | _unread(config, batch), jnp.nan, logps), 0)


@functools.partial(jax.jit, static_argnums=0)
def _values(config: Config, params: dict, batch: Batch) -> Array:
    streams, hidden = _hidden(config, params, batch)
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    values = jnp.einsum("gcd,d->gc", hidden.astype(wide), params["scalar_head"]["kernel"].astype(wide))
    values = jnp.where(_unread(config, batch), jnp.nan, _to_completions(streams, values))
    return jnp.where(batch.completion_mask, values, 0)


def _unread(config: Config, batch: Batch) -> Bool[Array, "B N T"]:
    """Completion tokens that the vocabulary lacks; all of them where it lacks one of their prompt."""
    prompts = jnp.all(are_ids(batch.prompt_tokens, config.vocab_size) | ~batch.prompt_mask, -1)
    return jnp.logical_not(prompts[:, None, None] & are_ids(batch.completion_tokens, config.vocab_size))


def _hidden(config: Config, params: dict, batch: Batch) -> tuple[Streams, Float[Array, "G C D"]]:
    """The final hidden states that completion tokens are predicted from."""
    streams = Streams.of(batch)
    shared_prefix = flash.shared_prefix if config.attention == "flash" else attention.shared_prefix
    attend = Partial(shared_prefix, streams)
    keep = Partial(Streams.completions_of, streams)
    hidden, _ = Decoder(config).apply(params, streams.tokens, streams.positions, attend, None, keep)
    return streams, hidden


def _to_completions(streams: Streams, values: Float[Array, "G C"]) -> Float[Array, "B N T"]:
    everywhere = jnp.pad(values, [(0, 0), (streams.tokens.shape[1] - values.shape[1], 0)])
    return streams.split(streams.to_slots(everywhere))[1]
