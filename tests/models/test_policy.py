"""Log-probs over a shared prompt against whole rows [prompt | completion]; what that saves, and what is refused."""

import dataclasses
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from pjpo.models import attention, lora
from pjpo.models.decoder import Config
from pjpo.models.rope import Scaling
from pjpo.packing import pack
from pjpo.types import Batch
from tests import tiny
from tests.models import plain_llama

# Measured over 100 drawn batches of every case below: log-probs (down to -13 nats) differ by at most 1.3e-5 nats,
# gradients by 1.4e-5 of their leaf's largest number. Both sides are float32 and round each of some ten sums a layer in
# an order of their own, 6e-8 of the sum each time.
LOGPS_BOUND, GRADIENT_BOUND = 3e-5, 4e-5
ALL = lora.Config(rank=3, alpha=1.5)
SOME = lora.Config(rank=2, alpha=3.0, targets=("v", "gate", "o"))
SLOWED = Scaling(kind="llama3", factor=4.0, low_freq_factor=0.5, high_freq_factor=1.5, original_positions=16)
GEMMA = {  # the settings of Gemma 2 and 3 together; windows shorter than the prompts
    "num_layers": 3,
    "sliding_window": 3,
    "global_layers": (1,),
    "rope_theta_local": 10.0,
    "rope_scaling": Scaling(kind="linear", factor=3.0),
    "qk_norm": True,
    "query_scale": 0.1,
    "attention_softcap": 1.0,
    "logit_softcap": 2.0,
    "post_norms": True,
    "norm_plus_one": True,
    "activation": "gelu_tanh",
    "embed_scale": 12**0.5,
}
CASES = {  # completions of a prompt, groups that are packed apart (0: not packed), settings of the model
    "1 completion": (1, 0, {}),
    "2 completions": (2, 0, {}),
    "8 completions, packed in 2 groups": (8, 2, {}),
    "packed, recomputed layers": (2, 1, {"remat": True}),
    "adapters": (2, 0, {"lora": ALL}),
    "scanned layers, head in blocks that do not divide": (
        2,
        0,
        {"scan_layers": True, "head_block_numbers": 37 * 11, "tied_head": False},
    ),
    "everything": (
        2,
        2,
        {"scan_layers": True, "remat": True, "lora": SOME, "tied_head": False, "head_block_numbers": 37 * 7},
    ),
    "window, biases, slowed rotation": (2, 0, {"sliding_window": 2, "qkv_bias": True, "rope_scaling": SLOWED}),
    "Gemma, packed, head in blocks, colder": (8, 2, GEMMA | {"head_block_numbers": 37 * 11, "temperature": 0.7}),
    "Gemma, scanned, recomputed layers, adapters": (2, 0, GEMMA | {"scan_layers": True, "remat": True, "lora": ALL}),
}


def rows_of(batch):
    """What a textbook forward sees: rows [B*N, P+T] without a gap, and where in them each completion token is."""
    num_prompts, num_completions, length = batch.completion_tokens.shape
    rows = np.zeros((num_prompts, num_completions, batch.prompt_tokens.shape[1] + length), np.int32)
    for b, n in np.ndindex(num_prompts, num_completions):
        prompt = batch.prompt_tokens[b][batch.prompt_mask[b]]
        completion = batch.completion_tokens[b, n][batch.completion_mask[b, n]]
        rows[b, n, : prompt.size + completion.size] = np.concatenate([prompt, completion])
    starts = batch.prompt_mask.sum(1)[:, None, None] + np.arange(length)[None, None]
    return rows.reshape(-1, rows.shape[-1]), np.broadcast_to(starts, batch.completion_tokens.shape)


@jax.jit(static_argnums=0)
def plain(config, params, rows, places, mask, weights):
    """Log-probs [B, N, T] by the oracle, 0 where there is no token, and the gradient of their sum under `weights`."""

    def logps(params):
        logps = plain_llama.logps(config, tiny.plain_params(config, params), rows).reshape(*mask.shape[:2], -1)
        return jnp.where(mask, jnp.take_along_axis(logps, places - 1, axis=2), 0)

    logps, pullback = jax.vjp(logps, params)
    return logps, pullback(weights)[0]


@jax.jit(static_argnums=0)
def shared(policy, params, batch, weights):
    """The same by the policy."""
    logps, pullback = jax.vjp(lambda params: policy.logps(params, batch), params)
    return logps, pullback(weights)[0]


def assert_close(policy, params, batch, packed, weights, logps_bound=LOGPS_BOUND, gradient_bound=GRADIENT_BOUND):
    # What the oracle does not look at is left at its default, so that it compiles once for several cases.
    config = dataclasses.replace(
        policy.config, remat=False, head_block_numbers=Config.head_block_numbers, dtype="float32"
    )
    expected, expected_gradient = plain(config, params, *rows_of(batch), batch.completion_mask, weights)
    logps, gradient = jax.device_get(shared(policy, params, packed, weights))  # a mask on a device is a compilation
    np.testing.assert_allclose(logps, expected, rtol=0, atol=logps_bound)
    np.testing.assert_array_equal(logps[~batch.completion_mask], 0)
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    for (path, leaf), other in zip(leaves, jax.tree.leaves(expected_gradient), strict=True):
        bound = gradient_bound * max(1e-3, float(np.abs(other).max()))
        np.testing.assert_allclose(leaf, other, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("case", CASES)
@hypothesis.settings(max_examples=15)
@hypothesis.given(seed=strategies.integers(0, 2**32 - 1))
def test_logps_and_gradients_equal_whole_rows(case, seed):
    num_completions, num_groups, settings = CASES[case]
    policy = tiny.make_policy(**settings)
    rng = np.random.default_rng(seed)
    batch = tiny.ragged(rng, num_completions=num_completions)
    packed = pack(batch, num_groups=num_groups) if num_groups else batch
    weights = rng.normal(size=batch.completion_tokens.shape).astype(np.float32)
    assert_close(policy, tiny.make_params(policy), batch, packed, weights)


@pytest.mark.parametrize("settings", [{}, {"sliding_window": 130, "global_layers": (1,)}])
def test_prompts_long_enough_to_go_in_blocks(settings):
    policy, rng = tiny.make_policy(max_positions=512, **settings), np.random.default_rng(0)
    batch = tiny.ragged(rng, num_prompts=3, width=350)
    assert batch.prompt_mask.sum(1).max() > 2 * attention.MIN_BLOCK
    weights = rng.normal(size=batch.completion_tokens.shape).astype(np.float32)
    assert_close(policy, tiny.make_params(policy), batch, batch, weights)


def test_adapters_of_coarse_weights_are_float32():
    policy = tiny.make_policy(param_dtype="bfloat16", lora=ALL)
    params = jax.eval_shape(policy.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params["params"])} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(params["lora"])} == {jnp.dtype("float32")}


def test_packing_computes_only_what_is_there():
    policy, rng = tiny.make_policy(), np.random.default_rng(0)
    batch = tiny.ragged(rng)
    packed = pack(batch, num_groups=2, prompt_step=1, completion_step=1)
    assert packed.packing.slots.shape[1] < 0.8 * packed.packing.places.shape[1]
    weights = rng.normal(size=batch.completion_tokens.shape).astype(np.float32)
    assert_close(policy, tiny.make_params(policy), batch, packed, weights)


@pytest.mark.parametrize("num_groups", [0, 2])
def test_nothing_at_all_to_score(num_groups):
    policy, rng = tiny.make_policy(), np.random.default_rng(0)
    whole = tiny.ragged(rng)
    nothing = np.zeros_like(whole.completion_mask)
    batch = dataclasses.replace(whole, completion_mask=nothing, loss_mask=nothing)
    batch = pack(batch, num_groups=num_groups) if num_groups else batch
    logps, gradient = shared(policy, tiny.make_params(policy), batch, np.ones(nothing.shape, np.float32))
    np.testing.assert_array_equal(logps, 0)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), gradient)


def test_what_lies_under_padding_changes_nothing():
    policy, rng = tiny.make_policy(), np.random.default_rng(0)
    batch = tiny.ragged(rng)
    noise = {
        "prompt_tokens": np.where(batch.prompt_mask, batch.prompt_tokens, 36),
        "completion_tokens": np.where(batch.completion_mask, batch.completion_tokens, 36),
    }
    weights, params = np.ones(batch.completion_tokens.shape, np.float32), tiny.make_params(policy)
    expected = shared(policy, params, batch, weights)
    found = shared(policy, params, dataclasses.replace(batch, **noise), weights)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_bfloat16_stays_close():
    # Measured over 5 batches: at most 0.20 nats, where the plain forward all in bfloat16 is off by 0.33.
    policy = tiny.make_policy(dtype="bfloat16")
    params, batch = tiny.make_params(policy), tiny.ragged(np.random.default_rng(0), num_completions=8)
    weights = np.ones(batch.completion_tokens.shape, np.float32)
    logps = policy.logps(params, batch)
    assert logps.dtype == jnp.float32
    config = dataclasses.replace(policy.config, dtype="float32")
    expected, _ = plain(config, params, *rows_of(batch), batch.completion_mask, weights)
    np.testing.assert_allclose(logps, expected, rtol=0, atol=0.3)


@pytest.mark.parametrize("settings", [{"num_layers": 1}, GEMMA])
def test_float64_is_float64_all_the_way(settings):
    # Any part of it in float32 would leave 1e-7; the angles of the rotary embedding once did.
    with jax.enable_x64(True):
        policy = tiny.make_policy(dtype="float64", param_dtype="float64", **settings)
        rng = np.random.default_rng(0)
        batch = tiny.ragged(rng)
        weights = rng.normal(size=batch.completion_tokens.shape)
        assert_close(policy, tiny.make_params(policy), batch, pack(batch, num_groups=2), weights, 1e-10, 1e-10)


def largest_arrays(policy, batch):
    """Numbers in the largest array of the compiled log-probs with their gradient, as XLA lists them."""
    params = tiny.make_params(policy)
    weights = np.ones(batch.completion_tokens.shape, np.float32)
    text = shared.lower(policy, params, batch, weights).compile().as_text()
    shapes = set(re.findall(r"\b(?:f32|bf16|pred|s32)\[([\d,]+)\]", text))
    return max(np.prod([int(size) for size in shape.split(",")]) for shape in shapes)


@pytest.mark.parametrize("settings", [{}, {"scan_layers": True, "remat": True}])
def test_no_array_of_tokens_times_vocabulary_exists(settings):
    vocab_size, block = 1009, 4 * 1009
    batch = tiny.ragged(np.random.default_rng(0), num_completions=2, length=8, vocab_size=vocab_size)
    logits = batch.completion_tokens.size * vocab_size
    whole, blocks = (
        largest_arrays(
            tiny.make_policy(vocab_size=vocab_size, head_block_numbers=numbers, num_layers=1, **settings), batch
        )
        for numbers in (logits, block)
    )
    assert whole >= logits  # so the test can tell
    assert blocks <= vocab_size * 12 < logits  # the table itself is the largest


def flops(policy, batch):
    weights = np.ones(batch.completion_tokens.shape, np.float32)
    return shared.lower(policy, tiny.make_params(policy), batch, weights).cost_analysis()["flops"]


def test_a_prompt_is_computed_once_for_its_completions():
    policy = tiny.make_policy(max_positions=128, num_layers=1)
    rng = np.random.default_rng(0)
    batch = tiny.ragged(rng, num_prompts=2, width=64, num_completions=8, length=8)
    repeated = {name: np.repeat(getattr(batch, name), 8, axis=0) for name in ("prompt_tokens", "prompt_mask")}
    apart = {name: getattr(batch, name).reshape(16, 1, 8) for name in ("completion_tokens", "completion_mask")}
    ratio = flops(policy, Batch.of(**repeated, **apart)) / flops(policy, batch)
    # 8 (64 + 8) positions against 64 + 8 * 8 are 4.5 times as many; the head, the same in both, takes the rest.
    assert ratio > 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"completion_tokens": np.zeros((2, 3), int)}, r"completion_tokens must be \[B, N, T\], got shape \(2, 3\)"),
        ({"completion_mask": np.ones((4, 2, 3), bool)}, r"completion_mask has shape \(4, 2, 3\), allowed: \(4, 2, 4\)"),
        ({"loss_mask": np.ones((4, 2), bool)}, r"loss_mask has shape \(4, 2\), allowed: \(4, 2, 4\)"),
        ({"prompt_tokens": np.zeros((3, 5), int)}, r"prompt_tokens has shape \(3, 5\), allowed: \(4, 5\)"),
        ({"prompt_mask": np.ones((4, 6), bool)}, r"prompt_mask has shape \(4, 6\), allowed: \(4, 5\)"),
        ({"prompt_tokens": None}, "prompt_mask without prompt_tokens; pass both or neither"),
        ({"rewards": np.zeros(4)}, r"rewards has shape \(4,\), allowed: \(4, 2, 4\) or \(4, 2\)"),
        ({"ref_logps": np.zeros((4, 2))}, r"ref_logps has shape \(4, 2\), allowed: \(4, 2, 4\)"),
    ],
)
def test_a_batch_whose_shapes_do_not_fit_is_refused(changed, message):
    names = ("prompt_tokens", "prompt_mask", "completion_tokens", "completion_mask")
    whole = tiny.ragged(np.random.default_rng(0))
    with pytest.raises(ValueError, match=message):
        Batch.of(**{name: getattr(whole, name) for name in names} | changed)


def test_a_batch_fills_what_is_left_out():
    batch = Batch.of(completion_tokens=np.zeros((3, 2, 4), np.int32))
    assert batch.prompt_tokens.shape == batch.prompt_mask.shape == (3, 0)
    assert batch.completion_mask.all()
    assert batch.loss_mask is batch.completion_mask
    assert batch.ref_logps is batch.packing is None


@pytest.mark.parametrize("shape", [(2, 2, 0), (0, 2, 3), (2, 0, 3)])
def test_of_nothing_come_zeros_of_its_shape(shape):
    policy = tiny.make_policy(scalar_head=True)
    batch = Batch.of(completion_tokens=np.zeros(shape, np.int32), prompt_tokens=np.ones((shape[0], 3), np.int32))
    params = tiny.make_params(tiny.make_policy()) | {"scalar_head": {"kernel": jnp.ones(12)}}
    for function, expected in ((policy.logps, shape), (policy.values, shape), (policy.scores, shape[:2])):
        for found in (function(params, batch), jax.jit(function)(params, batch)):
            assert (found.shape, found.dtype) == (expected, jnp.float32)
            np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("beyond", [37, -1])
@pytest.mark.parametrize(("field", "place"), [("prompt_tokens", (1, 2)), ("completion_tokens", (1, 0, 1))])
def test_a_token_outside_the_vocabulary_is_refused_and_gives_nan_inside_jit(field, place, beyond):
    policy = tiny.make_policy()
    params, batch = tiny.make_params(policy), tiny.ragged(np.random.default_rng(0))
    batch = Batch.of(prompt_tokens=batch.prompt_tokens, completion_tokens=batch.completion_tokens)  # no padding
    tokens = getattr(batch, field).copy()
    tokens[place] = beyond
    wrong = dataclasses.replace(batch, **{field: tokens})
    message = rf"{field} {re.escape(str(list(place)))} is {beyond}, outside the vocabulary of 37"
    for function in (policy.logps, policy.values, policy.scores):
        with pytest.raises(ValueError, match=message):
            function(params, wrong)
    logps = np.asarray(jax.jit(policy.logps)(params, wrong))
    others = np.asarray(policy.logps(params, batch))
    assert np.isnan(logps[place[0] if field == "prompt_tokens" else place]).all()  # and so the completion's sum
    touched = np.zeros(logps.shape, bool)
    touched[place[:-1]] = True
    np.testing.assert_array_equal(logps[~touched], others[~touched])
    mask = np.ones(tokens.shape, bool)
    mask[place] = False
    masked = dataclasses.replace(wrong, **{field.replace("tokens", "mask"): mask})
    assert np.isfinite(policy.logps(params, masked)).all()  # padding may be any number


def test_logps_refuse_prompts_of_no_width():
    policy = tiny.make_policy()
    with pytest.raises(ValueError, match="need a prompt of at least one token"):
        policy.logps(tiny.make_params(policy), Batch.of(completion_tokens=np.zeros((2, 2, 3), np.int32)))


def test_an_empty_prompt_gives_nan_where_a_made_up_number_would_stand():
    policy = tiny.make_policy()
    batch = tiny.ragged(np.random.default_rng(0))
    mask = np.ones_like(batch.completion_mask)
    batch = dataclasses.replace(
        batch, completion_mask=mask, prompt_mask=batch.prompt_mask & (np.arange(4) > 0)[:, None]
    )
    logps = policy.logps(tiny.make_params(policy), batch)
    np.testing.assert_array_equal(np.isnan(logps), (np.arange(4) == 0)[:, None, None] & (np.arange(4) == 0) & mask)


def test_logps_refuse_more_positions_than_the_model_has():
    batch = tiny.ragged(np.random.default_rng(0))  # 5 + 4
    policy = tiny.make_policy(max_positions=9)
    policy.logps(tiny.make_params(policy), batch)
    policy = tiny.make_policy(max_positions=8)
    with pytest.raises(ValueError, match=r"prompt width 5 \+ completion width 4 exceeds the model's 8 positions"):
        policy.logps(tiny.make_params(policy), batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 0}, "model: num_layers must be at least 1, got 0"),
        ({"num_heads": 3}, "model: num_heads 3 is no multiple of num_kv_heads 2"),
        ({"lora": lora.Config(rank=13)}, "model: lora.rank must be at most model_dim 12, got 13"),
        ({"head_dim": 5}, "model: rotary embedding needs an even head_dim, got 5"),
        ({"dtype": "float16"}, "model: dtype must be one of float32, bfloat16, float64, got 'float16'"),
        ({"param_dtype": "int8"}, "model: param_dtype must be one of"),
        ({"head_block_numbers": 36}, "model: head_block_numbers 36 holds no position's 37 logits"),
        ({"activation": "gelu"}, "model: activation must be one of silu, gelu_tanh, got 'gelu'"),
        ({"logit_softcap": 0.0}, "model: logit_softcap must be > 0, got 0.0"),
        ({"temperature": 0.0}, "model: temperature must be > 0, got 0.0"),
        ({"temperature": 1e-40}, "model: temperature must be at least 1e-06, got 1e-40; greedy is a setting of Samp"),
        ({"query_scale": float("nan")}, "model: query_scale must be > 0, got nan"),
        ({"sliding_window": 0}, "model: sliding_window must be at least 1, got 0"),
        ({"rope_theta_local": 5.0}, "model: global_layers and rope_theta_local mean something only with a sliding_win"),
        ({"sliding_window": 3, "global_layers": (2,)}, r"model: global_layers \(2,\) are not all among 2 layers"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_models_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny.make_policy(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "yarn"}, "rope_scaling: kind must be one of linear, llama3, got 'yarn'"),
        ({"factor": 0.5}, "rope_scaling: factor must be >= 1 and finite, got 0.5"),
        ({"factor": float("inf")}, "rope_scaling: factor must be >= 1 and finite, got inf"),
        ({"low_freq_factor": 0.0}, "0 < low_freq_factor < high_freq_factor must hold, got 0.0 and 4.0"),
        ({"high_freq_factor": float("inf")}, "0 < low_freq_factor < high_freq_factor must hold, got 1.0 and inf"),
        ({"low_freq_factor": 4.0}, "0 < low_freq_factor < high_freq_factor must hold, got 4.0 and 4.0"),
        ({"original_positions": 0}, "rope_scaling: original_positions must be >= 1, got 0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_scalings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Scaling(**{"kind": "llama3", "factor": 8.0} | settings)


def test_the_least_scalings_that_can_be():
    assert Scaling(kind="linear", factor=1.0).apply(np.ones(3)).tolist() == [1.0] * 3
    assert Scaling(kind="llama3", factor=1.0, original_positions=1).original_positions == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "lora: rank must be at least 1, or 0 for no adapters, got -1"),
        ({"alpha": float("nan")}, "lora: alpha must be > 0, got nan"),
        ({"alpha": float("inf")}, "lora: alpha must be > 0, got inf"),
        ({"targets": ("q", "w")}, "lora: targets must be some of q, k, v, o, gate, up, down; got"),
        ({"targets": ()}, "lora: targets must be some of"),
        ({"targets": ["q", "v"]}, r"lora: targets must be some of .*; got \['q', 'v'\], give a tuple"),
        ({"targets": "qkv"}, "lora: targets must be some of .*; got 'qkv', give a tuple"),
        ({"rank": None}, "lora: rank must be at least 1, or 0 for no adapters, got None"),
        ({"alpha": "16"}, "lora: alpha must be > 0, got '16'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_adapters_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        lora.Config(**settings)


def test_adapters_count_only_where_they_are_passed_in():
    policy = tiny.make_policy(lora=SOME, num_layers=1)
    params, batch = tiny.make_params(policy), tiny.ragged(np.random.default_rng(0))
    without = policy.logps(policy.without_adapters(params), batch)
    fresh = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf * (path[-1].key != "b"), params)
    np.testing.assert_array_equal(policy.logps(fresh, batch), without)
    assert np.any(policy.logps(params, batch) != without)
    assert policy.trainable(params) == ({"lora": params["lora"]}, {"params": params["params"]})


def test_rank_0_is_no_adapters():
    assert tiny.make_policy(lora=lora.Config(rank=0)) == tiny.make_policy(lora=None)
