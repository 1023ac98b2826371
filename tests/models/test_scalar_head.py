"""The scalar head against log-probs: with the difference of two tokens' rows it is the difference of their logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjpo.models import lora
from pjpo.packing import pack
from tests import tiny

ONE, OTHER = 3, 11  # the two tokens
BOUND = 3e-5  # that of log-probs, see `test_policy`


def setup(**settings):
    policy = tiny.make_policy(num_layers=1, scalar_head=True, tied_head=False, **settings)
    params = dict(tiny.make_params(tiny.make_policy(num_layers=1, tied_head=False, **settings)))
    table = params["params"]["head"]["table"]
    params["scalar_head"] = {"kernel": table[ONE] - table[OTHER]}
    batch = tiny.ragged(np.random.default_rng(0), num_completions=3)
    assert not batch.completion_mask.any(-1).all(), "an empty completion is wanted"
    return policy, params, batch


def difference(policy, params, batch, places):
    """log p(ONE) - log p(OTHER) at `places` [B, N, T], one place of each completion at a time."""

    def logps(token):
        tokens = np.where(places, token, batch.completion_tokens).astype(np.int32)
        return policy.logps(params, dataclasses.replace(batch, completion_tokens=tokens))

    return np.where(places, logps(ONE) - logps(OTHER), 0)


@pytest.mark.parametrize("num_groups", [0, 2])
def test_values_are_read_before_each_token(num_groups):
    policy, params, batch = setup()
    expected = sum(
        difference(policy, params, batch, batch.completion_mask & (np.arange(4) == t)[None, None]) for t in range(4)
    )
    given = pack(batch, num_groups=num_groups, prompt_step=1, completion_step=1) if num_groups else batch
    values = policy.values(params, given)
    np.testing.assert_allclose(values, expected, rtol=0, atol=BOUND)
    assert values.dtype == jnp.float32


def test_scores_are_read_after_the_last_token():
    policy, params, batch = setup()
    lengths = batch.completion_mask.sum(-1, keepdims=True)
    places = np.arange(5)[None, None]
    longer = dataclasses.replace(
        batch,
        completion_tokens=np.pad(batch.completion_tokens, [(0, 0), (0, 0), (0, 1)]),
        completion_mask=places <= lengths,
        loss_mask=places <= lengths,
    )
    expected = difference(policy, params, longer, places == lengths).sum(-1)
    expected = np.where(lengths[..., 0] > 0, expected, 0)
    for given in (batch, pack(batch, num_groups=2)):
        np.testing.assert_allclose(policy.scores(params, given), expected, rtol=0, atol=BOUND)


def test_it_starts_at_zero_is_trained_beside_adapters_and_is_no_part_of_the_reference():
    policy, _, batch = setup(lora=lora.Config(rank=2))
    params = policy.init(jax.random.key(0))
    assert set(params) == {"params", "lora", "scalar_head"}
    np.testing.assert_array_equal(policy.scores(params, batch), 0)
    trainable, frozen = policy.trainable(params)
    assert (set(trainable), set(frozen)) == ({"lora", "scalar_head"}, {"params"})
    assert set(policy.without_adapters(params)) == {"params"}
    with pytest.raises(ValueError, match=r"no scalar head, only params; set model\.scalar_head"):
        policy.scores(policy.without_adapters(params), batch)
