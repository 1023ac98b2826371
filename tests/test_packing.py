"""Where packed tokens lie, by loops over the real tokens."""

import numpy as np
import pytest

from pjpo.packing import pack, prompt_keys
from pjpo.types import Batch
from tests import tiny


def real_slots(batch, group, num_groups):
    """The slots of a group that hold a token to compute: prompts less their last token, then completion tokens."""
    size = len(batch.prompt_mask) // num_groups
    rows = range(group * size, (group + 1) * size)
    width = batch.prompt_mask.shape[1]
    length = batch.completion_mask[0].size
    prompts = [
        i * width + place
        for i, row in enumerate(rows)
        for place in np.flatnonzero(batch.prompt_mask[row])[:-1].tolist()
    ]
    completions = [
        size * width + i * length + place
        for i, row in enumerate(rows)
        for place in np.flatnonzero(batch.completion_mask[row].ravel()).tolist()
    ]
    return prompts, completions


@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize(("prompt_step", "completion_step"), [(1, 1), (3, 4), (256, 256)])
def test_every_real_token_has_one_place(num_groups, prompt_step, completion_step):
    batch = tiny.ragged(np.random.default_rng(0))
    packed = pack(batch, num_groups=num_groups, prompt_step=prompt_step, completion_step=completion_step)
    packing, num_slots = packed.packing, batch.prompt_mask.size // num_groups + batch.completion_mask.size // num_groups
    first = packing.num_prompt_places
    most = [0, 0]
    for group in range(num_groups):
        slots, places = packing.slots[group], packing.places[group]
        real = real_slots(batch, group, num_groups)
        assert [slot for slot in slots[:first] if slot < num_slots] == real[0]
        assert [slot for slot in slots[first:] if slot < num_slots] == real[1]
        for slot in range(num_slots):  # the two are inverses, and a slot without a place says so
            assert slots[places[slot]] == slot if slot in real[0] + real[1] else places[slot] == len(slots)
        most = [max(a, len(b)) for a, b in zip(most, real, strict=True)]
    assert packing.slots.shape == (num_groups, packing.slots.shape[1])
    whole = batch.prompt_mask.size // num_groups, batch.completion_mask.size // num_groups
    for size, step, needed, limit in zip(
        (first, packing.slots.shape[1] - first), (prompt_step, completion_step), most, whole, strict=True
    ):
        assert size == min(-(-max(needed, 1) // step) * step, limit)


def test_a_batch_of_nothing_takes_one_place_of_each_kind():
    mask = np.zeros((2, 3, 4), bool)
    packing = pack(
        Batch.of(completion_tokens=mask.astype(np.int32), completion_mask=mask), prompt_step=1, completion_step=1
    ).packing
    assert packing.num_prompt_places == 0  # there are no prompts of any width
    assert packing.slots.tolist() == [[24]]


def test_unless_said_otherwise_there_is_one_group_and_places_come_by_256():
    mask = np.broadcast_to(np.arange(8) < 3, (100, 2, 8))
    batch = Batch.of(
        completion_tokens=np.zeros((100, 2, 8), np.int32), completion_mask=mask, prompt_tokens=mask[:, 0] * 1
    )
    packing = pack(batch).packing
    assert packing.num_prompt_places == 768  # for 700 tokens
    assert packing.slots.shape == (1, 768 + 768)  # for 600 tokens more


def test_packing_leaves_the_rest_of_the_batch_as_it_was():
    batch = tiny.ragged(np.random.default_rng(0))
    packed = pack(batch)
    for name in ("prompt_tokens", "prompt_mask", "completion_tokens", "completion_mask", "loss_mask"):
        assert getattr(packed, name) is getattr(batch, name)


def test_completions_look_back_at_all_but_the_last_prompt_token():
    mask = np.array([[0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], bool)
    expected = np.array([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(prompt_keys(mask), expected)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="4 prompts cannot be packed into 3 equal groups; use a divisor"):
        pack(tiny.ragged(np.random.default_rng(0)), num_groups=3)


def test_places_can_be_given():
    batch = tiny.ragged(np.random.default_rng(0))
    needed = int(prompt_keys(batch.prompt_mask).sum()), int(batch.completion_mask.sum())
    packing = pack(batch, places=(needed[0] + 3, needed[1])).packing
    assert (packing.num_prompt_places, packing.slots.shape) == (needed[0] + 3, (1, sum(needed) + 3))
    with pytest.raises(ValueError, match=f"do not hold the {needed[0]} prompt and {needed[1]} completion tokens"):
        pack(batch, places=(needed[0], needed[1] - 1))
