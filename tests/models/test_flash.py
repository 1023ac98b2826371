"""Fused attention equals the plain one, value and gradient: the TPU's kernel interpreted, cuDNN's by its stand-in.

cuDNN itself needs a GPU, and nothing here has run it; but what JAX asks of its inputs is asked in a trace on a CPU too.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjpo import models
from pjpo.models import attention, flash
from pjpo.models.streams import Streams
from tests import tiny

SCORING = attention.Scoring(scale=0.3)
CUDNN = "jax._src.cudnn.fused_attention_stablehlo"


@pytest.fixture
def gpu(monkeypatch):
    """To JAX's checks and ours, a machine with a GPU; what comes back changes its compute capability, "8.0"."""
    device = types.SimpleNamespace(compute_capability="8.0")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(f"{CUDNN}.check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(
        f"{CUDNN}.check_compute_capability", lambda least: float(device.compute_capability) >= float(least)
    )
    return functools.partial(setattr, device, "compute_capability")


@pytest.fixture
def stand_in(monkeypatch):
    """XLA's attention in the place of cuDNN's; gives the arguments of its calls."""
    reference, calls = jax.nn.dot_product_attention, []

    def attend(q, k, v, *, implementation, **settings):
        calls.append((q, k, v, settings["mask"]))
        return reference(q, k, v, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    return calls


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


@pytest.mark.parametrize(
    ("kernel", "sizes"),
    [
        pytest.param("splash", (5, 2, 4), marks=pytest.mark.slow),  # one block
        ("splash", (40, 3, 70)),  # several
        ("cudnn", (5, 2, 4)),  # odd
        ("cudnn", (40, 3, 70)),  # even
    ],
)
def test_equals_the_plain_attention(kernel, sizes, stand_in):
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


@pytest.mark.parametrize("sizes", [(5, 2, 4), (6, 2, 4)])  # odd, even
def test_cudnn_gets_even_lengths_and_no_query_without_a_key(sizes, stand_in):
    streams, qkv, _ = setup(*sizes)
    through(flash.on_gpu, streams, qkv)
    [(q, k, v, mask)] = stand_in
    assert q.shape[1] == k.shape[1] == v.shape[1] == 14
    assert mask.any(-1).all()
    assert not mask[..., : qkv.shape[1], qkv.shape[1] :].any()  # what was added


@pytest.mark.parametrize("sizes", [(129, 2, 64), (128, 1, 65), (128, 2, 64)])  # odd, odd, even
def test_jax_lowers_value_and_gradient_to_cudnn(sizes, gpu):
    width, num_completions, length = sizes
    slots = jax.ShapeDtypeStruct((2, width + num_completions * length, 2, 4, 8), jnp.bfloat16)
    keys = jax.ShapeDtypeStruct(slots.shape[:2], bool)
    assert_on_cudnn(lambda slots, keys: flash.on_gpu(sizes, slots, keys, 0.3).astype(jnp.float32).sum(), slots, keys)


def test_a_policy_has_its_value_and_gradient_from_cudnn(gpu):
    policy = tiny.make_policy(attention="flash", dtype="bfloat16", num_layers=1, head_dim=8)
    batch = tiny.ragged(np.random.default_rng(0), width=5, num_completions=2, length=4)  # odd together
    params = jax.eval_shape(policy.init, jax.random.key(0))
    assert_on_cudnn(lambda params: policy.logps(params, batch).sum(), params)


def assert_on_cudnn(function, *arguments):
    traced = jax.jit(jax.value_and_grad(function)).trace(*arguments)
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax(" in lowered
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward(" in lowered


@pytest.mark.parametrize("head_dim", [8, 12, 128, 136, 256, 264])
@pytest.mark.parametrize("capability", ["8.0", "9.0"])
def test_head_dims_that_cudnn_refuses_are_refused(head_dim, capability, gpu):
    gpu(capability)
    config = tiny.make_policy(attention="flash", dtype="bfloat16", head_dim=head_dim).config
    slots, keys = jnp.zeros((1, 2, 1, 3, head_dim), jnp.bfloat16), jnp.ones((1, 2), bool)
    try:
        jax.eval_shape(lambda slots, keys: flash.on_gpu((1, 1, 1), slots, keys, 1.0), slots, keys)
    except NotImplementedError:
        with pytest.raises(ValueError, match=f"head_dim must be a multiple of 8 .* got {head_dim}; set .*plain"):
            flash.check(config)
    else:
        flash.check(config)


def test_other_dtypes_are_refused_on_a_gpu(gpu, model):
    about = "model: dtype must be bfloat16 for flash attention on a GPU, got 'float32'; set model.dtype=bfloat16, or "
    policy = tiny.make_policy(attention="flash")
    with pytest.raises(ValueError, match=about):
        policy.logps({}, tiny.ragged(np.random.default_rng(0)))
    with pytest.raises(ValueError, match=about):
        models.load(model, attention="flash")
    flash.check(tiny.make_policy().config)


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
