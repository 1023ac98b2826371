"""Whole runs, as a user starts and stops them: in processes of their own, each a few seconds."""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest
import tyro

from experiments import registry
from pjpo import experiment, reference, runs, train
from pjpo.checkpoints import Checkpoints
from pjpo.data import mixture, preference
from pjpo.data.buckets import Buckets, collate
from pjpo.evals.result import Result
from pjpo.methods import dpo_attenuated, kto, rso, simpo
from tests import tiny_run
from tests.experiments.test_registry import EXPERIMENTS, STUDIES
from tests.models import tiny_llama
from tests.quick import FLAGS

ROOT = Path(__file__).parents[1]
LAST = tiny_run.EXPERIMENT.loop.num_steps
# On one device, each compilation made once, and quickly: a start costs what importing costs.
CACHED = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


class Program:
    """A run of `tiny_run`, to be started again and again."""

    module = "tests.tiny_run"

    def __init__(self, root, model, cache=None):
        self.root, self.model = root, model
        self.environment = os.environ | {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        if cache:
            self.environment |= CACHED | {"JAX_COMPILATION_CACHE_DIR": str(cache)}

    def start(self, *arguments):
        command = [sys.executable, "-u", "-m", self.module, "--runs", self.root, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=self.environment, **pipes)

    def begin(self, *arguments):
        return self.start("--model.source", self.model, *arguments)

    def finish(self, *arguments):
        process = self.start(*arguments)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return out

    @property
    def folder(self):
        (config,) = self.root.glob("*/*/config.json")
        return config.parent

    @property
    def lines(self):
        text = (self.folder / "metrics.jsonl").read_text()
        rows = [json.loads(line) for line in text[: text.rindex("\n") + 1].splitlines()]
        return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]

    @property
    def file(self):
        """Which file holds the lines: a run that goes on writes another."""
        return next((path.stat().st_ino for path in self.root.glob("*/*/metrics.jsonl")), None)

    def wait_for(self, step, process, other_than=None):
        """Until that update is logged, in another file than that where one is given."""
        while process.poll() is None:
            try:
                if self.lines[-1]["step"] >= step and self.file != other_than:
                    return
            except (OSError, ValueError, IndexError):
                pass  # there is no folder yet, or no line
            time.sleep(0.005)
        pytest.fail(f"it ended before update {step}: {process.stderr.read()}")

    def bits(self, step=LAST):
        """Of all that the last checkpoint holds, with what is beside it."""
        about = json.loads((self.folder / "checkpoints" / str(step) / "about" / "metadata").read_text())
        like = {}
        for name, spec in about["leaves"].items():
            dtype, _, shape = spec.partition("[")
            shape = json.loads(f"[{shape}")
            like[name] = jax.random.key(0) if "key" in dtype else jax.ShapeDtypeStruct(shape, dtype)
        with Checkpoints(self.folder / "checkpoints") as checkpoints:
            found = checkpoints.restore(like)
        assert found.step == step
        raw = {n: jax.random.key_data(leaf) if "key" in str(leaf.dtype) else leaf for n, leaf in found.state.items()}
        return {name: np.asarray(leaf).tobytes() for name, leaf in raw.items()}, found.extra


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def alone(tmp_path_factory, model, cache):
    """A run that nobody disturbs."""
    program = Program(tmp_path_factory.mktemp("alone"), model, cache)
    program.finish("--model.source", model)
    return program


def same(one, other):
    assert one.lines == other.lines
    (bits, extra), (other_bits, other_extra) = one.bits(), other.bits()
    assert [name for name in bits if bits[name] != other_bits[name]] == []
    assert extra == other_extra


def kill_often(program, num_kills, seed=5):
    """SIGKILL at random moments, each later than the one before; whatever is being written then is torn.

    A moment is an update and up to a tenth of a second: five updates, and about as long as saving takes.
    """
    process, said, draw, killed = program.begin(), [], random.Random(seed), None
    for step in sorted(draw.sample(range(1, LAST - 20), num_kills)):
        program.wait_for(step, process, other_than=killed)
        time.sleep(draw.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        said.append(process.communicate()[0])
        killed = program.file
        process = program.start("--resume", program.folder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return [*said, out]


def test_killed_and_resumed_it_ends_with_the_same_bits(tmp_path, model, cache, alone):
    out = kill_often(Program(tmp_path, model, cache), 2)
    assert re.search(rf"going on from step \d+ of {LAST}", out[-1])
    same(Program(tmp_path, model), alone)


@pytest.mark.slow
def test_killed_ten_times_and_compiled_anew_each_time(tmp_path, model, alone):
    program = Program(tmp_path, model)
    kill_often(program, 10)
    same(program, alone)


@pytest.mark.slow
def test_killed_fifty_times_while_saving_too(tmp_path, model, cache, alone):
    program = Program(tmp_path, model, cache)
    out = kill_often(program, 50, seed=11)
    torn = sum("a half-written checkpoint, ignored" in said for said in out)
    resumed = sum("going on from step" in said for said in out)
    print(f"killed 50 times: {torn} checkpoints were torn, {resumed} starts went on from a checkpoint")
    assert torn >= 3
    same(program, alone)


def test_a_half_written_checkpoint_is_ignored_with_a_message(tmp_path, model, cache, alone):
    """Killed while step 14 is on its way to the disk; if it was there already, its last rename is undone."""
    program = Program(tmp_path, model, cache)
    process = program.begin()
    program.wait_for(15, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished = program.folder / "checkpoints" / "14"
    half = finished.with_name("14.orbax-checkpoint-tmp")
    if finished.exists():
        finished.rename(half)
    (half,) = program.folder.glob("checkpoints/14.*")
    out = program.finish("--resume", program.folder)
    assert f"{half}: a half-written checkpoint, ignored" in out
    assert f"going on from step 7 of {LAST}" in out
    assert not half.exists()
    same(program, alone)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, model, cache, alone):
    program = Program(tmp_path, model, cache)
    process = program.begin()
    program.wait_for(10, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in err
    step = int(
        re.search(rf"stopped after step (\d+) of {LAST}, which is saved in {program.folder}/checkpoints", err)[1]
    )
    assert (program.folder / "checkpoints" / str(step)).is_dir()
    assert "Learning curves" in (program.folder / "report.html").read_text()
    (command,) = re.findall(r"Go on with: python -m experiments\.tests\.tiny_run (.*)", err)
    out = program.finish(*command.split())
    assert f"going on from step {step} of {LAST}" in out
    same(program, alone)


def test_a_second_ctrl_c_stops_at_once(tmp_path, model, cache):
    """While it evaluates, which takes for ever here."""
    program = Program(tmp_path, model, cache)
    program.environment["TINY_RUN_HANGS_AT"] = "30"
    process = program.begin()
    program.wait_for(30, process)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == f"training: {LAST} steps\n"
    assert "once more to stop at once" in process.stderr.readline() + process.stderr.readline()
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert f"Go on with: python -m experiments.tests.tiny_run --resume {program.folder}" in err


class Glass(Program):
    module = "experiments.dpo_glass"


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_before_there_is_a_folder_says_that_nothing_was_kept(tmp_path, cache):
    """While pairs are sampled: JAX computes then, and must not crash what ends around it."""
    process = Glass(tmp_path / "runs", None, cache).start("--data.num-openings=1024")
    assert process.stderr.readline() == "sampling pairs: 1056 prompts\n"  # no terminal, so a line and no bar
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("stopped before there was anything to go on with, so nothing was kept. Start again with: ")
    (command,) = re.findall(r"python (.*)", err)
    assert command.endswith(f"-m experiments.dpo_glass --runs {tmp_path}/runs --data.num-openings=1024")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_nan_stops_with_a_message(tmp_path, model, cache):
    """A learning rate that leaves the range of float32: losses and gradients were finite until then."""
    program = Program(tmp_path, model, cache)
    process = program.begin("--optimizer.learning-rate=1e38", "--optimizer.warmup-steps=0")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert re.search(r"(became|infinite) .*in update \d+; last checkpoint: none", err), err
    assert "Config" in (program.folder / "report.html").read_text()
    assert "finished" not in runs.read(program.folder).summary


@pytest.mark.slow  # one that is killed and goes on ends with the same bits, too
def test_the_same_seed_gives_the_same_run(tmp_path, model, cache, alone):
    program = Program(tmp_path, model, cache)
    program.finish("--model.source", model)
    same(program, alone)


def test_another_folder_is_refused_and_nothing_in_it_changes(tmp_path, alone):
    def content():
        return {path: path.read_bytes() for path in alone.folder.rglob("*") if path.is_file()}

    before = content()
    cases = {
        "other settings": (alone, ["--method.beta=0.3"], r"another config \(method.beta: 0.1 there, 0.3 here\)"),
        "another experiment": (None, [], "holds a run of 'tests.tiny_run', not of 'dpo_glass'"),
    }
    for program, arguments, message in cases.values():
        command = ["--resume", str(alone.folder), *arguments]
        module = "tests.tiny_run" if program else "experiments.dpo_glass"
        done = subprocess.run(
            [sys.executable, "-m", module, *command], cwd=ROOT, env=alone.environment, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert re.search(message, done.stderr), done.stderr
        assert "Traceback" not in done.stderr
    assert content() == before


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_settings_come_back_from_the_folder(name, tmp_path):
    original = registry.get(name)
    changed = registry.override(original, {"method.beta": 0.7} if hasattr(original.method, "beta") else {})
    changed = registry.override(
        changed, {"optimizer.learning_rate": 7.0, "loop.num_steps": 99, "seed": 3, "pack": True}
    )
    changed = registry.override(changed, {"optimizer.max_grad_norm": float("inf")})  # which JSON cannot say
    folder = runs.create(tmp_path, name, experiment.describe(changed))
    assert experiment.recall(original, runs.read(folder.path).config) == changed
    assert experiment.describe(original) != experiment.describe(changed)


@pytest.mark.parametrize("name", STUDIES)
def test_settings_of_a_study_come_back_from_the_folder(name, tmp_path):
    original = registry.get(name)
    changed = registry.override(
        original, {"num_seeds": 7, "training.num_steps": 99, "training.optimizer.max_grad_norm": float("inf")}
    )
    folder = runs.create(tmp_path, name, experiment.describe(changed))
    assert experiment.recall(original, runs.read(folder.path).config) == changed


def test_a_reference_without_adapters_is_refused(tmp_path):
    wrong = dataclasses.replace(tiny_run.EXPERIMENT, reference="adapter", batch_size=16)
    with pytest.raises(ValueError, match=r"model\.lora\.rank is 0; use 'online'"):
        experiment.run("tiny", wrong, root=tmp_path)
    assert list(tmp_path.iterdir()) == []


# In this process, on its eight devices.
QUICK = {"batch_size": 16, "loop.num_steps": 2, "optimizer.warmup_steps": 0}
PLAIN = QUICK | {"num_microbatches": 1, "pack": False}  # half as much to compile, where the update is not what counts


def refused(root, change, message, error=ValueError):
    """The made-up run with other settings; before it has a folder."""
    with pytest.raises(error, match=message):
        experiment.run("tiny", registry.override(tiny_run.EXPERIMENT, QUICK | change), root=root / "runs")
    assert not (root / "runs").exists()


def test_a_file_where_runs_should_lie_is_refused_first(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(ValueError, match=r"no run can be written to .*runs is a file"):
        experiment.run("tiny", registry.override(tiny_run.EXPERIMENT, QUICK), root=tmp_path / "runs")


class Singles(tiny_run.Pairs):
    """Their chosen completions alone."""

    def build(self, context):
        data = super().build(context)
        train = [dataclasses.replace(pair, completions=pair.completions[:1]) for pair in data.train]
        return dataclasses.replace(data, train=train, held_out=[])


@pytest.mark.usefixtures("unchecked")
def test_data_that_a_method_on_pairs_cannot_take_leaves_no_folder(tmp_path, model):
    change = {"model.source": str(model), "data": Singles(), "evaluation": None}
    message = r"^{}: rows must be pairs, \(chosen, rejected\) on axis 1, got 1 completions"
    refused(tmp_path, change, message.format("dpo"))
    change |= {"reference": "none", "loss": simpo.loss, "method": simpo.Config()}
    refused(tmp_path, change, message.format("simpo"))


def test_what_cannot_work_leaves_no_folder(tmp_path, model, monkeypatch):
    refused(tmp_path, {"model.source": "nowhere"}, "unknown model source 'nowhere'")
    source = {"model.source": str(model)}
    refused(tmp_path, source | {"data": preference.Config(path="")}, "no data file is given")
    (tmp_path / "bad.jsonl").write_text('{"chosen": "a"}\n')
    refused(
        tmp_path, source | {"data": preference.Config(path=str(tmp_path / "bad.jsonl"))}, "bad.jsonl:1: columns found"
    )
    (tmp_path / "short").mkdir()
    config = tiny_llama.CONFIG | {"num_hidden_layers": 1, "max_position_embeddings": 14}
    short = tiny_llama.write_folder(tmp_path / "short", config)
    refused(tmp_path, {"model.source": str(short)}, r"made up:\d+ has 8 .* 8 of completion, together more .* 14 positi")
    refused(tmp_path, source | {"evaluation.batch_size": 12}, "evaluation.batch_size 12 is not divisible by 8 .*16")
    refused(tmp_path, source | {"batch_size": 48}, "batch_size 48 is larger than the 32 examples; use 32 or less")
    wrong = {"loss": kto.loss, "method": kto.Config()}
    refused(tmp_path, source | wrong, "kto: rows must hold one completion with its label, got 2")
    refused(tmp_path, {"evaluation": None, "keep_best_by": ("eval/loss", "min")}, "'eval/loss' needs an evaluation")
    refused(tmp_path, {"reference": "none"}, "^dpo compares with a reference, but reference is 'none'; use onl")
    for module in (rso, dpo_attenuated):  # which need none at other settings
        name = module.__name__.rpartition(".")[2]
        wrong = {"reference": "none", "loss": module.loss, "method": module.Config()}
        refused(tmp_path, wrong, f"^{name} compares with a reference, but reference is 'none'")
    for seed in (-1, 2**32):
        refused(tmp_path, {"seed": seed}, rf"seed must be >= 0 and below 2\*\*32, got {seed}")
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(tmp_path, {"wandb_project": "mine"}, r"wandb is missing: pip install -e", ModuleNotFoundError)


def test_keeping_the_best_by_what_is_not_measured_is_refused_before_training(tmp_path, model):
    wrong = PLAIN | {"model.source": str(model), "keep_best_by": ("eval/los", "min")}
    with pytest.raises(ValueError, match=r"no metric 'eval/los'; did you mean 'eval/loss'\? Known: .*eval/loss"):
        experiment.run("tiny", registry.override(tiny_run.EXPERIMENT, wrong), root=tmp_path)
    assert not list(tmp_path.glob("tiny/*"))  # nothing was measured, and nothing could go on with it


def test_stored_log_probs_serve_held_out_examples_too(tmp_path, model, monkeypatch):
    made, Store = [], reference.Store
    monkeypatch.setattr(reference, "Store", lambda *arguments: made.append(Store(*arguments)) or made[-1])
    changes = QUICK | {"model.source": str(model), "reference": "stored"}
    folder = experiment.run("tiny", registry.override(tiny_run.EXPERIMENT, changes), root=tmp_path)
    (store,) = made
    hits, misses, data = store.hits, store.misses, tiny_run.Pairs().build(None)
    assert hits >= 2 * 8  # completions held out, at the last evaluation
    store.attach(collate(data.held_out, Buckets.of(data.train + data.held_out)))
    assert (store.hits, store.misses) == (hits + 2 * 8, misses)
    losses = runs.read(folder).metrics["eval/loss"][1]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5) != losses[-1]


MIXED = mixture.Config(
    parts=(
        mixture.Part(name="a", data=tiny_run.Pairs(), weight=3.0),
        mixture.Part(name="b", data=tiny_run.Pairs(num_pairs=48)),
    )
)


def test_mixed_data_is_logged_by_source_too(tmp_path, model):
    value = registry.override(tiny_run.EXPERIMENT, QUICK | {"model.source": str(model), "data": MIXED})
    run = runs.read(experiment.run("tiny", value, root=tmp_path))

    def last(metric):
        return run.metrics[metric][1][-1]

    for metric in ("loss", "rewards/margins"):
        assert last(f"source/a/{metric}") != last(f"source/b/{metric}")
        parts = sorted(last(f"source/{name}/{metric}") for name in "ab")
        assert parts[0] <= last(metric) <= parts[1]
    held_out = np.mean([last(f"eval/source/{name}/loss") for name in "ab"])  # eight pairs each
    assert last("eval/loss") == pytest.approx(held_out, abs=1e-6)
    assert {name for name in run.summary if name.startswith("counts/")} == {"counts/a/rows", "counts/b/rows"}
    assert experiment.recall(value, run.config) == value


def test_the_parts_of_a_mixture_are_settings():
    value = dataclasses.replace(tiny_run.EXPERIMENT, data=MIXED)
    options = tyro.cli(
        registry.Options,
        default=registry.Options(experiment=value),
        args=["--data.parts.1.weight", "2.5", "--data.parts.0.data.num-pairs", "16"],
        config=(tyro.conf.AvoidSubcommands,),
    )
    parts = options.experiment.data.parts
    assert (parts[1].weight, parts[0].weight, parts[0].data.num_pairs) == (2.5, 3, 16)


@dataclasses.dataclass(frozen=True)
class Readings:
    """An evaluation with texts to read, and with Ctrl-C in its midst once."""

    def build(self, context, data):
        def evaluate(params, ref_params, *, title):
            if title == "evaluating step 1" and not self.interrupted:
                self.interrupted.append(True)
                raise KeyboardInterrupt
            return Result(metrics={"length": 1.0}, samples=[{"prompt": "So", "text": f"So: {title}", "reward_a": 0.5}])

        return evaluate

    interrupted: ClassVar[list] = []


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Pairs that differ each time they are asked for."""

    def build(self, context):
        self.seeds.append(len(self.seeds))
        pairs = tiny_run.Pairs(num_pairs=40 + 8 * len(self.seeds)).build(context)
        return dataclasses.replace(pairs, sampled=True)

    seeds: ClassVar[list] = []


def test_a_run_that_goes_on_keeps_its_data_and_shows_the_texts_before_and_after(tmp_path, model, monkeypatch):
    changes = {"model.source": str(model), "evaluation": Readings(), "loop.evaluate_every_steps": 1, "data": Sampled()}
    value = registry.override(tiny_run.EXPERIMENT, PLAIN | changes | {"wandb_project": "mine"})
    said, logged = [], []
    sink = lambda project, folder, config: lambda step, numbers: logged.append((project, step))  # noqa: E731
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    monkeypatch.setattr(runs, "wandb_sink", sink)
    with pytest.raises(train.Stopped, match="stopped at once"):
        experiment.run("tiny", value, root=tmp_path, say=said.append)
    (folder,) = tmp_path.glob("tiny/*")
    shown = " 1. So ...\n    before a +0.50  ': evaluating step 0'\n    after  a +0.50  ': evaluating step 2'"
    assert shown not in said
    for _ in range(2):  # the second time the run is finished already
        said.clear()
        experiment.run("tiny", value, root=tmp_path, resume=folder, say=said.append)
        assert shown in said
    assert Sampled.seeds == [0]
    assert runs.read(folder).summary["finished"]
    assert {("mine", 0), ("mine", 2)} <= set(logged)
