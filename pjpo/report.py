"""Pictures of runs, for notebooks, and `write`, which puts those of one run into a report.html that needs nothing else.

Every function takes runs as `pjpo.runs.read` gives them. A metric without a place below gets a panel of its own, so
whatever is logged can be seen.
"""

from __future__ import annotations

import base64
import fnmatch
import html
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from pjpo import runs

PANELS = (  # title, what the vertical axis shows, metrics (the last part of the name is the label)
    ("Loss", "nats", ("loss",)),
    ("Implicit rewards", "beta × log-ratio, nats", ("rewards/chosen", "rewards/rejected", "rewards/margins")),
    ("Pairs ranked right", "share of pairs", ("rewards/accuracies",)),
    ("Log-probabilities", "nats per completion", ("logps/chosen", "logps/rejected")),
    ("Completions", "tokens", tuple(f"completions/{what}_length" for what in ("mean", "min", "max"))),
    ("Ratios clipped", "share of tokens", ("clip_ratio/*_mean",)),
    ("Trainer less sampler", "log-probs, nats per token", ("sampling/sampling_logp_difference/*",)),
    ("Where the time goes", "seconds", ("time/*",)),
    ("Gradient norm", "before clipping", ("grad_norm",)),
    ("Learning rate", "", ("learning_rate",)),
    ("Speed", "tokens per second", ("*tokens_per_second",)),
    ("Tokens seen", "prompts and completions", ("num_tokens",)),
)
HELD_OUT_PANELS = (
    ("Rankings", "share of pairs", ("eval/ranking/accuracy", "eval/ranking/idealised_median", "eval/ranking/flipped")),
    (
        "Rankings by mean log-probs",
        "share of pairs",
        ("eval/ranking/accuracy_per_token", "eval/ranking/idealised_median_per_token"),
    ),
    (
        "Log-ratios to the start",
        "nats per completion",
        ("eval/implicit/chosen", "eval/implicit/rejected", "eval/implicit/margins"),
    ),
    ("Moved from the reference", "nats per completion", ("eval/logps/chosen_change", "eval/logps/rejected_change")),
    ("Length", "share of pairs", ("eval/length/longer_chosen", "eval/length/longer_rewarded")),
)
UNITS = {  # of metrics that stand alone
    "kl": "nats per completion",
    "entropy": "nats per token",
    "sequence_kl": "nats per completion",
    "ranking/difficulty": "nats, reference's rejected − chosen",
    "ranking/theorem_4_1_violations": "pairs",
    "token_rewards/largest_share": "share of a pair's token rewards",
    "reward_vader": "VADER, −1 to 1",
    "reward_judge": "P(positive) by the judge",
    "distinct_2": "different 2-grams / all",
    "mean_length": "tokens per completion",
    "step_seconds": "seconds",
}
COLORS = {"chosen": "#0072b2", "rejected": "#d55e00", "margins": "#4d4d4d"}
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by colour-blind readers too
BEST_OF = {"color": "#666666", "zorder": 1}
STYLE = {
    "text.parse_math": False,  # a name may hold dollars
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 5),
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}
CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 76rem; margin: 2rem auto; padding: 0 1.5rem }
h1 { font-size: 1.5rem }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #ddd }
img { max-width: 100%; height: auto }
small, summary, .caption { color: #666 }
.tables { display: flex; flex-wrap: wrap; gap: 1rem 3rem; align-items: flex-start }
table { border-collapse: collapse } tr { border-bottom: 1px solid #eee }
th, td { text-align: left; vertical-align: top; font-weight: normal; padding: .25rem 1.5rem .25rem 0 }
th { color: #555 } td { font-variant-numeric: tabular-nums }
.samples { width: 100%; table-layout: fixed } .samples div { margin-bottom: .5rem; white-space: pre-wrap }
.tokens { white-space: pre-wrap; line-height: 1.9 } .tokens span { border-radius: 2px }
summary { cursor: pointer }
"""


def learning_curves(run: runs.Run) -> Figure | None:
    """What was logged while training, over steps; diamonds are the same on held-out data. None without metrics."""
    return _grid(run, _grouped([name for name in run.metrics if not name.startswith("eval/")], PANELS))


def evaluation_curves(run: runs.Run) -> Figure | None:
    """What was measured on held-out data alone, over steps; bands are one standard error. None without any."""
    names = [name for name in run.metrics if name.startswith("eval/") and name.removeprefix("eval/") not in run.metrics]
    return _grid(run, _grouped(names, HELD_OUT_PANELS))


def _grouped(names: Sequence[str], panels: Sequence[tuple]) -> list[tuple[str, str, list[str]]]:
    """Those of the panels that have something to show, then one panel for each name that is in none of them."""
    rest, grouped = list(names), []
    for title, unit, patterns in panels:
        found = [name for pattern in patterns for name in rest if fnmatch.fnmatchcase(name, pattern)]
        if found:
            grouped.append((title, unit, found))
        rest = [name for name in rest if name not in found]
    return grouped + [(name, _unit(name), [name]) for name in rest if not name.endswith("_stderr")]


def frontier(*several: runs.Run, rewards: Sequence[str] = ("reward_vader", "reward_judge")) -> Figure | None:
    """Reward against KL to the reference as training goes on, beside best-of-n sampling from the reference.

    Args:
        several: one run, or runs that differ in a setting; each is a curve from its start to its end.
        rewards: the panels; a reward that no run has is left out.

    Returns:
        A figure; None where no run has measured KL and reward.
    """
    rewards = [reward for reward in rewards if any(len(_frontier(run, reward)) for run in several)]
    if not rewards:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(rewards), 4.0), layout="constrained")
        for axes, reward in zip(figure.subplots(1, len(rewards), squeeze=False)[0], rewards, strict=True):
            for run, label, color in zip(several, _labels(several), SERIES * len(several), strict=False):
                points = _frontier(run, reward)
                if not len(points):
                    continue
                steps, kl, kl_error, value, error = points.T
                axes.errorbar(kl, value, error, kl_error, "o-", color=color, label=label, elinewidth=0.8, capsize=0)
                at, offset = (kl[-1], value[-1]), (6, 5)
                axes.annotate(f"step {steps[-1]:.0f}", at, offset, textcoords="offset points", color=color, fontsize=8)
            best = [(num, row["kl"], row[reward]) for num, row in _best_of(several[0]).items() if reward in row]
            if best:  # told apart in the legend: beside the curve they are too near each other for labels
                nums, kl, value = zip(*best, strict=True)
                label = f"best of n = {', '.join(map(str, nums))}, reference"
                axes.plot(kl, value, "s--", label=label, **BEST_OF)
            axes.set(title=f"{reward} against KL", ylabel=_unit(reward), xlabel=f"KL to the reference, {UNITS['kl']}")
            axes.margins(0.12)
            axes.legend(loc="best")
    return figure


def token_rewards(rows: Iterable[Mapping[str, Any]]) -> str:
    """HTML: texts whose tokens are coloured by their rewards, blue where the policy raised them and orange where not.

    Args:
        rows: samples with "tokens" (texts) and "token_rewards" (beta times log-ratio, nats); "prompt" and "label" too,
            where they have them.
    """
    rows = list(rows)
    values = [[float(value) for value in row["token_rewards"]] for row in rows]
    known = [abs(value) for row in values for value in row if math.isfinite(value)]
    limit = max(float(np.quantile(known, 0.98)) if known else 0.0, 1e-6)  # a single huge token would hide the rest
    blocks = []
    for row, numbers in zip(rows, values, strict=True):
        spans = []
        for token, value in zip(row["tokens"], numbers, strict=True):
            strength = min(abs(value) / limit, 1.0) if math.isfinite(value) else 0.0
            color = f"rgba({'0,114,178' if value > 0 else '230,120,0'},{0.75 * strength:.2f})"
            text = html.escape(token).replace("\n", "⏎\n")
            spans.append(f'<span style="background:{color}" title="{value:+.3f}">{text}</span>')
        label = f"{html.escape(str(row['label']))}: " if "label" in row else ""
        prompt = f'<span style="color:#666">{html.escape(str(row.get("prompt", "")))}</span>'
        sum_text = f"<small>{label}{sum(numbers):+.2f} nats in all</small>"
        blocks.append(f'<p class="tokens">{prompt}{"".join(spans)}<br>{sum_text}</p>')
    ramp = "linear-gradient(90deg,rgba(230,120,0,.75),rgba(255,255,255,0),rgba(0,114,178,.75))"
    scale = (
        f'<div style="display:inline-block;width:12em;height:.8em;margin:0 .5em;background:{ramp}"></div>'
        f"<small>{-limit:+.2f} to {limit:+.2f} nats per token</small>"
    )
    return f"<style>{CSS[CSS.index('.tokens') : CSS.index('summary {')]}</style>{scale}{''.join(blocks)}"


def write(folder: str | os.PathLike) -> Path:
    """Reads a run's folder and writes its report.html.

    Returns:
        Path of the report, one file with its pictures inside.
    """
    run = runs.read(folder)
    sections = [
        ("Results", _results(run)),
        ("Plot", _plot(run)),
        (
            "Reward against KL",
            _picture(lambda: frontier(run), "On held-out data, from the start of training to its end."),
        ),
        ("Learning curves", _picture(lambda: learning_curves(run), "Strong: running mean. Diamonds: held-out data.")),
        ("Evaluation", _picture(lambda: evaluation_curves(run), "On held-out data. Bands: one standard error.")),
        ("Samples", _samples(run)),
        ("Token rewards", token_rewards(rows) if (rows := _of_kind(run, "token_rewards")) else ""),
        ("Data", _table(_under(run.summary, "counts/"))),
        ("Config", _table(runs.flat(run.config))),
        ("Made with", _table(runs.flat(run.about))),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    title = html.escape(f"{run.experiment} · {run.path.resolve().name}")
    head = f'<meta charset="utf-8"><title>{title}</title><style>{CSS}</style>'
    path = run.path / "report.html"
    runs.write_whole(
        path, f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{title}</h1>{body}</body></html>\n'
    )
    return path


def _grid(run: runs.Run, panels: Sequence[tuple[str, str, Sequence[str]]], num_columns: int = 3) -> Figure | None:
    if not panels:
        return None
    num_columns = min(num_columns, len(panels))
    num_rows = -(-len(panels) // num_columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.7 * num_columns, 2.6 * num_rows), layout="constrained")
        grid = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
        for axes in grid[len(panels) :]:
            axes.remove()
        for axes, (title, unit, names) in zip(grid, panels, strict=False):
            for name, fallback in zip(names, SERIES * len(names), strict=False):
                label = name.split("/")[-1].removesuffix("_tokens_per_second")
                _curve(axes, run, name, COLORS.get(label, fallback) if len(names) > 1 else SERIES[0], label)
            axes.set(title=title, ylabel=unit, xlabel="step")
            if len(names) > 1:
                axes.set_ylim(top=axes.get_ylim()[1] + 0.15 * np.ptp(axes.get_ylim()))  # room for the legend
                style = {"ncols": len(names), "handlelength": 1.2, "columnspacing": 1.2, "borderaxespad": 0}
                axes.legend(loc="upper left", **style).set_in_layout(False)  # or a long one widens its column
    return figure


def _curve(axes, run: runs.Run, name: str, color: str, label: str) -> None:
    """The numbers themselves; where they are many, pale, under their running mean."""
    steps, values = run.metrics[name]
    window = len(values) // 25
    if window >= 2 and name != "learning_rate":
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _running_mean(values, window), color=color, label=label)
    else:
        axes.plot(steps, values, "o-" if len(values) <= 25 else "-", color=color, label=label)
    if f"{name}_stderr" in run.metrics:
        where, errors = run.metrics[f"{name}_stderr"]
        middle = np.interp(where, steps, values)
        axes.fill_between(where, middle - errors, middle + errors, color=color, alpha=0.15, linewidth=0)
    if f"eval/{name}" in run.metrics:
        axes.plot(*run.metrics[f"eval/{name}"], "D", color=color, markeredgecolor="white", markersize=6)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Over `window` numbers around each, fewer at the ends; what is not finite is left out."""
    finite = np.isfinite(values)
    kernel = np.ones(2 * (window // 2) + 1)
    counts = np.convolve(finite, kernel, "same")
    sums = np.convolve(np.where(finite, values, 0), kernel, "same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _frontier(run: runs.Run, reward: str) -> np.ndarray:
    """[points, (step, kl, its error, reward, its error)], from the start to the end."""
    names = ("kl", "kl_stderr", reward, f"{reward}_stderr")
    points = {}
    if f"start/{reward}" in run.summary and "start/kl" in run.summary:
        points[0] = [run.summary.get(f"start/{name}", 0.0) for name in names]
    columns = {name: dict(zip(*map(list, run.metrics.get(f"eval/{name}", ((), ()))), strict=True)) for name in names}
    for step in sorted(columns["kl"].keys() & columns[reward].keys()):
        points[int(step)] = [columns[name].get(step, 0.0) for name in names]
    rows = [[step, *row] for step, row in points.items() if math.isfinite(row[0]) and math.isfinite(row[2])]
    return np.nan_to_num(np.array(rows, np.float64).reshape(-1, 5))


def _best_of(run: runs.Run) -> dict[int, dict[str, float]]:
    """n -> what best-of-n sampling from the reference gives."""
    table: dict[int, dict[str, float]] = {}
    for name, value in _under(run.summary, "best_of/").items():
        num, _, name = name.partition("/")
        table.setdefault(int(num), {})[name] = value
    return dict(sorted(table.items()))


def _labels(several: Sequence[runs.Run]) -> list[str]:
    """What tells the runs apart."""
    if len(several) == 1:
        return [several[0].experiment]
    configs = [runs.flat(run.config) for run in several]
    names = [name for name in configs[0] if len({json.dumps(config.get(name)) for config in configs}) > 1]
    return [
        ", ".join(f"{name} = {config.get(name)}" for name in names) or run.path.name
        for config, run in zip(configs, several, strict=True)
    ]


def _unit(name: str) -> str:
    return UNITS.get(name.removeprefix("eval/"), "")


def _under(numbers: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in numbers.items() if name.startswith(prefix)}


def _of_kind(run: runs.Run, kind: str) -> list[dict[str, Any]]:
    return [row for row in run.samples if row.get("kind", "completion") == kind]


def _picture(draw: Callable[[], Figure | None], caption: str) -> str:
    """What is drawn; or why it could not be, as the rest of the report can still be read."""
    data = io.BytesIO()
    try:
        figure = draw()
        if figure is None:
            return ""
        figure.savefig(data, format="png", dpi=144)
    except (ValueError, ArithmeticError, RuntimeError) as error:  # numbers beyond the axes, a picture beyond its size
        why = html.escape(f"{type(error).__name__}: {error}")
        return f"<p>This picture could not be drawn: {why}. Its numbers are in metrics.jsonl and summary.json.</p>"
    source = base64.b64encode(data.getvalue()).decode()
    return f'<p class="caption">{caption}</p><img alt="{caption}" src="data:image/png;base64,{source}">'


def _plot(run: runs.Run) -> str:
    """What the run drew itself, plot.png."""
    path = run.path / "plot.png"
    data = base64.b64encode(path.read_bytes()).decode() if path.exists() else ""
    return data and f'<img alt="plot" src="data:image/png;base64,{data}">'


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return html.escape(value if isinstance(value, str) else json.dumps(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _decimals(value: Any) -> str:
    """Measurements under each other line up, and a rounding error of 1e-7 is nought."""
    return f"{value:.3f}" if isinstance(value, float) else _number(value)


def _table(numbers: Mapping[str, Any]) -> str:
    return _rows([], [[html.escape(name), _number(value)] for name, value in numbers.items()])


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already; nothing without rows."""
    lines = [f"<tr>{''.join(f'<th>{cell}' for cell in head)}"] if head else []
    lines += [f"<tr><th>{'<td>'.join(row)}" for row in rows]
    return f"<table>{''.join(lines)}</table>" if rows else ""


def _results(run: runs.Run) -> str:
    """The numbers before and after side by side, then best-of-n, then the others."""
    start, end = _under(run.summary, "start/"), _under(run.summary, "eval/")
    rows = []
    for name in dict.fromkeys((*start, *end)):
        if name.endswith("_stderr"):
            continue
        cells = []
        for numbers in (start, end):
            error = numbers.get(f"{name}_stderr")
            value = _decimals(numbers[name]) if name in numbers else ""
            cells.append(value + (f" <small>± {_decimals(error)}</small>" if error else ""))
        change = f"{end[name] - start[name]:+.3f}" if name in start and name in end else ""
        rows.append([html.escape(name), *cells, change])
    tables = _rows(["", "start", "end", "change"], rows)
    best = _best_of(run)
    names = list(dict.fromkeys(name for row in best.values() for name in row))
    rows = [[f"best of {num}", *(_decimals(row.get(name, "")) for name in names)] for num, row in best.items()]
    tables += _rows(["", *map(html.escape, names)], rows)
    known = ("start/", "eval/", "best_of/", "counts/")
    tables += _table({name: value for name, value in run.summary.items() if not name.startswith(known)})
    return f'<div class="tables">{tables}</div>' if tables else ""


def _samples(run: runs.Run, num_shown: int = 20) -> str:
    """The same prompts over time: first and last beside each other, what came between to unfold."""
    by_prompt: dict[str, list[dict]] = {}
    for row in _of_kind(run, "completion"):
        by_prompt.setdefault(str(row.get("prompt", "")), []).append(row)
    if not by_prompt:
        return ""
    lines = []
    for prompt, rows in list(by_prompt.items())[:num_shown]:
        rows = sorted(rows, key=lambda row: row["step"])
        between = "".join(_sample(row, prompt) for row in rows[1:-1])
        between = f"<details><summary>{len(rows) - 2} between</summary>{between}</details>" if between else ""
        last = _sample(rows[-1], prompt) if len(rows) > 1 else ""
        lines.append(f"<tr><th>{html.escape(prompt)}{between}<td>{_sample(rows[0], prompt)}<td>{last}")
    more = f"<p>{len(by_prompt) - num_shown} more in samples.jsonl</p>" if len(by_prompt) > num_shown else ""
    return f'<table class="samples"><tr><th>prompt<th>first<th>last{"".join(lines)}</table>{more}'


def _sample(row: Mapping[str, Any], prompt: str) -> str:
    text = str(row.get("completion", row.get("text", ""))).removeprefix(prompt)
    numbers = {name: value for name, value in row.items() if name != "step" and isinstance(value, (int, float))}
    scores = " · ".join(f"{html.escape(name)} {_number(value)}" for name, value in numbers.items())
    return f"<div>{html.escape(text)}<br><small>step {row['step']}{' · ' if scores else ''}{scores}</small></div>"
