"""KTO's mismatched completions: whose they are, where padding is, and what is refused."""

import dataclasses

import numpy as np
import pytest

from pjpo.experiment import completed
from pjpo.methods import dpo, kto
from pjpo.mismatched import mismatched
from pjpo.types import Batch


def make_batch(lengths=(2, 3, 0, 1), labels=(1, 0, 0, 1)):
    mask = np.arange(3)[None, None] < np.array(lengths)[:, None, None]
    tokens = np.where(mask, np.arange(len(lengths))[:, None, None] * 10 + np.arange(3)[None, None], 0)
    return Batch.of(
        completion_tokens=tokens.astype(np.int32),
        completion_mask=mask,
        prompt_tokens=np.ones((len(lengths), 2), np.int32),
        labels=np.array(labels)[:, None],
    )


def test_each_row_gets_the_completion_of_the_next_row_that_is_not_padding():
    batch = make_batch()
    found = mismatched(batch)
    for row, (own, other) in enumerate([(0, 1), (1, 3), (2, 2), (3, 0)]):
        np.testing.assert_array_equal(found.completion_tokens[row, 0], batch.completion_tokens[own, 0])
        np.testing.assert_array_equal(found.completion_tokens[row, 1], batch.completion_tokens[other, 0])
        np.testing.assert_array_equal(found.completion_mask[row, 1], batch.completion_mask[other, 0])
        np.testing.assert_array_equal(found.loss_mask[row, 1], batch.loss_mask[other, 0])
    np.testing.assert_array_equal(found.labels, [[True] * 2, [False] * 2, [False] * 2, [True] * 2])
    np.testing.assert_array_equal(found.prompt_tokens, batch.prompt_tokens)


def test_two_completions_are_enough():
    found = mismatched(make_batch((2, 0, 1), (1, 0, 1)))
    np.testing.assert_array_equal(found.completion_tokens[:, 1, 0], [20, 0, 0])  # the padding keeps itself


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (make_batch((2, 0)[:2], (1, 0)), "the batch has 1 completion.s.; it takes 2 or more"),
        (make_batch(labels=(1, 0, 2, 1)), "labels must be true .desirable. or false, got 2"),
        (dataclasses.replace(make_batch(), labels=None), "the batch has no labels"),
        (mismatched(make_batch()), "rows must hold one completion with its label, got 2; split a pair"),
        (dataclasses.replace(make_batch(), ref_logps=np.zeros((4, 1, 3))), "before the batch is packed or given ref"),
    ],
)
def test_what_kto_cannot_use_is_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        mismatched(batch)


def test_a_run_completes_batches_where_its_method_asks_for_it():
    batch = make_batch()
    assert completed(dpo.Config(), batch) is batch
    found = completed(kto.Config(), batch)
    np.testing.assert_array_equal(found.completion_tokens, mismatched(batch).completion_tokens)
