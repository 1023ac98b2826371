"""SimPO against golden values."""

from pjpo.methods import simpo
from tests.methods import golden


@golden.in_both_dtypes
def test_golden_values(dtype, bound):
    golden.check(
        simpo,
        simpo.Config(beta=2.0, margin=1.0),
        bound,
        dtype=dtype,
        mean=1.20949057,
        each=[1.56729586, 1.23523644, 0.82593942],
        gradient=[[-0.10551886, 0.08793239], [-0.03940189, 0.04728227], [-0.09369608, 0.09369608]],
        reference=None,
    )
