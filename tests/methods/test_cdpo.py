"""cDPO against golden values, and where its margins stop."""

import numpy as np

from pjpo.methods import cdpo, dpo
from tests.methods import golden
from tests.methods.contract import Contract

CONTRACT = Contract(bad={"flip_rate": (float("nan"), float("inf"), -0.1, 0.5, 0.7)})


@golden.in_both_dtypes
def test_golden_values(dtype, bound):
    golden.check(
        cdpo,
        cdpo.Config(beta=0.1, flip_rate=0.1),
        bound,
        dtype=dtype,
        mean=0.72220965,
        each=[0.65439666, 0.84838216, 0.66385014],
        gradient=golden.opposite([-0.01250069, -0.01622059, -0.01270863]),
    )


@golden.in_both_dtypes
def test_golden_values_at_extremes(dtype, bound):
    golden.check(
        cdpo,
        cdpo.Config(beta=0.1, flip_rate=0.1),
        bound,
        dtype=dtype,
        policy=golden.EXTREME,
        reference=np.full((2, 2), -100.0),
        lengths=np.full((2, 2), 10),
        mean=400,
        each=[80, 720],
    )


def test_margins_stop_at_the_log_odds_of_a_right_label():
    margin = np.log(0.9 / 0.1) / 0.1  # nats
    policy = np.array([[-5.0, -5 - margin]])
    case = golden.Case(cdpo, cdpo.Config(), policy, np.full((1, 2), -5.0), np.full((1, 2), 3))
    np.testing.assert_allclose(case.gradient, 0, atol=1e-12)


def test_without_flips_it_is_dpo():
    one, other = golden.Case(cdpo, cdpo.Config(flip_rate=0.0)), golden.Case(dpo, dpo.Config())
    np.testing.assert_allclose(one.each, other.each, rtol=1e-12)
