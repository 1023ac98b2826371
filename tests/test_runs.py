import dataclasses
import json
import math
import os
import pathlib
import signal
import struct
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjpo import runs

CONFIG = {"method": {"beta": 0.1, "name": "dpo"}, "num_steps": 20, "mesh": (1, 8, 1), "path": None}


@pytest.fixture
def folder(tmp_path):
    made = runs.create(tmp_path / "runs", "dpo_tiny", CONFIG)
    yield made
    made.close()


def read_events(path):
    """TensorBoard's file by its published layout: length, checksum, record, checksum."""
    from tensorboardX.proto import event_pb2

    (file,) = path.glob("events.out.tfevents.*")
    data, events = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def test_a_place_for_runs_is_a_folder_or_can_become_one(tmp_path):
    for good in (tmp_path, tmp_path / "new" / "newer"):
        runs.check_root(good)
    file = tmp_path / "file"
    file.write_text("")
    for bad in (file, file / "runs"):
        with pytest.raises(ValueError, match=f"no run can be written to {bad}: {file} is a file; choose another"):
            runs.check_root(bad)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_create_writes_what_a_number_may_depend_on(folder, tmp_path):
    assert folder.path.parent == tmp_path / "runs" / "dpo_tiny"
    about = json.loads((folder.path / "config.json").read_text())
    assert about["experiment"] == "dpo_tiny"
    assert about["config"] == CONFIG | {"mesh": [1, 8, 1]}
    assert about["versions"]["jax"] == jax.__version__
    assert sum(about["devices"].values()) == jax.device_count()
    assert about["commit"] is None or len(about["commit"].removesuffix("-dirty")) == 40


def test_every_run_has_a_folder_of_its_own(tmp_path):
    made = [runs.create(tmp_path, "dpo_tiny", CONFIG).path for _ in range(2)]
    assert made[0] != made[1]


def test_the_folder_above_says_what_is_below(folder):
    with pytest.raises(FileNotFoundError, match=rf"not the folder of a run: .*; below it are: {folder.path}$"):
        runs.read(folder.path.parent)


def test_newest_is_the_newest_that_finished(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no run of 'dpo_tiny' in .*make one with python -m experiments.dpo_tin"
    ):
        runs.newest(tmp_path, "dpo_tiny")
    made = [runs.create(tmp_path, "dpo_tiny", CONFIG) for _ in range(3)]
    made[2].summary({"start/kl": math.nan})
    with pytest.raises(
        FileNotFoundError, match=rf"has finished; the newest, {made[2].path}, .*--resume {made[2].path}"
    ):
        runs.newest(tmp_path, "dpo_tiny")
    for folder in made[:2]:
        folder.summary({"finished": True})
    assert runs.newest(tmp_path, "dpo_tiny") == made[1].path


def test_reads_what_was_written(folder):
    folder.log(2, {"loss": jnp.float32(0.5), "rewards/chosen": np.float32(-1.25)})
    folder.log(1, {"loss": 0.75})
    folder.log(2, {"eval/kl": 3})
    folder.sample(
        2, [{"kind": "completion", "prompt": "a\u2028b", "completion": "é\n\ud800", "reward": np.float32(0.5)}]
    )
    folder.summary({"start/kl": 0.0, "counts/skipped": 3})
    folder.summary({"eval/kl": 4.5, "start/kl": 0.25})
    run = runs.read(folder.path)
    assert (run.experiment, run.config["method"]) == ("dpo_tiny", CONFIG["method"])
    assert set(run.metrics) == {"loss", "rewards/chosen", "eval/kl"}
    np.testing.assert_array_equal(run.metrics["loss"], [[1, 2], [0.75, 0.5]])
    np.testing.assert_array_equal(run.metrics["rewards/chosen"], [[2], [-1.25]])
    assert run.samples == [
        {"step": 2, "kind": "completion", "prompt": "a\u2028b", "completion": "é\n\ud800", "reward": 0.5}
    ]
    assert run.summary == {"start/kl": 0.25, "counts/skipped": 3, "eval/kl": 4.5}


def test_a_run_that_has_just_begun_can_be_read(folder):
    run = runs.read(folder.path)
    assert (run.metrics, run.samples, run.summary) == ({}, [], {})


def test_what_is_not_finite_is_valid_json_and_comes_back(folder):
    values = {"nan": math.nan, "inf": math.inf, "-inf": jnp.float32(-math.inf)}
    folder.log(1, values)
    folder.summary(values)
    folder.sample(1, [{"token_rewards": np.array([1.0, np.nan])}])

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    for name in ("metrics.jsonl", "summary.json", "samples.jsonl"):
        json.loads((folder.path / name).read_text(), parse_constant=refuse)
    run = runs.read(folder.path)
    for name in values:
        np.testing.assert_array_equal(run.metrics[name][1], [float(values[name])])
        np.testing.assert_array_equal(run.summary[name], float(values[name]))
    assert run.samples[0]["token_rewards"] == [1.0, "NaN"]


def test_what_is_not_json_is_refused(folder):
    with pytest.raises(ValueError, match=r"got \{1\} \(set\)"):
        folder.sample(1, [{"prompt": {1}}])


def test_tensorboard_gets_the_same_names_and_numbers(folder):
    folder.log(1, {"rewards/chosen": 0.5, "eval/best of.4": 2.0})
    folder.log(7, {"loss": math.nan})
    folder.rewind(1)
    folder.log(2, {"loss": 0.25})
    folder.close()
    first, *events = read_events(folder.path)
    assert first.file_version == "brain.Event:2"
    found = [(event.step, [(value.tag, value.simple_value) for value in event.summary.value]) for event in events]
    assert found[0] == (1, [("rewards/chosen", 0.5), ("eval/best of.4", 2.0)])
    assert found[3] == (2, [("loss", 0.25)])
    assert (events[2].step, events[2].session_log.status) == (2, 1)  # from step 2 on, forget what was read before


def test_resuming_goes_on_in_the_same_files(folder):
    folder.log(1, {"loss": 0.7})
    folder.close()
    again = runs.open(folder.path, "dpo_tiny", CONFIG)
    again.log(2, {"loss": 0.6})
    again.close()
    np.testing.assert_array_equal(runs.read(folder.path).metrics["loss"], [[1, 2], [0.7, 0.6]])
    assert len(list(folder.path.glob("events.out.tfevents.*"))) == 2


def test_another_experiment_is_refused(folder):
    before = (folder.path / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"holds a run of 'dpo_tiny', not of 'dpo_hh'; .*experiments.dpo_tiny"):
        runs.open(folder.path, "dpo_hh", CONFIG)
    assert (folder.path / "config.json").read_bytes() == before


def test_another_config_is_refused_naming_every_difference(folder):
    other = {"method": {"beta": 0.3, "name": "dpo", "label_smoothing": 0.1}, "num_steps": 40, "mesh": (1, 8, 1)}
    with pytest.raises(ValueError, match="another config") as error:
        runs.open(folder.path, "dpo_tiny", other)
    for difference in (
        "method.beta: 0.1 there, 0.3 here",
        "method.label_smoothing: 'absent' there, 0.1 here",
        "num_steps: 20 there, 40 here",
        "path: None there, 'absent' here",
    ):
        assert difference in str(error.value)
    assert "mesh" not in str(error.value)


def test_what_may_change_is_remembered(folder):
    other = CONFIG | {"num_steps": 40, "method": {"beta": 0.1, "name": "ipo"}}
    with pytest.raises(ValueError, match=r"method\.name: "):
        runs.open(folder.path, "dpo_tiny", other, may_change=("num_steps", "method.nam"))
    runs.open(folder.path, "dpo_tiny", other, may_change=("num_steps", "method"))
    assert runs.read(folder.path).config["num_steps"] == 40
    runs.open(folder.path, "dpo_tiny", other)


def test_a_folder_without_a_run_is_refused(tmp_path):
    for call in (lambda: runs.read(tmp_path), lambda: runs.open(tmp_path, "dpo_tiny", CONFIG)):
        with pytest.raises(FileNotFoundError, match=r"is not the folder of a run: it has no config.json"):
            call()


def test_rewind_forgets_what_came_after(folder):
    for step in range(6):
        folder.log(step, {"loss": float(step), "eval/kl": 0.1 * step})
        folder.sample(step, [{"prompt": "p", "completion": str(step)}])
    folder.rewind(3)
    run = runs.read(folder.path)
    assert list(run.metrics["loss"][0]) == [0, 1, 2, 3]
    assert [row["completion"] for row in run.samples] == ["0", "1", "2", "3"]
    assert run.metrics["eval/kl"][1][-1] == 0.1 * 3  # every bit of it


def test_what_goes_on_has_not_finished_and_what_finished_is_not_forgotten_whole(folder):
    folder.log(5, {"loss": 1.0})
    folder.summary({"finished": True, "eval/score": float("nan")})
    with pytest.raises(ValueError, match="finished, but has no checkpoint to go on from; its numbers stay"):
        folder.rewind(-1)
    assert runs.read(folder).summary["finished"]
    folder.rewind(4)
    assert list(runs.read(folder).summary) == ["eval/score"]
    folder.rewind(-1)


@pytest.mark.parametrize("value", [None, "six", [1]])
def test_a_metric_that_is_no_number_is_named(folder, value):
    rows = [{"step": 6, "loss": 0.5}, {"step": 6, "loss": value}]
    (folder.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, step 6: loss is no number but .*; remove that line"):
        runs.read(folder)


def test_half_a_line_is_ignored_and_then_gone(folder):
    folder.log(1, {"loss": 0.5})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert list(runs.read(folder.path).metrics["loss"][0]) == [1]
    again = runs.open(folder.path, "dpo_tiny", CONFIG)
    again.log(2, {"loss": 0.25})
    again.close()
    np.testing.assert_array_equal(runs.read(folder.path).metrics["loss"], [[1, 2], [0.5, 0.25]])


def test_a_bad_line_is_named(folder):
    folder.log(1, {"loss": 0.5})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write("loss=0.5\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not JSON"):
        runs.read(folder.path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"model_type": "llama"}', "is not the folder of a run: its config.json names no experiment"),
        ("config.json", "[]", "config.json holds a list, not an object"),
        ("config.json", '{"experiment": "x", "config": 3}', "names no experiment with its config"),
        ("config.json", "caf\xe9", "config.json is not JSON"),
        ("summary.json", "{", "summary.json is not JSON"),
        ("metrics.jsonl", '{"loss": 1}\n', "metrics.jsonl, line 1 is no object with a step; remove that line"),
        ("samples.jsonl", "[1]\n", "samples.jsonl, line 1 is no object with a step"),
    ],
)
def test_files_of_others_are_named(folder, name, content, message):
    (folder.path / name).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        runs.read(folder.path)


def test_killed_while_it_logs(tmp_path):
    """What was logged before the kill is there, and nothing else."""
    script = f"""
from pjpo import runs
folder = runs.create({str(tmp_path)!r}, "dpo_tiny", {{}})
for step in range(1_000_000):
    folder.log(step, {{"loss": float(step), "grad_norm": 1.0}})
    folder.sample(step, [{{"prompt": "p" * 5000}}])
    folder.summary({{"eval/kl": step}})
    if step % 50 == 0:
        print(step, flush=True)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    for _ in range(3):
        last = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run = runs.read(next(tmp_path.glob("dpo_tiny/*")))
    steps, values = run.metrics["loss"]
    np.testing.assert_array_equal(steps, np.arange(len(steps)))
    np.testing.assert_array_equal(values, np.arange(len(steps)))
    assert len(steps) > last
    assert len(run.samples) in (len(steps), len(steps) - 1)
    assert run.summary["eval/kl"] in (len(steps) - 1, len(steps) - 2)


@pytest.mark.usefixtures("interruptible")
def test_a_file_is_replaced_whole_or_not_at_all(folder, monkeypatch):
    folder.summary({"eval/kl": 1.0})
    before = (folder.path / "summary.json").read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGINT))  # stopped just before the end
    with pytest.raises(KeyboardInterrupt):
        folder.summary({"eval/kl": 2.0})
    assert (folder.path / "summary.json").read_bytes() == before


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs /dev/full, the disk that is always full")
def test_a_full_disk_is_named(folder):
    (folder.path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"):
        folder.log(1, {"loss": 0.5})


def test_the_reader_starts_fast():
    """Notebooks and scripts read runs without waiting for JAX."""
    heavy = "{'jax', 'orbax', 'matplotlib', 'tensorboardX', 'flax'}"
    script = f"import sys, pjpo.runs; print(sorted({heavy} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_run_is_a_value(folder):
    with pytest.raises(dataclasses.FrozenInstanceError):
        runs.read(folder.path).summary = {}


def test_metrics_go_to_weights_and_biases_too(tmp_path, monkeypatch):
    asked, logged = {}, []
    run = types.SimpleNamespace(log=lambda numbers, step: logged.append((step, numbers)))
    fake = types.SimpleNamespace(init=lambda **about: asked.update(about) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    folder = runs.create(tmp_path, "tiny", {"beta": 0.1})
    folder = dataclasses.replace(folder, sink=runs.wandb_sink("mine", folder, {"beta": 0.1}))
    with folder:
        folder.log(3, {"loss": np.float32(0.5)})
    assert logged == [(3, {"loss": 0.5})]
    assert (asked["project"], asked["id"], asked["config"]) == ("mine", folder.path.name, {"beta": 0.1})
    assert asked["resume"] == "allow"  # the same folder goes on with the same run there
    assert asked["dir"] == str(folder.path)


def test_a_missing_wandb_is_told_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    folder = runs.create(tmp_path, "tiny", {})
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[wandb\]'"):
        runs.wandb_sink("mine", folder, {})
