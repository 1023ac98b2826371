"""DPO with an attenuated reference against golden values, and DPO as its special case."""

import jax.numpy as jnp
import numpy as np
import pytest

from pjpo.methods import dpo_attenuated
from pjpo.types import Batch
from tests.methods import golden
from tests.methods.contract import Contract

CONTRACT = Contract(configs=(dpo_attenuated.Config(gamma=1.0),))


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


def test_a_missing_reference_is_refused_as_by_every_method_unless_none_of_it_counts():
    tokens = np.ones((1, 2, 3), np.int32)
    batch, logps = Batch.of(completion_tokens=tokens), -jnp.arange(6.0).reshape(tokens.shape)
    with pytest.raises(ValueError, match=r"^log-ratios need the log-probs of the reference, but ref_logps is None"):
        dpo_attenuated.loss(dpo_attenuated.Config(gamma=0.5), batch, logps, None)
    found, _ = dpo_attenuated.loss(dpo_attenuated.Config(gamma=0.0), batch, logps, None)
    np.testing.assert_allclose(found.value(), np.log1p(np.exp(-0.1 * 9)), rtol=1e-6)


def test_the_config_says_whether_it_needs_a_reference_and_whether_its_rewards_are_implicit_ones():
    said = {gamma: dpo_attenuated.Config(beta=0.3, gamma=gamma) for gamma in (0.0, 0.25, 1.0, 2.0)}
    assert [config.needs_reference for config in said.values()] == [False, True, True, True]
    assert [config.reward_scale for config in said.values()] == [None, None, 0.3, None]


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
