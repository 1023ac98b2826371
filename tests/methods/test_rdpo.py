"""rDPO against golden values, its identity with DPO, and its unbiasedness."""

import numpy as np
import pytest

from pjpo.methods import dpo, rdpo
from tests.methods import golden
from tests.methods.contract import Contract

CONTRACT = Contract(bad={"flip_rate": (float("nan"), float("inf"), -0.1, 0.5, 0.7)})


@golden.in_both_dtypes
def test_golden_values(dtype, bound):
    golden.check(
        rdpo,
        rdpo.Config(beta=0.1, flip_rate=0.1),
        bound,
        dtype=dtype,
        mean=0.73533465,
        each=[0.63189666, 0.92713216, 0.64697514],
        gradient=golden.opposite([-0.02000069, -0.02372059, -0.02020863]),
    )


@golden.in_both_dtypes
def test_golden_values_at_extremes(dtype, bound):
    golden.check(
        rdpo,
        rdpo.Config(beta=0.1, flip_rate=0.1),
        bound,
        dtype=dtype,
        policy=golden.EXTREME,
        reference=np.full((2, 2), -100.0),
        lengths=np.full((2, 2), 10),
        mean=400,
        each=[-100, 900],
    )


@pytest.mark.parametrize("flip_rate", [0.0, 0.1, 0.3, 0.45])
def test_it_is_dpo_less_a_multiple_of_the_margin_and_unbiased(flip_rate):
    found = golden.Case(rdpo, rdpo.Config(flip_rate=flip_rate))
    clean = golden.Case(dpo, dpo.Config())
    swapped = golden.Case(
        rdpo,
        rdpo.Config(flip_rate=flip_rate),
        golden.POLICY[:, ::-1],
        golden.REFERENCE[:, ::-1],
        golden.LENGTHS[:, ::-1],
    )
    margins = 0.1 * ((golden.POLICY - golden.REFERENCE) @ [1, -1])
    np.testing.assert_allclose(found.each, clean.each - flip_rate / (1 - 2 * flip_rate) * margins, rtol=1e-10)
    expected = (1 - flip_rate) * np.array(found.each) + flip_rate * np.array(swapped.each)
    np.testing.assert_allclose(expected, clean.each, rtol=1e-10)
