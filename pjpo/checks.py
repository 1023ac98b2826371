"""What hyperparameters may be: refusals that name the module of the config, the field, its value and what is allowed.

A comparison with nan is false, so each of these refuses nan too.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np


def positive(config: Any, *fields: str) -> None:
    """
    Raises:
        ValueError: a field that is not > 0 and finite.
    """
    for field in fields:
        _check(config, field, 0 < getattr(config, field) < math.inf, "> 0 and finite")


def not_negative(config: Any, *fields: str) -> None:
    """
    Raises:
        ValueError: a field that is not >= 0 and finite.
    """
    for field in fields:
        _check(config, field, 0 <= getattr(config, field) < math.inf, ">= 0 and finite")


def above(config: Any, bound: float | int, *fields: str) -> None:
    """
    Raises:
        ValueError: a field that is not > `bound` and finite.
    """
    for field in fields:
        _check(config, field, bound < getattr(config, field) < math.inf, f"> {bound} and finite")


def between(config: Any, low: float | int, high: float | int, *fields: str) -> None:
    """
    Raises:
        ValueError: a field outside of [low, high].
    """
    for field in fields:
        _check(config, field, low <= getattr(config, field) <= high, f"in [{low}, {high}]")


def finite(config: Any, *fields: str) -> None:
    """
    Raises:
        ValueError: a field that is nan or infinite.
    """
    for field in fields:
        _check(config, field, math.isfinite(getattr(config, field)), "finite")


def at_least(config: Any, least: int, *fields: str) -> None:
    """
    Raises:
        ValueError: a field below `least`.
    """
    for field in fields:
        _check(config, field, getattr(config, field) >= least, f">= {least}")


def flip_rate(config: Any) -> None:
    """
    Raises:
        ValueError: `config.flip_rate` is no rate at which labels still say more truth than untruth.
    """
    allowed = 0 <= config.flip_rate < 0.5
    _check(config, "flip_rate", allowed, "in [0, 0.5)", "swap the labels of noisier data")


def one_of(config: Any, field: str, allowed: Iterable[str]) -> None:
    """
    Raises:
        ValueError: a field that is none of `allowed`.
    """
    allowed = tuple(allowed)
    _check(config, field, getattr(config, field) in allowed, f"one of {', '.join(allowed)}")


def _check(config: Any, field: str, good: bool | np.bool_, allowed: str, way_out: str = "") -> None:
    if not good:
        place = type(config).__module__.rpartition(".")[2]
        hint = f"; {way_out}" if way_out else ""
        raise ValueError(f"{place}: {field} must be {allowed}, got {getattr(config, field)!r}{hint}")
