import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjpo.data import mixture, preference, prompts
from pjpo.data.batches import Batches
from pjpo.data.buckets import Buckets
from pjpo.data.examples import Shape
from tests.data.fakes import write_rows
from tests.data.test_files import CONTEXT, ids, pairs


def make_parts(tmp_path, sizes, weights, **settings):
    parts = []
    for name, size, weight in zip("abc", sizes, map(float, weights), strict=False):
        rows = [row | {"prompt": f"{name}{row['prompt']}"} for row in pairs(size)]
        path = write_rows(tmp_path / f"{name}.jsonl", rows)
        parts.append(mixture.Part(name=name, data=preference.Config(path=path, **settings), weight=weight))
    return tuple(parts)


def batches_of(data, **settings):
    buckets = Buckets.of(itertools.chain(data.train, data.held_out))
    return Batches(data.train, buckets=buckets, weights=data.weights, **({"batch_size": 8, "seed": 0} | settings))


def test_a_mixture_says_of_each_row_where_it_came_from(tmp_path):
    data = mixture.Config(parts=make_parts(tmp_path, (4, 6), (3, 1), num_held_out=1)).build(CONTEXT)
    assert (data.sources, data.weights) == (("a", "b"), (0.75, 0.25))
    assert [(example.source, example.id[0]) for example in data.train] == [(0, "a")] * 3 + [(1, "b")] * 5
    assert [(example.source, example.id[0]) for example in data.held_out] == [(0, "a"), (1, "b")]
    assert data.counts == {"a/rows": 4, "a/used": 4, "b/rows": 6, "b/used": 6}
    assert "a, weight 3: " in data.about
    assert "together 8 examples to train on, 2 held out" in data.about


def test_a_mixture_is_as_wide_as_its_widest_part_where_all_of_them_know(tmp_path):
    limits = [{"max_prompt_tokens": 5, "max_completion_tokens": 9}, {"max_prompt_tokens": 8}]
    parts = [make_parts(tmp_path, (1,), (1,), **limit)[0] for limit in limits]
    parts[1] = dataclasses.replace(parts[1], name="b")
    assert mixture.Config(parts=tuple(parts)).shape == Shape(num_completions=2, prompt_tokens=8)
    unknown = mixture.Part(name="c", data=object())
    assert mixture.Config(parts=(parts[0], unknown)).shape == Shape()


@pytest.mark.parametrize("num_groups", [None, 1])
@settings(max_examples=8)
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=3), st.integers(0, 5))
def test_rows_come_in_the_proportions_of_the_weights(tmp_path_factory, num_groups, weights, seed):
    parts = make_parts(tmp_path_factory.mktemp("mixed"), (9, 20, 30), weights)
    data = mixture.Config(parts=parts).build(CONTEXT)
    batches = batches_of(data, seed=seed, num_groups=num_groups, window=1 if num_groups is None else None)
    _, stop = batches._window_around(20)  # rows move between the batches of a window
    seen = np.concatenate([batch.sources for batch in itertools.islice(batches, stop)])
    counts = np.bincount(seen, minlength=len(weights))
    np.testing.assert_allclose(counts, len(seen) * np.array(data.weights), atol=len(weights))


def test_every_row_of_a_part_comes_before_one_comes_twice(tmp_path):
    data = mixture.Config(parts=make_parts(tmp_path, (8, 24), (1, 1))).build(CONTEXT)
    rows = [
        tuple(row[mask])
        for batch in itertools.islice(batches_of(data, window=1), 6)
        for row, mask in zip(batch.prompt_tokens, batch.prompt_mask, strict=True)
    ]
    of_a, of_b = ([row for row in rows if row[0] == ord(name)] for name in "ab")
    assert (len(of_a), len(set(of_a))) == (24, 8)
    assert len(set(of_b)) == 24
    assert set(of_a[:8]) == set(of_a[8:16])


def test_a_mixture_goes_on_where_it_was(tmp_path):
    data = mixture.Config(parts=make_parts(tmp_path, (9, 20), (2, 1))).build(CONTEXT)
    batches = batches_of(data)
    for _ in range(5):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(9)]
    again = batches_of(data)
    again.set_state(state)
    for batch in expected:
        found = next(again)
        np.testing.assert_array_equal(found.prompt_tokens, batch.prompt_tokens)
        np.testing.assert_array_equal(found.sources, batch.sources)
    other = mixture.Config(parts=make_parts(tmp_path, (9, 20), (1, 1))).build(CONTEXT)
    with pytest.raises(ValueError, match=r"weights was \[0.66.*\] then, \[0.5, 0.5\] now"):
        batches_of(other).set_state(state)


def test_a_prompt_that_one_part_holds_out_is_not_trained_on_in_another(tmp_path):
    same = write_rows(tmp_path / "same.jsonl", pairs(5))
    parts = (
        mixture.Part(name="a", data=preference.Config(path=same, num_held_out=2)),
        mixture.Part(name="b", data=preference.Config(path=same)),
    )
    data = mixture.Config(parts=parts).build(CONTEXT)
    assert len(data.train) == 6
    assert not {example.prompt.tobytes() for example in data.train} & {e.prompt.tobytes() for e in data.held_out}
    assert data.counts["b/skipped, prompt held out in another part"] == 2
    assert "a/skipped, prompt held out in another part" not in data.counts


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_weights_that_are_none_are_refused(weight):
    part = mixture.Part(name="b", data=preference.Config(path="b.jsonl"), weight=weight)
    with pytest.raises(ValueError, match=f"mixture: weight of 'b' must be > 0 and finite, got {weight}; leave out"):
        mixture.Config(parts=(mixture.Part(name="a", data=part.data), part))


def test_parts_need_names(tmp_path):
    parts = make_parts(tmp_path, (2, 2), (1, 1))
    for wrong in ((), (parts[0], parts[0])):
        with pytest.raises(ValueError, match=r"mixture: parts need names of their own, got (no parts|'a', 'a')"):
            mixture.Config(parts=wrong)


def test_an_empty_part_is_named(tmp_path):
    parts = make_parts(tmp_path, (3,), (1,))
    empty = write_rows(tmp_path / "empty.jsonl", [{"prompt": "Q", "chosen": "a", "rejected": "a"}])
    with pytest.raises(ValueError, match=r"mixture, part 'e': .*empty.jsonl has no row that can be used"):
        mixture.Config(parts=(*parts, mixture.Part(name="e", data=preference.Config(path=empty)))).build(CONTEXT)
    small = write_rows(tmp_path / "small.jsonl", pairs(1))
    held = mixture.Part(name="h", data=preference.Config(path=small, held_out_path=small))
    same = mixture.Part(name="x", data=preference.Config(path=small))
    with pytest.raises(ValueError, match="mixture: nothing of 'x' is left to train on"):
        mixture.Config(parts=(held, same)).build(CONTEXT)


def test_kinds_do_not_mix(tmp_path):
    parts = make_parts(tmp_path, (8,), (1,))
    other = mixture.Part(name="p", data=prompts.Config(path=parts[0].data.path))
    data = mixture.Config(parts=(*parts, other)).build(CONTEXT)
    with pytest.raises(ValueError, match=r"one number of completions: .*; do not mix data of different kinds"):
        next(batches_of(data, window=1))


def test_epochs_have_no_meaning(tmp_path):
    data = mixture.Config(parts=make_parts(tmp_path, (9, 9), (1, 1))).build(CONTEXT)
    with pytest.raises(ValueError, match=r"num_epochs must be None where sources are mixed by weight, got 2"):
        batches_of(data, num_epochs=2)
    assert ids(data.train)[0] == "a.jsonl:1"
