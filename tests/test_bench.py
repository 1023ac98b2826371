"""Jobs of the benchmarks at sizes of no interest: what they measure, not how fast it is."""

import types

import jax
import pytest

from benchmarks import bench

MODEL = {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "ffn": 16, "vocab": 32}
MODEL |= {"rope_theta": 1e4, "norm_eps": 1e-5, "tied": True, "max_pos": 16}
SPEC = {"seed": 1, "special_tokens": {"first_free": 4}}


def make(job, **options):
    args = {"job": "tiny", "model": "tiny", "dtype": "fp32", "cores": 1, "steps": 2, "variants": None} | options
    return bench.Bench(SPEC, job, MODEL, types.SimpleNamespace(**args))


@pytest.fixture(autouse=True)
def _keep_caches(monkeypatch):
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # or later tests compile again


def test_sizes_are_generated_each_and_speed_is_of_their_own_tokens(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(bench, "_now", lambda cores: next(clock))  # whatever is done takes a second
    job = {"kind": "sizes", "batches": [1, 3], "prompt": 4, "new_tokens": [2, 5]}
    found = bench.sizes(make(job))
    speeds = {"1 x 2": 2, "1 x 5": 5, "3 x 2": 6, "3 x 5": 15}
    assert {name: numbers["tokens_per_s"] for name, numbers in found.items()} == speeds
    assert all(numbers["step_s"] == [1, 1] for numbers in found.values())
    assert list(bench.sizes(make(job, variants="3 x 2"))) == ["3 x 2"]
