"""SLiC-HF against golden values, with the target as a third completion."""

import numpy as np
import pytest

from pjpo.methods import slic
from tests.methods import golden
from tests.methods.contract import Contract

CONTRACT = Contract(configs=(slic.Config(nll_weight=0.0),))
WITH_TARGET = np.concatenate([golden.POLICY, [[-11.0], [-29.0], [-7.5]]], axis=1)
LENGTHS = np.concatenate([golden.LENGTHS, [[4], [11], [3]]], axis=1)


@golden.in_both_dtypes
def test_golden_values(dtype, bound):
    golden.check(
        slic,
        slic.Config(margin=1.0, nll_weight=0.5),
        bound,
        dtype=dtype,
        mean=9.75,
        each=[5.5, 20.0, 3.75],
        gradient=[[0, 0, -1 / 6], [-1 / 3, 1 / 3, -1 / 6], [0, 0, -1 / 6]],
        policy=WITH_TARGET,
        reference=None,
        lengths=LENGTHS,
    )


def test_without_weight_no_target_is_needed():
    case = golden.Case(slic, slic.Config(nll_weight=0.0), reference=None)
    np.testing.assert_allclose(case.each, [0, 5.5, 0], atol=1e-12)


def test_a_missing_target_is_refused():
    with pytest.raises(ValueError, match=r"nll_weight 0.5 needs 3 completions .* got 2; add the target, or set"):
        golden.Case(slic, slic.Config(), reference=None, dtype="float32")


def test_a_fourth_completion_is_refused():
    policy, lengths = (np.concatenate([x, x[:, :1]], axis=1) for x in (WITH_TARGET, LENGTHS))
    with pytest.raises(ValueError, match=r"nll_weight 0.5 needs 3 completions .* got 4"):
        golden.Case(slic, slic.Config(), policy=policy, lengths=lengths, reference=None, dtype="float32")
