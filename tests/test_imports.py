"""Any module may be the first that a program imports."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CYCLIC = ("pjpo.sampling", "pjpo.models", "pjpo.models.policy", "pjpo.models.attention", "pjpo.step")


@pytest.mark.parametrize("module", CYCLIC)
def test_a_module_can_be_imported_first(module):
    subprocess.run([sys.executable, "-c", f"import {module}"], cwd=ROOT, check=True)
