"""GGUF files, written here as llama.cpp's converter writes them: the same numbers as from the Hugging Face folder."""

import gguf
import jax
import numpy as np
import pytest

from pjpo.models import load
from tests.models import tiny_llama

CONFIG = tiny_llama.CONFIG | {"vocab_size": len(tiny_llama.vocabulary())}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permute(weight, num_heads):
    """What llama.cpp's converter does to q and k."""
    split = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def write(path, *, architecture="llama", change=(), settings=()):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(32)
    writer.add_embedding_length(12)
    writer.add_feed_forward_length(20)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(6)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tiny_llama.vocabulary())
    writer.add_token_types([3, 3] + [1] * 257)
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(1)
    for name, value in settings:
        writer.add_key_value(name, *value)
    weights = tiny_llama.tensors(CONFIG) | dict(change)
    for name, value in weights.items():
        if "q_proj" in name or "k_proj" in name:
            value = permute(value, 4 if "q_proj" in name else 2)
        for hf, ours in NAMES.items():
            name = name.replace(hf, ours)
        if value.size:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [False, True])
def test_equals_the_hugging_face_folder(tmp_path, tied):
    weights = tiny_llama.tensors(CONFIG)
    if tied:
        del weights["lm_head.weight"]
    folder = tiny_llama.write_folder(tmp_path, CONFIG | {"tie_word_embeddings": tied}, weights)
    policy, params, tokenizer = load(folder)
    absent = {"lm_head.weight": np.zeros(0, np.float32)} if tied else {}
    from_gguf, same_params, same_tokenizer = load(write(tmp_path / "tiny.gguf", change=absent.items()))
    assert from_gguf == policy
    jax.tree.map(np.testing.assert_array_equal, same_params, params)
    assert (same_tokenizer.eos_id, same_tokenizer.stop_ids) == (tokenizer.eos_id, tokenizer.stop_ids) == (1, (0, 1))
    assert same_tokenizer.encode("hehe ½") == tokenizer.encode("hehe ½")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2' is not supported, only 'llama'"),
        (
            {"settings": [("llama.rope.scaling.type", ("linear", gguf.GGUFValueType.STRING))]},
            "llama.rope.scaling.type = 'linear' is not supported by this decoder, only 'none'",
        ),
        (
            {"settings": [("llama.expert_count", (8, gguf.GGUFValueType.UINT32))]},
            "llama.expert_count = 8 is not supported",
        ),
        ({"change": [("rope_freqs.weight", np.ones(3, np.float32))]}, r"no place for 'rope_freqs\.weight'"),
        (
            {"change": [("model.layers.1.mlp.down_proj.weight", np.ones((12, 24), np.float32))]},
            r"'blk\.1\.ffn_down\.weight' has shape \(12, 24\), the model's config asks for \(12, 20\)",
        ),
        ({"change": [("model.norm.weight", np.zeros(0, np.float32))]}, r"missing 'output_norm\.weight'"),
    ],
)
def test_files_that_the_decoder_does_not_fit(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "tiny.gguf", **options))


def test_other_vocabularies_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"'deepseek-llm' is not supported in a GGUF file, only 'gpt2' with one of sm"):
        load(
            write(
                tmp_path / "tiny.gguf", settings=[("tokenizer.ggml.pre", ("deepseek-llm", gguf.GGUFValueType.STRING))]
            )
        )


def test_cut_short_anywhere(tmp_path):
    path = write(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    for size in [0, 3, 20, *range(100, len(whole), 1999), len(whole) - 100]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"tiny\.gguf \({size:,} bytes\) is damaged or cut short, fetch it again"):
            load(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"tiny\.gguf"):
        load(path)
