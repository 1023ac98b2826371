"""A tokenizer small enough to see through, and rows written to files."""

import gzip
import json

import numpy as np

from pjpo.data.examples import Example


class ByteTokenizer:
    """UTF-8 bytes; `th` is one token; `<end>` is special, and ends turns of chats."""

    merged, eos_id, fingerprint = 256, 257, "bytes"

    def __init__(self, *, eos_id=eos_id, template="<{role}>{content}<end>\n", opening="<assistant>", marks=True):
        self.eos_id, self.template, self.opening, self.marks = eos_id, template, opening, marks

    def encode(self, text, *, special=False):
        parts = text.split("<end>") if special else [text]
        ids = []
        for part in parts:
            for i, word in enumerate(part.split("th")):
                ids += [*([self.merged] if i else []), *word.encode()]
            ids.append(ByteTokenizer.eos_id)
        return ids[:-1]

    def decode(self, ids, *, skip_special=False):
        return "".join({256: "th", 257: "<end>"}.get(int(i)) or chr(i) for i in ids)

    def render_chat(self, messages, *, add_generation_prompt):
        if self.template is None:
            raise ValueError("this tokenizer has no chat template")
        text = "".join(self.template.format(**message) for message in messages)
        return text + self.opening * add_generation_prompt

    def encode_chat(self, messages):
        """What the assistant says and the end of its turn are marked."""
        if not self.marks:
            raise ValueError("the chat template has no {% generation %} block")
        ids, mask = [], []
        for message in messages:
            before, after = self.template.format(role=message["role"], content="|").split("|")
            said = message["content"] + "<end>" * after.startswith("<end>")
            for text, counts in ((before, False), (said, message["role"] == "assistant"), (after[5:], False)):
                new = self.encode(text, special=True)
                ids, mask = ids + new, mask + [counts] * len(new)
        return ids, mask


def result_or_words(call, *errors):
    """(what `call` returns, None), or (None, the words of one of `errors`)."""
    try:
        return call(), None
    except errors as error:
        return None, str(error)


def write_rows(path, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def example(prompt_tokens, *completion_tokens, start=1, id="rows:1"):
    """An example of these lengths, whose ids count up from `start`."""
    arrays = [np.arange(start, start + length, dtype=np.int32) for length in (prompt_tokens, *completion_tokens)]
    return Example(prompt=arrays[0], completions=tuple(arrays[1:]), columns={}, id=id)
