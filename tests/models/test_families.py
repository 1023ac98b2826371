"""Every family against `transformers`: its weights, its config.json, its float32 logits and greedy continuations."""

import dataclasses
import json
import pathlib
import pickle

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pjpo import layout, sharding
from pjpo.models import families, load
from pjpo.models.rope import Scaling
from pjpo.packing import pack
from pjpo.sampling import Sampling
from pjpo.types import Batch
from tests.models import tiny_llama

DATA = pathlib.Path(__file__).parents[1] / "data_files" / "families"
TOKENS = [*"abcdefg", "ab"]
BOUND = 2e-5  # nats a token
PROMPTS = (9, 4)  # tokens, as in make.py
# What a family has, and the setting that takes it away; one that made no difference would not have been tested.
WITHOUT = {
    "llama2": [{"rope_scaling": None}],
    "llama3": [{"rope_scaling": None}],
    "mistral": [{"sliding_window": None}],
    "qwen2": [{"sliding_window": None, "global_layers": ()}, {"global_layers": ()}],
    "qwen3": [{"norm_eps": 0.1}],
    "gemma2": [
        {"sliding_window": None, "global_layers": ()},
        {"global_layers": ()},
        {"attention_softcap": None},
        {"logit_softcap": None},
        {"query_scale": None},
        {"embed_scale": 1.0},
        {"activation": "silu"},
    ],
    "gemma3": [
        {"sliding_window": 64},
        {"global_layers": (0,)},
        {"rope_theta_local": None},
        {"rope_scaling": None},
        {"logit_softcap": None},
        {"query_scale": None},
    ],
}


def folder_of(family, tmp_path):
    """The stored folder with a tokenizer."""
    for file in (DATA / family).iterdir():
        (tmp_path / file.name).symlink_to(file)
    tiny_llama.write_tokenizer(tmp_path, TOKENS, [("a", "b")])
    return tmp_path


def reference(family):
    """The batch that the rows of `make.py` make up, log-probs of its tokens by `transformers`, greedy continuations."""
    expected = load_file(DATA / family / "expected.safetensors")
    rows, logits = expected["tokens"].astype(np.int32), expected["logits"].astype(np.float64)
    length = rows.shape[2]
    places = np.arange(length)[None, None]  # in a row
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    logps = np.take_along_axis(logps[:, :, :-1], rows[:, :, 1:, None], -1)[..., 0]
    logps = np.pad(logps, ((0, 0), (0, 0), (1, 0)))  # of the token at each place
    # Prompts end at one place, so that the shorter one is padded on its left.
    prompts, completions, scores = np.zeros((2, 9), np.int32), np.zeros((2, 2, 16), np.int32), np.zeros((2, 2, 16))
    for b, width in enumerate(PROMPTS):
        prompts[b, 9 - width :] = rows[b, 0, :width]
        completions[b, :, : length - width] = rows[b, :, width:]
        scores[b, :, : length - width] = logps[b, :, width:]
    batch = Batch.of(
        prompt_tokens=prompts,
        prompt_mask=np.arange(9)[None] >= 9 - np.array(PROMPTS)[:, None],
        completion_tokens=completions,
        completion_mask=np.broadcast_to(places[..., :16] < length - np.array(PROMPTS)[:, None, None], (2, 2, 16)),
    )
    return batch, scores, expected["greedy"]


@jax.jit(static_argnums=0)
def logps(policy, params, batch):
    return policy.logps(params, batch)


@pytest.mark.parametrize("family", WITHOUT)
def test_logps_equal_transformers(family, tmp_path):
    batch, expected, _ = reference(family)
    policy, params, _ = load(folder_of(family, tmp_path))
    found = logps(policy, params, pack(batch, num_groups=2, prompt_step=1, completion_step=1))
    np.testing.assert_allclose(found, expected, rtol=0, atol=BOUND)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow) if f in ("llama2", "llama3", "qwen2") else f for f in WITHOUT]
)
def test_scanned_layers_and_greedy_decoding_equal_transformers(family, tmp_path):
    batch, expected, greedy = reference(family)
    policy, params, _ = load(folder_of(family, tmp_path), scan_layers=True)
    np.testing.assert_allclose(logps(policy, params, batch), expected, rtol=0, atol=BOUND)
    sampling = Sampling(max_completion_tokens=greedy.shape[1], temperature=0.0)
    out = policy.generate(params, (batch.prompt_tokens, batch.prompt_mask), jax.random.key(0), sampling)
    np.testing.assert_array_equal(out.tokens[:, 0], greedy)
    decoded = Batch.of(
        prompt_tokens=batch.prompt_tokens, prompt_mask=batch.prompt_mask, completion_tokens=np.asarray(out.tokens)
    )
    np.testing.assert_allclose(out.logps, logps(policy, params, decoded), rtol=0, atol=BOUND)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_gemma_that_sees_images(prefix, tmp_path):
    policy, params, _ = load(folder_of("gemma3", tmp_path))
    text = json.loads((tmp_path / "config.json").read_text())
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"model_type": "siglip_vision_model"}}
    weights = load_file(tmp_path / "model.safetensors")
    weights = {name.replace("model.", prefix, 1): value for name, value in weights.items()}
    for name in ("vision_tower.vision_model.post_layernorm.bias", "multi_modal_projector.mm_input_projection_weight"):
        weights[f"{'model.' if prefix.startswith('model') else ''}{name}"] = np.zeros(3, np.float32)
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).unlink()
    (tmp_path / "config.json").write_text(json.dumps(whole))
    save_file(weights, tmp_path / "model.safetensors")
    same, same_params, _ = load(tmp_path)
    assert same == policy
    jax.tree.map(np.testing.assert_array_equal, same_params, params)
    save_file(weights | {"audio_tower.bias": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"the decoder has no place for 'audio_tower\.bias'"):
        load(tmp_path)


@jax.jit(static_argnums=(0, 1))
def logps_and_gradient(policy, mesh, params, batch):
    """Log-probs, and the gradient of their mean square."""
    with layout.on(mesh):
        found, pull_back = jax.vjp(lambda params: policy.logps(params, batch), params)
        return found, pull_back(2 * found / batch.completion_mask.sum())[0]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])  # biases; norms of queries and keys, windows, post-norms
def test_a_mesh_gives_the_numbers_of_one_device(family, tmp_path):
    batch, expected, _ = reference(family)
    batch, expected = jax.tree.map(lambda x: np.concatenate([x, x[::-1]]), (batch, expected))
    folder, mesh = folder_of(family, tmp_path), sharding.make_mesh(sharding.Config(data=2, fsdp=2, model=2))
    policy, params, _ = load(folder, scan_layers=True)
    _, spread, _ = load(folder, scan_layers=True, mesh=mesh)
    assert {x.sharding.num_devices for x in jax.tree.leaves(spread)} == {8}
    _, alone = logps_and_gradient(policy, None, params, batch)
    found, gradient = logps_and_gradient(policy, mesh, spread, sharding.place_batch(batch, mesh))
    np.testing.assert_allclose(found, expected, rtol=0, atol=BOUND)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(alone))
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * largest)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "change"), [(f, change) for f, changes in WITHOUT.items() for change in changes])
def test_what_sets_a_family_apart_makes_a_difference(family, change, tmp_path):
    batch, expected, _ = reference(family)
    policy, params, _ = load(folder_of(family, tmp_path))
    changed = dataclasses.replace(policy, config=dataclasses.replace(policy.config, **change))
    assert np.abs(logps(changed, params, batch) - expected).max() > 100 * BOUND


# The parts of published config.json files that decide something, as their authors wrote them.
PUBLISHED = {
    "Llama-3.2-1B": (
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "tie_word_embeddings": True,
            "max_position_embeddings": 131072,
            "attention_bias": False,
            "mlp_bias": False,
        },
        {"rope_scaling": Scaling(kind="llama3", factor=32.0), "rope_theta": 5e5, "tied_head": True},
    ),
    "Mistral-7B-v0.1": (
        {
            "model_type": "mistral",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "max_position_embeddings": 32768,
        },
        {"sliding_window": 4096, "global_layers": (), "head_dim": 128, "tied_head": False},
    ),
    "Qwen2.5-0.5B": (
        {
            "model_type": "qwen2",
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "rope_theta": 1000000.0,
            "use_sliding_window": False,
            "sliding_window": 32768,
            "max_window_layers": 24,
            "tie_word_embeddings": True,
            "max_position_embeddings": 32768,
        },
        {"qkv_bias": True, "head_dim": 64, "rope_theta": 1e6, "tied_head": True},
    ),
    "gemma-2-2b": (
        {
            "model_type": "gemma2",
            "vocab_size": 256000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "max_position_embeddings": 8192,
        },
        {
            "global_layers": tuple(range(1, 26, 2)),
            "sliding_window": 4096,
            "query_scale": 1 / 16,
            "attention_softcap": 50.0,
            "logit_softcap": 30.0,
            "embed_scale": 48.0,
            "activation": "gelu_tanh",
            "tied_head": True,
        },
    ),
    "gemma-3-4b": (
        {
            "model_type": "gemma3",
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {"model_type": "siglip_vision_model"},
        },
        {
            "vocab_size": 262208,
            "num_heads": 8,
            "num_kv_heads": 4,
            "head_dim": 256,
            "global_layers": (5, 11, 17, 23, 29),
            "sliding_window": 1024,
            "rope_theta": 1e6,
            "rope_theta_local": 1e4,
            "rope_scaling": Scaling(kind="linear", factor=8.0),
            "logit_softcap": None,
            "tied_head": True,
        },
    ),
    "gemma-3-1b": (
        {
            "model_type": "gemma3_text",
            "vocab_size": 262144,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "rope_theta": 1000000,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "query_pre_attn_scalar": 256,
            "max_position_embeddings": 32768,
        },
        {
            "global_layers": (5, 11, 17, 23),
            "sliding_window": 512,
            "rope_theta": 1e6,
            "rope_theta_local": 1e4,
            "attention_softcap": None,
            "qk_norm": True,
            "norm_plus_one": True,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name):
    stored, expected = PUBLISHED[name]
    settings = families.from_config_json(stored, pathlib.Path("config.json"))
    assert {key: settings.get(key) for key in expected} == expected
    assert settings.get("sliding_window") == expected.get("sliding_window")


def test_what_a_config_leaves_out_is_what_transformers_takes():
    whole = PUBLISHED["gemma-2-2b"][0]
    left_out = {"head_dim", "hidden_activation", "sliding_window", "query_pre_attn_scalar", "attn_logit_softcapping"}
    left_out |= {"final_logit_softcapping", "rope_theta"}
    short = {name: value for name, value in whole.items() if name not in left_out}
    path = pathlib.Path("config.json")
    assert families.from_config_json(short, path) == families.from_config_json(whole, path)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu' is not supported by this decoder, only"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supported"),
        ("gemma3", {"layer_types": ["full_attention"] * 2}, "layer_types must be .* for 3 layers, got"),
        ("gemma3", {"layer_types": ["chunked_attention"] * 3}, "layer_types must be 'sliding_attention' or 'full_att"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True is not supported"),
        ("mistral", {"model_type": "mixtral"}, "'mixtral' is not supported, allowed: llama, mistral, qwen2, qwen3, ge"),
        ("qwen2", {"model_type": "qwen3"}, "missing 'model.layers.0.self_attn.k_norm.weight'.*; left over are .*bias"),
        ("gemma2", {"model_type": "gemma3_text"}, "missing 'model.layers.0.self_attn.k_norm.weight'"),
        ("gemma3", {"head_dim": 4}, r"k_norm\.weight' has shape \(8,\), the model's config asks for \(4,\)"),
        ("qwen3", {"vocab_size": 5}, "the tokenizer has 8 ids, the model only 5"),
    ],
)
def test_folders_of_a_family_that_the_decoder_does_not_fit(family, change, message, tmp_path):
    folder = folder_of(family, tmp_path)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_an_index_and_its_shards(tmp_path):
    folder = folder_of("llama3", tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    (folder / "model.safetensors.index.json").unlink()

    def refused(index, kind, message):
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(kind, match=message):
            load(folder)

    for outside in ("../other.safetensors", str(folder / shards[0]), "sub/x.safetensors"):
        changed = {"weight_map": index["weight_map"] | {"lm_head.weight": outside}}
        refused(changed, ValueError, r"index\.json names '.*; allowed: files of its own folder, without a path")
    refused({"weight_map": ["model.safetensors"]}, ValueError, "index.json has no 'weight_map' from tensors to files")
    (folder / shards[1]).unlink()
    refused(index, FileNotFoundError, rf"{shards[1]} is missing; weights are read from safetensors files alone")


def test_pickles_are_refused_with_the_way_out(tmp_path):
    folder = folder_of("qwen3", tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin is a pickle.* is not read.* convert it.*save_pre"):
        load(folder)
