import pathlib

import pytest


@pytest.fixture
def hh_path():
    path = pathlib.Path(__file__).parents[3] / "shared" / "data" / "hh_harmless_base.jsonl.gz"
    if not path.exists():
        pytest.skip(f"the HH data set is not at {path}")
    return str(path)
