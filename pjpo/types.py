"""The one layout that every method shares: prompts x completions.

Axis letters, here and in every annotation: B prompts, N completions of a prompt, P prompt tokens, T completion tokens,
D model width, V vocabulary, G groups of prompts that are packed together, M packed tokens of a group.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

CHOSEN, REJECTED, TARGET = 0, 1, 2  # places on the N axis when a batch holds pairs, and what to imitate beside them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """Where the real tokens of a batch lie, so that padding meets no matrix product. Made by `pjpo.packing.pack`.

    The B prompts are cut into G groups of neighbours; indices count within a group. A group's *slots* are its prompts'
    tokens [B/G, P], then the tokens its completions are predicted from [B/G, N, T] (the prompt's last token, then the
    completion less its last). Its *places* are M_p packed prompt tokens, then M_c packed completion tokens.
    """

    slots: Int[Array, "G M"]  # the slot of each place; the number of slots where the place is empty
    places: Int[Array, "G S"]  # the place of each slot; the number of places where the slot is padding
    num_prompt_places: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """B prompts with N completions each; a pytree of NumPy or JAX arrays. Fields that a method does not use are None.

    Padding is a mask, never a token id. Prompts may be padded on either side, completions on the right.
    """

    prompt_tokens: Int[Array, "B P"]
    prompt_mask: Bool[Array, "B P"]
    completion_tokens: Int[Array, "B N T"]  # end-of-sequence token included
    completion_mask: Bool[Array, "B N T"]
    loss_mask: Bool[Array, "B N T"]  # what counts in the loss
    rewards: Float[Array, "B N"] | Float[Array, "B N T"] | None = None
    advantages: Float[Array, "B N"] | Float[Array, "B N T"] | None = None
    labels: Array | None = None  # as the method defines
    sources: Int[Array, " B"] | None = None  # where data is mixed: which source each prompt came from
    old_logps: Float[Array, "B N T"] | None = None
    ref_logps: Float[Array, "B N T"] | None = None
    values: Float[Array, "B N T"] | None = None
    packing: Packing | None = None

    @classmethod
    def of(
        cls, *, completion_tokens, completion_mask=None, prompt_tokens=None, prompt_mask=None, **others: Any
    ) -> Batch:
        """A batch from what is at hand: an empty prompt, full masks and `loss_mask=completion_mask` where left out.

        Nested lists become arrays; tokens that are whole numbers become int32, masks of 0 and 1 booleans.

        Raises:
            ValueError: an unknown field, arrays whose shapes do not fit each other, lists that are ragged, tokens that
                are no whole numbers, masks that are neither 0 nor 1, by name.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in others:
            if name not in known:
                near = difflib.get_close_matches(name, known)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                raise ValueError(f"a batch has no field {name!r}{hint} Known: {', '.join(known)}")
        given = {"completion_tokens": completion_tokens, "completion_mask": completion_mask}
        given |= {"prompt_tokens": prompt_tokens, "prompt_mask": prompt_mask, **others}
        given = {name: as_field(name, value) for name, value in given.items() if value is not None}
        tokens = np.shape(given["completion_tokens"])
        if len(tokens) != 3:
            raise ValueError(f"completion_tokens must be [B, N, T], got shape {tokens}")
        if "prompt_mask" in given and "prompt_tokens" not in given:
            raise ValueError("prompt_mask without prompt_tokens; pass both or neither")
        prompts = np.shape(given.setdefault("prompt_tokens", np.zeros((tokens[0], 0), np.int32)))
        if len(prompts) != 2:
            raise ValueError(f"prompt_tokens must be [B, P], got shape {prompts}")
        given.setdefault("prompt_mask", np.ones(prompts, bool))
        given.setdefault("completion_mask", np.ones(tokens, bool))
        given.setdefault("loss_mask", given["completion_mask"])
        allowed = {name: [tokens] for name in ("completion_mask", "loss_mask", "old_logps", "ref_logps", "values")}
        allowed |= {name: [tokens, tokens[:2]] for name in ("rewards", "advantages", "labels")}
        allowed |= {"sources": [tokens[:1]], "prompt_tokens": [(tokens[0], prompts[1])], "prompt_mask": [prompts]}
        for name, shapes in allowed.items():
            if name in given and np.shape(given[name]) not in shapes:
                raise ValueError(f"{name} has shape {np.shape(given[name])}, allowed: {' or '.join(map(str, shapes))}")
        return cls(**given)


def as_field(name: str, value: Any) -> Any:
    """What a caller gives for a field of that name: lists as arrays, token ids as int32, masks as booleans.

    Raises:
        ValueError: it makes no array, or holds other numbers than these; inside jit they are not looked at.
    """
    is_list = isinstance(value, list | tuple)
    if is_list:
        try:
            value = np.array(value)
        except ValueError as error:
            raise ValueError(
                f"{name} makes no array ({error}); pad lists to one length, and mask the padding"
            ) from None
        if value.dtype.kind not in "biuf":
            raise ValueError(f"{name} makes no array of numbers, but of {value.dtype}")
    if name.endswith("_tokens") and value.dtype != np.int32:
        return _cast(name, value, np.int32, "token ids, whole numbers")
    if name.endswith("_mask") and value.dtype != bool:
        return _cast(name, value, bool, "0 or 1")
    if is_list:
        return value.astype(jax.dtypes.canonicalize_dtype(value.dtype))  # float32, and float64 under x64
    return value


def _cast(name: str, value: Any, dtype: Any, allowed: str) -> Any:
    with np.errstate(invalid="ignore"):  # nan is refused below
        cast = value.astype(dtype)
    if not isinstance(value, jax.core.Tracer) and np.any(wrong := np.asarray(value != cast)):
        raise ValueError(f"{name} must be {allowed}, got {np.asarray(value)[wrong][0]}")
    return cast
