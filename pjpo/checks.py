"""What hyperparameters may be: refusals that name the module of the config, the field, its value and what is allowed.

A comparison with nan is false, so each of these refuses nan too; and what is no number, such as "0.1" or None.
"""

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np


def positive(config: Any, *fields: str) -> None:
    """
    Raises:
        ValueError: a field that is not > 0 and finite.
    """
    for field in fields:
        _check_number(config, field, lambda x: 0 < x < math.inf, "> 0 and finite")


def not_negative(config: Any, *fields: str) -> None:
    """
    Raises:
        ValueError: a field that is not >= 0 and finite.
    """
    for field in fields:
        _check_number(config, field, lambda x: 0 <= x < math.inf, ">= 0 and finite")


def above(config: Any, bound: float | int, *fields: str) -> None:
    """
    Raises:
        ValueError: a field that is not > `bound` and finite.
    """
    for field in fields:
        _check_number(config, field, lambda x: bound < x < math.inf, f"> {bound} and finite")


def between(config: Any, low: float | int, high: float | int, *fields: str) -> None:
    """
    Raises:
        ValueError: a field outside of [low, high].
    """
    for field in fields:
        _check_number(config, field, lambda x: low <= x <= high, f"in [{low}, {high}]")


def finite(config: Any, *fields: str) -> None:
    """
    Raises:
        ValueError: a field that is nan or infinite.
    """
    for field in fields:
        _check_number(config, field, math.isfinite, "finite")


def at_least(config: Any, least: int, *fields: str) -> None:
    """
    Raises:
        ValueError: a field below `least`.
    """
    for field in fields:
        _check_number(config, field, lambda x: x >= least, f">= {least}")


def flip_rate(config: Any) -> None:
    """
    Raises:
        ValueError: `config.flip_rate` is no rate at which labels still say more truth than untruth.
    """
    _check_number(config, "flip_rate", lambda x: 0 <= x < 0.5, "in [0, 0.5)", "swap the labels of noisier data")


def one_of(config: Any, field: str, allowed: Iterable[str]) -> None:
    """
    Raises:
        ValueError: a field that is none of `allowed`.
    """
    allowed = tuple(allowed)
    _check(config, field, getattr(config, field) in allowed, f"one of {', '.join(allowed)}")


def name_of(config: Any) -> str:
    """The module of a config, which is the method's name."""
    return type(config).__module__.rpartition(".")[2]


def _check_number(config: Any, field: str, is_good: Callable, allowed: str, way_out: str = "") -> None:
    value = getattr(config, field)
    _check(config, field, isinstance(value, numbers.Real) and not isinstance(value, bool), "a number")
    _check(config, field, is_good(value), allowed, way_out)


def _check(config: Any, field: str, good: bool | np.bool_, allowed: str, way_out: str = "") -> None:
    if not good:
        hint = f"; {way_out}" if way_out else ""
        raise ValueError(f"{name_of(config)}: {field} must be {allowed}, got {getattr(config, field)!r}{hint}")
