import errno
import os
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pjpo.data.examples import Data, Example, Examples, Tally, hold_out
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


def of_prompts(prompts):
    return Examples(Example(np.arange(1), (), {"prompt": prompt}, f"rows:{i}") for i, prompt in enumerate(prompts))


@pytest.mark.parametrize("seed", range(5))
def test_a_prompt_is_held_out_with_all_its_examples(seed):
    prompts = "aabccd"
    sides = hold_out(of_prompts(prompts), [prompt.encode() for prompt in prompts], 2, seed)
    train, held_out = ([example.columns["prompt"] for example in side] for side in sides)
    assert len(held_out) == 2
    assert sorted(train + held_out) == list(prompts)
    assert not set(train) & set(held_out)


def test_all_but_one_can_be_held_out():
    train, held_out = hold_out(of_prompts("abcd"), [b"a", b"b", b"c", b"d"], 3, 0)
    assert (len(train), len(held_out)) == (1, 3)


def test_fewer_than_any_prompt_has_are_too_few():
    with pytest.raises(ValueError, match=r"num_held_out 1 is too few .*; use 2, the examples of the smallest$"):
        hold_out(of_prompts("aaabb"), [b"a", b"a", b"a", b"b", b"b"], 1, 0)


@pytest.mark.parametrize(("prompts", "number", "most"), [("abcd", 4, 3), ("aa", 1, 0), ("aab", 3, 2)])
def test_no_prompt_is_cut_and_something_is_left_to_train_on(prompts, number, most):
    with pytest.raises(ValueError, match=f"num_held_out {number} is too many .* use at most {most}$"):
        hold_out(of_prompts(prompts), [prompt.encode() for prompt in prompts], number, 0)


def test_a_tally_names_the_first_three_places_and_says_where_there_are_more():
    tally = Tally()
    for what, place in (("once", "a"), ("nowhere", None), ("twice", "b"), ("twice", None), *[("often", "c")] * 4):
        tally.add(what, place)
    found = {what: tally.places(what) for what in ("once", "nowhere", "twice", "often")}
    assert found == {"once": ["a"], "nowhere": [], "twice": ["b", "..."], "often": ["c", "c", "c", "..."]}


def test_data_are_read_unless_they_say_that_they_were_sampled():
    assert not Data([], [], {}, "").sampled


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
