import json

import numpy as np
import pytest

from pjpo.data import saved
from pjpo.data.examples import Data, Example
from tests.data.fakes import example
from tests.data.test_examples import assert_same


def test_data_comes_back_as_it_was(tmp_path):
    masks = (np.array([True, False]), np.array([True]))
    rich = Example(np.int32([1, 2]), (np.int32([3, 4]), np.int32([5])), {"a": [1]}, "x:1", masks, (True, False), 1)
    data = Data(
        train=[rich, example(2, 1, 1)],
        held_out=[example(1)],
        counts={"rows": 3},
        about="three rows",
        sources=("a", "b"),
        weights=(0.25, 0.75),
        sampled=True,
    )
    saved.save(tmp_path / "pairs.jsonl", data)
    found = saved.load(tmp_path / "pairs.jsonl")
    for name in saved.ABOUT:
        assert getattr(found, name) == getattr(data, name)
    for part in ("train", "held_out"):
        for a, b in zip(getattr(found, part), getattr(data, part), strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("lines", ["", "{", "[]", "{}\n{}", '{"counts": {}}\n{"part": "train"}', "{}\n[]", "\xe9"])
def test_a_damaged_file_is_named(tmp_path, lines):
    (tmp_path / "pairs.jsonl").write_text(lines, encoding="latin-1")
    with pytest.raises(ValueError, match=r"pairs.jsonl is damaged .*; start a new run"):
        saved.load(tmp_path / "pairs.jsonl")


@pytest.mark.parametrize(("kept", "there"), [(3, "{'train': 2, 'held_out': 0}"), (2, "{'train': 1, 'held_out': 0}")])
def test_missing_lines_are_noticed(tmp_path, kept, there):
    path = tmp_path / "pairs.jsonl"
    saved.save(path, Data(train=[example(1), example(2)], held_out=[example(3)], counts={}, about=""))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:kept]))
    written = "{'train': 2, 'held_out': 1} examples were written"
    with pytest.raises(ValueError, match=rf"pairs.jsonl is damaged .*{written}, {there} are there.*; start a new run"):
        saved.load(path)


def test_a_file_that_does_not_say_how_many_it_holds_is_read(tmp_path):
    """As earlier versions wrote it."""
    path = tmp_path / "pairs.jsonl"
    saved.save(path, Data(train=[example(1), example(2)], held_out=[], counts={}, about=""))
    first, *rest = path.read_text().splitlines(keepends=True)
    about = json.loads(first)
    del about["examples"]
    path.write_text(json.dumps(about) + "\n" + "".join(rest))
    assert len(saved.load(path).train) == 2
