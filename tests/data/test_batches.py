import itertools
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjpo.data.batches import Batches, in_order
from pjpo.data.buckets import Buckets
from pjpo.packing import pack
from tests.data.fakes import example


def make_examples(number, seed=0):
    """Examples of many lengths; the first prompt token is the example's place."""
    rng = np.random.default_rng(seed)
    lengths = 2 ** rng.uniform(0, [5, 4, 4], (number, 3))
    return [example(*map(int, lengths[i]), start=i, id=f"rows:{i}") for i in range(number)]


def make(examples, **settings):
    settings = {"batch_size": 4, "seed": 0, "buckets": Buckets.of(examples)} | settings
    return Batches(examples, **settings)


def places(batches):
    return [batch.prompt_tokens[:, 0].tolist() for batch in batches]


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_every_epoch_holds_every_example_in_an_order_of_its_own():
    rows = np.concatenate(places(make(make_examples(24), num_epochs=2, window=2))).tolist()
    assert sorted(rows[:24]) == sorted(rows[24:]) == list(range(24))
    assert rows[:24] != rows[24:]
    assert rows[:24] != list(range(24))


def test_epochs_follow_without_a_gap_and_the_last_rows_are_dropped():
    batches = places(make(make_examples(10), num_epochs=3, window=1))
    assert len(batches) == 7  # 30 rows, 4 at a time
    rows = np.concatenate(batches)
    counts = np.bincount(rows, minlength=10)
    assert counts.sum() == 28
    assert counts.max() == 3
    assert sorted(rows[:10]) == list(range(10))


def test_without_an_end_batches_go_on():
    assert len(list(itertools.islice(make(make_examples(5)), 20))) == 20


@pytest.mark.parametrize("window", [1, 32])
def test_the_seed_decides_the_order(window):
    orders = [places(make(make_examples(40), seed=seed, num_epochs=1, window=window)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_without_shuffling_the_order_is_kept():
    assert places(make(make_examples(9), shuffle=False, num_epochs=1)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_windows_bring_similar_lengths_together():
    examples = make_examples(400)
    real = sum(len(tokens) for example in examples for tokens in (example.prompt, *example.completions))

    def computed(window):
        return sum(b.prompt_mask.size + b.completion_mask.size for b in make(examples, num_epochs=1, window=window))

    assert real < computed(32) < 0.8 * computed(1)
    widths = [batch.completion_tokens.shape[2] for batch in itertools.islice(make(examples), 32)]
    assert widths != sorted(widths)  # and the batches of a window come in any order


@settings(max_examples=20, deadline=None)
@given(
    st.integers(8, 50),
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(0, 20),
    st.integers(0, 20),
    st.booleans(),
    st.sampled_from([None, 2]),
    st.sampled_from([None, 1]),
)
def test_a_restored_position_goes_on_exactly(number, batch_size, window, stop, used, shuffle, num_epochs, num_groups):
    settings = {"window": window, "shuffle": shuffle, "seed": 3, "num_epochs": num_epochs, "num_groups": num_groups}

    def fresh():
        return make(make_examples(number), batch_size=batch_size, **settings)

    batches = fresh()
    for _ in itertools.islice(batches, stop):
        pass
    state = json.loads(json.dumps(batches.get_state()))
    expected = list(itertools.islice(batches, 8))
    other = fresh()
    for _ in itertools.islice(other, used):  # wherever it stands
        pass
    other.set_state(state)
    assert other.get_state() == state
    restored = list(itertools.islice(other, 8))
    assert len(restored) == len(expected)
    for pair in zip(restored, expected, strict=True):
        assert_same(*pair)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 8}, "batch_size was 4 then, 8 now"),
        ({"seed": 1}, "seed was 0 then, 1 now"),
        ({"shuffle": False}, "shuffle was True then, False now"),
        ({"window": 2}, "window was 32 then, 2 now"),
        ({"num_groups": 2}, "packed was False then, True now"),
        ({"buckets": Buckets((99,), (99,))}, r"buckets was .* then, \[\[99\], \[99\]\] now"),
        ({"examples": make_examples(15)}, "num_examples was 16 then, 15 now"),
        ({"examples": make_examples(16, seed=1)}, "examples_sha256 was"),
    ],
)
def test_a_position_in_something_else_is_refused(change, named):
    examples = make_examples(16)
    state = make(examples).get_state()
    other = make(**({"examples": examples, "buckets": Buckets.of(examples)} | change))
    with pytest.raises(ValueError, match=f"the saved data position does not fit: .*{named}.*or a new run"):
        other.set_state(state)


@pytest.mark.parametrize("num_groups", [None, 4])
def test_hosts_share_each_batch_and_its_shape(num_groups):
    examples = make_examples(24)
    settings = {"batch_size": 8, "num_epochs": 2, "num_groups": num_groups}
    whole = list(make(examples, **settings))
    shards = [make(examples, **settings, shard_index=i, shard_count=4) for i in range(4)]
    assert len(whole) == 6
    for batch, *parts in zip(whole, *shards, strict=True):
        assert_same(jax.tree.map(lambda *rows: np.concatenate(rows), *parts), batch)
    assert shards[1].get_state() == make(examples, **settings).get_state() | {"position": {"next_index": 6}}


@settings(max_examples=20)
@given(st.integers(8, 60), st.sampled_from([4, 8]), st.integers(1, 9) | st.none(), st.integers(0, 99))
def test_packing_changes_no_row_of_a_window(number, batch_size, window, seed):
    examples = make_examples(number)
    settings = {"batch_size": batch_size, "seed": seed, "num_epochs": 3}
    packed = make(examples, **settings, window=window, num_groups=1)
    plain = make(examples, **settings, window=packed._window)
    start, num_batches = 0, 3 * number // batch_size
    found, expected = places(packed), places(plain)
    assert len(found) == len(expected) == num_batches
    while start < num_batches:  # the same rows, in other batches
        _, stop = packed._window_around(start)
        assert np.array_equal(np.sort(found[start:stop], axis=None), np.sort(expected[start:stop], axis=None))
        start = stop


def test_a_window_ends_with_its_epoch():
    rows = places(make(make_examples(10), batch_size=4, num_epochs=4, window=100))
    # Batches 0-2 begin in the first epoch (rows 0-9), 3 and 4 in the second, ...
    assert [make(make_examples(10), batch_size=4, window=100)._window_around(i) for i in (0, 2, 3, 4, 5)] == [
        (0, 3),
        (0, 3),
        (3, 5),
        (3, 5),
        (5, 8),
    ]
    counts = np.bincount(np.concatenate(rows), minlength=10)
    assert counts.tolist() == [4] * 10


def test_the_rows_of_a_packed_batch_do_not_depend_on_the_devices():
    examples = make_examples(64)
    orders = [places(make(examples, batch_size=8, num_epochs=2, num_groups=groups)) for groups in (1, 2, 4)]
    assert orders[1:] == [orders[0]] * 2


def test_packed_batches_are_packed_by_groups():
    for batch in make(make_examples(64), batch_size=8, num_epochs=1, num_groups=2):
        assert_same(batch.packing, pack(batch, num_groups=2, places=places_of(batch.packing)).packing)


def places_of(packing):
    return packing.num_prompt_places, packing.slots.shape[1] - packing.num_prompt_places


def test_evaluation_sees_every_example_once_and_fills_up_with_nothing():
    examples = make_examples(6)
    batches = list(in_order(examples, 4, Buckets.of(examples)))
    assert [batch.prompt_tokens.shape[0] for batch in batches] == [4, 4]
    assert places(batches) == [[0, 1, 2, 3], [4, 5, 0, 0]]
    for mask in (batches[1].prompt_mask, batches[1].completion_mask, batches[1].loss_mask):
        assert mask[:2].any()
        assert not mask[2:].any()
    total = sum(batch.loss_mask.sum() for batch in batches)
    assert total == sum(len(tokens) for example in examples for tokens in example.completions)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"batch_size": 17}, "batch_size 17 is larger than the 16 examples; use 16 or less"),
        ({"num_epochs": 0}, "num_epochs must be >= 1, got 0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"window": 0}, "window must be >= 1, got 0"),
        ({"batch_size": 12, "shard_count": 8}, "batch_size 12 is not divisible by shard_count 8; use 8 or 16"),
        ({"batch_size": 4, "shard_count": 8}, "batch_size 4 is not divisible by shard_count 8; use 8$"),
        ({"num_groups": 0}, "num_groups must be >= 1, got 0"),
        ({"num_groups": 3}, "num_groups 3 must divide batch_size 4"),
        ({"num_groups": 1, "shard_count": 2}, "num_groups 1 must .* be divisible by shard_count 2"),
        ({"shard_index": 2, "shard_count": 2}, "shard_index must be in 0..1 as shard_count is 2, got 2"),
        ({"shard_index": -1}, "shard_index must be in 0..0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make(make_examples(16), **settings)
