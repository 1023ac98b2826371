"""Settings from a stranger's file, checked as they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

LARGEST = float(np.finfo(np.float32).max)  # what every number is computed with


class Fields:
    """Values by name; one that is missing, or null, is the default where there is one.

    Every method raises a ValueError that names the file and the value.
    """

    def __init__(self, values: Mapping[str, Any], path: Path, prefix: str = ""):
        """`prefix` is what the file puts before every name."""
        self._values, self._path, self._prefix = values, path, prefix

    def get(self, name: str, default: Any = None) -> Any:
        value = self._values.get(self._prefix + name)
        return default if value is None else value

    def number(self, name: str, default: float | None = None) -> float:
        return float(self._check(name, default, lambda value: abs(value) <= LARGEST, "a number within float32"))

    def optional(self, name: str) -> float | None:
        return None if self.get(name) is None else self.number(name)

    def size(self, name: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        def good(value: Any) -> bool:
            return isinstance(value, int) and 1 <= value <= most

        return self._check(name, default, good, f"a whole number from 1 to {most}")

    def only(self, name: str, *allowed: Any) -> Any:
        """One of the values that the decoder computes; the first of them where the file is silent."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            one_of = " or ".join(map(repr, allowed))
            self._refuse(f"{self._prefix}{name} = {value!r} is not supported by this decoder, only {one_of}")
        return value

    def _check(self, name: str, default: Any, good: Callable[[Any], bool], allowed: str) -> Any:
        value = self.get(name, default)
        if value is None:
            self._refuse(f"the file does not say '{self._prefix}{name}'")
        if isinstance(value, bool) or not isinstance(value, int | float) or not good(value):
            self._refuse(f"{self._prefix}{name} must be {allowed}, got {value!r}")
        return value

    def _refuse(self, message: str):
        raise ValueError(f"{self._path}: {message}")
