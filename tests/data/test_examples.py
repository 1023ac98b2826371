import errno
import os
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pjpo.data.examples import Example, Examples, Tally
from pjpo.data.scratch import Scratch

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=6).map(lambda ids: np.array(ids, np.int32))
COLUMNS = st.dictionaries(st.text(max_size=3), st.none() | st.integers() | st.text(max_size=5), max_size=3)


@st.composite
def fields(draw):
    """Of an example, which the test makes: checking its annotations draws from `random`, as strategies must not."""
    completions = tuple(draw(st.lists(IDS, max_size=3)))
    masks = tuple(np.array([draw(st.booleans()) for _ in ids], bool) for ids in completions)
    return {
        "prompt": draw(IDS),
        "completions": completions,
        "columns": draw(COLUMNS),
        "id": draw(st.text(max_size=9)),
        "loss_masks": draw(st.sampled_from([None, masks])),
        "labels": draw(st.sampled_from([None, tuple(bool(len(ids) % 2) for ids in completions)])),
        "source": draw(st.sampled_from([None, 0, 2])),
    }


def assert_same(found, expected):
    for name in ("prompt", "completions", "loss_masks"):
        a, b = (getattr(example, name) for example in (found, expected))
        assert (a is None) == (b is None)
        for x, y in zip(*((v,) if name == "prompt" else v or () for v in (a, b)), strict=True):
            np.testing.assert_array_equal(x, y)
            assert x.dtype == y.dtype
    for name in ("columns", "id", "labels", "source"):
        assert getattr(found, name) == getattr(expected, name)


@given(st.lists(fields(), max_size=5))
def test_examples_come_back_as_they_were(expected):
    expected = [Example(**each) for each in expected]
    examples = Examples(expected)
    assert len(examples) == len(expected)
    for found, wanted in zip(examples, expected, strict=True):
        assert_same(found, wanted)


def test_some_of_the_examples_can_be_taken():
    examples = Examples(Example(np.arange(i), (), {}, f"rows:{i}") for i in range(5))
    assert [example.id for example in examples.take([3, 1])] == ["rows:3", "rows:1"]
    assert [example.id for example in examples[1:3]] == ["rows:1", "rows:2"]
    assert examples[-1].id == "rows:4"
    with pytest.raises(IndexError):
        examples[5]


def test_scratch_outlives_nothing_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    scratch = Scratch()
    assert [scratch.append(part) for part in (b"one", b"", b"three")] == [0, 3, 3]
    assert scratch.read(3, 5) == b"three"
    assert list(tmp_path.iterdir()) == []
    descriptor = scratch._descriptor
    del scratch
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_a_full_disk_is_named():
    scratch = Scratch()
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, scratch._descriptor)
    os.close(full)
    with pytest.raises(OSError, match="for temporary data; make room, or set TMPDIR") as caught:
        scratch.append(b"x")
    assert caught.value.errno == errno.ENOSPC


def test_a_tally_names_the_first_three_places():
    tally = Tally()
    for line in range(5):
        tally.add("cut", f"rows:{line}")
    tally.add("read")
    assert tally.places("cut") == ["rows:0", "rows:1", "rows:2", "..."]
    assert tally.places("read") == tally.places("unheard of") == []
    assert str(tally) == "  cut: 5 (rows:0, rows:1, rows:2, ...)\n  read: 1"
