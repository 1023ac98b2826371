"""Hugging Face folders: against HF's own formulas in NumPy, over every layout of files, and every way to be wrong."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from pjpo.models import load
from tests.models import plain_llama, tiny_llama

TOKENS = np.array([5, 70, 1, 263, 70, 9, 140])


def same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"head_dim": 8}])
def test_logits_equal_hf_formulas(tmp_path, change):
    config = tiny_llama.CONFIG | change
    policy, params, tokenizer = load(tiny_llama.write_folder(tmp_path, config))
    ours = plain_llama.logits(policy.config, params, TOKENS[None])[0]
    np.testing.assert_allclose(ours, tiny_llama.logits(config, tiny_llama.tensors(config), TOKENS), atol=2e-5)
    assert policy.config.max_positions == 32
    assert tokenizer.eos_id == 1


def test_files_may_be_split_and_repeat_what_follows_from_others(tmp_path):
    config = tiny_llama.CONFIG | {"tie_word_embeddings": True}
    weights = tiny_llama.tensors(config)
    _, whole, _ = load(tiny_llama.write_folder(tmp_path, config))
    extra = {"lm_head.weight": weights["model.embed_tokens.weight"]}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    weights |= extra
    names = sorted(weights)
    parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: weights[name] for name in held}, tmp_path / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"holds model\.safetensors, and an index of other files; remove one"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    same(load(str(tmp_path))[1], whole)
    twice = {name: weights[name] for name in [*names[1::2], names[0]]}
    save_file(twice, tmp_path / "model-2-of-2.safetensors")
    with pytest.raises(ValueError, match=f"'{names[0]}' is in model-1-of-2.safetensors and in model-2-of-2"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_are_widened_exactly(tmp_path, dtype):
    weights = {name: value.astype(dtype) for name, value in tiny_llama.tensors().items()}
    _, params, _ = load(tiny_llama.write_folder(tmp_path, weights=weights))
    same(params["params"]["embed"]["table"], weights["model.embed_tokens.weight"].astype(np.float32))


@pytest.mark.parametrize(
    "rope",
    [{"rope_scaling": None}, {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}],
)
def test_plain_rope_in_either_spelling(tmp_path, rope):
    assert load(tiny_llama.write_folder(tmp_path, tiny_llama.CONFIG | rope))[0].config.rope_theta == 5000.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "phi3"}, r"config\.json: model_type 'phi3' is not supported, allowed: llama, mistral, qwen2, "),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported by this decoder, only 'silu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"sliding_window": 16}, "sliding_window = 16"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "the file does not say 'low_freq_factor'",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5000.0}},
            "RoPE scaling of type 'yarn' is not supported, allowed: default, linear, llama3",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}}, "beta_fast = 32 is not supported"),
        ({"rope_scaling": "linear"}, "about RoPE must be objects, got 'linear'"),
        ({"rope_parameters": {"full_attention": None}}, "about RoPE must be objects, got None"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a number within float32, got '2'"),
        ({"rope_scaling": {"type": ["linear"]}}, r"RoPE scaling of type \['linear'\] is not supported"),
        ({"num_attention_heads": "4"}, "num_attention_heads must be a whole number from 1 to 2147483647, got '4'"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers must be a whole number from 1 to 10000, got 1000000000000"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number within float32, got nan"),
        (
            {"tie_word_embeddings": 1.5},
            "tie_word_embeddings = 1.5 is not supported by .*, only False or True",
        ),
        ({"hidden_size": None}, r"config\.json: the file does not say 'hidden_size'"),
        # Weights that do not match: which tensor, both shapes, as they lie in the file.
        (
            {"intermediate_size": 24},
            r"'model\.layers\.0\.mlp\.down_proj\.weight' has shape \(12, 20\), the model's config asks for \(12, 24\)",
        ),
        ({"num_hidden_layers": 3}, r"missing 'model\.layers\.2\..* and 6 more, which the model's config asks for"),
        ({"num_hidden_layers": 1}, r"the decoder has no place for 'model\.layers\.1\..* and 6 more"),
        ({"vocab_size": 200}, "the tokenizer has 259 ids, the model only 200"),
    ],
)
def test_folders_that_the_decoder_does_not_fit(tmp_path, change, message):
    folder = tiny_llama.write_folder(tmp_path, tiny_llama.CONFIG | change, tiny_llama.tensors())
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_tensors_missing_left_over_or_of_integers(tmp_path):
    weights = tiny_llama.tensors()
    norm = weights.pop("model.norm.weight")
    tiny_llama.write_folder(tmp_path, weights=weights)
    with pytest.raises(ValueError, match=r"missing 'model\.norm\.weight', which the model's config asks for$"):
        load(tmp_path)
    bias = {"model.layers.0.self_attn.q_proj.bias": np.ones(24, np.float32)}
    save_file(weights | bias | {"model.norm.weight": norm}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no place for 'model\.layers\.0\.self_attn\.q_proj\.bias'"):
        load(tmp_path)
    save_file(weights | {"model.norm.weight": np.ones(12, np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' holds int8, allowed: floating point"):
        load(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_files_missing_or_damaged(tmp_path, file):
    path = tiny_llama.write_folder(tmp_path) / file
    whole = path.read_bytes()
    for size in (0, 5, 60, len(whole) - 3):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=file):
            load(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=file):
        load(tmp_path)
