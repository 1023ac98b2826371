"""Label flips: as often as asked, once for all, and within [0, 0.5)."""

import numpy as np
import pytest

from pjpo.data.examples import Example
from pjpo.data.flips import flip


def pairs(count):
    return [
        Example(prompt=np.zeros(1, np.int32), completions=(np.array([i]), np.array([-i])), columns={}, id=str(i))
        for i in range(1, count + 1)
    ]


def test_pairs_are_swapped_at_the_rate_and_say_so():
    before = pairs(4000)
    after = flip(before, 0.3, seed=0)
    swapped = [bool(new.completions[0] == old.completions[1]) for new, old in zip(after, before, strict=True)]
    assert swapped == [example.columns["flipped"] for example in after]
    np.testing.assert_allclose(np.mean(swapped), 0.3, atol=0.03)
    assert swapped == [example.columns["flipped"] for example in flip(before, 0.3, seed=0)]
    assert swapped != [example.columns["flipped"] for example in flip(before, 0.3, seed=1)]
    assert not any(example.columns["flipped"] for example in flip(before, 0.0, seed=0))


@pytest.mark.parametrize("rate", [-0.1, 0.5, 1.0, float("nan")])
def test_rates_that_say_the_opposite_are_refused(rate):
    with pytest.raises(ValueError, match=r"flip_rate must be in \[0, 0.5\), got"):
        flip(pairs(1), rate, seed=0)


def test_only_pairs_can_be_flipped():
    single = Example(prompt=np.zeros(1, np.int32), completions=(np.array([1]),), columns={}, id="x:1")
    with pytest.raises(ValueError, match="x:1: only pairs can be flipped, not 1"):
        flip([single], 0.1, seed=0)
