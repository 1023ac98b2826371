"""CPO against golden values, with the likelihood as a mean over tokens and as a sum over sequences."""

import jax.numpy as jnp
import numpy as np

from pjpo.methods import cpo
from pjpo.types import Batch
from tests.methods import golden
from tests.methods.contract import Contract

CONTRACT = Contract(
    configs=(cpo.Config(nll_reduction="sum"),), nudged={"nll_reduction": "sum"}, bad={"nll_reduction": ("none",)}
)


@golden.in_both_dtypes
def test_golden_values_per_token(dtype, bound):
    golden.check(
        cpo,
        cpo.Config(beta=0.1),
        bound,
        dtype=dtype,
        mean=3.14505435,
        each=None,
        gradient=None,
        reference=None,
    )


@golden.in_both_dtypes
def test_golden_values_per_sequence(dtype, bound):
    golden.check(
        cpo,
        cpo.Config(beta=0.1, nll_reduction="sum"),
        bound,
        dtype=dtype,
        mean=17.64505435,
        each=None,
        gradient=None,
        reference=None,
    )


def test_metrics():
    case = golden.Case(cpo, cpo.Config(beta=0.1), reference=None, dtype="float32")
    np.testing.assert_allclose(case.metrics["nll_loss"], 2.41666667, rtol=1e-6)
    np.testing.assert_allclose(case.metrics["rewards/margins"], 0.1 * np.mean([1.5, -4.5, 1.5]), rtol=1e-5)


def test_without_the_likelihood_only_the_margin_counts():
    golden.check(
        cpo,
        cpo.Config(beta=0.1, nll_weight=0.0),
        1e-8,
        dtype="float64",
        reference=None,
        mean=0.72838768,
        each=[0.62095705, 0.94324895, 0.62095705],
        gradient=golden.opposite([-0.01541901, -0.02035464, -0.01541901]),
    )


def test_one_pair_of_one_token_is_its_own_mean():
    logps = jnp.array([[[-2.0, 0.0], [-1.0, -4.0]]])
    mask = np.array([[[True, False], [True, True]]])
    batch = Batch.of(
        prompt_tokens=[[1]], completion_tokens=np.ones((1, 2, 2), np.int32), completion_mask=mask, loss_mask=mask
    )
    found = cpo.loss(cpo.Config(beta=0.1), batch, logps, None)[0].value()
    np.testing.assert_allclose(found, np.log1p(np.exp(-0.1 * (-2 + 5))) + 2.0, rtol=1e-6)
