"""SentencePiece vocabularies: read from .model and GGUF files, made into `tokenizers` backends, trained from text."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces, in .model and GGUF files alike
SPACE = "▁"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a SentencePiece file says."""

    model: Literal["bpe", "unigram"]
    pieces: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    unk_id: int
    space_prefix: bool  # text is encoded as if a space stood before it
    squeeze_spaces: bool = False  # spaces at the ends go, several are one
    charsmap: bytes = b""  # compiled normalisation rules

    def backend(self) -> tokenizers.Tokenizer:
        """A tokenizer that gives the ids of SentencePiece's own.

        Raises:
            ValueError: user-defined pieces together with a space prefix, which `tokenizers` would repeat after each.
        """
        vocab = {piece: i for i, piece in enumerate(self.pieces)}
        defined = [piece for piece, kind in zip(self.pieces, self.kinds, strict=True) if kind == USER_DEFINED]
        if defined and self.space_prefix:
            raise ValueError(
                f"user-defined pieces ({defined[0]!r} and {len(defined) - 1} more) are read only from vocabularies "
                "without add_dummy_prefix; use the model's tokenizer.json"
            )
        byte_fallback = BYTE in self.kinds
        if self.model == "bpe":
            unknown = self.pieces[self.unk_id]
            model = models.BPE(
                vocab=vocab, merges=self._merges(vocab), unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback
            )
            backend = tokenizers.Tokenizer(model)
        else:
            scored = list(zip(self.pieces, self.scores, strict=True))
            backend = tokenizers.Tokenizer(models.Unigram(scored, self.unk_id, byte_fallback))
            backend.pre_tokenizer = pre_tokenizers.Split(Regex(self._inside_names()), "isolated")
        steps = [normalizers.Precompiled(self.charsmap)] if self.charsmap else []
        if self.squeeze_spaces:
            steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
        steps += [normalizers.Prepend(SPACE)] if self.space_prefix else []
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
        undo = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(undo + [decoders.Strip(" ", 1, 0)] * self.space_prefix)
        backend.add_tokens(
            [
                AddedToken(piece, special=kind != USER_DEFINED, normalized=kind == USER_DEFINED)
                for piece, kind in zip(self.pieces, self.kinds, strict=True)
                if kind in (UNKNOWN, CONTROL, USER_DEFINED)
            ]
        )
        return backend

    def _merges(self, vocab: dict[str, int]) -> list[tuple[str, str]]:
        """Pairs in the order in which SentencePiece joins them: by the score of the piece that they make."""
        joined = [i for i, kind in enumerate(self.kinds) if kind == NORMAL and len(self.pieces[i]) > 1]
        parts = {piece for piece, i in vocab.items() if self.kinds[i] == NORMAL}
        return [
            (piece[:cut], piece[cut:])
            for piece in (self.pieces[i] for i in sorted(joined, key=lambda i: (-self.scores[i], i)))
            for cut in range(1, len(piece))
            if piece[:cut] in parts and piece[cut:] in parts
        ]

    def _inside_names(self) -> str:
        """Where text that spells a control or byte piece is cut in two, or Unigram would take it for that piece."""
        names = [piece for piece, kind in zip(self.pieces, self.kinds, strict=True) if kind in (UNKNOWN, CONTROL, BYTE)]
        return "|".join(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names if len(name) > 1)


def read(path: Path) -> tuple[Vocabulary, dict[str, str]]:
    """A .model file: its vocabulary, and its special tokens by the names that chat templates know (`bos_token`, ...).

    Raises:
        ValueError: a file that is damaged, or of a kind that is not read, by name.
    """
    from google.protobuf.message import DecodeError  # here, so that importing pjpo stays fast
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path} is not a readable SentencePiece model: {error}; fetch it again") from error
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    kind = trainer.ModelType.Name(trainer.model_type).lower()
    if not proto.pieces or kind not in ("bpe", "unigram"):
        raise ValueError(f"{path} holds {len(proto.pieces)} pieces of model_type {kind!r}, allowed: bpe, unigram")
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise ValueError(f"{path}: treat_whitespace_as_suffix and escape_whitespaces=false are not read")
    scores, kinds = [piece.score for piece in proto.pieces], [piece.type for piece in proto.pieces]
    ids: dict[str, int] = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "pad_token": trainer.pad_id}
    if max(ids.values()) >= len(kinds) or UNKNOWN not in kinds or not np.isfinite(scores).all():
        raise ValueError(
            f"{path} is damaged: of {len(kinds)} pieces {kinds.count(UNKNOWN)} are for the unknown, its special tokens "
            f"have ids {ids}, and {np.isfinite(scores).sum()} scores are finite; fetch it again"
        )
    if not _can_be_walked(normalizer.precompiled_charsmap):
        raise ValueError(f"{path}: precompiled_charsmap points beyond its end; fetch the file again")
    vocabulary = Vocabulary(
        model=kind,
        pieces=[piece.piece for piece in proto.pieces],
        scores=scores,
        kinds=kinds,
        unk_id=kinds.index(UNKNOWN),
        space_prefix=normalizer.add_dummy_prefix,
        squeeze_spaces=normalizer.remove_extra_whitespaces,
        charsmap=normalizer.precompiled_charsmap,
    )
    ids |= {"unk_token": vocabulary.unk_id}
    return vocabulary, {name: vocabulary.pieces[i] for name, i in ids.items() if i >= 0}


def _can_be_walked(charsmap: bytes) -> bool:
    """Whether no text leads beyond compiled normalisation rules, where `tokenizers` would end the program.

    They are the size of a double-array trie in bytes, its units of 32 bits, and texts that end with 0. From unit i the
    byte c leads to unit i ^ offset ^ c; a unit with bit 8 has a leaf at i ^ offset, which holds where its text begins.
    """
    if not charsmap:
        return True
    size = int.from_bytes(charsmap[:4], "little")
    units, texts = charsmap[4 : 4 + size], charsmap[4 + size :]
    if size == 0 or size % 4 or len(units) < size or not texts.endswith(b"\0"):
        return False
    try:
        texts.decode()
    except UnicodeDecodeError:
        return False
    trie = np.frombuffer(units, "<u4").astype(np.int64)
    inner = trie >> 31 == 0
    offsets = trie >> 10 << ((trie & 1 << 9) >> 6)
    first = np.arange(len(trie)) ^ offsets
    if ((first | 255) >= len(trie))[inner].any():
        return False
    begins = trie[first[inner & (trie >> 8 & 1 == 1)]] & 2**31 - 1
    return bool((begins < len(texts)).all()) and all(texts[i - 1] == 0 for i in set(begins.tolist()) if i)


def train(
    texts: Iterable[str], path: Path, *, vocab_size: int, model: Literal["bpe", "unigram"] = "bpe", **settings
) -> None:
    """Learns a vocabulary from texts and writes it to `path`, a .model file.

    Ids: 0 is padding, 1 ends a text, 2 begins one, 3 stands for what is unknown, which with byte fallback nothing is.
    Text is taken as it is, so decoding gives it back: no normalisation, no space added or dropped.

    Args:
        texts: a text each; SentencePiece learns from each line by itself.
        path: ends in .model; must not exist.
        vocab_size: pieces in all, the 260 of bytes and special tokens among them.
        model: the algorithm.
        settings: further options of `sentencepiece.SentencePieceTrainer`.

    Raises:
        FileExistsError: there is such a file.
        ValueError: texts too few for so many pieces, in SentencePiece's words.
    """
    import sentencepiece

    if path.exists():
        raise FileExistsError(f"{path} exists; a vocabulary is not written over, choose another name")
    ours = {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "character_coverage": 0.9995,  # rarer characters are spelt in bytes
        "minloglevel": 2,
    }
    with path.with_name(f"{path.name}.tmp").open("wb") as file:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=file,
                vocab_size=vocab_size,
                model_type=model,
                pad_id=0,
                eos_id=1,
                bos_id=2,
                unk_id=3,
                **ours | settings,
            )
        except (RuntimeError, OSError) as error:
            Path(file.name).unlink()
            raise ValueError(
                f"sentencepiece: no vocabulary of {vocab_size} pieces from these texts: {error}"
            ) from error
    Path(file.name).rename(path)
