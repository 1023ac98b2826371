import functools

import jax
import numpy as np
import pytest

from pjpo import models, rollouts
from pjpo.models.decoder import Config
from pjpo.models.policy import Policy
from pjpo.sampling import Sampling
from pjpo.types import Batch

POLICY = Policy(
    Config(
        vocab_size=32,
        num_layers=1,
        model_dim=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=16,
        rope_theta=1e4,
        norm_eps=1e-6,
        tied_head=True,
        max_positions=32,
    )
)
PROMPTS = [np.array(prompt, np.int32) for prompt in ([1, 2, 3], [4], [5, 6], [7, 8, 9], [1, 2, 3])]
SAMPLING = Sampling(num_completions=3, max_completion_tokens=6, stop_tokens=(0, 1, 2, 3))


@functools.cache
def params():
    return POLICY.init(jax.random.key(0))


def sample(prompts=PROMPTS, batch_size=2, key=0):
    return rollouts.rollouts(POLICY, params(), prompts, jax.random.key(key), SAMPLING, batch_size=batch_size)


def test_samples_do_not_depend_on_the_batch_size():
    batches = [sample(batch_size=size) for size in (2, 64)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *batches)
    assert batches[0].completion_tokens.shape == (5, 3, 6)


def test_samples_differ_between_completions_equal_prompts_and_keys():
    tokens = sample().completion_tokens
    assert np.any(tokens[0, 0] != tokens[0, 1])
    assert np.any(tokens[0] != tokens[4])  # the same prompt in another place
    assert np.any(tokens != sample(key=1).completion_tokens)


def test_decodes_in_one_shape():
    shapes = []

    class Spy:
        def generate(self, params, prompts, key, sampling):
            shapes.append((prompts.tokens.shape, key.shape))
            return POLICY.generate(params, prompts, key, sampling)

    rollouts.rollouts(Spy(), params(), PROMPTS, jax.random.key(0), SAMPLING, batch_size=2)
    assert shapes == [((2, 3), (2, 3))] * 3


def test_log_probs_are_those_of_teacher_forcing():
    batch = sample()
    np.testing.assert_allclose(batch.old_logps, POLICY.logps(params(), batch), atol=1e-5)
    assert batch.completion_mask.sum() < batch.completion_mask.size  # some have stopped early


def test_prompts_keep_their_tokens_and_places():
    batch = sample()
    for prompt, tokens, mask in zip(PROMPTS, batch.prompt_tokens, batch.prompt_mask, strict=True):
        np.testing.assert_array_equal(tokens[mask], prompt)


def test_texts_are_prompt_and_completion_without_padding():
    class Letters:
        def decode(self, ids):
            return "".join(chr(97 + i) for i in ids)

    batch = sample()
    texts = rollouts.texts(batch, Letters())
    assert not batch.completion_mask.all()
    for b, prompt in enumerate(PROMPTS):
        for n in range(3):
            kept = batch.completion_tokens[b, n][: batch.completion_mask[b, n].sum()]
            assert texts[b][n] == "".join(chr(97 + i) for i in [*prompt, *kept])


def test_what_does_not_end_is_cut_off():
    tokens = np.array([[[7, 2, 0], [7, 8, 9], [2, 7, 2]], [[2, 7, 8], [9, 0, 0], [2, 0, 0]]])
    mask = np.array([[[1, 1, 0], [1, 1, 1], [1, 1, 1]], [[1, 1, 1], [1, 0, 0], [1, 0, 0]]], bool)
    batch = Batch.of(completion_tokens=tokens, completion_mask=mask)
    expected = [[False, True, False], [True, True, False]]
    np.testing.assert_array_equal(rollouts.truncated(batch, (2, 3)), expected)
    assert rollouts.truncated(batch, ()).all()


def test_a_prompt_that_is_longer_than_the_width_is_refused_by_its_row():
    tokens, mask = rollouts.pad([[1, 2], [3]], 3)
    np.testing.assert_array_equal(tokens, [[1, 2, 0], [3, 0, 0]])
    np.testing.assert_array_equal(mask, tokens > 0)
    with pytest.raises(ValueError, match="row 1 has 4 tokens, more than the width 3; shorten it"):
        rollouts.pad([[1, 2], [3, 4, 5, 6]], 3)


def test_no_prompts_are_refused():
    with pytest.raises(ValueError, match="no prompts"):
        sample([])


def test_stop_texts_are_one_token_that_means_them():
    _, _, tokenizer = models.load("glassllm-en")
    assert rollouts.stop_tokens(("\n", "<eos>"), tokenizer) == (3, 4)
    # All characters outside of the vocabulary share the id of <unk>, which would end completions at any of them.
    with pytest.raises(ValueError, match="stop '☃' has no token of its own: the tokenizer takes it for '⁇', id 1"):
        rollouts.stop_tokens(("\n", "☃"), tokenizer)
