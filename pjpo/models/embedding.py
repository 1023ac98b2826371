"""Tokens to their rows of the embedding, cut as it lies at rest: no device ever holds a wider part of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pjpo import layout
from pjpo.layout import ROWS, TABLE

Tokens = Int[Array, "*rows T"] | Int[np.ndarray, "*rows T"]


@jax.custom_vjp
def lookup(table: Float[Array, "V D"], tokens: Int[Array, "G M"]) -> Float[Array, "G M D"]:
    """table[tokens]. Each device finds its own columns for its neighbours' tokens too, then they swap."""

    @layout.on_devices(ins=(TABLE, ROWS), outs=ROWS, num_rows=len(tokens))
    def each(table, tokens):
        place, here = _places(table, layout.gather(tokens, axis=0))
        found = table[place]
        return layout.columns_to_rows(layout.sum_model(jnp.where(here[..., None], found, 0)))

    return each(table, tokens)


def _backward(residuals, cotangent):
    table, tokens = residuals

    @layout.on_devices(ins=(TABLE, ROWS, ROWS), outs=TABLE, num_rows=len(tokens))
    def each(table, tokens, cotangent):
        place, here = _places(table, layout.gather(tokens, axis=0))
        cotangent = jnp.where(here[..., None], layout.rows_to_columns(cotangent), 0)
        return layout.sum_data(jnp.zeros(table.shape, cotangent.dtype).at[place].add(cotangent))

    return each(table, tokens, cotangent), None


lookup.defvjp(lambda table, tokens: (lookup(table, tokens), (table, tokens)), _backward)


def _places(table: Array, tokens: Array) -> tuple[Array, Array]:
    """Rows of this device's part of the table, and whether they are the tokens' own."""
    place = tokens - layout.offset(len(table))
    return place.clip(0, len(table) - 1), (place >= 0) & (place < len(table))


def check_ids(name: str, tokens: Any, mask: Any, vocab_size: int) -> None:
    """Tokens that are there must have a row. Not looked at inside jit, nor where other processes hold some of them.

    Raises:
        ValueError: the first that has none, with its place.
    """
    if any(isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True) for x in (tokens, mask)):
        return
    tokens = np.asarray(tokens)
    beyond = np.asarray(mask) & ~are_ids(tokens, vocab_size)
    if beyond.any():
        place = tuple(np.argwhere(beyond)[0].tolist())
        raise ValueError(
            f"{name} {list(place)} is {tokens[place]}, outside the vocabulary of {vocab_size}; mask what is padding, "
            "and encode with the model's own tokenizer"
        )


def are_ids(tokens: Tokens, vocab_size: int) -> Bool[Array, "*rows T"] | Bool[np.ndarray, "*rows T"]:
    """The same inside jit: whether each token has a row, there or not."""
    return (tokens >= 0) & (tokens < vocab_size)
