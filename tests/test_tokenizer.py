"""Tokenizers from the three kinds of files, and chat templates as `transformers` renders them."""

import importlib.util
import json
import pathlib
import pickle
import string
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from pjpo.tokenizer import _GGUF_PRE_TOKENIZERS, Tokenizer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|endoftext|>", "<|im_end|>", "<think>", *BYTES, "11", "he"]
FIELDS = {  # of a GGUF file
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 4] + [1] * (len(TOKENS) - 3),
    "tokenizer.ggml.merges": ["1 1", "h e"],
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}",
}
GLASS = pathlib.Path(importlib.util.find_spec("glassllm").submodule_search_locations[0]) / "weights"
USER = [{"role": "user", "content": "hé <b>"}]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_gguf(FIELDS)


@pytest.fixture(scope="module")
def glass():
    return Tokenizer.from_glassllm(GLASS / "en.tokenizer.json")


def with_template(template, **special_tokens):
    source = Tokenizer.from_gguf(FIELDS)
    return Tokenizer(source._special, eos_id=1, chat_template=template, special_tokens=special_tokens)


@given(st.text())
def test_bytes_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_digits_are_split_where_the_file_says_so(tokenizer):
    one = TOKENS.index("1")
    assert tokenizer.encode("11") == [one, one]
    assert Tokenizer.from_gguf(FIELDS | {"tokenizer.ggml.pre": "gpt-2"}).encode("11") == [TOKENS.index("11")]
    assert Tokenizer.from_gguf(FIELDS | {"tokenizer.ggml.pre": "llama-bpe"}).encode("11") == [TOKENS.index("11")]
    qwen = Tokenizer.from_gguf(FIELDS | {"tokenizer.ggml.pre": "qwen2"})
    assert qwen.encode("11") == [one, one]
    assert qwen.decode(qwen.encode("e\u0301")) == "é"  # composed, as its normaliser does


def words(text, most_digits):
    """What llama.cpp's loop over characters cuts a text into for llama-bpe and qwen2."""

    def kind(i):
        c = text[i] if i < len(text) else ""
        return "" if not c else "space" if c.isspace() else unicodedata.category(c)[0]

    def run(i, kinds):
        while kind(i) in kinds:
            i += 1
        return i

    others, pieces, i = set("MPSC"), [], 0
    while i < len(text):
        short = next((s for s in ("s", "t", "re", "ve", "m", "ll", "d") if text[i:].lower().startswith(f"'{s}")), None)
        before_letters = kind(i) not in ("L", "N") and text[i] not in "\r\n" and kind(i + 1) == "L"
        after_space = i + (text[i] == " ")
        spaces = run(i, {"space"})
        line_ends = [j + 1 for j in range(i, spaces) if text[j] in "\r\n"]
        if short:
            end = i + 1 + len(short)
        elif before_letters or kind(i) == "L":
            end = run(i + before_letters, {"L"})
        elif kind(i) == "N":
            end = min(run(i, {"N"}), i + most_digits)
        elif kind(after_space) in others:
            end = run(after_space, others)
            while text[end : end + 1] in ("\r", "\n"):
                end += 1
        elif line_ends:
            end = line_ends[-1]
        else:  # the last space belongs to what follows, unless it is alone
            end = spaces - (spaces > i + 1 and spaces < len(text))
        pieces.append(text[i:end])
        i = end
    return pieces


@settings(max_examples=500)
@given(st.text(alphabet="aZé中ب\u0301¼٣5''sStTlLrReEvVmMdD  \t\r\n\u00a0\u3000_.,!🙂", max_size=30))
@pytest.mark.parametrize(("pre", "most_digits"), [("llama-bpe", 3), ("qwen2", 1)])
def test_words_are_those_of_llama_cpp(pre, most_digits, text):
    split, _ = _GGUF_PRE_TOKENIZERS[pre]
    assert [word for word, _ in split.pre_tokenize_str(text)] == words(text, most_digits)


def test_special_tokens_in_text_are_text_unless_asked_for(tokenizer):
    assert tokenizer.encode("he<|im_end|>", special=True) == [TOKENS.index("he"), 1]
    as_text = tokenizer.encode("he<|im_end|>")
    assert 1 not in as_text
    assert tokenizer.decode(as_text) == "he<|im_end|>"
    assert tokenizer.encode("<think>") == [2]  # a word of the vocabulary, not a control token


def test_decoding_leaves_special_tokens_out_unless_asked_for(tokenizer):
    ids = np.array([TOKENS.index("he"), 1])
    assert tokenizer.decode(ids) == "he"
    assert tokenizer.decode(ids, skip_special=False) == "he<|im_end|>"


def test_ends(tokenizer, glass):
    assert (tokenizer.eos_id, tokenizer.stop_ids, tokenizer.pad_id) == (1, (0, 1), 0)
    assert (glass.eos_id, glass.stop_ids, glass.pad_id) == (None, (), 0)
    assert (tokenizer.vocab_size, glass.vocab_size) == (len(TOKENS), 1024)


@given(st.text(alphabet=string.ascii_letters + string.digits + " \n▁.,’—_é\u0301½ß<>", max_size=80))
def test_glassllm_equals_its_own_tokenizer(glass, text):
    theirs = pytest.importorskip("glassllm.tokenizer").Tokenizer.load(GLASS / "en.tokenizer.json")
    ids = theirs.encode(text)
    assert glass.encode(text) == ids
    assert glass.decode(ids) == theirs.decode(ids)


def test_glassllm_special_names_in_text_are_text(glass):
    assert not {0, 2, 3} & set(glass.encode("a <eos> <bos> <pad>"))
    assert glass.encode("<eos>", special=True) == [3]


def test_fingerprint_changes_with_anything_that_changes_ids_or_texts(tokenizer):
    variants = [
        {"tokenizer.chat_template": "{{ messages }}"},
        {"tokenizer.ggml.merges": ["h e", "1 1"]},
        {"tokenizer.ggml.pre": "gpt-2"},
        {"tokenizer.ggml.eos_token_id": 0},
        {"tokenizer.ggml.bos_token_id": 0},
    ]
    prints = [Tokenizer.from_gguf(FIELDS | change).fingerprint for change in variants]
    assert len({tokenizer.fingerprint, *prints}) == 1 + len(variants)
    assert Tokenizer.from_gguf(FIELDS).fingerprint == tokenizer.fingerprint


def test_a_copy_in_another_process_is_the_same(tokenizer):
    copied = pickle.loads(pickle.dumps(tokenizer))
    assert copied.fingerprint == tokenizer.fingerprint
    assert copied.encode("he<|im_end|>") == tokenizer.encode("he<|im_end|>")


@pytest.mark.parametrize("change", [{"tokenizer.ggml.model": "t5"}, {"tokenizer.ggml.pre": "tekken"}])
def test_other_gguf_vocabularies_are_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change.values()))):
        Tokenizer.from_gguf(FIELDS | change)


def write_folder(folder, tokenizer, **files):
    tokenizer._special.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return Tokenizer.from_folder(folder)


def test_folder(tmp_path, tokenizer):
    tokenizer._special.enable_truncation(3)
    config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": None, "chat_template": "{{ eos_token }}"}
    loaded = write_folder(tmp_path, tokenizer, tokenizer_config=config, generation_config={"eos_token_id": [1, 2]})
    assert (loaded.eos_id, loaded.stop_ids) == (1, (0, 1, 2))
    assert loaded.encode("he 11, he 11") == Tokenizer.from_gguf(FIELDS).encode("he 11, he 11")  # not cut to 3 tokens
    assert loaded.render_chat(USER, add_generation_prompt=True) == "<|im_end|>"


def test_folder_ends_from_the_model_config_where_the_tokenizer_names_none(tmp_path, tokenizer):
    loaded = write_folder(tmp_path, tokenizer, config={"eos_token_id": 2})
    assert (loaded.eos_id, loaded.stop_ids, loaded.chat_template) == (2, (0, 1, 2), None)


@pytest.mark.parametrize("value", [999, -1, 2**40, 1.5, True, "2", [2, None]])
def test_end_tokens_that_the_vocabulary_lacks_are_refused(tmp_path, tokenizer, value):
    with pytest.raises(ValueError, match=r"^eos_token_id .* is no token of the vocabulary, whose ids are 0 to \d+"):
        write_folder(tmp_path, tokenizer, generation_config={"eos_token_id": value})
    if not isinstance(value, list):
        for name in ("eos", "padding"):
            with pytest.raises(ValueError, match=rf"^tokenizer.ggml.{name}_token_id {value!r} is no token"):
                Tokenizer.from_gguf(FIELDS | {f"tokenizer.ggml.{name}_token_id": value})


def test_folder_templates(tmp_path, tokenizer):
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    loaded = write_folder(tmp_path, tokenizer, tokenizer_config={"chat_template": templates})
    assert loaded.chat_template == "named"
    with pytest.raises(ValueError, match="none of the chat templates 'tool_use' is called 'default'"):
        write_folder(tmp_path, tokenizer, tokenizer_config={"chat_template": templates[:1]})
    (tmp_path / "chat_template.jinja").write_text("its own file")
    assert Tokenizer.from_folder(tmp_path).chat_template == "its own file"


def test_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{% for m in messages %}{{ m['role'] }}{% endfor %}", "<s>user"),
        ("{% if add_generation_prompt %}\nyes\n{% endif %}\nend", "yes\nend"),  # blocks take their line with them
        ("  {% if tools is none %}\na{% endif %}", "a"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "hé <b>"}'),  # no HTML escapes, no \\u
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1"),
        ("{% generation %}a{{ messages | length }}{% endgeneration %}!", "a1!"),
        ("{{ strftime_now('%%') }}", "%"),
    ],
)
def test_templates_render_as_in_transformers(template, text):
    rendered = with_template(template, bos_token="<s>").render_chat(USER, add_generation_prompt=True)
    assert rendered == text
