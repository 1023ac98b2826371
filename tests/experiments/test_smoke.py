"""Every experiment's `--smoke`, as a user starts it, and what it leaves in its folder."""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import registry
from pjpo import report, runs
from tests.experiments.test_registry import EXPERIMENTS, STUDIES

ROOT = Path(__file__).parents[2]
MINUTE = 60.0  # seconds
DPO = {"loss", "grad_norm", "learning_rate", "num_tokens", "tokens_per_second"} | {
    f"{kind}/{what}"
    for kind, whats in {
        "rewards": ("chosen", "rejected", "margins", "accuracies"),
        "logps": ("chosen", "rejected"),
    }.items()
    for what in whats
}  # TRL's names, letter for letter


def write_pairs(path, seed=0):
    """Rows of HH's two columns, of words that the tiny model knows."""
    words = ["Alice", "Rabbit", "Queen", "looked", "said", "thought", "garden", "little", "door", "never", "tea"]
    rng = random.Random(seed)

    def text(count):
        return " ".join(rng.choices(words, k=count))

    with path.open("w") as file:
        for row in range(40):
            dialogue = f"\n\nHuman: {row} {text(4)}?\n\nAssistant: "
            file.write(json.dumps({"chosen": dialogue + text(3), "rejected": dialogue + text(5)}) + "\n")
    return path


class Smoke:
    """A finished smoke run: its folder, what it printed, the processor time it took."""

    def __init__(self, name, root):
        arguments = ["--shifted", write_pairs(root / "others.jsonl", seed=1)] if name == "reward_hh" else []
        command = [sys.executable, "-m", f"experiments.{name}", "--smoke", "--runs", root / "runs", *arguments]
        environment = os.environ | {"XLA_FLAGS": ""}  # one device
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        self.out, self.err = done.stdout, done.stderr
        self.seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        (self.folder,) = (root / "runs" / name).glob("*")
        self.run = runs.read(self.folder)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """One run of each experiment, whichever tests ask for it."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = Smoke(name, tmp_path_factory.mktemp(name))
        return made[name]

    return of


# One goes from pairs that it samples itself to its report; the others' smoke runs are slow.
QUICK = ("dpo_glass",)
NAMES = [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in EXPERIMENTS]


@pytest.mark.parametrize("name", NAMES)
def test_ends_within_a_minute_with_everything_in_its_folder(smoke, name):
    done = smoke(name)
    assert done.seconds < 2 * MINUTE  # of two cores, whatever else they are doing
    assert "Traceback" not in done.err
    assert f"run: {done.folder}" in done.out
    assert f"report: {done.folder / 'report.html'}" in done.out
    present = {path.name.split(".out.")[0] for path in done.folder.iterdir()}
    files = {"config.json", "metrics.jsonl", "summary.json", "report.html", "events", "checkpoints"}
    assert files <= present
    assert not list(done.folder.rglob("*.tmp"))
    num_steps = registry.override(registry.get(name), registry.get(name).smoke).loop.num_steps
    assert (done.folder / "checkpoints" / str(num_steps)).is_dir()
    steps, losses = done.run.metrics["loss"]
    assert steps.tolist() == list(range(1, num_steps + 1))
    assert np.isfinite(losses).all()
    assert done.run.experiment == name
    source = done.run.config["model"]["source"]
    assert source == "glassllm-en" or Path(source).is_relative_to(done.folder.parents[1])  # what it made itself
    assert any(name.startswith("counts/") for name in done.run.summary)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_ends_within_a_minute_with_its_verdicts(smoke, name):
    done = smoke(name)
    assert done.seconds < 2 * MINUTE
    value = registry.override(registry.get(name), registry.get(name).smoke)
    files = {"config.json", "samples.jsonl", "plot.png", "result.md", "summary.json", "report.html"}
    assert files <= {path.name for path in done.folder.iterdir()}
    of_seeds = [row for row in done.run.samples if "numbers" in row]  # beside rollouts and metrics of updates
    assert [row["step"] for row in of_seeds] == list(range(value.num_seeds))
    assert all(np.isfinite(list(row["numbers"].values())).all() for row in of_seeds)
    text = (done.folder / "result.md").read_text()
    for claim in value.claims():
        assert done.run.summary[claim].startswith(("holds", "does not hold"))
        assert claim in text
        assert claim in done.out
    assert "<h2>Plot</h2>" in (done.folder / "report.html").read_text()


ONLINE = [name for name in EXPERIMENTS if registry.get(name).rollouts]


@pytest.mark.parametrize("name", [n for n in NAMES if n.values[0] not in ("sft_reviews", "reward_pairs", *ONLINE)])
def test_metrics_have_trl_s_names(smoke, name):
    metrics = smoke(name).run.metrics
    assert {n for n in metrics if not n.startswith("eval/")} == DPO
    # Policy and reference agree at the start: the first loss is log 2, its rewards 0.
    assert metrics["loss"][1][0] == pytest.approx(np.log(2), abs=1e-5)
    assert metrics["rewards/margins"][1][0] == pytest.approx(0, abs=1e-4)
    assert metrics["logps/chosen"][1][0] < -1


@pytest.mark.slow
def test_a_reward_models_metrics_have_trl_s_names_too(smoke):
    metrics = smoke("reward_pairs").run.metrics
    of_rewards = {"accuracy", "margin", "mean_reward"}
    found = {n for n in metrics if not n.startswith("eval/")}
    assert found == {n for n in DPO if not n.startswith(("rewards/", "logps/"))} | of_rewards
    assert metrics["loss"][1][0] == pytest.approx(np.log(2), abs=1e-5)  # a head of zeros: all rewards alike


@pytest.mark.slow
@pytest.mark.parametrize("name", ONLINE)
def test_rollouts_have_trl_s_names_and_go_to_the_samples(smoke, name):
    run = smoke(name).run
    value = registry.override(registry.get(name), registry.get(name).smoke)
    names = {"loss", "reward", "reward_std", "frac_reward_zero_std", "num_tokens"}
    names |= {f"completions/{what}" for what in ("mean_length", "min_length", "max_length", "clipped_ratio")}
    names |= {f"sampling/sampling_logp_difference/{what}" for what in ("mean", "max")}
    names |= {f"time/{what}" for what in ("generate", "reward", "score", "update")}
    names |= {f"speed/{what}_tokens_per_second" for what in ("generate", "update")}
    assert names <= run.metrics.keys()
    if not value.rollouts.pairs:
        assert run.metrics["kl"][1][0] == pytest.approx(0, abs=1e-5)  # where nothing was trained yet
        assert run.metrics["entropy"][1][0] > 0
    rows = [row for row in run.samples if row["kind"] == "rollout"]
    assert {row["step"] for row in rows} == {1}  # of the first of three rollouts
    num_completions = 2 if value.rollouts.pairs else value.rollouts.num_completions
    assert len(rows) == value.rollouts.num_logged_prompts * num_completions
    assert {"prompt", "completion", "reward", "rewards", "truncated"} <= rows[0].keys()
    assert ("advantage" in rows[0]) != value.rollouts.pairs


@pytest.mark.slow
def test_dpo_sees_the_held_out_pairs(smoke):
    run = smoke("dpo_hh").run
    steps, losses = run.metrics["eval/loss"]
    assert steps.tolist() == [0, 2, 4]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5)
    assert run.summary["start/loss"] == losses[0]
    assert run.summary["eval/loss"] == losses[-1] != losses[0]
    assert {"counts/rows", "counts/used"} <= run.summary.keys()
    assert list(smoke("dpo_hh").folder.parent.parent.glob("reference_logps/*/about.json"))


@pytest.mark.slow
def test_sft_learns(smoke):
    run = smoke("sft_reviews").run
    assert not any("rewards/" in name for name in run.metrics)
    assert run.summary["eval/loss"] < run.summary["start/loss"]
    assert 2 < run.summary["start/loss"] < 10  # nats per token of a vocabulary of thousands


@pytest.mark.parametrize("name", ["dpo_glass", pytest.param("dpo_sentiment", marks=pytest.mark.slow)])
def test_the_sentiment_study_is_summed_up(smoke, name):
    done = smoke(name)
    summary = done.run.summary
    for name in ("reward_vader", "reward_judge", "kl", "distinct_2", "mean_length"):
        for when in ("start", "eval"):
            assert isinstance(summary[f"{when}/{name}"], float)
        steps, values = done.run.metrics[f"eval/{name}"]
        assert steps.tolist() == [0, 3, 6]
        assert (values[0], values[-1]) == (summary[f"start/{name}"], summary[f"eval/{name}"])
    assert summary["start/kl"] == pytest.approx(0, abs=1e-3)
    steps, margins = done.run.metrics["eval/rewards/margins"]  # the panel, on pairs that were never trained on
    assert steps.tolist() == [0, 3, 6]
    assert margins[0] == pytest.approx(0, abs=1e-4)
    assert margins[-1] != 0
    assert {f"eval/{name}" for name in ("ranking/accuracy", "logps/chosen_change", "entropy")} <= summary.keys()
    assert summary["eval/ranking/theorem_4_1_violations"] == 0
    assert 0 < summary["eval/token_rewards/largest_share"] < 1
    assert "start/token_rewards/largest_share" not in summary  # where no token has moved
    assert "nats a completion" in summary["displacement"]
    rewards = [summary[f"best_of/{num}/reward_vader"] for num in (1, 2, 4)]
    assert rewards == sorted(rewards)
    assert rewards[0] == pytest.approx(summary["start/reward_vader"])
    texts = [row for row in done.run.samples if row["kind"] == "completion"]
    assert sorted({row["step"] for row in texts}) == [0, 3, 6]
    assert len({row["prompt"] for row in texts}) == 8
    tokens = [row for row in done.run.samples if row["kind"] == "token_rewards"]
    assert {row["label"] for row in tokens} == {"chosen", "rejected"}
    assert len((done.folder / "pairs.jsonl").read_text().splitlines()) > 8
    assert "before vader" in done.out  # pairs of texts to read
    assert "after  vader" in done.out


def test_the_report_shows_it(smoke):
    text = (smoke("dpo_glass").folder / "report.html").read_text()
    for title in (
        "Results",
        "Reward against KL",
        "Learning curves",
        "Evaluation",
        "Samples",
        "Token rewards",
        "Config",
    ):
        assert f"<h2>{title}</h2>" in text
    assert text.count("data:image/png;base64,") == 3
    assert "http" not in text.replace("http://www.w3.org", "")  # nothing is fetched


@pytest.mark.filterwarnings("default")  # of Jupyter about itself
def test_the_notebook_reads_it(smoke, monkeypatch):
    pytest.importorskip("nbclient", reason="needs the extra 'notebooks'")
    pytest.importorskip("ipykernel", reason="needs the extra 'notebooks'")
    from tests.test_notebooks import execute

    notebook = execute("01_dpo_sentiment.ipynb", monkeypatch, smoke("dpo_glass").folder)
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    for cell in ("learning", "evaluation", "frontier"):
        assert "image/png" in outputs[cell][-1]["data"]
    assert "nats in all" in outputs["tokens"][-1]["data"]["text/html"]


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(smoke, tmp_path):
    """Pointing at its folder, with no other setting, writes the report again and adds nothing."""
    folder = tmp_path / "dpo_hh" / "copy"
    shutil.copytree(smoke("dpo_hh").folder, folder)
    before = {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl", "summary.json")}
    (folder / "report.html").unlink()
    command = [sys.executable, "-m", "experiments.dpo_hh", "--resume", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on from step 4 of 4" in done.stdout
    assert {name: (folder / name).read_bytes() for name in before} == before
    report_text = (folder / "report.html").read_text()
    assert report_text.count("<h2>") == report.write(folder).read_text().count("<h2>") > 4
