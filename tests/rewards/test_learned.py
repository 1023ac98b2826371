"""A reward model on texts and on token ids, and ids that are not its own."""

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from pjpo.rewards.learned import RewardModel
from pjpo.tokenizer import Tokenizer
from pjpo.types import Batch
from tests import tiny

WORDS = ["<end>", "hello", "bad", "good", "words"]


def make_tokenizer(words=WORDS):
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(backend, eos_id=0)


@pytest.fixture
def model():
    policy = tiny.make_policy(num_layers=1, scalar_head=True)
    params = dict(tiny.make_params(tiny.make_policy(num_layers=1)))
    params["scalar_head"] = {"kernel": jax.random.normal(jax.random.key(0), (12,))}
    return RewardModel(policy, params, make_tokenizer())


def test_texts_are_scored_as_their_tokens(model):
    batch = Batch.of(
        prompt_tokens=np.array([[1, 4], [1, 0]], np.int32),
        prompt_mask=np.array([[True, True], [True, False]]),
        completion_tokens=np.array([[[3, 0, 0], [2, 4, 0]], [[4, 0, 0], [3, 3, 0]]], np.int32),
        completion_mask=np.array([[[True, True, False], [True] * 3], [[True, True, False], [True] * 3]]),
    )
    expected = model.scores(batch, make_tokenizer())
    found = model.reward(["hello words", "hello"], [["good", "bad words"], ["words", "good good"]])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len(np.unique(np.round(expected, 4))) == 4


def test_ids_of_another_tokenizer_are_refused(model):
    batch = Batch.of(completion_tokens=np.ones((1, 1, 2), np.int32), prompt_tokens=np.ones((1, 1), np.int32))
    other = make_tokenizer([*WORDS, "more"])
    with pytest.raises(ValueError, match=r"tokenizer differs .* \(5 and 6 ids\).* pass texts to `reward` instead"):
        model.scores(batch, other)


def test_ragged_numbers_of_completions_are_refused(model):
    with pytest.raises(ValueError, match=r"2 prompts with 2 rows of \[1, 2\] completions"):
        model.reward(["hello", "hello"], [["good"], ["good", "bad"]])
