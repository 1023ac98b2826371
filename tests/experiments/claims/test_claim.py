"""Intervals, verdicts and the table, on made-up measurements."""

import numpy as np
import pytest
from scipy import stats

from experiments.claims import __main__ as command
from experiments.claims.claim import Above, Claim, Within, interval, run, table


def made_up(measure, *checks):
    return Claim(paper="P", text="t", setting="s", measure=measure, checks=checks)


def test_the_interval_is_students():
    values = np.array([1.0, 2.0, 4.0, 4.5, 6.0])
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    mean, half = interval(values)
    np.testing.assert_allclose([mean - half, mean + half], [low, high], rtol=1e-12)


def test_differences_are_paired_by_seed():
    # Seeds differ by far more than the two numbers do: unpaired, nothing would hold.
    claim = made_up(lambda seed: {"a": 100.0 * seed + 1 + 0.1 * (seed % 2), "b": 100.0 * seed}, Above("a", "b"))
    assert run(claim).holds
    assert not run(made_up(claim.measure, Above("b", "a"))).holds
    assert not run(made_up(claim.measure, Above("a", "b", by=1.2))).holds


def test_a_difference_that_could_be_chance_does_not_hold():
    noise = [1.0, -0.9, 0.3, -0.2, 0.1]
    assert not run(made_up(lambda seed: {"a": noise[seed], "b": 0.0}, Above("a", "b"))).holds


def test_every_seed_must_lie_within():
    claim = made_up(lambda seed: {"a": float(seed)}, Within("a", 0, 3))
    assert run(claim, 4).holds
    assert not run(claim, 5).holds


def test_a_claim_that_does_not_hold_is_in_the_table_with_its_numbers():
    verdicts = [run(made_up(lambda seed: {"a": float(seed)}, Within("a", *bounds))) for bounds in ((0, 4), (5, 6))]
    first, second = table(verdicts).split("\n")[2:]
    assert first.endswith("| yes |")
    assert second.endswith("| **no** |")
    assert "NOT a in [0, 4], asked [5, 6]" in second
    assert "a 2 ± 2" in first


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match="num_seeds must be >= 2 for an interval, got 1"):
        run(made_up(lambda seed: {"a": 0.0}, Within("a", 0, 1)), 1)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The command, on one made-up claim; its table."""
    monkeypatch.setattr(command, "CLAIMS", (made_up(lambda seed: {"a": float(seed)}, Within("a", 0, 3)),))

    def run(*argv):
        command.main([*argv, "--out", str(tmp_path / "docs" / "claims.md")])
        return (tmp_path / "docs" / "claims.md").read_text()

    return run


def test_the_command_writes_the_table_with_the_studies_after_it(written, tmp_path, capsys):
    (tmp_path / "docs" / "studies").mkdir(parents=True)
    (tmp_path / "docs" / "studies" / "rdpo.md").write_text("### of a study\n")
    text = written("--num-seeds", "4")
    assert "wrote this: 4 seeds (**fewer than 5**), " in text
    assert text.index("| yes |") < text.index("## On real models") < text.index("### of a study")
    assert capsys.readouterr().out.startswith("1 of 1 claims hold; ")
    text = written("--num-seeds", "5")
    assert "wrote this: 5 seeds, " in text
    assert "**no**" in text
    with pytest.raises(SystemExit, match="num_seeds must be >= 2 for an interval, got 1"):
        written("--num-seeds", "1")
    assert "**no**" in (tmp_path / "docs" / "claims.md").read_text()


def test_a_place_for_the_table_is_checked_before_anything_is_measured(written, tmp_path, monkeypatch):
    (tmp_path / "docs").write_text("mine")
    monkeypatch.setattr(command, "run", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit, match=r"no table can be written to .*docs: .*docs is a file; .*with --out"):
        written()


def test_every_paper_has_claims():
    assert len({claim.paper for claim in command.CLAIMS}) == 14
