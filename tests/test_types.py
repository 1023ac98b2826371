"""`Batch.of`: what it fills in, what it takes, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjpo.packing import pack
from pjpo.types import CHOSEN, REJECTED, TARGET, Batch

TOKENS = np.arange(12, dtype=np.int32).reshape(2, 2, 3)
PROMPTS = np.arange(8, dtype=np.int32).reshape(2, 4)


def test_pairs_are_chosen_then_rejected_then_what_to_imitate():
    # Of every array of pairs that anyone stored: a change would turn them round without a word.
    assert (CHOSEN, REJECTED, TARGET) == (0, 1, 2)


def test_the_number_of_prompt_places_is_known_while_tracing():
    packed = pack(Batch.of(completion_tokens=TOKENS, prompt_tokens=PROMPTS), num_groups=1)
    assert jax.jit(lambda batch: np.zeros(batch.packing.num_prompt_places))(packed).size >= PROMPTS.size


def test_what_is_left_out_is_filled_in():
    batch = Batch.of(completion_tokens=TOKENS.reshape(3, 2, 2))
    assert batch.prompt_tokens.shape == batch.prompt_mask.shape == (3, 0)
    assert batch.completion_mask.all()
    assert batch.loss_mask is batch.completion_mask
    assert batch.rewards is None
    mask = TOKENS > 3
    batch = Batch.of(completion_tokens=TOKENS, completion_mask=mask, prompt_tokens=PROMPTS)
    assert batch.loss_mask is mask
    assert batch.prompt_mask.all()
    assert batch.prompt_mask.shape == (2, 4)


def test_nested_lists_become_arrays_of_the_field_s_dtype():
    batch = Batch.of(
        completion_tokens=[[[5, 6], [7, 0]]],
        completion_mask=[[[1, 1], [1, 0]]],
        prompt_tokens=[(1, 2)],
        rewards=[[0.5, -1.0]],
        labels=[[True, False]],
    )
    dtypes = {"completion_tokens": "int32", "completion_mask": "bool", "prompt_tokens": "int32", "prompt_mask": "bool"}
    for name, dtype in (dtypes | {"loss_mask": "bool", "rewards": "float32", "labels": "bool"}).items():
        assert getattr(batch, name).dtype == dtype, name
    np.testing.assert_array_equal(batch.completion_tokens, [[[5, 6], [7, 0]]])
    np.testing.assert_array_equal(batch.loss_mask, [[[True, True], [True, False]]])
    np.testing.assert_array_equal(batch.rewards, [[0.5, -1]])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"completion_tokens": [[[1, 2], [3]]]}, "completion_tokens makes no array .*pad lists to one length"),
        ({"completion_tokens": [[["a"]]]}, "completion_tokens makes no array"),
        ({"completion_tokens": [1, 2]}, r"completion_tokens must be \[B, N, T\], got shape \(2,\)"),
        ({"prompt_tokens": [1, 2]}, r"prompt_tokens must be \[B, P\], got shape \(2,\)"),
        ({"prompt_mask": PROMPTS > 0}, "prompt_mask without prompt_tokens"),
        ({"prompt_tokens": PROMPTS[:1]}, r"prompt_tokens has shape \(1, 4\), allowed: \(2, 4\)"),
        ({"prompt_tokens": PROMPTS, "prompt_mask": PROMPTS[:, :2] > 0}, r"prompt_mask has shape \(2, 2\)"),
        ({"completion_mask": TOKENS[:, :1] > 0}, r"completion_mask has shape \(2, 1, 3\), allowed: \(2, 2, 3\)"),
        ({"rewards": [1.0, 2.0]}, r"rewards has shape \(2,\), allowed: \(2, 2, 3\) or \(2, 2\)"),
        ({"sources": np.zeros((2, 2), int)}, r"sources has shape \(2, 2\), allowed: \(2,\)"),
        ({"old_logps": np.zeros((2, 2))}, r"old_logps has shape \(2, 2\), allowed: \(2, 2, 3\)"),
        ({"completion_tokens": TOKENS + 0.5}, r"completion_tokens must be token ids, whole numbers, got 0\.5"),
        ({"completion_tokens": [[[1, 2.5]]]}, r"completion_tokens must be token ids, whole numbers, got 2\.5"),
        ({"prompt_tokens": np.full((2, 4), np.nan)}, "prompt_tokens must be token ids, whole numbers, got nan"),
        ({"completion_tokens": [[[1, 2**40]]]}, f"completion_tokens must be token ids, whole numbers, got {2**40}"),
        ({"completion_mask": jnp.ones(TOKENS.shape) / 2}, r"completion_mask must be 0 or 1, got 0\.5"),
        ({"loss_mask": np.where(TOKENS > 3, 0, -np.inf)}, "loss_mask must be 0 or 1, got -inf"),
        (
            {"completions_mask": TOKENS > 3},
            r"no field 'completions_mask'; did you mean 'completion_mask'\? Known: prom",
        ),
        ({"temperature": 1.0}, "a batch has no field 'temperature'. Known: prompt_tokens, prompt_mask, comp"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        Batch.of(**{"completion_tokens": TOKENS} | given)


def test_token_ids_of_another_type_become_int32():
    for tokens in (TOKENS.astype(float), jnp.asarray(TOKENS, jnp.float32), TOKENS.astype(np.int64), TOKENS.tolist()):
        batch = Batch.of(completion_tokens=tokens)
        assert batch.completion_tokens.dtype == np.int32
        np.testing.assert_array_equal(batch.completion_tokens, TOKENS)


def test_lists_keep_float64_where_jax_does():
    with jax.enable_x64(True):
        batch = Batch.of(completion_tokens=[[[1]]], old_logps=[[[-0.1]]], labels=[[1]])
    assert batch.old_logps.dtype == np.float64
    assert batch.old_logps[0, 0, 0] == -0.1


def test_masks_of_numbers_become_booleans():
    batch = Batch.of(completion_tokens=TOKENS, completion_mask=np.ones(TOKENS.shape), loss_mask=jnp.ones(TOKENS.shape))
    assert batch.completion_mask.dtype == batch.loss_mask.dtype == bool
