"""What hyperparameters may be: refusals that name the module of the config, the field, its value and what is allowed.

A comparison with nan is false, so each of these refuses nan too; and what is no number, such as "0.1" or None.
"""

import dataclasses
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np

WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    types.NoneType: "None",
    Callable: "a function",
    Any: "given",
}


def kinds(config: Any) -> None:
    """Fields are what their annotations say, and so are those of the configs inside; for any dataclass.

    Where an annotation is `Any`, None is refused unless it is the default.

    Raises:
        ValueError: one is not.
    """
    name, hints = type(config).__name__.lower(), typing.get_type_hints(type(config))
    place = name_of(config) if name == "config" else name
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        is_missing = hint is Any and value is None and field.default is not None
        if is_missing or not _is(value, hint):
            raise ValueError(f"{place}: {field.name} must be {_said(hint)}, got {value!r}")
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if dataclasses.is_dataclass(part) and not isinstance(part, type):
                kinds(part)


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


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says; whole numbers are numbers, and scalars of NumPy and JAX are too."""
    if hasattr(value, "item") and np.ndim(value) == 0:
        value = value.item()
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if kind is Literal:
        return any(type(value) is type(allowed) and value == allowed for allowed in parts)
    if kind in (typing.Union, types.UnionType):
        return any(_is(value, part) for part in parts)
    if kind is tuple:  # a list does as well
        parts = parts[:1] * len(value) if parts[1:] == (...,) and isinstance(value, (tuple, list)) else parts
        return isinstance(value, (tuple, list)) and len(value) == len(parts) and all(map(_is, value, parts))
    if hint in (int, float):
        return isinstance(value, {int: numbers.Integral, float: numbers.Real}[hint]) and not isinstance(value, bool)
    return isinstance(value, (str, os.PathLike) if hint is str else kind or hint)


def _said(hint: Any) -> str:
    """An annotation, in words."""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if kind in (typing.Union, types.UnionType):
        return " or ".join(map(_said, parts))
    if kind is tuple:
        if parts[1:] != (...,):
            return f"a tuple ({', '.join(map(_said, parts))})"
        return "a tuple" if parts[0] is Any else f"a tuple, each {_said(parts[0])}"
    kind = kind or hint
    return WORDS.get(kind) or f"a {kind.__module__}.{kind.__qualname__}"


def _check_number(config: Any, field: str, is_good: Callable, allowed: str, way_out: str = "") -> None:
    value = getattr(config, field)
    _check(config, field, isinstance(value, numbers.Real) and not isinstance(value, bool), "a number")
    _check(config, field, is_good(value), allowed, way_out)


def _check(config: Any, field: str, good: bool | np.bool_, allowed: str, way_out: str = "") -> None:
    if not good:
        hint = f"; {way_out}" if way_out else ""
        raise ValueError(f"{name_of(config)}: {field} must be {allowed}, got {getattr(config, field)!r}{hint}")
