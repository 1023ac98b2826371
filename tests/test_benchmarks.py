"""Every variant of a benchmark's job still runs: on one layer, one step of each; and what a speed is of."""

import dataclasses
import json
import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from benchmarks import bench, refilled, refilling, scaling
from pjpo.sampling import Prompts, sequence_keys
from tests import test_rollouts

MODEL = {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn": 32, "vocab": 64}
MODEL |= {"rope_theta": 1e4, "norm_eps": 1e-5, "tied": True, "max_pos": 256}
JOBS = {
    "dpo_var": {"kind": "dpo", "pairs": 2, "prompt": [2, 9], "completion": [3, 7], "ref": "online"},
    "dpo_fixed_pre": {"kind": "dpo", "pairs": 2, "prompt": [8, 8], "completion": [4, 4], "ref": "cached"},
    "dpo_fixed_lora": {"kind": "dpo", "pairs": 2, "prompt": [8, 8], "completion": [4, 4], "ref": "adapter"},
    "sft": {"kind": "sft", "batch": 2, "length": 8},
    "shared": {"kind": "score", "prompts": 1, "group": 2, "prompt": 8, "completion": 4},
    "gen": {"kind": "generate", "batch": 2, "prompt": 4, "new_tokens": 4, "greedy": True},
    "gen_uneven": {"kind": "generate", "batch": 2, "group": 4, "prompt": 4, "new_tokens": 8, "mean_tokens": 4}
    | {"greedy": False},
    "gen_sizes": {"kind": "sizes", "batches": [1, 3], "prompt": 4, "new_tokens": [2, 5]},
    "grpo": {"kind": "grpo", "prompts": 1, "group": 2, "prompt": 4, "new_tokens": 4},
}
VARIANTS = {
    "dpo_var": {"default", "no_sharing", "full_head", "plain_products", "no_packing"},
    "dpo_fixed_pre": {"default", "no_sharing", "full_head", "plain_products", "sft"},
    "dpo_fixed_lora": {"default", "no_sharing", "full_head", "plain_products"},
    "sft": {"default", "full_head", "plain_products"},
    "shared": {"default", "no_sharing", "full_head", "plain_products"},
    "gen": {"default", "transposed", "plain_products", "weights_bf16"},
    "gen_uneven": {"default", "transposed", "plain_products", "no_sharing", "weights_bf16"}
    | {"halvings_1", "halvings_2", "halvings_3", "refilled_2", "refilled_4"},
    "gen_sizes": {"1 x 2", "1 x 5", "3 x 2", "3 x 5"},
    "grpo": {"default", "generate", "update", "update_no_sharing"},
}
SPECIAL = {"pad": 0, "eos": 1, "bos": 2, "unk": 3, "first_free": 4}


@pytest.mark.parametrize("job", ["sft", *(pytest.param(j, marks=pytest.mark.slow) for j in JOBS if j != "sft")])
def test_every_variant_runs(job, tmp_path):
    spec = {"seed": 1, "lr": 1e-6, "beta": 0.1, "max_grad_norm": 1.0, "special_tokens": SPECIAL}
    (tmp_path / "jobs.json").write_text(json.dumps(spec | {"models": {"tiny": MODEL}, "jobs": JOBS}))
    attention = "flash" if job == "sft" else "plain"  # which is the same on a CPU
    command = [sys.executable, "-m", "benchmarks.bench", job, "--jobs", tmp_path / "jobs.json", "--model", "tiny"]
    options = ["--steps", "1", "--attention", attention, *["--remat"] * (job == "sft")]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["attention"] == attention
    variants = report["variants"]
    assert set(variants) == VARIANTS[job]
    assert all(facts["tokens_per_s"] > 0 for facts in variants.values())


def test_a_size_s_speed_is_of_its_own_tokens(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(bench, "_now", lambda cores: next(clock))  # whatever is done takes a second
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # or later tests compile again
    options = {"job": "gen_sizes", "model": "tiny", "dtype": "fp32", "cores": 1, "steps": 2, "variants": None}
    options |= {"attention": "plain", "remat": False}
    spec = {"seed": 1, "special_tokens": SPECIAL}
    found = bench.sizes(bench.Bench(spec, JOBS["gen_sizes"], MODEL, types.SimpleNamespace(**options)))
    speeds = {name: facts["tokens_per_s"] for name, facts in found.items()}
    assert speeds == {"1 x 2": 2, "1 x 5": 5, "3 x 2": 6, "3 x 5": 15}


def test_the_policy_is_what_was_asked_for():
    options = {"job": "sft", "model": "tiny", "dtype": "bf16", "steps": 1, "attention": "flash", "remat": True}
    config = bench.Bench({"seed": 1}, JOBS["sft"], MODEL, types.SimpleNamespace(**options)).policy.config
    assert (config.attention, config.remat, config.dtype) == ("flash", True, "bfloat16")


@pytest.mark.parametrize(
    ("rows", "halvings", "steps"), [(3, 0, 3 * 3), (3, 1, 3 + 2), (2, 0, 2 + 3 * 2), (2, 1, 2 + 3)]
)
def test_refilled_rows_cost_their_number_at_every_step(rows, halvings, steps):
    assert refilling.seconds([3, 1, 1], rows, halvings, ([1, 4], [1.0, 4.0])) == steps


def test_refilling_reads_what_steps_cost():
    variants = {f"{rows} x {new}": {"step_s": [1e9, rows * new / 2, 0.0]} for rows in (16, 4) for new in (32, 64)}
    assert refilling.step_costs(variants, 64) == ([4, 16], [2.0, 8.0])
    with pytest.raises(SystemExit, match="costs of completions of 128 tokens at two sizes or more are needed"):
        refilling.step_costs(variants, 128)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "at_once", "halvings"), [(4, 1, 0), (6, 3, 2), (20, 5, 1)])
def test_refilled_rows_sample_what_rows_for_all_do(rows, at_once, halvings):
    tokens = np.array([[1, 2, 3], [4, 0, 0], [5, 6, 0], [7, 8, 9], [3, 3, 0]], np.int32)
    prompts, keys = Prompts(tokens, tokens > 0), sequence_keys(jax.random.key(0), 5, 3)
    expected = test_rollouts.POLICY.generate(test_rollouts.params(), prompts, keys, test_rollouts.SAMPLING)
    sampling = dataclasses.replace(test_rollouts.SAMPLING, halvings=halvings)
    config, params = test_rollouts.POLICY.config, test_rollouts.params()
    found = refilled.generate(config, sampling, params, prompts, keys, rows, at_once)
    assert len(set(np.asarray(found.mask).sum(-1).reshape(-1))) > 2
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def compiled_or_not(effort, model, *_):
    if model == "too large":
        os._exit(1)  # as the compiler does
    return {"effort": effort, "fits": True, "seconds": {"compute": 1.0}}


@pytest.mark.slow
def test_scaling_goes_on_when_the_compiler_ends_its_process(monkeypatch, tmp_path, capfd):
    rows = [(model, "v5e:2x2", (1, 4, 1), 8) for model in ("small", "too large", "large")]
    monkeypatch.setattr(scaling, "ROWS", {"update": rows, "generation": []})
    monkeypatch.setattr(scaling, "compile_row", compiled_or_not)  # in a process of its own, as the real one
    monkeypatch.setattr(sys, "argv", ["scaling", str(tmp_path / "rows.jsonl")])
    failed = r"as the compiler failed on them: \[\['too large', 'v5e:2x2', \(1, 4, 1\), 8, 'update'\]\]"
    for compiled in (["small", "large"], []):  # a second time, only what is missing
        with pytest.raises(SystemExit, match=failed):
            scaling.main()
        said = capfd.readouterr().out.splitlines()
        assert [line.split("'")[1] for line in said if "compute" in line] == compiled
        assert sum("the compiler ended the process" in line for line in said) == 1
        lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
        assert [line["row"][0] for line in lines] == ["small", "large"]
