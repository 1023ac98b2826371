"""Text to token ids and back, and chat messages to text, as the model's own files say."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsInt

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from pjpo import chat, spm

# Special tokens by which models say that they are done. A file often names only one of those its model may emit.
END_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "</s>", "<end_of_turn>")

# GGUF files name their pre-tokenizer; these are the ones met with byte-level BPE in the families that load.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split_words(digits: str) -> tuple[pre_tokenizers.PreTokenizer, ...]:
    words = pre_tokenizers.Split(Regex(_WORDS.replace("DIGITS", digits)), "isolated")
    return words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


_GGUF_PRE_TOKENIZERS = {
    "smollm": (pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False),),
    "llama-bpe": _split_words("{1,3}"),
    "qwen2": _split_words(""),
}


class Tokenizer:
    """A vocabulary with its rules, the tokens that end a completion, and the chat template.

    Attributes:
        vocab_size: one more than the largest id.
        eos_id: the id to end a completion with; None where the model never learned one.
        stop_ids: ids after which generation has nothing more to say, `eos_id` among them.
        pad_id: what fills places that a mask hides. Any id would do: padding is a mask, never an id.
        chat_template: jinja2 source, or None.
    """

    pad_id = 0

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_id: int | None,
        stop_ids: Iterable[int] = (),
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        """`special_tokens` are what the chat template may refer to: `bos_token`, `eos_token`, ..."""
        backend.no_padding()
        backend.no_truncation()
        # Two copies, not one with a switch that is flipped for each call: data is tokenised in several threads.
        self._special, self._plain = backend, tokenizers.Tokenizer.from_str(backend.to_str())
        self._plain.encode_special_tokens = True
        self.vocab_size = 1 + max(backend.get_vocab().values())
        self.eos_id = eos_id
        self.stop_ids = tuple(sorted({*stop_ids, *(() if eos_id is None else (eos_id,))}))
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})

    def __setstate__(self, state: dict[str, Any]):
        self.__dict__ |= state
        self._plain.encode_special_tokens = True  # the switch does not survive pickling

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`; nothing is added before or after it.

        Args:
            text: any string.
            special: whether text such as `<|im_end|>` means the special token. Off, because text from a data set
                must not be able to end a turn; on for rendered chats.
        """
        backend = self._special if special else self._plain
        return backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Collection[SupportsInt], *, skip_special: bool = True) -> str:
        """The text of a list or array of ids; special tokens are left out unless `skip_special` is off."""
        return self._special.decode(np.asarray(ids).tolist(), skip_special_tokens=skip_special)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """The messages as one text, to be encoded with `special=True`; what `transformers` would give.

        Args:
            messages: dicts of `role`, `content` and whatever else the template reads.
            add_generation_prompt: end with the opening of the assistant's next turn.
            variables: what else the template reads: `tools`, `documents`, `enable_thinking`, ...

        Raises:
            ValueError: no chat template, or one that refuses these messages.
        """
        variables = {**self.special_tokens, "add_generation_prompt": add_generation_prompt, **variables}
        return chat.render(self._template(), messages, **variables)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> tuple[list[int], list[bool]]:
        """Token ids of a whole chat, and which of them the assistant wrote, as the template's blocks say.

        A token counts if any of its characters does. (`transformers` drops all but the first token of a block's last
        character, where that character has several.)

        Raises:
            ValueError: no chat template, one that refuses these messages, or one without `{% generation %}` blocks.
        """
        text, spans = chat.render_with_spans(self._template(), messages, **{**self.special_tokens, **variables})
        encoding = self._special.encode(text, add_special_tokens=False)
        mask = np.zeros(len(encoding.ids), bool)
        starts, ends = np.array(encoding.offsets, int).reshape(-1, 2).T
        for start, end in spans:
            inside = np.flatnonzero((starts < end) & (ends > start))
            if inside.size:
                mask[inside[0] : inside[-1] + 1] = True
        return encoding.ids, mask.tolist()

    def _template(self) -> str:
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template; give prompts as text, or set `chat_template`")
        return self.chat_template

    def special_id(self, name: str) -> int | None:
        """The id of a special token by the name that templates know, such as `bos_token`; None if there is none."""
        return self._special.token_to_id(self.special_tokens.get(name, ""))

    def save(self, folder: Path, *, max_tokens: int) -> None:
        """Files from which `from_folder` and `transformers` make the same tokenizer; the model takes `max_tokens`."""
        self._special.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_tokens,
            "clean_up_tokenization_spaces": False,  # decoding gives what was encoded
            **self.special_tokens,
        }
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides ids and texts: equal fingerprints, equal results."""
        parts = self._special.to_str(), self.eos_id, self.stop_ids, self.chat_template, self.special_tokens
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """From a Hugging Face folder: tokenizer.json or tokenizer.model, and what is there of the files beside it.

        Raises:
            FileNotFoundError: neither of the two.
            ValueError: a file that cannot be read.
        """
        config = read_json(folder / "tokenizer_config.json", default={})
        backend, special_tokens = _folder_backend(folder, config)
        special_tokens |= {
            name: token["content"] if isinstance(token, dict) else token
            for name, token in (read_json(folder / "special_tokens_map.json", default={}) | config).items()
            if name.endswith("_token") and isinstance(token, dict | str)
        }
        generation = read_json(folder / "config.json", default={})
        generation |= read_json(folder / "generation_config.json", default={})
        ends = generation.get("eos_token_id")
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        for i in ends:
            _check_id("eos_token_id", i, 1 + max(backend.get_vocab().values()))
        eos_id = backend.token_to_id(special_tokens.get("eos_token", ""))
        return cls(
            backend,
            eos_id=ends[0] if eos_id is None and ends else eos_id,
            stop_ids=[*ends, *_end_ids(backend)],
            chat_template=_folder_chat_template(folder, config),
            special_tokens=special_tokens,
        )

    @classmethod
    def from_sentencepiece(cls, path: Path) -> Tokenizer:
        """From a .model file.

        Raises:
            ValueError: a file that cannot be read.
        """
        vocabulary, special_tokens = spm.read(path)
        backend = vocabulary.backend()
        eos_id = backend.token_to_id(special_tokens["eos_token"]) if "eos_token" in special_tokens else None
        return cls(backend, eos_id=eos_id, stop_ids=_end_ids(backend), special_tokens=special_tokens)

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> Tokenizer:
        """From the metadata of a GGUF file (`fields` by name, as plain Python values).

        Raises:
            ValueError: a vocabulary that is neither SentencePiece's BPE nor byte-level BPE with a known pre-tokenizer.
        """
        tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
        model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
        named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in named.items()}
        for name, i in ids.items():
            if i is not None:
                _check_id(f"tokenizer.ggml.{named[name]}_token_id", i, len(tokens))
        if model == "llama":
            backend = spm.Vocabulary(
                model="bpe",
                pieces=tokens,
                scores=fields["tokenizer.ggml.scores"],
                kinds=kinds,
                unk_id=kinds.index(spm.UNKNOWN) if ids["unk_token"] is None else ids["unk_token"],
                space_prefix=fields.get("tokenizer.ggml.add_space_prefix", True),
            ).backend()
        elif model == "gpt2" and pre in _GGUF_PRE_TOKENIZERS:
            backend = _byte_level(tokens, kinds, fields["tokenizer.ggml.merges"], pre)
        else:
            raise ValueError(
                f"tokenizer.ggml.model {model!r} with tokenizer.ggml.pre {pre!r} is not supported in a GGUF file, only "
                f"'llama', and 'gpt2' with one of {', '.join(_GGUF_PRE_TOKENIZERS)}; load the model's Hugging Face "
                "folder instead"
            )
        return cls(
            backend,
            eos_id=ids["eos_token"],
            stop_ids=_end_ids(backend),
            chat_template=fields.get("tokenizer.chat_template"),
            special_tokens={name: tokens[i] for name, i in ids.items() if i is not None},
        )

    @classmethod
    def from_glassllm(cls, path: Path) -> Tokenizer:
        """From glassllm's own file: character BPE over NFC text in which "▁" stands for a space.

        Its vocabulary lists `<eos>`, but the model was trained on windows of running text and never saw it.
        """
        data = read_json(path)
        tokens = ["<pad>", "<unk>", "<bos>", "<eos>", *data["alphabet"], *("".join(pair) for pair in data["merges"])]
        vocab = {token: i for i, token in enumerate(tokens)}
        merges = [tuple(pair) for pair in data["merges"]]
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|▁*[^▁\n]+|▁+"), "isolated")
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Replace("<unk>", "⁇"), decoders.Fuse()]
        )
        backend.add_special_tokens(["<pad>", "<bos>", "<eos>"])
        return cls(backend, eos_id=None)


def read_json(path: Path, *, default: Any = None) -> Any:
    """The content of a JSON file, or `default`, where one is given, if there is no such file.

    Raises:
        FileNotFoundError, ValueError: by the file's name.
    """
    if default is not None and not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path} is not a readable JSON file: {error}") from error


def _check_id(name: str, value: Any, vocab_size: int) -> None:
    if type(value) is not int or not 0 <= value < vocab_size:
        raise ValueError(
            f"{name} {value!r} is no token of the vocabulary, whose ids are 0 to {vocab_size - 1}; mend it"
        )


def _byte_level(tokens: list[str], kinds: list[int], merges: list[str], pre: str) -> tokenizers.Tokenizer:
    model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in merges],
        ignore_merges=pre == "llama-bpe",
    )
    backend = tokenizers.Tokenizer(model)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(_GGUF_PRE_TOKENIZERS[pre]))
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            AddedToken(token, special=kind == spm.CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (spm.CONTROL, spm.USER_DEFINED)
        ]
    )
    return backend


def _folder_backend(folder: Path, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer of a folder, and the special tokens that its own file names."""
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(path)), {}
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise ValueError(f"{path} is not a readable tokenizer: {error}") from error
    path = folder / "tokenizer.model"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder / 'tokenizer.json'} is missing, and so is tokenizer.model; one of them is read"
        )
    vocabulary, special_tokens = spm.read(path)
    backend = vocabulary.backend()
    added = {int(i): AddedToken(**token) for i, token in config.get("added_tokens_decoder", {}).items()}
    more = read_json(folder / "added_tokens.json", default={})
    added |= {i: AddedToken(token, normalized=False) for token, i in more.items() if i not in added}
    backend.add_tokens([added[i] for i in sorted(added)])
    for i, token in added.items():
        if backend.token_to_id(token.content) != i:
            found = backend.token_to_id(token.content)
            raise ValueError(
                f"{folder}: added token {token.content!r} has id {i}, but {path.name} leaves {found} for it"
            )
    return backend, special_tokens


def _end_ids(backend: tokenizers.Tokenizer) -> list[int]:
    specials = {added.content: i for i, added in backend.get_added_tokens_decoder().items() if added.special}
    return [specials[token] for token in END_TOKENS if token in specials]


def _folder_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template") or read_json(folder / "chat_template.json", default={}).get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            names = ", ".join(map(repr, named))
            raise ValueError(f"{folder}: none of the chat templates {names} is called 'default'; rename the one to use")
        template = named["default"]
    return template
