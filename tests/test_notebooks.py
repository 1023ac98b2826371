"""Every notebook is kept without outputs, and runs from its first cell to its last."""

import base64
import math
import os
import re
import sys
from pathlib import Path

import pytest

from tests.fabricated import make_rollouts, make_run

nbformat = pytest.importorskip("nbformat", reason="needs the extra 'notebooks'")
nbclient = pytest.importorskip("nbclient", reason="needs the extra 'notebooks'")
pytest.importorskip("ipykernel", reason="needs the extra 'notebooks'")

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def execute(name, monkeypatch, run):
    """The notebook after its run; it may read `run` and nothing else."""
    monkeypatch.setenv("PJPO_RUN", str(run))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    return notebook


@pytest.mark.filterwarnings("default")  # of Jupyter about itself
def test_dpo_sentiment_draws_the_run(tmp_path, monkeypatch):
    notebook = execute("01_dpo_sentiment.ipynb", monkeypatch, make_run(tmp_path, num_steps=20))
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    for cell in ("learning", "evaluation", "frontier"):
        picture = base64.b64decode(outputs[cell][-1]["data"]["image/png"])
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 10_000
    assert "wonder" in outputs["tokens"][-1]["data"]["text/html"]
    assert "reward_vader" in outputs["numbers"][0]["text"]
    assert "wonderful (20)" in outputs["samples"][0]["text"]


@pytest.mark.filterwarnings("default")
def test_a_run_of_rollouts_is_drawn(tmp_path, monkeypatch):
    notebook = execute("05_rl_run.ipynb", monkeypatch, make_rollouts(tmp_path))
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    for cell in ("curves", "evaluation", "rto"):
        pictures = [output.data["image/png"] for output in outputs[cell] if "image/png" in output.get("data", {})]
        assert len(base64.b64decode(pictures[0])) > 5000
    assert "largest gap: 9." in outputs["sampler"][0]["text"]
    assert "advantage +0.87  ' 3'" in outputs["groups"][0]["text"]
    sums = outputs["rto"][0]["text"].splitlines()
    assert sums[0].split(": ")[1] == sums[1].split(": ")[1]  # of rto and ddpo
    assert sums[2].endswith("[1. 1. 1. 1.]")  # rs adds nothing
    text = outputs["rto-text"][-1]["data"]["text/html"]
    assert text.count("nats in all") == 6
    colors = {
        word: set(re.findall(rf"rgba\(([\d,]+),[\d.]+\)\" title=\"[-+.\d]+\">{word} ", text))
        for word in ("wonderful", "brilliant", "awful", "stupid")
    }
    assert colors["wonderful"] | colors["brilliant"] == {"0,114,178"}  # rewards, in blue
    assert colors["awful"] | colors["stupid"] == {"230,120,0"}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("name", "pictures", "printed"),
    [
        ("02_losses_side_by_side", ("margin", "noise"), {"noise": "'rDPO': 2.0", "ties": "reward model accuracy 0.5"}),
        ("03_ranking_and_displacement", ("threshold",), {"displacement": "Likelihood displacement: both fell"}),
        ("04_token_credit", ("credit",), {"search": "16 beams", "policy": "token there: 0"}),
    ],
)
def test_the_toys_run_and_draw(name, pictures, printed, tmp_path, monkeypatch):
    notebook = execute(f"{name}.ipynb", monkeypatch, tmp_path)
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    for cell in pictures:
        found = [output.data["image/png"] for output in outputs[cell] if "image/png" in output.get("data", {})]
        assert len(base64.b64decode(found[0])) > 5000
    for cell, text in printed.items():
        assert text in "".join(output.get("text", "") for output in outputs[cell])
    if name.startswith("02"):
        check_losses(*("".join(output.get("text", "") for output in outputs[cell]) for cell in ("methods", "ties")))


def check_losses(methods, ties):
    """Every method that learns from preferences is drawn, in each of its forms, with its loss and slope at a tie."""
    drawn = "cdpo cpo dpo dpo_attenuated ipo kto orpo rdpo reward_model rso simpo slic"
    assert methods.strip() == f"methods: {drawn}"
    rows = re.findall(r"^(.+?) +(-?\d+\.\d{4}) +([+-]\d+\.\d{4})$", ties, re.MULTILINE)
    found = {name: (float(value), float(slope)) for name, value, slope in rows}
    log2, sigmoid1 = math.log(2), 1 / (1 + math.exp(-1))
    expected = {  # of completions of 10 tokens
        "DPO": (log2, -0.1 / 2),
        "cDPO": (log2, -0.1 * (0.5 - 0.2)),
        "rDPO": (log2, -0.1 * (0.5 + 0.2 / 0.6)),
        "attenuated DPO": (log2, -0.1 / 2),
        "IPO (sums)": (25, -10),
        "IPO (means)": (25, -1),
        "RSO sigmoid-norm": (log2, -0.05 / 2),
        "RSO hinge": (1, -0.1),
        "RSO hinge-norm": (1, -0.2),
        "SLiC without NLL": (10, -1),
        "CPO": (log2 + 4, -0.1 / 2 - 1 / 20),
        "CPO without NLL": (log2, -0.1 / 2),
        "SimPO": (math.log1p(math.e), -2 / 10 * sigmoid1),
        "KTO, desirable": (0.5, -0.1 / 4),
        "KTO, undesirable": (0.5, 0.1 / 4),
        "Bradley-Terry reward model": (log2, -0.5),
    }
    assert found.keys() == expected.keys() | {"ORPO"}
    for name, numbers in expected.items():
        assert found[name] == pytest.approx(numbers, abs=1e-4), name
    p = math.exp(-4)  # of a token on average; ORPO's likelihood and the slope of its log-odds
    assert found["ORPO"] == pytest.approx((4 + log2, -1 / 20 - 0.5 / 10 / (1 - p)), abs=1e-4)


@pytest.mark.filterwarnings("default")
def test_dpo_sentiment_says_what_to_do_without_a_run(tmp_path, monkeypatch):
    with pytest.raises(nbclient.exceptions.CellExecutionError, match=r"nowhere is not the folder of a run"):
        execute("01_dpo_sentiment.ipynb", monkeypatch, tmp_path / "nowhere")


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
