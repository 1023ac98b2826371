"""Where two-response descents stop, and how far those that do not stop have come."""

import numpy as np
import pytest

from experiments.claims import insights
from pjpo.methods import ipo


@pytest.mark.parametrize(
    ("name", "num_steps", "margin"),
    [
        ("dpo", 100, 21.85),
        ("dpo", 1000, 45.71),
        ("dpo", 10000, 69.02),
        ("cdpo", 10000, 21.97224577),
        ("kto", 100, 19.02),
        ("kto", 1000, 45.79),
        ("kto", 10000, 69.63),
        ("hinge_norm", 10000, 10.0),
        ("cpo", 100, 3.40),
        ("cpo", 1000, 9.97),
        ("cpo", 10000, 29.33),
    ],
)
def test_margins(name, num_steps, margin):
    np.testing.assert_allclose(insights.margin(name, num_steps), margin, atol=0.006)


@pytest.mark.parametrize(("beta", "probability"), [(0.1, 0.99330715), (0.5, 0.73105858), (1.0, 0.62245933)])
def test_ipo_stops_at_its_margin(beta, probability, monkeypatch):
    monkeypatch.setitem(insights.FIXED, "ipo", (ipo, ipo.Config(beta=beta), 0.1))
    np.testing.assert_allclose(1 / (1 + np.exp(-insights.margin("ipo", 10_000))), probability, atol=1e-7)


def test_sizes_are_compared_from_the_sft_start(monkeypatch):
    def start_points(num_pairs, seed):
        return {
            f"{name} from {start}": seed + num_pairs + (start == "sft") for name in "xy" for start in insights.STARTS
        }

    monkeypatch.setattr(insights, "start_points", start_points)
    monkeypatch.setattr(insights, "METHODS", {"x": None, "y": None})
    assert insights.sizes(3) == {f"{n}, {pairs} pairs": 4 + pairs for n in "xy" for pairs in (100, 1000, 10_000)}
