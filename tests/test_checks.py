"""Refusals of hyperparameters: at both ends of what is allowed, and just past them."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
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


@dataclasses.dataclass(frozen=True)
class Part:
    size: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kinds:
    count: int = 1
    rate: float = 1.0
    is_on: bool = False
    path: str = ""
    form: Literal["sum", "mean", 0] = "sum"
    most: int | None = None
    stop: tuple[str, ...] = ()
    range: tuple[float, int] = (0.5, 1)
    part: Part = dataclasses.field(default_factory=Part)
    parts: tuple[Part, ...] = ()
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    loss: Callable = len
    data: Any = 1
    evaluation: Any = None


def test_values_of_their_kind_are_taken():
    for settings in (
        {"count": np.int64(4), "rate": np.float32(0.1), "is_on": np.bool_(True), "most": jnp.int32(3)},
        {"rate": 1, "most": 3, "form": 0, "path": Path("there"), "stop": ["a", "b"], "range": (1, np.int32(2))},
        {"rate": jnp.float32(0.1), "parts": (Part(), Part()), "others": {"a": 1}, "loss": Part, "evaluation": 1},
    ):
        checks.kinds(Kinds(**settings))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 4.0}, "kinds: count must be a whole number, got 4.0"),
        ({"count": True}, "kinds: count must be a whole number, got True"),
        ({"count": jnp.float32(4)}, "kinds: count must be a whole number, got "),
        ({"rate": None}, "kinds: rate must be a number, got None"),
        ({"rate": np.array([0.1])}, "kinds: rate must be a number, got array"),
        ({"is_on": "no"}, "kinds: is_on must be True or False, got 'no'"),
        ({"is_on": 1}, "kinds: is_on must be True or False, got 1"),
        ({"path": 1}, "kinds: path must be a text, got 1"),
        ({"form": "max"}, "kinds: form must be one of sum, mean, 0, got 'max'"),
        ({"form": False}, "kinds: form must be one of sum, mean, 0, got False"),
        ({"most": 1.5}, "kinds: most must be a whole number or None, got 1.5"),
        ({"stop": None}, "kinds: stop must be a tuple, each a text, got None"),
        ({"stop": "end"}, "kinds: stop must be a tuple, each a text, got 'end'"),
        ({"stop": ("a", 1)}, "kinds: stop must be a tuple, each a text, got ('a', 1)"),
        ({"range": (0.5,)}, "kinds: range must be a tuple (a number, a whole number), got (0.5,)"),
        ({"range": (0.5, 1.5)}, "kinds: range must be a tuple (a number, a whole number), got (0.5, 1.5)"),
        ({"part": {"size": 1}}, "kinds: part must be a tests.test_checks.Part, got {'size': 1}"),
        ({"loss": "dpo"}, "kinds: loss must be a function, got 'dpo'"),
        ({"others": 1}, "kinds: others must be a collections.abc.Mapping, got 1"),
        ({"data": None}, "kinds: data must be given, got None"),
        ({"part": Part(size="2")}, "part: size must be a whole number, got '2'"),
        ({"parts": (Part(), Part(size=None))}, "part: size must be a whole number, got None"),
        ({"data": Part(size=0.5)}, "part: size must be a whole number, got 0.5"),
    ],
)
def test_values_of_another_kind_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        checks.kinds(Kinds(**settings))
