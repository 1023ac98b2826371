"""Pack a batch on the host, so that the policy computes its real tokens and next to no padding."""

import dataclasses
from collections.abc import Callable

import numpy as np

from pjpo.types import Batch, Packing


def pack(
    batch: Batch,
    *,
    num_groups: int = 1,
    prompt_step: int = 256,
    completion_step: int = 256,
    largest: Callable[[list[int]], list[int]] = lambda counts: counts,
    places: tuple[int, int] | None = None,
) -> Batch:
    """The same batch with `packing` filled in: same log-probs to rounding, fewer positions computed.

    Args:
        batch: NumPy arrays.
        num_groups: groups that are packed apart, one or more for each device that batches are split over.
        prompt_step: places for prompt tokens are rounded up to a multiple of this, a group; each multiple that occurs
            is a compilation.
        completion_step: the same for completion tokens.
        largest: tokens of the fullest group here, prompts' and completions', to those anywhere: where each process
            packs its own prompts, all need one shape.
        places: how many for prompt and for completion tokens, a group, instead of what the steps give.

    Raises:
        ValueError: `num_groups` does not divide the batch, or a group has more tokens than places.
    """
    num_prompts, num_completions, length = batch.completion_tokens.shape
    if num_prompts % num_groups:
        raise ValueError(f"{num_prompts} prompts cannot be packed into {num_groups} equal groups; use a divisor")
    in_group = (num_groups, -1)
    prompt_slots = prompt_keys(batch.prompt_mask).reshape(in_group)
    completion_slots = np.asarray(batch.completion_mask).reshape(in_group)
    needed = largest([int(slots.sum(1).max()) for slots in (prompt_slots, completion_slots)])
    prompt_places, completion_places = places or (
        _round_up(needed[0], prompt_step, prompt_slots.shape[1]),
        _round_up(needed[1], completion_step, completion_slots.shape[1]),
    )
    if prompt_places < needed[0] or completion_places < needed[1]:
        raise ValueError(
            f"places {places} do not hold the {needed[0]} prompt and {needed[1]} completion tokens of a group; use more"
        )
    num_slots = prompt_slots.shape[1] + completion_slots.shape[1]
    num_places = prompt_places + completion_places
    slots = np.full((num_groups, num_places), num_slots, np.int32)
    places_of_slots = np.full((num_groups, num_slots), num_places, np.int32)
    for group in range(num_groups):
        for used, first_place, first_slot in (
            (np.flatnonzero(prompt_slots[group]), 0, 0),
            (np.flatnonzero(completion_slots[group]), prompt_places, prompt_slots.shape[1]),
        ):
            slots[group, first_place : first_place + used.size] = first_slot + used
            places_of_slots[group, first_slot + used] = first_place + np.arange(used.size)
    packing = Packing(slots=slots, places=places_of_slots, num_prompt_places=prompt_places)
    return dataclasses.replace(batch, packing=packing)


def prompt_keys(prompt_mask):
    """[B, P] bool: the prompt tokens that completions look back at, which is all but the last real one of each.

    The last one starts every completion's own stream, where it predicts the first completion token.
    """
    after = prompt_mask[:, ::-1].cumsum(1)[:, ::-1]
    return prompt_mask & (after > 1)


def _round_up(count: int, step: int, limit: int) -> int:
    return min(-(-max(count, 1) // step) * step, limit)
