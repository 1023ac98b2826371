"""A study's verdicts, its table and its folder, on made-up measurements."""

import dataclasses
import json
import re
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from experiments import frontier_glass, rdpo_glass
from experiments.study import bench, study
from pjpo import optim, runs, train


class NoModel(bench.Config):
    def load(self):
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadeUp(study.Study):
    paper: ClassVar = "P"
    setting: ClassVar = "Nothing is run."
    start: bench.Config = dataclasses.field(default_factory=NoModel)
    training: bench.Training = dataclasses.field(default_factory=lambda: bench.Training(num_steps=1))
    measured: ClassVar[list] = []

    def measure(self, start, seed, record):
        self.measured.append(seed)
        record("first", [{"kind": "rollout", "reward": 0.5}, {"kind": "update", "loss": 2.0}])
        return {"a: x": 10.0 * seed + 1, "a: y": 0.5, "b: x": 10.0 * seed}

    def claims(self):
        return {"a beats b": (study.Above("a: x", "b: x"),), "b beats a": (study.Above("b: x", "a: x"),)}

    def panels(self):
        return [study.Panel(title="t", xlabel="", ylabel="", curves={"x": [("a", "a: x"), ("b", "b: x")]})]


@pytest.fixture
def said():
    return []


@pytest.fixture
def folder(tmp_path, said):
    MadeUp.measured.clear()
    return study.run("made_up", MadeUp(num_seeds=3), root=tmp_path, say=said.append)


def test_verdicts_are_paired_by_seed(folder, said):
    summary = runs.read(folder).summary
    assert summary["a beats b"] == "holds: a: x - b: x = 1 [1, 1]"
    assert summary["b beats a"] == "does not hold: NOT b: x - a: x = -1 [-1, -1]"
    assert summary["a: y"] == "0.5 ± 0"
    assert summary["finished"]
    assert any("b beats a\n    does not hold: NOT" in line for line in said)


def test_the_table_has_a_place_for_every_number(folder):
    lines = (folder / "result.md").read_text().splitlines()
    assert lines[0] == "### P: `made_up`"
    assert "| | x | y |" in lines
    # Mean 11 or 10 of 10 apart: half the interval is t(0.975, 2) * 10 / sqrt(3) = 24.84.
    assert "| a | 11 ± 2e+01 | 0.5 ± 0 |" in lines
    assert "| b | 10 ± 2e+01 |  |" in lines
    assert "- b beats a: **does not hold**. NOT b: x - a: x = -1 [-1, -1]" in lines
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "<h2>Plot</h2>" in (folder / "report.html").read_text()


def test_a_verdict_on_few_seeds_is_marked(folder, said):
    assert "Nothing is run. 3 seeds (**fewer than 5**), " in (folder / "result.md").read_text()
    study.run("made_up", MadeUp(num_seeds=5), resume=folder, say=said.append)
    assert "Nothing is run. 5 seeds, " in (folder / "result.md").read_text()


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[3] / "docs" / "studies").glob("*.md")), ids=lambda path: path.stem
)
def test_what_is_published_has_five_seeds_or_says_so(path):
    ((number, mark),) = re.findall(r" (\d+) seeds( \(\*\*fewer than 5\*\*\))?, 20", path.read_text())
    assert bool(mark) == (int(number) < 5)


def test_going_on_measures_new_seeds_alone(folder, said):
    study.run("made_up", MadeUp(num_seeds=4), root="nowhere", resume=folder, say=said.append)
    assert MadeUp.measured == [0, 1, 2, 3]
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == 4 * ["rollout", "update", "seed"]
    assert [row["step"] for row in rows] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert rows[1] == {"step": 0, "training": "first", "kind": "update", "loss": 2.0}
    assert [row["numbers"]["b: x"] for row in rows[2::3]] == [0, 10, 20, 30]
    assert "4 seeds" in (folder / "result.md").read_text()


def test_an_interruption_keeps_what_is_measured_and_says_how_to_go_on(tmp_path, said, monkeypatch):
    def measure(self, start, seed, record):
        if seed == 1:
            raise KeyboardInterrupt
        return {"a: x": float(seed)}

    monkeypatch.setattr(MadeUp, "measure", measure)
    with pytest.raises(train.Stopped, match=r"Go on with: python -m experiments.made_up --resume .*made_up"):
        study.run("made_up", MadeUp(), root=tmp_path, say=said.append)
    (folder,) = tmp_path.glob("made_up/*")
    assert [row["step"] for row in runs.read(folder).samples] == [0]


def test_what_the_first_seed_refuses_leaves_no_folder(tmp_path, said, monkeypatch):
    def measure(self, start, seed, record):
        raise ValueError("made up: no such setting")

    monkeypatch.setattr(MadeUp, "measure", measure)
    with pytest.raises(ValueError, match="no such setting"):
        study.run("made_up", MadeUp(), root=tmp_path, say=said.append)
    assert not list(tmp_path.glob("made_up/*"))


def test_counts_and_schedules_are_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(NoModel, "load", lambda self: pytest.fail("loaded"))
    slow = bench.Training(num_steps=3, optimizer=optim.Config(learning_rate=1.0, warmup_steps=3))
    with pytest.raises(ValueError, match="warmup_steps 3 must be below num_steps 3"):
        study.run("made_up", MadeUp(training=slow), root=tmp_path)
    for settings in ({"num_steps": 0}, {"num_steps": 2, "batch_size": 0}):
        with pytest.raises(ValueError, match=f"bench: {list(settings)[-1]} must be >= 1, got 0"):
            bench.Training(**settings)
    for name in ("num_held_out", "opening_tokens", "max_completion_tokens", "num_completions"):
        with pytest.raises(ValueError, match=f"bench: {name} must be >= 1, got 0"):
            bench.Config(**{name: 0})
    with pytest.raises(ValueError, match="study: num_openings must be >= 1, got -3"):
        dataclasses.replace(rdpo_glass.EXPERIMENT, num_openings=-3)
    with pytest.raises(ValueError, match="study: flip_rates must name one value at least"):
        dataclasses.replace(rdpo_glass.EXPERIMENT, flip_rates=())
    with pytest.raises(ValueError, match=r"study: budgets must be > 0 nats, got \(1.0, -1.0\)"):
        dataclasses.replace(frontier_glass.EXPERIMENT, budgets=(1.0, -1.0))
    assert dataclasses.replace(frontier_glass.EXPERIMENT, stops=()).stops == ()


def test_other_settings_are_refused(folder, said):
    other = MadeUp(num_seeds=3, training=bench.Training(num_steps=2))
    with pytest.raises(ValueError, match=r"training.num_steps: 1 there, 2 here"):
        study.run("made_up", other, resume=folder, say=said.append)


def test_a_place_that_takes_no_run_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(NoModel, "load", lambda self: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"no run can be written to .*file: .* is a file; .* with --runs"):
        study.run("made_up", MadeUp(), root=tmp_path / "file")


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match="num_seeds must be >= 2 for an interval, got 1"):
        MadeUp(num_seeds=1)


def test_an_error_bar_is_the_interval_over_seeds():
    axes = study.draw(MadeUp().panels(), [{"a: x": 1.0, "b: x": 4.0}, {"a: x": 3.0, "b: x": 4.0}]).axes[0]
    (segments,) = [bars.get_segments() for bars in axes.collections]
    half = 12.7062047  # t(0.975, 1) times a standard error of 1
    np.testing.assert_allclose(segments[0][:, 1], [2 - half, 2 + half], rtol=1e-6)
    np.testing.assert_allclose(segments[1][:, 1], [4, 4])


def test_curves_of_one_x_are_drawn_side_by_side_and_the_legend_covers_none():
    panel = study.Panel(title="t", xlabel="", ylabel="", curves={"one": [("a", "a: x")], "two": [("a", "b: x")]})
    figure = study.draw([panel], [{"a: x": 1.0, "b: x": 4.0}, {"a: x": 3.0, "b: x": 4.0}])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    bars = [drawn.get_transform().transform(drawn.get_segments()[0])[0, 0] for drawn in axes.collections]  # pixels
    middle = axes.transData.transform((0, 4))[0]
    np.testing.assert_allclose(bars, [middle - figure.dpi / 60, middle + figure.dpi / 60])
    dots = [line.get_transform().transform(line.get_xydata())[0, 0] for line in axes.lines]
    np.testing.assert_allclose(dots, bars)
    legend, title = (part.get_window_extent() for part in (axes.get_legend(), axes._left_title))
    assert axes.get_window_extent().y1 <= legend.y0 < legend.y1 <= title.y0


def test_a_study_that_lacks_a_part_cannot_be_made():
    class Partial(study.Study):
        def measure(self, start, seed, record):
            return {}

    with pytest.raises(TypeError, match=r"abstract methods? .*claims.*panels"):
        Partial(training=bench.Training(num_steps=1))
