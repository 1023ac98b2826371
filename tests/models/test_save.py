"""What is saved loads as the same bits, holds the tensors that were read, and is never half a folder."""

import json

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from pjpo.models import load, lora, save
from pjpo.tokenizer import Tokenizer
from tests import tiny
from tests.models.test_families import WITHOUT as FAMILIES
from tests.models.test_families import folder_of

LORA = lora.Config(rank=2, alpha=6.0)


def tensors_of(folder, pattern="model*.safetensors"):
    return {name: value for file in folder.glob(pattern) for name, value in load_file(file).items()}


def same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def with_adapters(folder, **settings):
    """A model whose adapters are no longer at their start."""
    policy, params, tokenizer = load(folder, lora=LORA, **settings)
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype(x.dtype), params["lora"])
    return policy, params | {"lora": drawn}, tokenizer


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_load_save_load_gives_the_same_bits(family, scan_layers, tmp_path):
    (tmp_path / "there").mkdir()
    there = folder_of(family, tmp_path / "there")
    policy, params, tokenizer = load(there, scan_layers=scan_layers)
    here = save(tmp_path / "here", policy, params, tokenizer)
    again = load(here, scan_layers=scan_layers)
    assert again[0] == policy
    same(again[1], params)
    assert again[2].fingerprint == tokenizer.fingerprint
    stored = tensors_of(there)
    same(tensors_of(here), {name: value.astype(np.float32) for name, value in stored.items()})
    half, weights, _ = load(there, scan_layers=scan_layers, param_dtype="bfloat16")
    same(tensors_of(save(tmp_path / "half", half, weights, tokenizer)), stored)


def test_packaged_models_become_folders(tmp_path):
    policy, params, tokenizer = load("glassllm-en")
    again = load(save(tmp_path / "glass", policy, params, tokenizer))
    assert again[0] == policy
    same(again[1], params)
    assert again[2].fingerprint == tokenizer.fingerprint


def test_large_models_are_split_and_indexed(tmp_path):
    (tmp_path / "there").mkdir()
    policy, params, tokenizer = load(folder_of("qwen3", tmp_path / "there"))
    here = save(tmp_path / "here", policy, params, tokenizer, max_shard_bytes=5000)
    same(load(here)[1], params)
    index = json.loads((here / "model.safetensors.index.json").read_text())
    files = sorted(here.glob("model-*.safetensors"))
    assert [file.name for file in files] == sorted(set(index["weight_map"].values()))
    assert files[-1].name == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for file in files:
        held = load_file(file)
        assert sum(value.nbytes for value in held.values()) <= 5000 or len(held) == 1
        assert all(index["weight_map"][name] == file.name for name in held)


@pytest.mark.parametrize(("family", "scan_layers"), [("llama2", False), ("qwen2", True), ("gemma3", False)])
def test_adapters_alone_and_folded_in(family, scan_layers, tmp_path):
    (tmp_path / "there").mkdir()
    there = folder_of(family, tmp_path / "there")
    policy, params, tokenizer = with_adapters(there, scan_layers=scan_layers)
    alone = save(tmp_path / "alone", policy, params, tokenizer, adapters="alone", base=str(there))
    merged = tensors_of(save(tmp_path / "merged", policy, params, tokenizer))
    about = json.loads((alone / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["base_model_name_or_path"]) == (2, 6.0, str(there))
    assert {*about["target_modules"]} == {f"{name}_proj" for name in lora.PROJECTIONS}
    assert not list(alone.glob("model*"))
    held = tensors_of(alone, "adapter_model.safetensors")
    assert len(held) == 2 * len(lora.PROJECTIONS) * policy.config.num_layers
    for name, value in tensors_of(there).items():  # W + alpha / rank B A, in PEFT's own layout
        module = "base_model.model." + name.removesuffix(".weight")
        expected = value.astype(np.float32)
        if f"{module}.lora_A.weight" in held:
            expected = expected + 3 * held.pop(f"{module}.lora_B.weight") @ held.pop(f"{module}.lora_A.weight")
        np.testing.assert_allclose(merged[name], expected, rtol=1e-6, atol=1e-6)
    assert not held

    batch = tiny.ragged(np.random.default_rng(1), vocab_size=64)
    plain, weights, _ = load(tmp_path / "merged", scan_layers=scan_layers)
    np.testing.assert_allclose(plain.logps(weights, batch), policy.logps(params, batch), atol=2e-5)


def test_what_ends_a_turn(tmp_path):
    (tmp_path / "there").mkdir()
    policy, params, tokenizer = load(folder_of("llama2", tmp_path / "there"))
    ends = Tokenizer(
        tokenizer._special,
        eos_id=5,
        stop_ids=(2, 5),
        chat_template="{{ bos_token }}",
        special_tokens={"bos_token": "a", "pad_token": "b", "eos_token": "f"},
    )
    here = save(tmp_path / "here", policy, params, ends)
    generation = json.loads((here / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": [5, 2], "pad_token_id": 1}
    assert (here / "chat_template.jinja").read_text() == "{{ bos_token }}"
    again = load(here)[2]
    assert (again.eos_id, again.stop_ids, again.chat_template) == (5, (2, 5), "{{ bos_token }}")
    assert again.special_tokens == ends.special_tokens


@pytest.fixture
def model(tmp_path):
    (tmp_path / "there").mkdir()
    return load(folder_of("llama2", tmp_path / "there"))


def test_nothing_is_written_over(model, tmp_path):
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "thesis.tex").write_text("mine")
    file.write_text("mine")
    for path in (full, file):
        with pytest.raises(
            FileExistsError, match=rf"{path.name} is not empty, and nothing is written over; choose ano"
        ):
            save(path, *model)
    assert [path.name for path in full.iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", *model)


def test_all_or_nothing(model, tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Tokenizer, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path / "deep" / "here", *model)
    assert not list((tmp_path / "deep").iterdir())


def test_what_appears_meanwhile_is_kept(model, tmp_path, monkeypatch):
    def slow(*_, **__):
        (tmp_path / "here").mkdir()
        (tmp_path / "here" / "thesis.tex").write_text("mine")

    monkeypatch.setattr(Tokenizer, "save", slow)
    with pytest.raises(FileExistsError, match="here is not empty, and nothing is written over"):
        save(tmp_path / "here", *model)
    assert {path.name for path in tmp_path.iterdir()} == {"there", "here"}
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["thesis.tex"]


def test_what_transformers_asks_of_the_files(model, tmp_path):
    folder = save(tmp_path / "here", *model)
    with safe_open(folder / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    tokens = json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"]
    assert tokens == model[0].config.max_positions


def test_bfloat16_weights_take_their_adapters_in_float32(model, tmp_path):
    policy, params, tokenizer = with_adapters(tmp_path / "there", param_dtype="bfloat16")
    merged = tensors_of(save(tmp_path / "merged", policy, params, tokenizer))["model.layers.0.mlp.down_proj.weight"]
    a, b = (np.asarray(params["lora"]["layers_0"]["down_adapter"][leaf]) for leaf in "ab")
    weight = np.asarray(params["params"]["layers_0"]["down"]["kernel"])
    np.testing.assert_array_equal(merged, (weight.astype(np.float32) + 3 * (a @ b)).astype(weight.dtype).T)


def test_adapters_of_another_policy_are_refused(model, tmp_path):
    _, params, tokenizer = with_adapters(tmp_path / "there")
    with pytest.raises(ValueError, match="the parameters hold adapters, but the policy has none; give the policy"):
        save(tmp_path / "here", model[0], params, tokenizer)
    assert not (tmp_path / "here").exists()


def test_adapters_alone_need_adapters(model, tmp_path):
    with pytest.raises(ValueError, match=r"there are no adapters to save alone.*save them merged"):
        save(tmp_path / "here", *model, adapters="alone")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"qkv_bias": True, "qk_norm": True},
            "no family has .*qk_norm=True, qkv_bias=True; known: llama, mistral, qwen",
        ),
        ({"logit_softcap": 30.0}, "a 'llama' model of transformers cannot have logit_softcap = 30.0"),
        ({"sliding_window": 8, "global_layers": (0,)}, r"a 'mistral' model of .* cannot have global_layers = \(0,\)"),
    ],
)
def test_models_that_no_family_is(model, settings, message, tmp_path):
    policy = tiny.make_policy(**settings)
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "here", policy, tiny.make_params(policy), model[2])
    assert not (tmp_path / "here").exists()
