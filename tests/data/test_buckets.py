import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjpo.data.batches import Batches
from pjpo.data.buckets import Buckets, check_room, collate, pad
from tests.data.fakes import example


def test_collate_pads_on_the_right():
    batch = collate([example(2, 1, 3), example(1, 2, 0, start=5)], Buckets((2, 4), (2, 4)))
    np.testing.assert_array_equal(batch.prompt_tokens, [[1, 2], [5, 0]])
    np.testing.assert_array_equal(batch.prompt_mask, [[True, True], [True, False]])
    np.testing.assert_array_equal(batch.completion_tokens, [[[1, 0, 0, 0], [1, 2, 3, 0]], [[5, 6, 0, 0], [0] * 4]])
    lengths = [[1, 3], [2, 0]]
    np.testing.assert_array_equal(batch.completion_mask, np.arange(4) < np.array(lengths)[..., None])
    np.testing.assert_array_equal(batch.loss_mask, batch.completion_mask)
    assert (batch.prompt_tokens.dtype, batch.completion_tokens.dtype) == (np.int32, np.int32)


def test_prompts_alone_have_no_completions():
    batch = collate([example(3), example(2)], Buckets.of([example(3), example(2)]))
    assert batch.prompt_tokens.shape == (2, 3)
    assert batch.completion_tokens.shape == (2, 0, 0)


def test_sizes_are_halvings_of_the_longest():
    examples = [example(100, 3, 41), example(10, 2, 9)]
    assert Buckets.of(examples) == Buckets((25, 50, 100), (11, 21, 41))
    assert Buckets.of(examples, num_sizes=1) == Buckets((100,), (41,))
    assert Buckets.of([example(8, 32, 32)] * 2) == Buckets((8,), (32,))  # one length, one shape, no padding
    assert Buckets.of(examples).fit(26, 11) == (50, 11)


def test_what_fits_no_bucket_is_refused():
    with pytest.raises(
        ValueError, match=r"a prompt of 9 tokens is longer than the largest bucket, 8.*max_prompt_tokens"
    ):
        collate([example(9, 1)], Buckets((4, 8), (4,)))
    with pytest.raises(ValueError, match=r"a completion of 5 tokens.*max_completion_tokens"):
        collate([example(1, 5)], Buckets((4, 8), (4,)))
    with pytest.raises(ValueError, match=r"one number of completions: x:1 has 2, x:2 has 1"):
        collate([example(1, 1, 1, id="x:1"), example(1, 1, id="x:2")], Buckets((4,), (4,)))
    with pytest.raises(ValueError, match="no examples"):
        collate([], Buckets((4,), (4,)))
    with pytest.raises(ValueError, match=r"at least one example and size, got 0"):
        Buckets.of([])


def test_rows_that_cannot_fit_the_model_are_refused_by_name_alone_and_in_one_batch():
    rows = [example(10, 1, 90, id="x:1"), example(95, 5, 2, id="x:2"), example(3, 3, id="x:3")]
    check_room(rows, 185)
    with pytest.raises(ValueError, match=r"x:1 has 10 .* and 90 of completion, .* the model's 99 positions; set"):
        check_room(rows, 99)
    with pytest.raises(ValueError, match=r"prompt of x:2, 95 tokens, and the completion of x:1, 90, .* 184 pos"):
        check_room(rows, 184)
    check_room([example(10, 90, 2)], 100)
    with pytest.raises(ValueError, match=r"has 60 .* and 30 of completion"):  # the longest in all, not of completion
        check_room([example(60, 30, 1), example(10, 50, 1)], 80)


LENGTHS = st.one_of(st.integers(1, 9), st.integers(1, 4000), st.sampled_from([1, 64, 65, 8192]))


def shape(batch):
    return batch.prompt_tokens.shape[1], batch.completion_tokens.shape[2]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(LENGTHS, LENGTHS, LENGTHS), min_size=4, max_size=60), st.integers(1, 4), st.integers(0, 9))
def test_shapes_are_bounded_for_any_lengths(lengths, num_sizes, seed):
    examples = [example(*row) for row in lengths]
    buckets = Buckets.of(examples, num_sizes=num_sizes)
    assert len(buckets.shapes) <= num_sizes**2
    for window in (1, 3):
        batches = Batches(examples, batch_size=4, seed=seed, buckets=buckets, num_epochs=2, window=window)
        assert {shape(batch) for batch in batches} <= set(buckets.shapes)


def test_compilations_are_as_many_as_shapes():
    examples = [example(*row) for row in np.random.default_rng(0).integers(1, [300, 90, 60], (400, 3))]
    buckets = Buckets.of(examples)

    traced = []

    @jax.jit
    def step(batch):
        traced.append(shape(batch))
        return batch.prompt_mask.sum() + batch.completion_mask.sum()

    batches = Batches(examples, batch_size=4, seed=0, buckets=buckets, num_epochs=2)
    seen = {shape(batch) for batch in batches if step(batch) > 0}
    assert len(traced) == len(seen)
    assert 4 <= len(seen) <= len(buckets.shapes) == 9


def test_masks_labels_and_sources_reach_the_batch():
    masks = (np.array([True, False]), np.array([False]))
    first = dataclasses.replace(example(1, 2, 1), loss_masks=masks, labels=(True, False), source=1)
    second = dataclasses.replace(example(1, 1, 2), labels=(False, True), source=0)
    batch = pad([first, second], (1, 2), 3)
    np.testing.assert_array_equal(batch.loss_mask, [[[1, 0], [0, 0]], [[1, 0], [1, 1]], [[0, 0], [0, 0]]])
    np.testing.assert_array_equal(batch.completion_mask[0], [[1, 1], [1, 0]])
    np.testing.assert_array_equal(batch.labels, [[True, False], [False, True], [False, False]])
    np.testing.assert_array_equal(batch.sources, [1, 0, 0])
    plain = pad([example(1, 2, 1)], (1, 2), 1)
    assert plain.labels is plain.sources is None
    with pytest.raises(ValueError, match="only one of x:1 and rows:1 has labels; do not mix data of two kinds"):
        pad([dataclasses.replace(first, id="x:1"), example(1, 1, 2)], (1, 2), 2)
