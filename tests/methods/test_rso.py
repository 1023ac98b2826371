"""The three losses of RSO against golden values."""

import numpy as np

from pjpo.methods import rso
from tests.methods import golden
from tests.methods.contract import Contract

CONTRACT = Contract(
    configs=tuple(rso.Config(form=form) for form in ("hinge", "hinge_norm")),
    nudged={"form": "hinge"},
    bad={"form": ("hinges",)},
)


@golden.in_both_dtypes
def test_golden_values_sigmoid_norm(dtype, bound):
    golden.check(
        rso,
        rso.Config(gamma=0.05),
        bound,
        dtype=dtype,
        mean=0.70916768,
        each=[0.66845965, 0.78447043, 0.67457295],
        gradient=golden.opposite([-0.00812504, -0.00906064, -0.00817710]),
    )


@golden.in_both_dtypes
def test_golden_values_hinge(dtype, bound):
    golden.check(
        rso,
        rso.Config(gamma=0.05, form="hinge"),
        bound,
        dtype=dtype,
        mean=1.025,
        each=[0.925, 1.225, 0.925],
        gradient=golden.opposite([-0.05 / 3] * 3),
        reference=None,
    )


@golden.in_both_dtypes
def test_golden_values_hinge_norm(dtype, bound):
    golden.check(
        rso,
        rso.Config(gamma=0.05, form="hinge_norm"),
        bound,
        dtype=dtype,
        mean=1.02916667,
        each=[0.95, 1.175, 0.9625],
        gradient=golden.opposite([-0.05 / 3] * 3),
    )


def test_hinge_alone_needs_no_reference():
    assert {form: rso.Config(form=form).needs_reference for form in rso.FORMS} == {
        "sigmoid_norm": True,
        "hinge": False,
        "hinge_norm": True,
    }


@golden.in_both_dtypes
def test_golden_values_at_extremes(dtype, bound):
    golden.check(
        rso,
        rso.Config(gamma=0.05, form="hinge_norm"),
        bound,
        dtype=dtype,
        policy=golden.EXTREME,
        reference=np.full((2, 2), -100.0),
        lengths=np.full((2, 2), 10),
        mean=200.5,
        each=[0, 401],
    )
