"""Several processes on this machine, with one or more CPU devices each: the numbers, files and words of one."""

import contextlib
import json
import re
import signal
import socket
import time

import jax
import numpy as np
import pytest

from pjpo import distributed, runs
from tests.experiments.test_smoke import write_pairs
from tests.test_experiment import Program
from tests.test_step import METRICS_BOUND, PARAMS_BOUND

SHORT = ["--loop.num-steps=20", "--loop.evaluate-every-steps=8", "--batch-size=8"]
LONG = ["--loop.num-steps=60", *SHORT[1:], "--num-microbatches=1"]
LIMIT = 240  # seconds; a process that is still there is killed


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


class Hosts(Program):
    """A run of `tiny_run` by several processes, to be started again with any number of them."""

    def processes(self, count, *arguments, devices=1, each=lambda number: []):
        """Started, `devices` in each; `each` gives further arguments for one."""
        port = free_port()
        self.environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        if count == 1:
            return [self.start(*arguments, *each(0))]
        meeting = [f"--distributed.coordinator=localhost:{port}", f"--distributed.num-processes={count}"]
        meeting += ["--distributed.heartbeat-timeout-seconds=10"]
        return [
            self.start(*arguments, *meeting, f"--distributed.process-id={number}", *each(number))
            for number in range(count)
        ]

    def end(self, processes, limit=LIMIT):
        """[(exit status, stdout, stderr)] of each; whatever happens, none of them is left."""
        deadline, ended = time.monotonic() + limit, []
        try:
            for process in processes:
                out, err = process.communicate(timeout=max(deadline - time.monotonic(), 1))
                ended.append((process.returncode, out, err))
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        return ended

    def run(self, count, *arguments, **settings):
        """To its end."""
        ended = self.end(self.processes(count, *arguments, **settings))
        for status, _, err in ended:
            assert status == 0, err
        return ended

    def begin_run(self, count, *arguments, **settings):
        return self.run(count, "--model.source", self.model, *arguments, **settings)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


def make_run(root, model, cache, count):
    """A short run by `count` processes, with what they printed and the rows that each read."""
    hosts = Hosts(root / "runs", model, cache)
    (root / "reads").mkdir()
    hosts.environment["TINY_RUN_READS"] = str(root / "reads")
    hosts.ended = hosts.begin_run(count, *SHORT)
    hosts.reads = [json.loads(path.read_text()) for path in sorted((root / "reads").iterdir())]
    return hosts


@pytest.fixture(scope="module")
def one(tmp_path_factory, model, cache):
    return make_run(tmp_path_factory.mktemp("one"), model, cache, 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory, model, cache):
    return make_run(tmp_path_factory.mktemp("two"), model, cache, 2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, model, cache):
    """A longer run by one process, for those that end early and go on."""
    hosts = Hosts(tmp_path_factory.mktemp("undisturbed"), model, cache)
    hosts.begin_run(1, *LONG)
    return hosts


def last_state(hosts, step=20):
    """Arrays of the last checkpoint, as one process restores it."""
    bits, extra = hosts.bits(step)
    return {name: np.frombuffer(content, np.float32) for name, content in bits.items() if "params" in name}, extra


def assert_same_run(found, expected, step=20):
    """Line by line, and the last checkpoint: same numbers within the bound that meshes are held to."""
    assert len(found.lines) == len(expected.lines)
    for row, other in zip(found.lines, expected.lines, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            if "accuracies" in name and row["step"] <= 1:
                continue  # before the first update margins are 0 but for rounding, which decides what is above
            assert row[name] == pytest.approx(value, rel=METRICS_BOUND, abs=METRICS_BOUND), (name, row["step"])
    (params, extra), (others, other_extra) = last_state(found, step), last_state(expected, step)
    assert params.keys() == others.keys() != set()
    for name, values in others.items():
        np.testing.assert_allclose(params[name], values, rtol=0, atol=PARAMS_BOUND, err_msg=name)
    assert extra == other_extra


def test_two_processes_train_to_the_numbers_of_one(one, two):
    assert [row["step"] for row in two.lines if "loss" in row] == list(range(1, 21))
    assert_same_run(two, one)


def test_each_reads_its_half_of_every_batch(one, two):
    (whole,), (first, second) = one.reads, two.reads
    assert len(whole) == 20
    assert {len(rows) for rows in first + second} == {4}
    assert [[*rows, *others] for rows, others in zip(first, second, strict=True)] == whole


def test_one_of_them_writes_and_speaks(two):
    (_, out, _), (_, silent, _) = two.ended
    assert f"run: {two.folder}" in out
    assert f"report: {two.folder / 'report.html'}" in out
    assert [line for line in silent.splitlines() if "Gloo" not in line] == []
    files = sorted(path.name.split(".out.")[0] for path in two.folder.iterdir())
    assert files == [
        "checkpoints",
        "config.json",
        "events",
        "metrics.jsonl",
        "report.html",
        "samples.jsonl",
        "summary.json",
    ]
    steps = [row["step"] for row in two.lines if "loss" in row]
    assert steps == sorted(set(steps))
    run = runs.read(two.folder)
    assert run.about["processes"] == 2
    assert {name for name in run.summary if name.startswith("eval/")} != set()


def refused(hosts, *arguments, **settings):
    ended = hosts.end(hosts.processes(2, "--model.source", hosts.model, *SHORT, *arguments, **settings))
    for status, _, err in ended:
        assert status == 1, err
        assert "Traceback" not in err
    return [err for _, _, err in ended]


def test_processes_that_disagree_on_the_config_are_refused(tmp_path, model, cache):
    hosts = Hosts(tmp_path / "runs", model, cache)
    for err in refused(hosts, each=lambda number: [f"--method.beta=0.{number + 1}"]):
        assert "the processes disagree on the config: method.beta is 0.1 in process 0 and 0.2 in 1. Start all" in err
    assert not hosts.root.exists()


def test_nobody_can_be_met_without_saying_where(tmp_path, model):
    hosts = Hosts(tmp_path / "runs", model)
    ((status, _, err),) = hosts.end([hosts.begin("--distributed")])
    assert status == 1
    assert "no cluster was detected (SLURM, " in err
    assert "give --distributed.coordinator=host:port" in err
    assert "Traceback" not in err


def test_a_coordinator_that_cannot_be_is_refused():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        place = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match=r"process 0 cannot listen at port \d+ \(Address already in use\)"):
            distributed.start(distributed.Config(coordinator=place, num_processes=2, process_id=0))
    settings = distributed.Config(coordinator=place, num_processes=2, process_id=1, start_timeout_seconds=1)
    with pytest.raises(OSError, match=f"nobody answers at {place} after 1 s .* is process 0 started there"):
        distributed.start(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_processes": 0}, "num_processes must be at least 1, got 0"),
        ({"heartbeat_timeout_seconds": 0}, "heartbeat_timeout_seconds must be at least 1, got 0"),
        ({"num_processes": 2, "process_id": 2}, "process_id must be 0 to 1, got 2"),
        ({"process_id": -1}, "process_id must be 0 or more, got -1"),
        ({"coordinator": "localhost"}, "coordinator must be host:port, .* got 'localhost'"),
        ({"coordinator": "localhost:0"}, "coordinator must be host:port, with a port of 1 to 65535, got 'localhost:0'"),
        ({"coordinator": "localhost:65536"}, "coordinator must be .* of 1 to 65535, got 'localhost:65536'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"distributed: {message}"):
        distributed.Config(**settings)


@pytest.mark.parametrize(
    ("error", "is_loss"),
    [
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Read error"), True),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: the coordination service"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"), True),  # as reading a value says it
        (ValueError("INVALID_ARGUMENT: shapes differ"), False),
        (ValueError("data: the source is unavailable"), False),
        (OSError("UNAVAILABLE: a disk"), False),
    ],
)
def test_the_end_of_another_process_is_told_from_other_errors(error, is_loss, monkeypatch):
    assert not distributed.is_loss(error)  # alone, nobody can be lost
    monkeypatch.setattr(distributed, "_count", lambda: 2)
    assert distributed.is_loss(error) == is_loss


def test_every_difference_is_named_with_its_process(monkeypatch):
    told = [{"a": 1, "b": "x"}, {"a": 1, "b": "x"}, {"a": 2, "b": "x", "c": None}]
    monkeypatch.setattr(distributed, "gather", lambda value: told)
    with pytest.raises(ValueError, match="disagree on the config: a is 1 in process 0 and 2 in 2; c is 'absent' in"):
        distributed.agree("config", told[0])
    monkeypatch.setattr(distributed, "gather", lambda value: told[:2])
    distributed.agree("config", told[0])


@pytest.mark.parametrize("process", [0, 1])
def test_the_first_process_answers_for_all_or_fails_for_all(monkeypatch, process):
    def others_hear(value):  # what process 0 says, as JSON brings it
        return [json.loads(json.dumps(value if process == 0 else said))]

    def refuse():
        raise FileNotFoundError("no run there")

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(distributed, "gather", others_hear)
    said = [[3, [4]], None]
    assert distributed.from_first(lambda: [3, [4]] if process == 0 else pytest.fail("asked")) == [3, [4]]
    said = [None, "no run there"]
    expected = FileNotFoundError if process == 0 else ValueError
    with pytest.raises(expected, match="^no run there" if process == 0 else "^process 0 says: no run there"):
        distributed.from_first(refuse)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo_glass", "sft_reviews", "dpo_hh"])
def test_experiments_run_from_end_to_end(tmp_path, name):
    """Sampling pairs, evaluations, the judge: whatever a run does, two processes do it together."""
    two, one = Hosts(tmp_path / "two", None), Hosts(tmp_path / "one", None)
    data = ["--data.path", write_pairs(tmp_path / "pairs.jsonl")] if name == "dpo_hh" else []
    for hosts, count in ((two, 2), (one, 1)):
        hosts.module = f"experiments.{name}"
        hosts.run(count, "--smoke", *data)
    for row, other in zip(two.lines, one.lines, strict=True):
        assert row.keys() == other.keys()
        for metric in (name for name in other if name == "eval/loss" or not name.startswith("eval/")):
            if "accuracies" not in metric or row["step"] > 1:
                assert row[metric] == pytest.approx(other[metric], rel=1e-3, abs=1e-3), (metric, row["step"])
    first, second = runs.read(two.folder), runs.read(one.folder)
    assert first.summary.keys() == second.summary.keys()
    assert len(first.samples) == len(second.samples)
    # Rounding decides a draw that lies where one token's share ends and another's begins, and the completion from there
    # on; 1 of 96 was seen to go another way, which moved eval/kl by 0.01. So texts are compared, not their means.
    texts = [[row["text"] for row in run.samples if row["kind"] == "completion"] for run in (first, second)]
    same = [one == other for one, other in zip(*texts, strict=True)]
    assert sum(same) >= 0.9 * len(same)


@pytest.mark.slow
def test_four_processes_train_to_the_numbers_of_one(tmp_path, one):
    hosts, alone = Hosts(tmp_path / "four", one.model), Hosts(tmp_path / "one", one.model)
    hosts.begin_run(4, *SHORT, "--num-microbatches=1")
    alone.begin_run(1, *SHORT, "--num-microbatches=1")
    assert_same_run(hosts, alone)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "devices"), [("--mesh.fsdp=2", 2), ("--mesh.model=2", 1)])
def test_parts_of_the_weights_in_several_processes(tmp_path, one, mesh, devices):
    """Where heads are cut between the two processes, both read every row."""
    hosts = Hosts(tmp_path, one.model)
    hosts.begin_run(2, *SHORT, mesh, devices=devices)
    assert_same_run(hosts, one)


@pytest.mark.slow
def test_reference_log_probs_are_stored_once(tmp_path, one):
    alone, hosts = Hosts(tmp_path / "alone", one.model), Hosts(tmp_path / "two", one.model)
    alone.begin_run(1, *SHORT, "--reference=stored")
    hosts.begin_run(2, *SHORT, "--reference=stored")
    assert_same_run(hosts, alone)
    # Each file is a checksum of 32 bytes and rows, which are of one size in both.
    sizes = [[path.stat().st_size - 32 for path in run.root.glob("reference_logps/*/*.rows")] for run in (alone, hosts)]
    assert sum(sizes[0]) == sum(sizes[1]) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("before", "victim", "after"), [(2, 0, 1), (2, 1, 1), (2, 0, 4), (2, 1, 4), (1, 0, 2)])
def test_one_is_killed_and_another_number_goes_on(tmp_path, undisturbed, cache, before, victim, after):
    hosts = Hosts(tmp_path, undisturbed.model, cache)
    processes = hosts.processes(before, "--model.source", hosts.model, *LONG)
    hosts.wait_for(25, processes[0])
    processes[victim].kill()
    started = time.monotonic()
    ended = hosts.end(processes)
    assert time.monotonic() - started < 60  # seconds: heartbeats stop for ten, and then some
    for status, _, err in ended[:victim] + ended[victim + 1 :]:
        assert status != 0
        assert re.search("another one ended|another task died", err)
    good = [int(path.name) for path in (hosts.folder / "checkpoints").iterdir() if path.name.isdecimal()]
    assert max(good) >= 14
    out = hosts.run(after, "--resume", hosts.folder)[0][1]
    assert re.search(r"going on from step \d+ of 60", out)
    assert_same_run(hosts, undisturbed, step=60)


@pytest.mark.slow
def test_one_that_does_not_answer_is_dead(tmp_path, one):
    """A machine that hangs closes no connection; its heartbeats stop."""
    hosts = Hosts(tmp_path, one.model)
    processes = hosts.processes(2, "--model.source", one.model, "--batch-size=8")
    hosts.wait_for(10, processes[0])
    processes[1].send_signal(signal.SIGSTOP)
    started = time.monotonic()
    (ended,) = hosts.end(processes[:1])
    processes[1].kill()
    processes[1].communicate()
    assert time.monotonic() - started < 60
    assert ended[0] != 0
    assert "another task died" in ended[2]


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_stops_all_with_everything_saved(tmp_path, undisturbed, cache, asked, how):
    hosts = Hosts(tmp_path, undisturbed.model, cache)
    processes = hosts.processes(2, "--model.source", hosts.model, *LONG)
    hosts.wait_for(10, processes[0])
    processes[asked].send_signal(how)
    ended = hosts.end(processes)
    assert [status for status, _, _ in ended] == [1, 1]
    step = int(re.search(r"stopped after step (\d+) of 60", ended[0][2])[1])
    assert (hosts.folder / "checkpoints" / str(step)).is_dir()
    assert "Go on with: python -m experiments.tests.tiny_run --resume" in ended[0][2]
    assert "stopped after" not in ended[1][2]
    assert "Traceback" not in ended[0][2] + ended[1][2]
    hosts.run(1, "--resume", hosts.folder)
    assert_same_run(hosts, undisturbed, step=60)
