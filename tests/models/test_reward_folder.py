"""Reward models as folders: bit by bit there and back, a folder of `transformers`, and heads that are not wanted."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pjpo.models import load, lora, save
from pjpo.rewards.learned import RewardModel
from pjpo.tokenizer import Tokenizer
from pjpo.types import Batch
from tests import tiny
from tests.models.test_families import DATA, folder_of
from tests.models.test_save import same, tensors_of


def reward_model_of(family, folder, **settings):
    """A language model with a scalar head that is no longer at its start."""
    folder.mkdir()
    policy, params, tokenizer = load(folder_of(family, folder), scalar_head=True, **settings)
    drawn = np.random.default_rng(0).normal(size=policy.config.model_dim).astype(policy.config.param_dtype)
    return policy, params | {"scalar_head": {"kernel": jax.numpy.asarray(drawn)}}, tokenizer


def scored(policy, params):
    return policy.scores(params, tiny.ragged(np.random.default_rng(1), vocab_size=64))


@pytest.mark.parametrize(
    ("family", "scan_layers", "dtype"),
    [("llama3", False, "float32"), ("qwen2", True, "float32"), ("gemma3", False, "bfloat16")],
)
def test_load_save_load_gives_the_same_bits(family, scan_layers, dtype, tmp_path):
    settings = {"scan_layers": scan_layers, "param_dtype": dtype}
    policy, params, tokenizer = reward_model_of(family, tmp_path / "there", **settings)
    here = save(tmp_path / "here", policy, params, tokenizer)
    again, kept, _ = load(here, **settings)
    assert again.config == dataclasses.replace(policy.config, language_head=False)
    without_head = {name: tree for name, tree in params["params"].items() if name != "head"}
    same(kept, params | {"params": without_head})
    np.testing.assert_array_equal(scored(again, kept), scored(policy, params))
    once_more = save(tmp_path / "once more", again, kept, tokenizer)
    same(tensors_of(once_more), tensors_of(here))
    config = json.loads((here / "config.json").read_text())
    (architecture,) = config["architectures"]
    assert architecture.endswith("ForSequenceClassification")
    assert list(config["id2label"]) == ["0"]
    assert tensors_of(here)["score.weight"].shape == (1, policy.config.model_dim)
    assert "lm_head.weight" not in tensors_of(here)
    language_model = {name: tree for name, tree in params.items() if name != "scalar_head"}
    same(load(save(tmp_path / "language", policy, language_model, tokenizer), **settings)[1], language_model)


def test_adapters_are_folded_in(tmp_path):
    policy, params, tokenizer = reward_model_of("llama2", tmp_path / "there", lora=lora.Config(rank=2))
    drawn = jax.tree.map(lambda x: 0.2 * np.random.default_rng(2).normal(size=x.shape), params["lora"])
    params |= {"lora": jax.tree.map(lambda x: jax.numpy.asarray(x, "float32"), drawn)}
    with pytest.raises(ValueError, match="adapters alone has no place for the scalar head; save them merged"):
        save(tmp_path / "alone", policy, params, tokenizer, adapters="alone")
    again, kept, _ = load(save(tmp_path / "here", policy, params, tokenizer))
    np.testing.assert_allclose(scored(again, kept), scored(policy, params), atol=2e-5)


def test_scores_of_transformers(tmp_path):
    """`make.py` left the folder and the scores of whole rows."""
    policy, params, _ = load(folder_of("reward", tmp_path))
    expected = load_file(DATA / "reward" / "expected.safetensors")
    rows = expected["tokens"].astype(np.int32)
    batch = Batch.of(prompt_tokens=rows[:, :4], completion_tokens=rows[:, None, 4:])
    np.testing.assert_allclose(policy.scores(params, batch)[:, 0], expected["scores"], rtol=0, atol=2e-5)


def test_a_head_that_is_not_there_is_refused(tmp_path):
    policy, params, tokenizer = reward_model_of("llama2", tmp_path / "there")
    folder = save(tmp_path / "here", policy, params, tokenizer)
    with pytest.raises(ValueError, match=r"is a reward model .*where a language model is expected; give the model"):
        load(folder, scalar_head=False)
    again, kept, _ = load(folder)
    with pytest.raises(ValueError, match="lack their 'scalar_head', and there is no language head"):
        save(tmp_path / "headless", again, {"params": kept["params"]}, tokenizer)
    batch = tiny.ragged(np.random.default_rng(1), vocab_size=64)
    with pytest.raises(ValueError, match="reward model, without a language head: it scores completions"):
        again.logps(kept, batch)
    with pytest.raises(ValueError, match="is a language model where a reward model is expected: it has no score"):
        RewardModel.load(tmp_path / "there")
    rewards = RewardModel.load(folder)
    np.testing.assert_array_equal(rewards.scores(batch, tokenizer), policy.scores(params, batch))


def test_a_head_of_several_labels_is_refused(tmp_path):
    policy, params, tokenizer = reward_model_of("llama2", tmp_path / "there")
    folder = save(tmp_path / "here", policy, params, tokenizer)
    tensors = tensors_of(folder)
    save_file(tensors | {"score.weight": np.zeros((3, 16), np.float32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"'score.weight' has shape \(3, 16\), the model's config asks for \(1, 16\)"):
        load(folder)


def test_padding_that_ends_turns_is_left_out(tmp_path):
    """`transformers` looks for the last token that is no padding: it would stop before the end token."""
    policy, params, tokenizer = reward_model_of("llama2", tmp_path / "there")
    ends = Tokenizer(tokenizer._special, eos_id=5, stop_ids=(5,), special_tokens={"pad_token": "f", "eos_token": "f"})
    for name, given, padding in (("same", ends, None), ("other", tokenizer, tokenizer.special_id("pad_token"))):
        folder = save(tmp_path / name, policy, params, given)
        assert json.loads((folder / "config.json").read_text())["pad_token_id"] == padding
    assert load(tmp_path / "same")[2].special_tokens["pad_token"] == "f"
