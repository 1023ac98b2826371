"""Published values for online methods, rounded to eight decimals: tests/data_files/online.json, by function."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

CASES = json.loads((pathlib.Path(__file__).parent / "data_files" / "online.json").read_text())


def cases(name):
    """Parametrises a test by (inputs, expected, dtype)."""
    found = [(case["inputs"], case["expected"], dtype) for case in CASES[name] for dtype in ("float64", "float32")]
    ids = [f"{i // 2 + 1}-{dtype}" for i, (*_, dtype) in enumerate(found)]
    return pytest.mark.parametrize(("inputs", "expected", "dtype"), found, ids=ids)


def x64(dtype):
    return jax.enable_x64(dtype == "float64")


def arrays(inputs, dtype, *names):
    """These inputs as arrays; masks as booleans."""
    return [jnp.asarray(inputs[name], bool if name == "mask" else dtype) for name in names]


def check(found, expected, dtype):
    """To the rounding of the printed values, relative to what is above 1."""
    assert found.dtype == dtype
    bound = 2e-8 if dtype == "float64" else 2e-5
    expected = np.asarray(expected)
    np.testing.assert_array_less(np.abs(found - expected), bound * np.maximum(1, np.abs(expected)))
