"""Fused attention equals the plain one, value and gradient: the TPU's kernel interpreted, cuDNN's by its stand-in.

cuDNN itself needs a GPU, and nothing here has run it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjpo.models import attention, flash
from pjpo.models.streams import Streams
from tests import tiny

SCORING = attention.Scoring(scale=0.3)


def setup(width, num_completions, length):
    """(streams, projections [B, S, K, R, H], which slots hold tokens that anything depends on)."""
    rng = np.random.default_rng(0)
    batch = tiny.ragged(rng, num_prompts=2, width=width, num_completions=num_completions, length=length)
    streams = Streams.of(batch)
    qkv = jnp.asarray(rng.normal(size=(*streams.tokens.shape, 2, 4, 8)), jnp.float32)
    return streams, qkv, np.asarray(streams.join(streams.prompt_keys, jnp.asarray(batch.completion_mask)))


def through(kernel, streams, qkv):
    width = streams.prompt_keys.shape[1]
    own = jnp.ones((len(qkv), qkv.shape[1] - width), bool)
    shape = width, streams.num_completions, own.shape[1] // streams.num_completions
    return kernel(shape, qkv, jnp.concatenate([streams.prompt_keys, own], axis=1), SCORING.scale)


@pytest.mark.parametrize("sizes", [pytest.param((5, 2, 4), marks=pytest.mark.slow), (40, 3, 70)])  # one block; several
@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_equals_the_plain_attention(kernel, sizes, monkeypatch):
    if kernel == "cudnn":
        reference = jax.nn.dot_product_attention
        monkeypatch.setattr(
            jax.nn, "dot_product_attention", lambda *a, implementation, **s: reference(*a, implementation="xla", **s)
        )
    function = functools.partial(flash.on_tpu, interpret=True) if kernel == "splash" else flash.on_gpu
    streams, qkv, counts = setup(*sizes)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(*qkv.shape[:3], 2, 8)), jnp.float32)
    weights = jnp.where(counts[:, :, None, None, None], weights, 0)  # padding may hold anything

    def outputs_and_gradient(attend):
        @jax.jit
        def compute(qkv):
            out, pullback = jax.vjp(attend, qkv)
            return (out * weights).sum(), out, pullback(weights)[0]

        return jax.device_get(compute(qkv))

    value, out, gradient = outputs_and_gradient(functools.partial(through, function, streams))
    plain = outputs_and_gradient(lambda qkv: attention.shared_prefix(streams, qkv, None, SCORING)[0])
    np.testing.assert_allclose(value, plain[0], rtol=1e-5)
    np.testing.assert_allclose(out[counts], plain[1][counts], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient, plain[2], rtol=1e-4, atol=1e-5)


def test_a_policy_with_flash_attention_has_the_same_log_probs():
    batch = tiny.ragged(np.random.default_rng(0))
    policy = tiny.make_policy()
    flashing = tiny.make_policy(attention="flash")
    params = tiny.make_params(policy)
    np.testing.assert_allclose(flashing.logps(params, batch), policy.logps(params, batch), rtol=1e-6)


def test_an_unknown_attention_is_refused(unchecked):
    with pytest.raises(ValueError, match="model: attention must be one of plain, flash, got 'fast'"):
        tiny.make_policy(attention="fast")


def test_what_the_kernels_lack_is_refused():
    for lacking in ({"sliding_window": 3}, {"attention_softcap": 20.0}):
        with pytest.raises(
            ValueError, match="flash attention knows no sliding_window and no attention_softcap; use plain"
        ):
            tiny.make_policy(attention="flash", **lacking)
