"""Text to token ids and back, and chat messages to text, as the model's own files say."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, SupportsInt

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

# Special tokens by which models say that they are done. A file often names only one of those its model may emit.
END_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "</s>")

# GGUF files name their pre-tokenizer; these are the ones met in the Llama family with byte-level BPE.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GGUF_PRE_TOKENIZERS = {
    "smollm": (pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False),),
    "llama-bpe": (
        pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ),
}
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


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

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """The messages as one text, to be encoded with `special=True`; what `transformers` would give.

        Raises:
            ValueError: no chat template, or one that refuses these messages.
        """
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template; give prompts as text, or set `chat_template`")
        try:
            return _compile(self.chat_template).render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses {messages!r}: {error}") from error

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides ids and texts: equal fingerprints, equal results."""
        parts = self._special.to_str(), self.eos_id, self.stop_ids, self.chat_template, self.special_tokens
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """From a Hugging Face folder: tokenizer.json, and what is there of the files that go with it.

        Raises:
            FileNotFoundError: no tokenizer.json.
            ValueError: a file that cannot be read.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing; a folder that has only tokenizer.model is brought up to date by "
                "`transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise ValueError(f"{path} is not a readable tokenizer: {error}") from error
        config = read_json(folder / "tokenizer_config.json", default={})
        special_tokens = read_json(folder / "special_tokens_map.json", default={}) | config
        special_tokens = {
            name: token["content"] if isinstance(token, dict) else token
            for name, token in special_tokens.items()
            if name.endswith("_token") and isinstance(token, dict | str)
        }
        generation = read_json(folder / "config.json", default={})
        generation |= read_json(folder / "generation_config.json", default={})
        ends = generation.get("eos_token_id")
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        eos_id = backend.token_to_id(special_tokens.get("eos_token", ""))
        return cls(
            backend,
            eos_id=ends[0] if eos_id is None and ends else eos_id,
            stop_ids=[*ends, *_end_ids(backend)],
            chat_template=_folder_chat_template(folder, config),
            special_tokens=special_tokens,
        )

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> Tokenizer:
        """From the metadata of a GGUF file that holds byte-level BPE (`fields` by name, as plain Python values).

        Raises:
            ValueError: another kind of vocabulary or pre-tokenizer, by name.
        """
        model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
        if model != "gpt2" or pre not in _GGUF_PRE_TOKENIZERS:
            raise ValueError(
                f"tokenizer.ggml.model {model!r} with tokenizer.ggml.pre {pre!r} is not supported in a GGUF file, only "
                f"'gpt2' with one of {', '.join(_GGUF_PRE_TOKENIZERS)}; load the model's Hugging Face folder instead"
            )
        tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
        merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
        vocab = {token: i for i, token in enumerate(tokens)}
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
        backend.pre_tokenizer = pre_tokenizers.Sequence(list(_GGUF_PRE_TOKENIZERS[pre]))
        backend.decoder = decoders.ByteLevel()
        backend.add_tokens(
            [
                AddedToken(token, special=kind == _CONTROL, normalized=False)
                for token, kind in zip(tokens, kinds, strict=True)
                if kind in (_CONTROL, _USER_DEFINED)
            ]
        )
        named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in named.items()}
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


def _end_ids(backend: tokenizers.Tokenizer) -> list[int]:
    specials = {added.content: i for i, added in backend.get_added_tokens_decoder().items() if added.special}
    return [specials[token] for token in END_TOKENS if token in specials]


def _folder_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template") or read_json(folder / "chat_template.json", default={}).get("chat_template")
    if isinstance(template, list):  # several by name
        template = {named["name"]: named["template"] for named in template}.get("default")
    return template


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant wrote; for rendering it is transparent."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


@functools.cache
def _compile(template: str) -> jinja2.Template:
    """Templates come with models, so they run sandboxed; filters and functions are those of `transformers`."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment.from_string(template)
