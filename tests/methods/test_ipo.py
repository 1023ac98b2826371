"""IPO against golden values, averaged and summed, and what length does to each."""

import numpy as np
import pytest

from pjpo.methods import ipo
from tests.methods import golden
from tests.methods.contract import Contract

CONTRACT = Contract(configs=(ipo.Config(reduction="sum"),), nudged={"reduction": "sum"}, bad={"reduction": ("median",)})


@golden.in_both_dtypes
def test_golden_values_averaged(dtype, bound):
    golden.check(
        ipo,
        ipo.Config(beta=0.1),
        bound,
        dtype=dtype,
        mean=24.86103009,
        each=[23.20027778, 28.22265625, 23.16015625],
        gradient=[[-0.64222222, 0.53518519], [-0.29513889, 0.35416667], [-0.80208333, 0.80208333]],
    )


@golden.in_both_dtypes
def test_golden_values_summed(dtype, bound):
    golden.check(
        ipo,
        ipo.Config(beta=0.1, reduction="sum"),
        bound,
        dtype=dtype,
        mean=35.43750000,
        each=[16.0, 72.25, 18.0625],
        gradient=golden.opposite([-2.66666667, -5.66666667, -2.83333333]),
    )


@pytest.mark.parametrize(("reduction", "expected"), [("mean", [24.6016, 24.6016]), ("sum", [23.04, 9.0])])
def test_length_changes_the_summed_loss_alone(reduction, expected):
    lengths = np.array([[5, 5], [50, 50]])  # every chosen token up by 0.02 nats, every rejected one down
    config = ipo.Config(beta=0.1, reduction=reduction)
    case = golden.Case(ipo, config, -lengths + 0.02 * lengths * [1, -1], -1.0 * lengths, lengths)
    np.testing.assert_allclose(case.each, expected, rtol=1e-12)
