"""A run's checkpoint as a folder: the trained weights, from runs with and without adapters."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjpo import runs
from pjpo.checkpoints import Checkpoints
from pjpo.experiment import Model, describe
from pjpo.models import load, lora, save
from pjpo.models.export import export, main
from pjpo.step import State

FULL = Model(source="glassllm-en")
ADAPTED = Model(source="glassllm-en", lora=lora.Config(rank=2, targets=("q", "down")))


def write_run(root, model, steps=(3, 7), best=None):
    """A run's folder as training leaves it; the parameters of step n are those of its start plus n."""
    config = {"model": describe(model), "keep_best_by": ("eval/score", "max") if best else None}
    folder = runs.create(root, "tiny", config)
    policy, params, _ = load(model.source, lora=model.lora)
    trained = policy.trainable(params)[0]
    with Checkpoints(folder.checkpoints, config["keep_best_by"], keep_last=9) as saved:
        for step in steps:
            moved = jax.tree.map(lambda x: x + step, trained)  # noqa: B023
            state = State(moved, {"moments": jnp.ones(3)}, jnp.int32(step), jax.random.key(0))
            saved.save(step, state, metrics={"eval/score": float(step == best)})
            saved.wait()
    return folder.path


def test_the_last_checkpoint_of_full_weights(tmp_path):
    run = write_run(tmp_path / "runs", FULL)
    said = []
    export(run, tmp_path / "model", say=said.append)
    _, start, _ = load("glassllm-en")
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y + 7), load(tmp_path / "model")[1], start)
    assert said == [f"step 7 of {run}"]
    export(run, tmp_path / "third", step=3)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y + 3), load(tmp_path / "third")[1], start)


def test_the_best_checkpoint_where_the_run_kept_one(tmp_path):
    said = []
    export(write_run(tmp_path / "runs", FULL, best=3), tmp_path / "model", say=said.append)
    assert said[0].startswith("step 3 of")


def test_adapters_folded_in_and_alone(tmp_path):
    run = write_run(tmp_path / "runs", ADAPTED)
    policy, params, tokenizer = load("glassllm-en", lora=ADAPTED.lora)
    # The adapters' start does not depend on the key where it was moved from: B is 7, A is drawn.
    drawn = jax.tree.map(lambda x: x + 7, params["lora"])
    expected = save(tmp_path / "expected", policy, params | {"lora": drawn}, tokenizer)
    export(run, tmp_path / "merged")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "merged")[1], load(expected)[1])
    for base, named in ((None, "glassllm-en"), ("my/base", "my/base")):
        said = []
        export(run, tmp_path / named, adapter=True, base=base, say=said.append)
        about = json.loads((tmp_path / named / "adapter_config.json").read_text())
        assert (about["base_model_name_or_path"], about["target_modules"]) == (named, ["q_proj", "down_proj"])
        assert any("belong to glassllm-en, which PEFT cannot read" in line for line in said) == (base is None)


def test_what_cannot_be_exported(tmp_path):
    run = write_run(tmp_path / "runs", FULL)
    with pytest.raises(ValueError, match=r"trained all weights \(model.lora.rank is 0\), so it has no adapters"):
        export(run, tmp_path / "model", adapter=True)
    with pytest.raises(ValueError, match=r"has no checkpoint of step 5, only of 3, 7"):
        export(run, tmp_path / "model", step=5)
    study = runs.create(tmp_path / "runs", "rdpo_glass", {"start": {"model": {"source": "glassllm-en"}}})
    with pytest.raises(ValueError, match="is of 'rdpo_glass', which keeps no weights; export the run of an experiment"):
        export(study.path, tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
        export(tmp_path, tmp_path / "model")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=f"no model can be written to .*: {tmp_path}/file is a file; choose another"):
        export(tmp_path / "no run", tmp_path / "file" / "model")  # which is asked first, being quick to tell
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        export(run, tmp_path / "model")


def test_the_command_says_which_package_is_missing(tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"model {name!r} comes with a package that is not installed")

    run = write_run(tmp_path / "runs", FULL)
    monkeypatch.setattr(sys.modules["pjpo.models.load"], "_packaged_file", missing)
    with pytest.raises(SystemExit, match="model 'glassllm-en' comes with a package that is not installed"):
        main([str(run), str(tmp_path / "model")])


def test_the_command_says_what_is_missing(tmp_path):
    run = write_run(tmp_path / "runs", FULL, steps=())
    command = [sys.executable, "-m", "pjpo.models.export", str(run), str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith(f"{run}/checkpoints holds no checkpoint: the run was stopped before its first one\n")
    assert not (tmp_path / "model").exists()
