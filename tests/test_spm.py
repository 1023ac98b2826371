"""SentencePiece vocabularies: ids and texts are those of the sentencepiece package itself."""

import json
import pydoc_data.topics

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from pjpo import spm
from pjpo.tokenizer import Tokenizer

LINES = [line for name in ("strings", "numbers", "comparisons") for line in pydoc_data.topics.topics[name].splitlines()]
THEIR_DEFAULTS = {"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": True, "remove_extra_whitespaces": True}
KINDS = {
    "bpe": {"model": "bpe"},
    "bpe, no bytes": {"model": "bpe", "byte_fallback": False},
    "bpe, space prefix": {"model": "bpe", "add_dummy_prefix": True},
    "bpe, user-defined": {"model": "bpe", "user_defined_symbols": ["<tool>", "▁▁▁▁"], "control_symbols": ["<turn>"]},
    "unigram": {"model": "unigram"},
    "unigram, their defaults": {"model": "unigram", **THEIR_DEFAULTS},
    "unigram, no bytes": {"model": "unigram", "byte_fallback": False},
}
TEXTS = st.text(alphabet="abcdefghinorst  \n.,(){}<>/s▁_0x41éßfi①\u3000字🙂\t", max_size=60)
HARD = [
    "",
    " ",
    "  a  b ",
    "<s>",
    "</s>",
    "<unk>",
    "a<s>b",
    "<0x41>",
    "<tool> <turn>",
    "        x",
    "\n\n\nif",
    "e\u0301 ①",
]


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    """The file, sentencepiece's own processor of it, and our tokenizer."""
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    spm.train(LINES, path, vocab_size=420, **KINDS[request.param])
    return path, sentencepiece.SentencePieceProcessor(model_file=str(path)), Tokenizer.from_sentencepiece(path)


def in_order(ids, processor):
    """Unigram may cut a run of one character in several ways that are equally likely; which one is anyone's choice."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(processor.serialized_model_proto())
    return ids if proto.trainer_spec.model_type == proto.trainer_spec.BPE else sorted(ids)


@given(st.one_of(TEXTS, st.sampled_from(HARD)))
def test_ids_and_texts_are_those_of_sentencepiece(trained, text):
    _, theirs, ours = trained
    ids = theirs.encode(text)
    assert in_order(ours.encode(text), theirs) == in_order(ids, theirs)
    assert ours.decode(ids, skip_special=False) == theirs.decode(ids).replace(" ⁇ ", "<unk>")


def test_lines_that_it_learned_from(trained):
    _, theirs, ours = trained
    ids = [ours.encode(line) for line in LINES]
    for found, line in zip(ids, LINES, strict=True):
        assert in_order(found, theirs) == in_order(theirs.encode(line), theirs)
    assert sum(map(len, ids)) < 0.7 * sum(map(len, LINES))


def test_special_tokens(trained):
    path, _, ours = trained
    assert (ours.eos_id, ours.special_tokens["bos_token"], ours.vocab_size) == (1, "<s>", 420)
    assert ours.encode("<s></s>", special=True) == [2, 1]
    assert ours.fingerprint == Tokenizer.from_sentencepiece(path).fingerprint


@pytest.mark.parametrize("kind", ["bpe", "bpe, space prefix"])
def test_gguf_files_hold_the_same_vocabulary(tmp_path, kind):
    path = tmp_path / "tokenizer.model"
    spm.train(LINES, path, vocab_size=420, **KINDS[kind])
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in proto.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in proto.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in proto.pieces],
        "tokenizer.ggml.eos_token_id": 1,
    }
    if kind == "bpe":
        fields["tokenizer.ggml.add_space_prefix"] = False
    theirs, ours = sentencepiece.SentencePieceProcessor(model_file=str(path)), Tokenizer.from_gguf(fields)
    for text in [*LINES, *HARD]:
        assert ours.encode(text) == theirs.encode(text)
    assert (ours.eos_id, ours.stop_ids) == (1, (1,))


def test_folders_that_have_only_the_model_file(tmp_path):
    spm.train(LINES, tmp_path / "tokenizer.model", vocab_size=400)
    added = {"400": {"content": "<|im_end|>", "special": True, "normalized": False}, "0": {"content": "<pad>"}}
    config = {"added_tokens_decoder": added, "eos_token": "<|im_end|>", "chat_template": "{{ eos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 400, "<more>": 401}))
    ours = Tokenizer.from_folder(tmp_path)
    assert (ours.eos_id, ours.vocab_size, ours.special_tokens["bos_token"]) == (400, 402, "<s>")
    assert ours.encode("<|im_end|><more>", special=True) == [400, 401]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<more>": 500}))
    with pytest.raises(ValueError, match=r"added token '<more>' has id 500, but tokenizer\.model leaves 401 for it"):
        Tokenizer.from_folder(tmp_path)


def _without_unknown(proto):
    proto.pieces[3].type = spm.NORMAL


def _with_charsmap(change):
    def damage(proto):
        charsmap = bytearray(proto.normalizer_spec.precompiled_charsmap)
        proto.normalizer_spec.precompiled_charsmap = bytes(change(charsmap))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda proto: setattr(proto.trainer_spec, "eos_id", 9999), "special tokens have ids .*'eos_token': 9999"),
        (_without_unknown, "of 420 pieces 0 are for the unknown"),
        (lambda proto: setattr(proto.pieces[9], "score", float("nan")), "419 scores are finite"),
        *[
            (_with_charsmap(change), "precompiled_charsmap points beyond its end")
            for change in (
                lambda x: b"\0\0\0\0",  # no trie
                lambda x: x[:100],  # half of one
                lambda x: x[:-1],  # a text without its end
                lambda x: x[:-3] + b"\xff\xff\0",  # no UTF-8
                lambda x: x[:4] + b"\xff\xff\xff\x7f" + x[8:],  # from its root to nowhere
                lambda x: x[: 4 + 256 * 4] + b"\xff\xff\xff\x7f" * 256 + x[4 + 512 * 4 :],  # from further down
            )
        ],
    ],
)
def test_damaged_files_are_refused_before_they_end_the_program(tmp_path, damage, message):
    path = tmp_path / "tokenizer.model"
    spm.train(LINES, path, vocab_size=420, **KINDS["unigram, their defaults"])
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    damage(proto)
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match=rf"tokenizer\.model.*{message}"):
        spm.read(path)


@given(text=st.text())
def test_what_is_trained_gives_every_text_back(trained_once, text):
    text = text.replace("▁", "_")  # SentencePiece's own sign for a space
    assert trained_once.decode(trained_once.encode(text), skip_special=False) == text


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    spm.train(LINES, path, vocab_size=400)
    return Tokenizer.from_sentencepiece(path)


def test_training_refuses_what_it_cannot_do_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "tokenizer.model"
    with pytest.raises(ValueError, match=r"no vocabulary of 5000 pieces from these texts: .*too high"):
        spm.train(["a b"], path, vocab_size=5000)
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"tokenizer\.model exists; a vocabulary is not written over"):
        spm.train(LINES, path, vocab_size=400)
    assert path.read_bytes() == b"mine"


def test_files_that_are_not_read(tmp_path):
    path = tmp_path / "tokenizer.model"
    for data, message in [(b"not a model", "not a readable|holds 0 pieces"), (b"", "holds 0 pieces")]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            spm.read(path)
    for settings, message in [
        ({"model_type": "word"}, "of model_type 'word', allowed: bpe, unigram"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
    ]:
        with path.open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(LINES), model_writer=file, vocab_size=400, minloglevel=2, **settings
            )
        with pytest.raises(ValueError, match=message):
            spm.read(path)
    path.unlink()
    spm.train(LINES, path, vocab_size=420, **KINDS["bpe, user-defined"], add_dummy_prefix=True)
    with pytest.raises(ValueError, match=r"user-defined pieces .*add_dummy_prefix; use the model's tokenizer\.json"):
        Tokenizer.from_sentencepiece(path)
