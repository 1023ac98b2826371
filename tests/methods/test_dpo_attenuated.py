"""DPO with an attenuated reference against golden values, and DPO as its special case."""

from pjpo.methods import dpo_attenuated
from tests.methods import golden


@golden.in_both_dtypes
def test_golden_values(dtype, bound):
    golden.check(
        dpo_attenuated,
        dpo_attenuated.Config(beta=0.1, gamma=0.5),
        bound,
        dtype=dtype,
        mean=0.72803089,
        each=[0.63259904, 0.91301525, 0.63847838],
        gradient=golden.opposite([-0.01562635, -0.01995626, -0.01573015]),
    )


@golden.in_both_dtypes
def test_it_is_dpo_at_1(dtype, bound):
    golden.check(
        dpo_attenuated,
        dpo_attenuated.Config(beta=0.1, gamma=1.0),
        bound,
        dtype=dtype,
        mean=0.72804299,
        each=[0.64439666, 0.88338216, 0.65635014],
        gradient=golden.opposite([-0.01583403, -0.01955392, -0.01604196]),
    )


@golden.in_both_dtypes
def test_it_needs_no_reference_at_0(dtype, bound):
    golden.check(
        dpo_attenuated,
        dpo_attenuated.Config(beta=0.1, gamma=0.0),
        bound,
        dtype=dtype,
        mean=0.72838768,
        each=[0.62095705, 0.94324895, 0.62095705],
        gradient=golden.opposite([-0.01541901, -0.02035464, -0.01541901]),
    )
