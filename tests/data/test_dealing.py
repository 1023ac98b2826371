"""How much of what is computed is real, and in how many shapes, on the lengths of HH's pairs."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjpo.data.arrange import SLACKS
from pjpo.data.batches import Batches
from pjpo.data.buckets import Buckets
from pjpo.data.dealing import deal, halve
from tests import tiny
from tests.data.fakes import example

# Prompt, chosen and rejected tokens of 1,992 pairs, in SmolLM2's tokens; see make_hh_lengths.py beside it.
LENGTHS = np.load(pathlib.Path(__file__).parents[1] / "data_files" / "hh_lengths.npy")
WITHIN_LIMITS = (LENGTHS[:, 0] <= 256) & (LENGTHS[:, 1:].max(1) <= 128)  # those of experiments/dpo_hh.py
NO_LIMITS = LENGTHS[:, 0] > 0


def measured(rows, num_epochs, batch_size, num_groups):
    """(real tokens over computed positions, compiled shapes) of the batches that training would get."""
    examples = [example(*map(int, row)) for row in rows]
    settings = {"batch_size": batch_size, "num_groups": num_groups, "num_epochs": num_epochs}
    batches = Batches(examples, seed=0, buckets=Buckets.of(examples), **settings)
    real = computed = 0
    shapes = set()
    for batch in batches:
        slots, num_slots = batch.packing.slots, batch.packing.places.shape[1]
        real += (slots < num_slots).sum()
        computed += slots.size
        shapes.add((str(jax.tree.map(np.shape, batch)), batch.packing.num_prompt_places))
    if num_epochs * len(rows) % batch_size == 0:  # no token is lost; a prompt's last one starts its completions
        assert real == num_epochs * (rows[:, 0] - 1 + rows[:, 1:].sum(1)).sum()
    return real / computed, len(shapes)


@pytest.mark.parametrize(
    ("rows", "batch_size", "num_groups", "most_shapes"),
    [
        (WITHIN_LIMITS, 8, 1, 10),
        (WITHIN_LIMITS, 16, 2, 18),
        (NO_LIMITS, 8, 1, 10),
        (NO_LIMITS, 16, 1, 12),
        (NO_LIMITS, 64, 8, 14),
    ],
)
def test_at_least_95_percent_of_positions_are_real_in_few_shapes(rows, batch_size, num_groups, most_shapes):
    real, shapes = measured(LENGTHS[rows], 3, batch_size=batch_size, num_groups=num_groups)
    assert real >= 0.95
    assert shapes <= most_shapes


def test_a_larger_data_set_of_these_lengths_needs_no_more_shapes():
    rows = np.random.default_rng(0).choice(LENGTHS[WITHIN_LIMITS], 8000)
    real, shapes = measured(rows, 1, batch_size=32, num_groups=4)
    assert real >= 0.96
    assert shapes <= 12


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([1, 2]))
def test_shapes_are_bounded_for_any_lengths(seed, num_groups):
    rng = np.random.default_rng(seed)
    rows = (rng.pareto(rng.uniform(0.5, 3), (40, 3)) * 10 + 1).clip(max=3000).astype(int)
    _, shapes = measured(rows, 3, batch_size=4, num_groups=num_groups)
    assert shapes <= 9 * (len(SLACKS) + 1)


def test_log_probs_are_those_of_padded_batches():
    policy = tiny.make_policy(vocab_size=64)
    params = tiny.make_params(policy)
    lengths = np.random.default_rng(0).integers(1, [12, 6, 6], (48, 3))
    examples = [example(*map(int, row), start=start) for start, row in enumerate(lengths)]
    shapes, traced = set(), []

    @jax.jit
    def logps(params, batch):
        traced.append(batch)
        return policy.logps(params, batch)

    for batch in Batches(examples, batch_size=8, seed=0, buckets=Buckets.of(examples), num_epochs=1, num_groups=2):
        shapes.add(str((jax.tree.map(np.shape, batch), batch.packing.num_prompt_places)))
        padded = dataclasses.replace(batch, packing=None)
        np.testing.assert_allclose(logps(params, batch), policy.logps(params, padded), atol=2e-5)
    assert len(traced) == len(shapes)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 99))
def test_dealing_gives_every_row_once_and_never_spreads_the_sums(num_groups, size, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 200, (num_groups * size, 2))
    groups = deal(tokens, size, rng)
    assert groups.shape == (num_groups, size)
    assert sorted(groups.ravel()) == list(range(len(tokens)))
    dealt, as_they_came = (
        tokens[g].sum(1).std(0) / tokens.mean(0) for g in (groups, np.arange(len(tokens)).reshape(-1, size))
    )
    assert (dealt**2).sum() <= (as_they_came**2).sum() + 1e-9


def test_groups_of_eight_agree_to_one_part_in_fifty():
    tokens = LENGTHS[WITHIN_LIMITS][:1600] @ [[1, 0], [0, 1], [0, 1]]
    sums = tokens[deal(tokens, 8, np.random.default_rng(0))].sum(1)
    assert (abs(sums / sums.mean(0) - 1) < 0.02).all()


def test_halves_of_a_batch_and_their_halves_have_the_same_tokens():
    tokens = (LENGTHS[WITHIN_LIMITS] @ [[1, 0], [0, 1], [0, 1]])[:64]
    order = halve(tokens, np.random.default_rng(0))
    assert sorted(order) == list(range(64))
    for parts, off in ((2, 0.01), (4, 0.04), (8, 0.1)):
        sums = tokens[order].reshape(parts, -1, 2).sum(1)
        assert (abs(sums / sums.mean(0) - 1) < off).all()


@pytest.mark.parametrize("number", [1, 2, 3, 6, 10, 12])
def test_any_number_of_rows_is_halved_as_far_as_it_goes(number):
    tokens = np.random.default_rng(0).integers(1, 9, (number, 2))
    assert sorted(halve(tokens, np.random.default_rng(0))) == list(range(number))
