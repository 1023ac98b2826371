"""Refusals of hyperparameters: at both ends of what is allowed, and just past them."""

import dataclasses
import math
import re

import numpy as np
import pytest

from pjpo import checks


@dataclasses.dataclass(frozen=True)
class Config:
    weight: float = 1.0
    flip_rate: float = 0.0
    form: str = "mean"


@pytest.mark.parametrize(
    ("check", "good", "bad", "allowed"),
    [
        (checks.positive, (1e-30, 1e30), (0.0, -0.1, math.inf, math.nan), "> 0 and finite"),
        (checks.not_negative, (0.0, 1e30), (-1e-30, math.inf, math.nan), ">= 0 and finite"),
        (checks.finite, (-1e30, 0.0, 1e30), (-math.inf, math.inf, math.nan), "finite"),
    ],
)
def test_bounds(check, good, bad, allowed):
    for weight in good:
        check(Config(weight=weight), "weight")
    for weight in bad:
        with pytest.raises(ValueError, match=re.escape(f"test_checks: weight must be {allowed}, got {weight}")):
            check(Config(weight=weight), "weight")


@pytest.mark.parametrize("weight", ["0.1", None, True, [0.1], 1j])
def test_what_is_no_number_is_refused_by_name(weight):
    config = Config(weight=weight, flip_rate=weight)
    refusals = [
        lambda: checks.positive(config, "weight"),
        lambda: checks.not_negative(config, "weight"),
        lambda: checks.above(config, 1, "weight"),
        lambda: checks.between(config, 0, 1, "weight"),
        lambda: checks.finite(config, "weight"),
        lambda: checks.at_least(config, 1, "weight"),
        lambda: checks.flip_rate(config),
    ]
    for refusal in refusals:
        with pytest.raises(ValueError, match=rf"test_checks: \w+ must be a number, got {re.escape(repr(weight))}"):
            refusal()


def test_numbers_of_numpy_are_numbers():
    checks.positive(Config(weight=np.float32(0.1)), "weight")
    checks.at_least(Config(weight=np.int64(2)), 2, "weight")


def test_least():
    checks.at_least(Config(weight=2), 2, "weight")
    with pytest.raises(ValueError, match="test_checks: weight must be >= 3, got 2"):
        checks.at_least(Config(weight=2), 3, "weight")


def test_ranges():
    for weight in (1.0, 2.0):
        checks.between(Config(weight=weight), 1, 2, "weight")
    for weight in (0.99, 2.01, math.nan):
        with pytest.raises(ValueError, match=rf"test_checks: weight must be in \[1, 2\], got {weight}"):
            checks.between(Config(weight=weight), 1, 2, "weight")
    checks.above(Config(weight=1.01), 1, "weight")
    for weight in (1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"test_checks: weight must be > 1 and finite, got {weight}"):
            checks.above(Config(weight=weight), 1, "weight")


def test_flip_rate():
    for rate in (0.0, 0.4999):
        checks.flip_rate(Config(flip_rate=rate))
    for rate in (-0.1, 0.5, math.nan):
        with pytest.raises(ValueError, match=rf"flip_rate must be in \[0, 0.5\), got {rate}; swap the labels"):
            checks.flip_rate(Config(flip_rate=rate))


def test_one_of():
    checks.one_of(Config(), "form", ("sum", "mean"))
    with pytest.raises(ValueError, match="test_checks: form must be one of sum, max, got 'mean'"):
        checks.one_of(Config(), "form", ("sum", "max"))
