"""The loop around an update that costs nothing: the state moves by what the batch says. Whole runs: test_experiment."""

import contextlib
import json
import math
import resource
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjpo import runs, train
from pjpo.checkpoints import Checkpoints, SaveError
from pjpo.data.batches import Batches
from pjpo.data.buckets import Buckets
from pjpo.data.examples import Example
from pjpo.metrics import Mean

EXAMPLES = [Example(np.array([7]), (np.array([row]), np.array([0])), {}, f"row {row}") for row in range(10)]
TIMING = "tokens_per_second"


def update(state, ref_params, batch):
    """Each state depends on all batches so far, and on their order."""
    row = float(batch.completion_tokens[0, 0, 0])
    state = {"params": 0.5 * state["params"] + row, "step": state["step"] + 1}
    return state, {"loss": Mean.of(jnp.float32(row)), "grad_norm": Mean.of(jnp.float32(1.0))}


def mean(state, step):
    return {"eval/mean": float(state["params"].mean())}


class Run:
    """One folder; every `train` goes on in it."""

    def __init__(self, root, size=4):
        self.folder = runs.create(root, "loop", {})
        self.size, self.said = size, []

    def train(self, update=update, evaluate=mean, **loop):
        with self.folder, Checkpoints(self.folder.checkpoints, say=self.said.append) as checkpoints:
            return train.train(
                train.Loop(**{"num_steps": 12, "evaluate_every_steps": 4, "checkpoint_every_steps": 3} | loop),
                update=update,
                state={"params": jax.random.normal(jax.random.key(0), self.size), "step": jnp.int32(0)},
                ref_params=None,
                batches=train.Offline(
                    Batches(EXAMPLES, batch_size=1, seed=3, buckets=Buckets.of(EXAMPLES)), lambda batch: batch
                ),
                evaluate=evaluate,
                trainable=lambda state: state,
                restored=lambda state, saved: saved,
                folder=self.folder,
                checkpoints=checkpoints,
                say=self.said.append,
            )

    def await_checkpoint(self, step):
        """It is saved in the background."""
        while step not in self.steps:
            time.sleep(0.01)

    @property
    def saved(self):
        """The last checkpoint."""
        like = {"params": jnp.zeros(self.size), "step": jnp.int32(0)}
        with Checkpoints(self.folder.checkpoints) as checkpoints:
            return checkpoints.restore(like)

    @property
    def steps(self):
        return sorted(int(path.name) for path in self.folder.checkpoints.glob("*") if path.name.isdecimal())

    @property
    def lines(self):
        rows = [json.loads(line) for line in (self.folder.path / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in row.items() if name != TIMING} for row in rows]


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "runs")


@pytest.fixture
def alone(tmp_path):
    """What a run left alone comes to."""
    run = Run(tmp_path / "alone")
    run.train()
    return run


def at(step, action, then=update):
    """`update` with something happening in update `step`."""

    def acting(state, ref_params, batch):
        if state["step"] + 1 == step:
            action()
        return then(state, ref_params, batch)

    return acting


def poisoned(step, name="loss", value=math.nan):
    """`update` whose metric, or parameters, go bad in update `step`."""

    def bad(state, ref_params, batch):
        state, metrics = update(state, ref_params, batch)
        if state["step"] == step and name == "params":
            state |= {"params": state["params"].at[1].set(value)}
        elif state["step"] == step:
            metrics |= {name: Mean.of(jnp.float32(value))}
        return state, metrics

    return bad


def interrupt():
    signal.raise_signal(signal.SIGINT)


def same(one, other):
    assert one.lines == other.lines
    assert jax.tree.map(bytes, (one.saved.step, one.saved.state)) == jax.tree.map(
        bytes, (other.saved.step, other.saved.state)
    )
    assert one.saved.extra == other.saved.extra


def test_everything_at_its_period(run):
    state = run.train(num_steps=10, log_every_steps=2, evaluate_every_steps=4, checkpoint_every_steps=3)
    assert state["step"] == 10
    logged = [row["step"] for row in run.lines if "loss" in row]
    assert logged == [2, 3, 4, 6, 8, 9, 10]  # what is saved is logged first
    assert [row["step"] for row in run.lines if "eval/mean" in row] == [0, 4, 8, 10]
    assert run.steps == [9, 10]  # of 3, 6, 9 and the last, the last two


def test_a_period_of_zero_is_never(run):
    run.train(num_steps=10, evaluate_every_steps=0, checkpoint_every_steps=0)
    assert [row["step"] for row in run.lines if "eval/mean" in row] == [0, 10]
    assert run.steps == [10]


def test_what_nothing_was_counted_of_is_not_logged(run):
    def counting(state, ref_params, batch):
        state, metrics = update(state, ref_params, batch)
        seen = state["step"] == 2
        return state, metrics | {"seen": Mean.of(jnp.float32(5.0), seen), "unseen": Mean.of(jnp.zeros(0))}

    run.train(update=counting, evaluate=None, num_steps=4, log_every_steps=2, checkpoint_every_steps=0)
    assert [row.get("seen") for row in run.lines] == [5.0, None]
    assert not any("unseen" in row for row in run.lines)


def test_logs_means_over_the_period_and_counts_tokens(run):
    rows = []

    def watched(state, ref_params, batch):
        rows.append(float(batch.completion_tokens[0, 0, 0]))
        return update(state, ref_params, batch)

    run.train(watched, evaluate=None, num_steps=6, log_every_steps=3, checkpoint_every_steps=0)
    np.testing.assert_allclose([row["loss"] for row in run.lines], [np.mean(rows[:3]), np.mean(rows[3:])], rtol=1e-6)
    assert [row["num_tokens"] for row in run.lines] == [9, 18]  # a prompt token and two of completions, each update


@pytest.mark.parametrize(
    "bad", [{"num_steps": 0}, {"log_every_steps": 0}, {"evaluate_every_steps": -1}, {"checkpoint_every_steps": -1}]
)
def test_bad_periods_are_refused(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        train.Loop(**{"num_steps": 1} | bad)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 8, 11])
def test_interrupted_it_saves_and_goes_on(run, alone, step):
    """At 3 a checkpoint is due too, at 4 and 8 an evaluation, which must not be forgotten."""
    with pytest.raises(train.Stopped, match=rf"^stopped after step {step} of 12, which is saved in .*checkpoints$"):
        run.train(at(step, interrupt))
    assert run.saved.step == step
    run.train()
    assert run.said == [f"going on from step {step} of 12"]
    same(run, alone)


def test_interrupted_in_the_last_update_it_ends(run, alone):
    run.train(at(12, interrupt))
    same(run, alone)


def test_interrupted_while_it_evaluates(run, alone):
    def evaluate(state, step):
        if step == 8:
            interrupt()
        return mean(state, step)

    with pytest.raises(train.Stopped, match="step 8"):
        run.train(evaluate=evaluate)
    run.train()
    same(run, alone)


def test_a_second_interruption_does_not_wait(run, alone, capfd):
    with pytest.raises(KeyboardInterrupt):
        run.train(at(5, lambda: (interrupt(), interrupt())))
    assert "once more to stop at once" in capfd.readouterr().err
    assert run.saved.step == 3
    run.train()
    same(run, alone)


def test_signals_mean_afterwards_what_they_meant(run):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(train.Stopped):
        run.train(at(2, lambda: signal.raise_signal(signal.SIGTERM)))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_not_finite_it_stops(run, name, value):
    with pytest.raises(
        FloatingPointError, match=rf"{name} became {value} in update 8; last checkpoint: step 6 in .*checkpoints\."
    ):
        run.train(poisoned(8, name, value))
    assert run.saved.step == 6
    assert run.lines[-1]["step"] == 7


def test_not_finite_before_any_checkpoint(run):
    with pytest.raises(FloatingPointError, match="in update 2; last checkpoint: none"):
        run.train(poisoned(2))
    assert run.saved is None


def test_not_finite_in_a_period(run, alone):
    with pytest.raises(
        FloatingPointError,
        match=r"loss became nan between updates 7 and 8; last checkpoint: step 6 .*log_every_steps=1",
    ):
        run.train(poisoned(8), log_every_steps=5)
    run.train()  # with whatever was wrong put right
    assert run.saved.step == 12
    np.testing.assert_array_equal(run.saved.state["params"], alone.saved.state["params"])


@pytest.mark.parametrize(("step", "last"), [(6, 3), (12, 9)])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_parameters_that_are_not_finite_are_never_saved(run, step, last, value):
    """The loss of an update is that before it: it says nothing yet."""
    with pytest.raises(
        FloatingPointError, match=rf"parameters became nan or infinite in update {step}; last checkpoint: step {last} "
    ):
        run.train(poisoned(step, "params", value))
    assert run.saved.step == last
    assert np.isfinite(run.saved.state["params"]).all()


def test_interrupted_with_bad_parameters_it_saves_none(run):
    def both(state, ref_params, batch):
        return at(5, interrupt, poisoned(5, "params"))(state, ref_params, batch)

    with pytest.raises(FloatingPointError, match="in update 5; last checkpoint: step 3"):
        run.train(both)
    assert run.saved.step == 3


def test_a_folder_that_cannot_be_closed_does_not_hide_why_it_stopped(run, monkeypatch):
    def close(folder, close=runs.RunFolder.close):
        close(folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.RunFolder, "close", close)
    with pytest.raises(FloatingPointError, match="in update 5"):
        run.train(poisoned(5))
    with pytest.raises(OSError, match="No space left"):
        run.train()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # writes that TensorStore gave up
def test_a_write_that_fails(tmp_path):
    """A limit on the size of files stands in for the full disk."""
    run = Run(tmp_path, size=100_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit():
        run.await_checkpoint(6)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))

    try:
        with pytest.raises(
            SaveError, match=r"the checkpoint of step 9 could not be saved .*Last good checkpoint: .*/6\."
        ):
            run.train(at(8, limit))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.steps == [3, 6]
    assert run.train()["step"] == 12
    assert run.said[-1] == "going on from step 6 of 12"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # writes that TensorStore gave up
def test_a_disk_that_fills_up(tmp_path, alone):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        run = Run(disk)
        filler = disk / "filler"

        def fill():
            run.await_checkpoint(6)
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

        with pytest.raises(OSError, match=r"No space left on device: .*/disk/|could not be saved in .*/6\."):
            run.train(at(8, fill))
        assert run.steps == [3, 6]
        filler.unlink()
        run.train()
        same(run, alone)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
