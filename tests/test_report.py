import base64
import html.parser
import math
import re

import numpy as np
import pytest

from pjpo import report, runs
from tests.fabricated import OPENINGS, make_run


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def run(path):
    return runs.read(path)


@pytest.fixture(scope="module")
def page(path):
    return report.write(path).read_text()


def make_bare(tmp_path, rows=(), summary=None):
    folder = runs.create(tmp_path, "sft_tiny", {})
    for step, metrics in rows:
        folder.log(step, metrics)
    folder.summary(summary or {})
    folder.close()
    return runs.read(folder.path)


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_the_report_stands_alone(path, page):
    assert path.joinpath("report.html").exists()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 3
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert len(re.findall(r"(?:src|href)=", page)) == 3
    assert "://" not in re.sub(r"base64,[^\"]+", "", page)


def test_the_report_has_every_section(page):
    sections = re.findall(r"<h2>([^<]+)", page)
    assert sections == [
        "Results",
        "Reward against KL",
        "Learning curves",
        "Evaluation",
        "Samples",
        "Token rewards",
        "Data",
        "Config",
        "Made with",
    ]
    assert "<th>skipped: tie<td>31" in page
    assert "<th>method.beta<td>0.1" in page
    assert "<th>versions.jax<td>" in page


def test_results_stand_side_by_side(run, page):
    start, end = run.summary["start/reward_vader"], run.summary["eval/reward_vader"]
    assert f"<th>reward_vader<td>{start:.3f} <small>± 0.020</small><td>{end:.3f}" in page
    assert f"<td>{end - start:+.3f}" in page
    assert "<th>best of 4<td>0.630<td>0.640<td>0.636" in page


def test_samples_first_and_last_side_by_side(page):
    row = page[page.index(OPENINGS[0]) :]
    first, last = (
        row.index("<td><div> and it was long &amp; dull (0)"),
        row.index("<td><div> and it was wonderful (200)"),
    )
    assert row.index("<details><summary>4 between") < first < last < row.index(OPENINGS[1])


def test_texts_are_not_markup(page):
    tags = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)
    parser.feed(page)
    assert "img" in tags
    assert not {"drama", "b"} & set(tags)
    assert "A quiet &lt;drama&gt; about" in page


def test_related_metrics_share_a_panel(run):
    figure = report.learning_curves(run)
    assert titles(figure)[:4] == ["Loss", "Implicit rewards", "Pairs ranked right", "Log-probabilities"]
    labels = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert labels == ["chosen", "rejected", "margins"]
    assert all(axes.get_xlabel() == "step" for axes in figure.axes)


def test_every_metric_is_drawn(tmp_path):
    names = ["loss", "kl", "my/own", "eval/kl", "eval/other", "tokens_per_second"]
    run = make_bare(tmp_path, [(step, dict.fromkeys(names, 1.0)) for step in range(3)])
    assert titles(report.learning_curves(run)) == ["Loss", "Speed", "kl", "my/own"]
    assert titles(report.evaluation_curves(run)) == ["eval/other"]
    lines = report.learning_curves(run).axes[2].lines  # kl, with its held-out values as diamonds
    assert [line.get_marker() for line in lines] == ["o", "D"]


def test_a_name_may_hold_dollars(tmp_path):
    run = make_bare(tmp_path, [(step, {"source/$x_$/loss": 1.0, "eval/$x_$": 1.0}) for step in range(3)])
    assert "<img" in report.write(run.path).read_text()


def test_what_is_held_out_alone_has_its_panels(tmp_path):
    pairs = {f"ranking/{what}": 0.5 for what in ("accuracy", "idealised_median", "flipped", "difficulty")}
    pairs |= {f"ranking/{what}_per_token": 0.5 for what in ("accuracy", "idealised_median", "idealised_min")}
    pairs |= {f"implicit/{what}": 0.5 for what in ("chosen", "rejected", "margins", "accuracies")}
    pairs |= {"logps/chosen_change": -1.0, "logps/rejected_change": -2.0, "logps/chosen": -9.0}
    pairs |= {"length/longer_chosen": 0.5, "length/longer_rewarded": 0.6}
    trained = {"rewards/margins": 3.0, "logps/chosen": -8.0}
    rows = [(step, trained | {f"eval/{name}": value for name, value in pairs.items()}) for step in range(2)]
    figure = report.evaluation_curves(make_bare(tmp_path, rows))
    shown = {axes.get_title(loc="left"): axes for axes in figure.axes}
    labels = {
        title: [text.get_text() for text in axes.get_legend().get_texts()]
        for title, axes in shown.items()
        if axes.get_legend()
    }
    assert labels == {
        "Rankings": ["accuracy", "idealised_median", "flipped"],
        "Rankings by mean log-probs": ["accuracy_per_token", "idealised_median_per_token"],
        "Log-ratios to the start": ["chosen", "rejected", "margins"],
        "Moved from the reference": ["chosen_change", "rejected_change"],
        "Length": ["longer_chosen", "longer_rewarded"],
    }
    assert shown["eval/ranking/difficulty"].get_ylabel() == "nats, reference's rejected − chosen"
    assert "eval/logps/chosen" not in shown  # beside what was logged while training, as a diamond
    curves = {axes.get_title(loc="left"): axes for axes in report.learning_curves(make_bare(tmp_path, rows)).axes}
    assert len(curves["Implicit rewards"].lines) == 1  # of training alone: log-ratios to the start have another scale


def test_many_points_get_a_running_mean():
    values = np.array([0.0, 3.0, 6.0, np.nan, 6.0, 3.0, 0.0])
    np.testing.assert_allclose(report._running_mean(values, 3), [1.5, 3, 4.5, 6, 4.5, 3, 1.5])
    np.testing.assert_array_equal(report._running_mean(np.full(3, np.nan), 2), np.full(3, np.nan))


def test_the_frontier_goes_from_start_to_end(run):
    figure = report.frontier(run)
    assert titles(figure) == ["reward_vader against KL", "reward_judge against KL"]
    axes = figure.axes[0]
    policy, best = (line for line in axes.lines if len(line.get_xdata()) in (3, 6))
    np.testing.assert_allclose(policy.get_xdata(), run.metrics["eval/kl"][1])
    np.testing.assert_allclose(policy.get_ydata(), run.metrics["eval/reward_vader"][1])
    np.testing.assert_allclose(best.get_xdata(), [0, math.log(2) - 1 / 2, math.log(4) - 3 / 4])
    np.testing.assert_allclose(best.get_ydata(), [0.21, 0.45, 0.63])
    assert [text.get_text() for text in axes.texts] == ["step 200"]


def test_the_frontier_compares_runs(run, tmp_path):
    other = runs.read(make_run(tmp_path, beta=0.3))
    labels = [text.get_text() for text in report.frontier(run, other).axes[0].get_legend().get_texts()]
    assert labels == ["best of n = 1, 2, 4, reference", "method.beta = 0.1", "method.beta = 0.3"]


def test_the_frontier_from_a_summary_alone(tmp_path):
    numbers = {"start/kl": 0.0, "start/reward_vader": 0.2}
    run = make_bare(tmp_path, [(50, {"eval/kl": 4.0, "eval/reward_vader": 0.5})], numbers)
    (axes,) = report.frontier(run).axes
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[0, 0.2], [4, 0.5]])


def test_without_metrics_there_is_a_report_still(tmp_path):
    run = make_bare(tmp_path)
    assert report.learning_curves(run) is report.evaluation_curves(run) is report.frontier(run) is None
    assert "Config" not in report.write(run.path).read_text()


def test_numbers_that_are_not_finite_do_not_stop_the_report(tmp_path):
    bad = {"loss": math.nan, "eval/kl": math.inf, "eval/reward_vader": math.nan, "rewards/chosen": -math.inf}
    run = make_bare(tmp_path, [(step, bad) for step in range(80)], {"start/kl": math.nan, "eval/kl": math.inf})
    assert "nan" in report.write(run.path).read_text()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # which end nothing outside of tests
def test_a_picture_that_cannot_be_drawn_says_why_in_its_place(tmp_path):
    huge = [(0, {"loss": 1e308, "eval/accuracy": 0.5}), (1, {"loss": -1e308, "eval/accuracy": 0.75})]
    run = make_bare(tmp_path, huge, {"eval/accuracy": 0.75})
    page = report.write(run.path).read_text()
    place = "<h2>Learning curves</h2><p>This picture could not be drawn: ValueError: arange: cannot compute length. Its"
    assert place in page
    assert "<h2>Evaluation</h2><p class" in page
    assert "<h2>Results</h2>" in page
    assert "<h2>Made with</h2>" in page


def test_bugs_in_a_picture_are_not_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "learning_curves", lambda run: run.nothing)
    with pytest.raises(AttributeError):
        report.write(make_bare(tmp_path, [(0, {"loss": 1.0})]).path)


def test_token_rewards_by_colour():
    row = {"tokens": ["good", " <b>", "bad"], "token_rewards": [2.0, "NaN", -1.0], "prompt": "p & q", "label": "chosen"}
    shown = report.token_rewards([row])
    spans = re.findall(r'<span style="background:rgba\((\d+),\d+,\d+,([\d.]+)\)" title="([^"]+)">([^<]*)', shown)
    assert [span[2:] for span in spans] == [("+2.000", "good"), ("+nan", " &lt;b&gt;"), ("-1.000", "bad")]
    blue, none, orange = spans
    assert (blue[0], orange[0], float(none[1])) == ("0", "230", 0.0)
    assert float(blue[1]) > float(orange[1]) > 0.3
    assert "p &amp; q" in shown


def test_tokens_and_rewards_must_match():
    with pytest.raises(ValueError, match="zip"):
        report.token_rewards([{"tokens": ["a", "b"], "token_rewards": [1.0]}])
