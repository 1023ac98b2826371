"""Files of rows that are damaged, or hold something else: counted, or refused by file and line; nothing else."""

import gzip
import json
from types import SimpleNamespace

import hypothesis
import pytest
from hypothesis import strategies

from pjpo.data import preference, prompts, supervised
from tests.data.fakes import ByteTokenizer

CONTEXT = SimpleNamespace(tokenizer=ByteTokenizer())
MANY = hypothesis.settings(max_examples=300)
CHAT = [{"role": "user", "content": "Why?"}]
ANSWERS = [[{"role": "assistant", "content": answer}] for answer in ("So.", "No.")]
ROWS = (
    {"prompt": "Why?", "chosen": " So.", "rejected": " No."},
    {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
    {"prompt": CHAT, "chosen": ANSWERS[0], "rejected": ANSWERS[1]},
    {"chosen": CHAT + ANSWERS[0], "rejected": CHAT + ANSWERS[1]},
    {"prompt": "Why?", "completion": " So."},
    {"text": "So it is."},
    {"prompt": CHAT},
)
CONFIGS = (preference.Config, supervised.Config, prompts.Config)
TEXTS = strategies.text(max_size=3) | strategies.sampled_from(
    ["\ud800", "\0", "\u2028", "\n\nAssistant:", "{", "<end>"]
)
VALUES = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | TEXTS,
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=4,
)


@strategies.composite
def lines(draw):
    """One row, which may have odd values and odd bytes."""
    row = dict(draw(strategies.sampled_from(ROWS)))
    for _ in range(draw(strategies.integers(0, 2))):
        name = draw(strategies.sampled_from([*row, "score", "role"]))
        row[name] = draw(VALUES)
    line = bytearray(json.dumps(draw(VALUES) if draw(strategies.integers(0, 9)) == 0 else row).encode())
    for _ in range(draw(strategies.sampled_from([0, 0, 0, 1, 3]))):
        place = draw(strategies.integers(0, len(line)))
        line[place : place + draw(strategies.integers(0, 3))] = draw(strategies.binary(max_size=3))
    return bytes(line)


@MANY
@hypothesis.given(strategies.lists(lines(), max_size=3), strategies.sampled_from(CONFIGS))
def test_rows_are_used_or_counted_or_refused_by_line(tmp_path_factory, content, config):
    path = tmp_path_factory.getbasetemp() / "odd.jsonl"
    path.write_bytes(b"\n".join(content))
    try:
        data = config(path=str(path)).build(CONTEXT)
    except ValueError as error:
        said = str(error)
    else:
        said = data.about
        kept = sum(number for what, number in data.counts.items() if what == "used" or what.startswith("skipped"))
        assert kept == data.counts["rows"]
        assert len(data.train) == data.counts["used"] > 0
    assert "odd.jsonl" in said


@MANY
@hypothesis.given(strategies.data())
def test_a_damaged_archive_is_refused_or_read(tmp_path_factory, data):
    content = bytearray(gzip.compress("".join(json.dumps(ROWS[0]) + "\n" for _ in range(20)).encode(), mtime=0))
    place = data.draw(strategies.integers(0, len(content) - 1))
    content[place : place + data.draw(strategies.integers(0, 4))] = data.draw(strategies.binary(max_size=4))
    path = tmp_path_factory.getbasetemp() / "odd.jsonl.gz"
    path.write_bytes(content)
    try:
        found = preference.Config(path=str(path)).build(CONTEXT)
    except ValueError as error:
        found = error
    assert "odd.jsonl.gz" in str(getattr(found, "about", found))


def test_depth_and_size_are_no_way_out(tmp_path):
    path = tmp_path / "deep.jsonl"
    for line in ("[" * 10**6, '{"prompt":' * 10**5, "1" * 10**6, '{"prompt": ' + "1" * 10**5 + "}"):
        path.write_text(line)
        with pytest.raises(ValueError, match=r"deep\.jsonl:1: "):
            prompts.Config(path=str(path)).build(CONTEXT)
