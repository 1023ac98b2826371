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
