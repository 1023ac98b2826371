"""A batch as the token streams a decoder computes: each prompt once, then its completions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pjpo.packing import prompt_keys
from pjpo.types import Batch, Packing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Streams:
    """G groups of M tokens. Unpacked, a group is one prompt and M = P + N*T; packed, see `pjpo.types.Packing`."""

    tokens: Int[Array, "G M"]
    positions: Int[Array, "G M"]  # of each token in its own sequence, the prompt's first token at 0
    prompt_keys: Bool[Array, "B P"]  # what completions look back at
    packing: Packing | None
    num_completions: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, batch: Batch) -> Streams:
        """The streams of a batch; the completion stream starts with the prompt's last token.

        Raises:
            ValueError: prompts of no width, from which a first token cannot be predicted.
        """
        num_prompts, width = batch.prompt_tokens.shape
        _, num_completions, length = batch.completion_tokens.shape
        if width == 0:
            raise ValueError("log-probs need a prompt of at least one token to predict the first completion token from")
        mask = jnp.asarray(batch.prompt_mask)
        last = width - 1 - jnp.argmax(mask[:, ::-1], axis=1)  # [B], of the last real prompt token
        first_inputs = jnp.take_along_axis(batch.prompt_tokens, last[:, None], axis=1)  # [B, 1]
        first_inputs = jnp.broadcast_to(first_inputs[:, :, None], (num_prompts, num_completions, 1))
        inputs = jnp.concatenate([first_inputs, batch.completion_tokens[:, :, :-1]], axis=2)  # [B, N, T]
        start = mask.sum(1)[:, None, None] - 1
        positions = jnp.broadcast_to(start + jnp.arange(length)[None, None], inputs.shape)
        streams = cls(
            tokens=jnp.concatenate([batch.prompt_tokens, inputs.reshape(num_prompts, -1)], axis=1),
            positions=jnp.concatenate([mask.cumsum(1) - 1, positions.reshape(num_prompts, -1)], axis=1).clip(0),
            prompt_keys=prompt_keys(mask),
            packing=batch.packing,
            num_completions=num_completions,
        )
        if batch.packing is None:
            return streams
        return dataclasses.replace(
            streams, tokens=streams.to_places(streams.tokens), positions=streams.to_places(streams.positions)
        )

    def split(self, values: Array) -> tuple[Array, Array]:
        """[B, P + N*T, ...] slots -> the prompts' [B, P, ...] and the completions' [B, N, T, ...]."""
        num_prompts, width = self.prompt_keys.shape
        completions = values[:, width:]
        length = completions.shape[1] // self.num_completions
        return values[:, :width], completions.reshape(num_prompts, self.num_completions, length, *values.shape[2:])

    def join(self, prompts: Array, completions: Array) -> Array:
        """The inverse of `split`."""
        return jnp.concatenate([prompts, completions.reshape(len(prompts), -1, *prompts.shape[2:])], axis=1)

    def to_slots(self, values: Array) -> Array:
        """[G, M, ...] -> [B, P + N*T, ...]; zero where a slot is padding."""
        if self.packing is None:
            return values
        groups = len(values)
        slots = _move(values, self.packing.places, self.packing.slots)  # [G, S, ...]
        num_prompts, width = self.prompt_keys.shape
        prompts, completions = jnp.split(slots, [num_prompts // groups * width], axis=1)
        return self.join(prompts.reshape(num_prompts, width, *values.shape[2:]), completions)

    def to_places(self, values: Array) -> Array:
        """The inverse of `to_slots`; zero where a place is empty."""
        if self.packing is None:
            return values
        groups, rest = len(self.packing.slots), values.shape[2:]
        width = self.prompt_keys.shape[1]
        prompts, completions = values[:, :width], values[:, width:]
        slots = jnp.concatenate([prompts.reshape(groups, -1, *rest), completions.reshape(groups, -1, *rest)], axis=1)
        return _move(slots, self.packing.slots, self.packing.places)

    def completions_of(self, values: Array) -> Array:
        """[G, M, ...] -> [G, C, ...]: the part that predicts completion tokens."""
        first = self.prompt_keys.shape[1] if self.packing is None else self.packing.num_prompt_places
        return values[:, first:]


@jax.custom_vjp
def _move(values: Array, source: Array, destination: Array) -> Array:
    """values[g, source[g, i]], zero past the end. `destination` is the inverse, so the gradient is a gather too."""
    index = source.reshape(*source.shape, *[1] * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1, mode="fill", fill_value=0)


_move.defvjp(
    lambda values, source, destination: (_move(values, source, destination), (source, destination)),
    lambda indices, cotangent: (_move(cotangent, indices[1], indices[0]), None, None),
)
