"""GGUF files, written here as llama.cpp's converter writes them: the same numbers as from the Hugging Face folder."""

import json

import gguf
import jax
import numpy as np
import pytest

from pjpo.models import gguf as gguf_reader
from pjpo.models import load
from pjpo.models.load import config as load_config
from tests.models import tiny_gguf, tiny_llama
from tests.models.test_families import BOUND, DATA, TOKENS, logps, reference

CONFIG = tiny_llama.CONFIG | {"vocab_size": len(tiny_llama.vocabulary())}


def write(folder, **options):
    """The tiny Llama, in both forms."""
    if not (folder / "config.json").exists():
        tiny_llama.write_folder(folder, CONFIG)
    return tiny_gguf.write(folder / "tiny.gguf", folder, tiny_llama.vocabulary(), ["h e"], **options)


@pytest.mark.parametrize("tied", [False, True])
def test_equals_the_hugging_face_folder(tmp_path, tied):
    weights = tiny_llama.tensors(CONFIG)
    if tied:
        del weights["lm_head.weight"]
    folder = tiny_llama.write_folder(tmp_path, CONFIG | {"tie_word_embeddings": tied}, weights)
    policy, params, tokenizer = load(folder)
    from_gguf, same_params, same_tokenizer = load(write(tmp_path))
    assert from_gguf == policy
    jax.tree.map(np.testing.assert_array_equal, same_params, params)
    assert (same_tokenizer.eos_id, same_tokenizer.stop_ids) == (tokenizer.eos_id, tokenizer.stop_ids) == (1, (0, 1))
    assert same_tokenizer.encode("hehe ½") == tokenizer.encode("hehe ½")


# What the folder says for the first test, as the file has no place for it, and settings that no file keeps: of the
# folder for that test, and given with the file in the next.
FAMILIES = {
    "llama2": ({}, {}),
    "llama3": ({"rope_theta": 5e5, "original_max_position_embeddings": 8192}, {}),
    "mistral": ({}, {"sliding_window": None}),
    "qwen2": ({}, {"sliding_window": None, "global_layers": ()}),
    "qwen3": ({}, {}),
    "gemma2": ({"query_pre_attn_scalar": 8}, {}),
    "gemma3": ({"query_pre_attn_scalar": 8}, {}),
}


def family_folder(folder, family, change):
    """The stored folder with a tokenizer and, where `change` says so, another config."""
    for file in (DATA / family).glob("model*"):
        (folder / file.name).symlink_to(file)
    config = json.loads((DATA / family / "config.json").read_text())
    for name, value in change.items():
        (config["rope_parameters"] if name in config["rope_parameters"] else config)[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    tiny_llama.write_tokenizer(folder, TOKENS, [("a", "b")])
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_their_folders(family, tmp_path):
    change, lost = FAMILIES[family]
    policy, params, _ = load(family_folder(tmp_path, family, change), **lost)
    from_gguf, same_params, _ = load(tiny_gguf.write(tmp_path / "tiny.gguf", tmp_path, TOKENS, ["a b"]))
    assert from_gguf == policy
    # Gemma's norms are stored plus 1, which costs the last bits of a float32.
    atol = 1.2e-7 if family.startswith("gemma") else 0
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), same_params, params)


# Settings that are given with the file, as it has no place for them. That leaves the window of Mistral and Gemma, soft
# caps, and the bases of RoPE to be read from it.
GIVEN = {
    "llama2": (),
    "llama3": ("rope_theta", "rope_scaling"),
    "mistral": (),
    "qwen2": ("sliding_window", "global_layers"),
    "qwen3": (),
    "gemma2": ("query_scale",),
    "gemma3": ("query_scale",),
}


@pytest.mark.parametrize("family", GIVEN)
def test_log_probs_equal_transformers(family, tmp_path):
    change, _ = FAMILIES[family]
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    whole.mkdir(), changed.mkdir()
    config = load_config(family_folder(whole, family, {}))
    window = ("llama.attention.sliding_window", (config.sliding_window, gguf.GGUFValueType.UINT32))
    path = tiny_gguf.write(
        tmp_path / "tiny.gguf",
        family_folder(changed, family, change),
        TOKENS,
        ["a b"],
        settings=[window] if family == "mistral" else [],
    )
    policy, params, _ = load(path, **{name: getattr(config, name) for name in GIVEN[family]})
    batch, expected, _ = reference(family)
    np.testing.assert_allclose(logps(policy, params, batch), expected, rtol=0, atol=BOUND)
    assert policy.config == config


def test_the_largest_gemmas_divide_scores_by_another_root(tmp_path):
    tiny_llama.write_folder(tmp_path, CONFIG)
    settings = {"gemma2": {"block_count": 46}, "gemma3": {"block_count": 62}}
    fields = {"head_count": 4, "layer_norm_rms_epsilon": 1e-6}
    fields = {f"attention.{name}": value for name, value in fields.items()} | {"attention.key_length": 128}
    fields |= {"embedding_length": 4608, "feed_forward_length": 8, "context_length": 8192, "vocab_size": 9}
    for architecture, change in settings.items():
        named = {f"{architecture}.{name}": value for name, value in (fields | change).items()}
        config = gguf_reader._config(tmp_path, architecture, named, True, None)
        assert config["query_scale"] == (4608 / 4) ** -0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"architecture": "phi3"},
            "architecture 'phi3' is not supported, allowed: llama, qwen2, qwen3, gemma2, gemma3",
        ),
        (
            {"settings": [("llama.rope.scaling.type", ("yarn", gguf.GGUFValueType.STRING))]},
            "llama.rope.scaling.type = 'yarn' is not supported by this decoder, only 'linear' or 'none'",
        ),
        (
            {"settings": [("llama.expert_count", (8, gguf.GGUFValueType.UINT32))]},
            "llama.expert_count = 8 is not supported",
        ),
        (
            {"settings": [("llama.attention.sliding_window", (-1, gguf.GGUFValueType.INT32))]},
            "llama.attention.sliding_window must be a whole number from 1 to 2147483647, got -1",
        ),
        ({"divisors": np.array([1, 2, 3], np.float32)}, r"rope_freqs\.weight holds another scaling than Llama 3's"),
        ({"divisors": np.ones(4, np.float32)}, r"rope_freqs\.weight holds another scaling than Llama 3's"),
        (
            {"change": [("model.layers.1.mlp.down_proj.weight", np.ones((12, 24), np.float32))]},
            r"'blk\.1\.ffn_down\.weight' has shape \(12, 24\), the model's config asks for \(12, 20\)",
        ),
        ({"change": [("model.norm.weight", None)]}, r"missing 'output_norm\.weight'"),
    ],
)
def test_files_that_the_decoder_does_not_fit(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, **options))


def test_other_vocabularies_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"'deepseek-llm' is not supported in a GGUF file, only 'llama', and 'gpt2' w"):
        load(write(tmp_path, settings=[("tokenizer.ggml.pre", ("deepseek-llm", gguf.GGUFValueType.STRING))]))


def test_cut_short_anywhere(tmp_path):
    path = write(tmp_path)
    whole = path.read_bytes()
    for size in [0, 3, 20, *range(100, len(whole), 1999), len(whole) - 100]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"tiny\.gguf \({size:,} bytes\) is damaged or cut short, fetch it again"):
            load(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"tiny\.gguf"):
        load(path)


def test_arrays_take_little_memory_or_are_refused(tmp_path, monkeypatch):
    numbers = ("x.numbers", (list(range(50_000)), gguf.GGUFValueType.ARRAY))
    reads = []
    get = gguf.GGUFReader._get
    monkeypatch.setattr(gguf.GGUFReader, "_get", lambda self, *given: reads.append(given) or get(self, *given))
    policy, _, _ = load(write(tmp_path, settings=[numbers]))
    assert policy == load(write(tmp_path))[0]
    assert len(reads) < 5_000  # and not one for each number
    monkeypatch.setattr(gguf_reader, "MOST_ITEMS", 5)
    with pytest.raises(ValueError, match=r"its arrays have \d+ texts or more, allowed: 5"):
        load(write(tmp_path))


def test_a_quantisation_without_a_reader_is_refused_by_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "new.gguf", "llama")
    kind = gguf.GGMLQuantizationType.Q8_K  # what llama.cpp computes with in between; no file should hold it
    block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    writer.add_tensor(gguf_reader.ROPE_DIVISORS, block, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"new\.gguf: tensor 'rope_freqs\.weight' is quantised as Q8_K"):
        load(tmp_path / "new.gguf")
