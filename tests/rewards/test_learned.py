"""A reward model on texts and on token ids, and ids that are not its own."""

import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from pjpo import models as saved
from pjpo.data import preference
from pjpo.data.examples import Example
from pjpo.models import policy as policy_module
from pjpo.rewards import learned, normalise
from pjpo.rewards.learned import Normalisation, RewardModel
from pjpo.rewards.protocol import Rewards
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


@pytest.fixture
def folder(model, tmp_path):
    saved.save(tmp_path / "model", model.policy, model.params, model.tokenizer)
    return tmp_path / "model"


PROMPTS, COMPLETIONS = ["hello", "hello words", "bad"], ["good", "bad words", "words"]


def test_scores_are_normalised_by_what_is_stored_and_then_clipped(model, folder):
    raw = model.reward(PROMPTS, [[text] for text in COMPLETIONS])[:, 0].astype(np.float64)
    Normalisation.of(raw).save(folder)
    known = Normalisation.load(folder)
    assert known == Normalisation(mean=raw.mean(), std=raw.std(ddof=1), num_scores=3)
    expected = (raw - raw.mean()) / raw.std(ddof=1)
    settings = {"source": str(folder), "batch_size": 2}
    found = learned.Config(**settings, normalise=True)(completions=COMPLETIONS, prompts=PROMPTS)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    clip = float(np.sort(np.abs(expected))[1])
    clipped = learned.Config(**settings, normalise=True, clip=clip)(completions=COMPLETIONS, prompts=PROMPTS)
    np.testing.assert_allclose(clipped, np.clip(expected, -clip, clip), rtol=1e-4)
    assert max(map(abs, clipped)) == clip < max(map(abs, found))
    plain = learned.Config(**settings, normalise=False)(completions=COMPLETIONS, prompts=PROMPTS)
    np.testing.assert_allclose(plain, raw, rtol=1e-4)


def test_its_unit_is_that_of_your_pairs(model, folder, tmp_path):
    """As `python -m pjpo.rewards.normalise` makes it."""
    rows = [("hello", "good", "bad"), ("hello words", "words", "bad bad"), ("bad", "good good", "words bad")]
    text = "\n".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), row, strict=True))) for row in rows)
    (tmp_path / "pairs.jsonl").write_text(text)
    data = preference.Config(path=str(tmp_path / "pairs.jsonl"), num_held_out=1)
    found = normalise.normalise(folder, data, batch_size=2)
    prompts, *completions = zip(*rows, strict=True)
    expected = Normalisation.of(model.reward(prompts, list(zip(*completions, strict=True))))
    assert (found.mean, found.std) == pytest.approx((expected.mean, expected.std), rel=1e-4)
    assert Normalisation.load(folder) == found
    assert found.num_scores == 6


def test_what_was_sampled_is_scored_token_by_token_where_the_tokenizer_is_the_models_own(model, folder):
    """A prompt with a chat's marks, which its text does not show, and a completion that was cut off."""
    marked = np.array([0, 1, 4, 0], np.int32)  # <end>hello words<end>
    tokens, mask = np.array([[[3, 0], [2, 4]]], np.int32), np.array([[[True, True], [True, True]]])
    batch = Batch.of(
        prompt_tokens=marked[None], prompt_mask=np.ones((1, 4), bool), completion_tokens=tokens, completion_mask=mask
    )
    config = learned.Config(source=str(folder), normalise=False)
    rewards = Rewards(functions=(config,), weights=(1.0,))
    example = [Example(marked, (), {}, "a:1")]
    expected = model.scores(batch, model.tokenizer)
    np.testing.assert_allclose(rewards.of_samples(batch, example, make_tokenizer()).total, expected, atol=1e-5)
    decode = make_tokenizer().decode
    as_texts = model.reward([decode(marked)], [[decode(ids) for ids in tokens[0]]])
    assert np.abs(as_texts - expected).min() > 1e-3
    other = make_tokenizer([*WORDS, "more"])
    np.testing.assert_allclose(rewards.of_samples(batch, example, other).total, as_texts, atol=1e-5)


def test_what_fits_the_model_is_scored_whatever_it_is_padded_to(model):
    room = model.policy.config.max_positions
    prompts, completions = [[1] * (room - 5), [2, 3]], [[[4] * 5], [[4, 1]]]
    batch = model.padded(prompts, completions)
    assert batch.prompt_tokens.shape[1] + batch.completion_tokens.shape[-1] == room
    assert np.isfinite(model.scores(batch, model.tokenizer)).all()
    short = model.padded([[1]], [[[4] * (room - 1)]])
    assert (short.prompt_tokens.shape[1], short.completion_tokens.shape[-1]) == (1, room - 1)
    assert np.isfinite(model.scores(short, model.tokenizer)).all()


def test_a_warm_up_compiles_what_the_call_needs(folder, compiled):
    policy_module._values.clear_cache()  # of other tests, some of which have this shape
    config = learned.Config(source=str(folder), normalise=False, batch_size=5)
    config.warm_up(COMPLETIONS, prompts=PROMPTS)
    assert compiled.count("jit(_values)") == 1
    config(COMPLETIONS, prompts=PROMPTS)
    assert compiled.count("jit(_values)") == 1


def test_a_model_that_cannot_be_had_ends_the_run_before_it_starts(folder):
    rewards = Rewards(functions=(learned.Config(source=str(folder), normalise=True),), weights=(1.0,))
    with pytest.raises(
        FileNotFoundError, match=r"reward_normalisation.json is missing; make it .*pjpo.rewards.normalise"
    ):
        rewards.score(["hello"], [["good"]])
    with pytest.raises(ValueError, match="glassllm-en is a language model where a reward model is expected"):
        Rewards(functions=(learned.Config(source="glassllm-en", normalise=False),), weights=(1.0,)).check({})


@pytest.mark.parametrize("scores", [[1.0], [2.0, 2.0], [1.0, np.nan]])
def test_scores_that_give_no_unit_are_refused(scores):
    with pytest.raises(ValueError, match="needs a finite mean, a std > 0 and 2 or more scores"):
        Normalisation.of(np.array(scores))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="learned: clip must be > 0, or inf for none, got 0"):
        learned.Config(source="x", normalise=False, clip=0.0)
    with pytest.raises(ValueError, match="learned: batch_size must be >= 1, got 0"):
        learned.Config(source="x", normalise=False, batch_size=0)
