"""Samples against teacher forcing, the oracle's likeliest tokens, and the distributions that the settings name."""

import dataclasses
import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import DictKey
from scipy import special, stats

from pjpo import sampling, sharding
from pjpo.models import attention, filled, load, lora, whole
from pjpo.products import has_matrix_unit, has_wide_registers, streamed_rows
from pjpo.sampling import Prompts, Sampling, _draw, _logsumexp_in_blocks, choose, sequence_keys
from pjpo.types import Batch
from tests import tiny
from tests.models import plain_llama

LOGPS_BOUND = 1e-5  # nats a token between decoding and teacher forcing
MODELS = {
    "plain": {},
    "scanned": {"scan_layers": True},
    "adapters": {"lora": lora.Config(rank=2, alpha=2.0)},
    "scanned adapters, own head": {
        "lora": lora.Config(rank=2, alpha=2.0, targets=("q", "k", "o", "down")),
        "scan_layers": True,
        "tied_head": False,
    },
    "bfloat16 weights": {"param_dtype": "bfloat16", "tied_head": False},
    "a window that leaves prompts behind": {"sliding_window": 4},
    "three queries for a key": {"num_heads": 3, "num_kv_heads": 1},
    "logits that are capped, and colder": {"logit_softcap": 2.0, "temperature": 0.6},
}
SETTINGS = Sampling(num_completions=3, max_completion_tokens=6)


def make_prompts(seed=0, num_prompts=4, width=5):
    batch = tiny.ragged(np.random.default_rng(seed), num_prompts, width)
    return Prompts(batch.prompt_tokens, batch.prompt_mask)


def assert_teacher_forcing_agrees(policy, params, prompts, completions, bound=LOGPS_BOUND):
    batch = Batch.of(
        prompt_tokens=prompts.tokens,
        prompt_mask=prompts.mask,
        completion_tokens=completions.tokens,
        completion_mask=completions.mask,
    )
    np.testing.assert_allclose(completions.logps, policy.logps(params, batch), rtol=0, atol=bound)


@pytest.mark.parametrize("name", MODELS)
def test_logps_equal_teacher_forcing(name):
    policy = tiny.make_policy(**MODELS[name])
    params, prompts = tiny.make_params(policy), make_prompts()
    settings = dataclasses.replace(SETTINGS, stop_tokens=(3, 8, 30), temperature=0.7, top_k=30)
    completions = policy.generate(params, prompts, jax.random.key(0), settings)
    assert (completions.tokens.dtype, completions.mask.dtype, completions.logps.dtype) == (jnp.int32, bool, jnp.float32)
    assert 0 < completions.mask.mean() < 1
    assert_teacher_forcing_agrees(policy, params, prompts, completions)


def test_scores_that_are_hundreds_apart_overflow_nothing():
    policy, prompts = tiny.make_policy(), make_prompts()
    loud = jax.tree_util.tree_map_with_path(
        lambda path, x: 30 * x if path[-2:] == (DictKey("qkv"), DictKey("kernel")) else x, tiny.make_params(policy)
    )
    completions = policy.generate(loud, prompts, jax.random.key(0), SETTINGS)
    assert np.isfinite(completions.logps).all()
    assert_teacher_forcing_agrees(policy, loud, prompts, completions, bound=1e-3)  # such scores are rounded by as much


def test_logps_of_a_pretrained_model_equal_teacher_forcing():
    if importlib.util.find_spec("glassllm") is None:
        pytest.skip("glassllm is not installed")
    policy, params, tokenizer = load("glassllm-en")
    ids = [tokenizer.encode(text) for text in ("Once upon a time", "The cat")]
    width = max(map(len, ids))
    mask = np.arange(width)[None] < np.array([[len(row)] for row in ids])
    prompts = Prompts(np.array([np.resize(row, width) for row in ids], np.int32), mask)
    settings = Sampling(num_completions=4, max_completion_tokens=24)
    assert_teacher_forcing_agrees(
        policy, params, prompts, policy.generate(params, prompts, jax.random.key(0), settings)
    )


STREAMED = [
    {},
    {"vocab_size": 37, "scan_layers": True},
    {"lora": lora.Config(rank=2, alpha=2.0), "param_dtype": "bfloat16"},
    {"sliding_window": 3, "global_layers": (1,), "attention_softcap": 5.0},
]


@pytest.mark.skipif(not has_wide_registers(), reason="the processor has no registers of 512 bits")
@pytest.mark.parametrize("settings", [*STREAMED, {"dtype": "bfloat16"}])
def test_few_rows_are_decoded_by_streams(settings, monkeypatch):
    monkeypatch.setattr(sampling, "has_matrix_unit", lambda: False)
    sizes = {"vocab_size": 48, "model_dim": 64, "head_dim": 8, "mlp_dim": 96}
    policy, prompts = tiny.make_policy(**(sizes | settings)), make_prompts()
    params, keys = tiny.make_params(policy), sequence_keys(jax.random.key(0), 4, 3)
    table = params["params"]["embed"]["table"]
    flat = {"embed": {"table": table / 10}}  # no token takes all the probability
    params = params | {"params": params["params"] | flat}
    assert sampling.program(policy.config, params, prompts, keys) is sampling.streamed
    shrinking = dataclasses.replace(SETTINGS, stop_tokens=(3, 6, 8, 28, 30), halvings=1)
    found = policy.generate(params, prompts, keys, shrinking)
    expected = jax.jit(lambda params: policy.generate(params, prompts, keys, shrinking))(params)  # not by streams
    same = (found.tokens == expected.tokens).all(-1)
    assert same.mean() >= (0.5 if "dtype" in settings else 1)  # in bfloat16 another sum may choose another token
    bound = 0.1 if "dtype" in settings else LOGPS_BOUND  # eight bits of a logit of twenty
    np.testing.assert_allclose(found.logps[same], expected.logps[same], rtol=0, atol=bound)
    assert 0 < found.mask.mean() < 1


@pytest.mark.parametrize(("param_dtype", "head"), [("float32", (1, 64, 64)), ("bfloat16", (1, 64, 32))])
def test_streams_alone_read_the_head_as_outer_products_by_whole_registers(param_dtype, head, monkeypatch):
    policy = tiny.make_policy(vocab_size=33, model_dim=64, param_dtype=param_dtype)
    params, prompts, keys = tiny.make_params(policy), make_prompts(), sequence_keys(jax.random.key(0), 4, 3)
    read = []
    monkeypatch.setattr(
        sampling, "streamed_rows", lambda x, kernels: read.append(kernels.shape) or streamed_rows(x, kernels)
    )
    for program, expected in ((sampling.transposed, []), (sampling.streamed, [head])):
        jax.eval_shape(functools.partial(program.__wrapped__, policy.config, SETTINGS), params, prompts, keys)
        assert read == expected


def test_streams_are_for_few_rows_in_float32_on_one_cpu_alone():
    policy, prompts = tiny.make_policy(), make_prompts()
    params = tiny.make_params(policy)

    def is_streamed(num_completions, params=params, keys=None, **settings):
        config = dataclasses.replace(policy.config, **settings)
        keys = sequence_keys(jax.random.key(0), 4, num_completions) if keys is None else keys
        return sampling.program(config, params, prompts, keys) is sampling.streamed

    assert is_streamed(16) == has_wide_registers()
    assert not is_streamed(17)  # 68 rows
    assert not is_streamed(1, keys=sequence_keys(jax.random.key(0), 1, 1))
    assert is_streamed(1, keys=sequence_keys(jax.random.key(0), 2, 1)) == has_wide_registers()
    assert not is_streamed(1, dtype="float64", param_dtype="float64")
    for name in ("dtype", "param_dtype"):
        assert is_streamed(1, **{name: "bfloat16"}) == (has_wide_registers() and not has_matrix_unit())
    assert not is_streamed(1, sharding.place(params, sharding.make_mesh()))


def test_what_sampling_does_unless_told():
    assert Sampling(max_completion_tokens=3) == Sampling(
        max_completion_tokens=3,
        num_completions=1,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        stop_tokens=(),
        halvings=0,
    )


def test_greedy_is_the_oracles_likeliest_token():
    policy = tiny.make_policy(max_positions=11)  # 5 + 6: not one to spare
    params, prompts = tiny.make_params(policy), make_prompts()
    settings = Sampling(max_completion_tokens=6, temperature=0.0, num_completions=2)
    tokens, mask, _ = policy.generate(params, prompts, jax.random.key(0), settings)
    assert mask.all()
    np.testing.assert_array_equal(tokens[:, 0], tokens[:, 1])
    rows = np.zeros((4, 11), np.int32)
    sizes = prompts.mask.sum(1)
    for row, tokens_of_row, prompt_mask in zip(rows, prompts.tokens, prompts.mask, strict=True):
        row[: prompt_mask.sum()] = tokens_of_row[prompt_mask]
    logits = jax.jit(plain_llama.logits, static_argnums=0)
    for step in range(6):
        likeliest = logits(policy.config, params, rows)[np.arange(4), sizes + step - 1].argmax(-1)
        np.testing.assert_array_equal(tokens[:, 0, step], likeliest)
        rows[np.arange(4), sizes + step] = likeliest


def test_a_sample_depends_on_its_own_key_alone():
    policy = tiny.make_policy()
    params = tiny.make_params(policy)
    prompts = make_prompts(num_prompts=6)
    settings = dataclasses.replace(SETTINGS, top_p=0.95, stop_tokens=(5,))
    keys = sequence_keys(jax.random.key(7), 6, 3)
    whole = policy.generate(params, prompts, keys, settings)
    for row, n in ((0, 0), (3, 2), (5, 1)):
        own = prompts.tokens[row][prompts.mask[row]]
        for before, after in ((7 - own.size, 0), (0, 6 - own.size)):  # padded on the left, on the right; other widths
            tokens = np.pad(own, (before, after), constant_values=9)[None]
            mask = np.pad(np.ones(own.size, bool), (before, after))[None]
            one = dataclasses.replace(settings, num_completions=1)
            alone = policy.generate(params, Prompts(tokens, mask), keys[row : row + 1, n : n + 1], one)
            np.testing.assert_array_equal(alone.tokens[0, 0], whole.tokens[row, n])
            np.testing.assert_array_equal(alone.mask[0, 0], whole.mask[row, n])
            np.testing.assert_allclose(alone.logps[0, 0], whole.logps[row, n], rtol=0, atol=LOGPS_BOUND)
    same = policy.generate(params, prompts, jax.random.key(7), settings)
    jax.tree.map(np.testing.assert_array_equal, same, whole)
    other = policy.generate(params, prompts, jax.random.key(8), settings)
    assert np.any(other.tokens != whole.tokens)
    assert np.any(whole.tokens[:, 0] != whole.tokens[:, 1])


@pytest.mark.usefixtures("unchecked")
def test_prompts_may_be_a_plain_pair_of_arrays():
    policy = tiny.make_policy()
    params, prompts, key = tiny.make_params(policy), make_prompts(), jax.random.key(0)
    settings = dataclasses.replace(SETTINGS, top_p=0.95, stop_tokens=(5,))
    pair = policy.generate(params, (jnp.asarray(prompts.tokens), prompts.mask), key, settings)
    jax.tree.map(np.testing.assert_array_equal, pair, policy.generate(params, prompts, key, settings))


def test_keys_are_folded_by_row_and_number():
    keys, key = sequence_keys(jax.random.key(3), 4, 2), jax.random.key(3)
    for b, n in np.ndindex(4, 2):
        expected = jax.random.fold_in(jax.random.fold_in(key, b), n)
        np.testing.assert_array_equal(jax.random.key_data(keys[b, n]), jax.random.key_data(expected))


@pytest.mark.usefixtures("unchecked")
def test_a_key_may_be_of_either_kind():
    policy = tiny.make_policy()
    params, prompts = tiny.make_params(policy), make_prompts()
    of_numbers, typed = (
        policy.generate(params, prompts, key, SETTINGS) for key in (jax.random.PRNGKey(5), jax.random.key(5))
    )
    jax.tree.map(np.testing.assert_array_equal, of_numbers, typed)


def frequencies(logits, num_draws=20_000, **settings):
    """How often each token is chosen, [V], with a key for each draw."""
    keys = jax.random.split(jax.random.key(0), num_draws)[None]
    drawn = jax.jit(lambda logits, keys: choose(Sampling(max_completion_tokens=1, **settings), logits, keys))
    many = jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[None, None], (1, num_draws, len(logits)))
    return np.bincount(np.asarray(drawn(many, keys))[0], minlength=len(logits))


def assert_drawn_from(probabilities, **settings):
    """Chi-square over the tokens that may occur; none of the others does. Keys are fixed, so this is no lottery."""
    logits = np.log(np.array([0.02, 0.3, 0.1, 0.25, 0.03, 0.2, 0.1 - 1e-3, 1e-3]))
    counts, probabilities = frequencies(logits, **settings), np.array(probabilities) / np.sum(probabilities)
    np.testing.assert_array_equal(counts[probabilities == 0], 0)
    kept = probabilities > 0
    if kept.sum() > 1:
        assert stats.chisquare(counts[kept], counts.sum() * probabilities[kept]).pvalue > 0.01


def test_draws_follow_the_softmax():
    assert_drawn_from([0.02, 0.3, 0.1, 0.25, 0.03, 0.2, 0.099, 0.001])


UNIFORM_0, UNIFORM_MOST = 780233, 20192286  # keys of these seeds draw 0 and 1 - 2^-23, the largest below 1


def test_the_least_and_the_largest_number_draw_what_may_occur():
    least, most = jax.random.key(UNIFORM_0), jax.random.key(UNIFORM_MOST)
    assert jax.random.uniform(least) == 0
    assert jax.random.uniform(most) == 1 - 2.0**-23
    logits = np.full((2, 1, 1024), -np.inf, np.float32)
    logits[0, 0, [300, 400, 700]] = logits[1, 0, :600] = 0
    np.testing.assert_array_equal(_draw(jnp.asarray(logits), jnp.stack([least, most])[:, None]), [[300], [599]])


def test_rounding_leaves_no_number_beyond_the_last_token():
    logits = np.random.default_rng(0).normal(0, 3, (1, 2000, 1024)).astype(np.float32)
    logits -= logits.max(-1, keepdims=True)
    logits[..., -3:] = -np.inf
    drawn = _draw(jnp.asarray(logits), jnp.broadcast_to(jax.random.key(UNIFORM_MOST), (1, 2000)))
    weights = np.exp(np.float64(logits[0]))
    beyond = np.array([w[d + 1 :].sum() / w.sum() for w, d in zip(weights, np.asarray(drawn)[0], strict=True)])
    assert (beyond < 1e-6).all()
    assert (np.take_along_axis(weights, np.asarray(drawn)[0, :, None], -1) > 0).all()


@pytest.mark.parametrize("vocab_size", [300, 1024])
def test_the_sum_of_a_distribution_of_any_size(vocab_size):
    logits = np.random.default_rng(0).normal(size=(2, 3, vocab_size)).astype(np.float32)
    logits[0] += np.float32([[1e4], [-1e4], [0]])
    logits[1, :, 270] += np.float32([2e4, 1e3, -1e3])
    found, expected = _logsumexp_in_blocks(jnp.asarray(logits)), special.logsumexp(np.float64(logits), axis=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


def test_temperature_raises_to_a_power():
    assert_drawn_from(np.array([0.02, 0.3, 0.1, 0.25, 0.03, 0.2, 0.099, 0.001]) ** 2, temperature=0.5)


@pytest.mark.parametrize("vocab_size", [1, 7, 256, 300, 1024])
def test_greedy_takes_the_first_of_the_largest(vocab_size):
    logits = np.random.default_rng(0).integers(-9, -3, (5, 4, vocab_size)).astype(np.float32)  # many ties
    logits[2, :, -1], logits[1, :, vocab_size // 2] = 0, -2  # one largest, in the last block or between
    logits[0] = -np.inf
    keys = sequence_keys(jax.random.key(0), 5, 4)
    found = choose(dataclasses.replace(SETTINGS, temperature=0.0), jnp.asarray(logits), keys)
    np.testing.assert_array_equal(found, logits.argmax(-1))


def test_the_smallest_temperatures_are_greedy():
    for temperature in (1e-40, 1e-38, 2e-38):  # below the least normal number of float32, and above
        np.testing.assert_array_equal(
            frequencies(np.array([90.0, 100.0, 99.0]), 100, temperature=temperature), [0, 100, 0]
        )


def test_top_k_keeps_the_likeliest():
    assert_drawn_from([0, 0.3, 0, 0.25, 0, 0.2, 0, 0], top_k=3)
    assert_drawn_from([0.02, 0.3, 0.1, 0.25, 0.03, 0.2, 0.099, 0.001], top_k=100)
    assert_drawn_from([0, 1, 0, 0, 0, 0, 0, 0], top_k=1)


def test_top_p_keeps_the_fewest_that_reach_it():
    assert_drawn_from([0, 0.3, 0, 0.25, 0, 0, 0, 0], top_p=0.5)
    assert_drawn_from([0, 0.3, 0.1, 0.25, 0, 0.2, 0, 0], top_p=0.8)
    assert_drawn_from([0, 1, 0, 0, 0, 0, 0, 0], top_p=1e-6)


def test_min_p_is_a_fraction_of_the_likeliest():
    assert_drawn_from([0, 0.3, 0.1, 0.25, 0, 0.2, 0, 0], min_p=0.332)  # at least 0.0996
    assert_drawn_from([0, 0.3, 0, 0.25, 0, 0.2, 0, 0], min_p=0.34)


@pytest.mark.parametrize(
    ("logits", "settings", "kept"),
    [
        ([0.0, -30.0], {}, 2),  # though the first has all that float32 tells apart
        ([math.log(2), 0.0, 0.0], {"top_p": 0.5}, 1),  # which reaches it, to the bit
        ([0.0, math.log(0.5), -1.0], {"min_p": 0.5}, 2),
    ],
)
def test_filters_at_their_limits(logits, settings, kept):
    shifted = jnp.array(logits, jnp.float32) - logits[0]
    found = sampling._keep_likely(Sampling(max_completion_tokens=1, **settings), shifted[None, None])
    assert np.isfinite(found).sum() == kept


def test_filters_apply_in_turn_and_after_the_temperature():
    # Of the three likeliest, 0.3 + 0.25 of 0.75 reach 0.7; then 0.25 is below 0.9 of 0.3.
    assert_drawn_from([0, 0.3, 0, 0.25, 0, 0, 0, 0], top_k=3, top_p=0.7)
    assert_drawn_from([0, 1, 0, 0, 0, 0, 0, 0], top_k=3, top_p=0.7, min_p=0.9)
    # Squared and normalised, 0.3 and 0.25 have 0.41 and 0.29, which reach 0.7: at temperature 1 it would take 0.2 too.
    assert_drawn_from([0, 0.09, 0, 0.0625, 0, 0, 0, 0], temperature=0.5, top_p=0.69)


def test_draws_follow_the_softmax_across_blocks_of_a_large_vocabulary():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=1000) * 3
    counts = frequencies(logits)
    expected = np.exp(logits) / np.exp(logits).sum() * counts.sum()
    rare = expected < 20  # told apart by nothing; one bin of them
    observed, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    assert len(observed) > 50
    assert stats.chisquare(observed, expected).pvalue > 0.01


def test_impossible_tokens_are_never_drawn():
    logits = np.full(600, -np.inf)
    logits[[0, 255, 256, 599]] = 0
    counts = frequencies(logits)
    assert counts[[0, 255, 256, 599]].sum() == counts.sum()
    assert stats.chisquare(counts[[0, 255, 256, 599]]).pvalue > 0.01


def test_no_rounding_draws_an_impossible_token(monkeypatch):
    monkeypatch.setattr(jax.random, "uniform", lambda key: jnp.float32(1 - 2**-24))  # the largest there is
    logits = 2 * np.random.default_rng(0).normal(size=(1, 4000, 512)).astype(np.float32)
    logits[..., [256, 511]] = -np.inf  # at both ends of the last block
    drawn = choose(
        Sampling(max_completion_tokens=1), jnp.asarray(logits), jax.random.split(jax.random.key(0), (1, 4000))
    )
    assert np.isfinite(np.take_along_axis(logits, np.asarray(drawn)[..., None], axis=-1)).all()


def test_every_step_draws_anew():
    policy = tiny.make_policy()
    blank = jax.tree.map(jnp.zeros_like, tiny.make_params(policy))  # every token is as likely as the others
    settings = dataclasses.replace(SETTINGS, max_completion_tokens=30)
    tokens = policy.generate(blank, make_prompts(), jax.random.key(0), settings).tokens
    assert np.mean(tokens[..., 1:] == tokens[..., :-1]) < 3 / 37  # by chance 1 of 37 repeats the one before


@pytest.mark.parametrize("stops", [(3, 8, 30, 0), (3, 8, 30)])  # 0 also stands after the end
def test_a_completion_ends_with_its_stop_token_and_is_zero_after(stops):
    policy = tiny.make_policy()
    params, prompts = tiny.make_params(policy), make_prompts()
    settings = dataclasses.replace(SETTINGS, max_completion_tokens=12)
    free = policy.generate(params, prompts, jax.random.key(0), settings)
    stopped = policy.generate(params, prompts, jax.random.key(0), dataclasses.replace(settings, stop_tokens=stops))
    ended = np.isin(free.tokens, stops)
    length = np.where(ended.any(-1), ended.argmax(-1) + 1, 12)
    assert len(np.unique(length)) > 1
    mask = np.arange(12)[None, None] < length[..., None]
    np.testing.assert_array_equal(stopped.mask, mask)
    np.testing.assert_array_equal(stopped.tokens, np.where(mask, free.tokens, 0))
    np.testing.assert_allclose(stopped.logps, np.where(mask, free.logps, 0), rtol=0, atol=LOGPS_BOUND)
    assert free.mask.all()


def test_decoding_stops_when_every_completion_has_ended(monkeypatch):
    steps = []
    monkeypatch.setattr(
        "pjpo.sampling._step_keys",
        lambda keys, step: (jax.debug.callback(steps.append, step), jax.vmap(jax.vmap(lambda key: key))(keys))[1],
    )
    policy = tiny.make_policy(rope_theta=101.0)  # a config of its own, so that nothing compiled before is used
    settings = Sampling(max_completion_tokens=20, stop_tokens=tuple(range(37)))
    completions = policy.generate(tiny.make_params(policy), make_prompts(), jax.random.key(0), settings)
    jax.effects_barrier()
    assert len(steps) == 1
    np.testing.assert_array_equal(completions.mask.sum(-1), 1)


@pytest.mark.parametrize("name", ["plain", "scanned adapters, own head"])
def test_completions_that_still_grow_move_into_half_the_rows(name, monkeypatch):
    rows = []
    monkeypatch.setattr(
        "pjpo.sampling._step_keys",
        lambda keys, step: (jax.debug.callback(lambda _: rows.append(keys.size), step), fold(keys, step))[1],
    )
    fold = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(0, None)), in_axes=(0, None))
    policy = tiny.make_policy(**MODELS[name], rope_theta=103.0)  # a config of its own: nothing compiled before is used
    params, prompts = tiny.make_params(policy), make_prompts()
    settings = dataclasses.replace(SETTINGS, max_completion_tokens=16, stop_tokens=(0, 3, 5, 8, 11, 17, 22, 30))
    whole = policy.generate(params, prompts, jax.random.key(0), settings)
    jax.effects_barrier()
    assert rows == [12] * int(whole.mask.sum(-1).max())
    rows.clear()
    shrunk = policy.generate(params, prompts, jax.random.key(0), dataclasses.replace(settings, halvings=2))
    jax.effects_barrier()
    growing = whole.mask.sum((0, 1))[: len(rows)]  # completions, by step
    assert rows == [3 if count <= 3 else 6 if count <= 6 else 12 for count in growing.tolist()]
    assert {6, 12} <= set(rows)
    np.testing.assert_array_equal(shrunk.tokens, whole.tokens)
    np.testing.assert_array_equal(shrunk.mask, whole.mask)
    np.testing.assert_allclose(shrunk.logps, whole.logps, rtol=0, atol=LOGPS_BOUND)


def test_half_the_rows_may_be_fewer_than_devices():
    policy = tiny.make_policy(vocab_size=40)  # which the mesh divides
    params, prompts = tiny.make_params(policy), make_prompts(num_prompts=8)
    settings = dataclasses.replace(SETTINGS, max_completion_tokens=12, stop_tokens=(0, 3, 5, 8, 11, 17, 22, 30))
    whole = policy.generate(params, prompts, jax.random.key(0), settings)
    placed = sharding.place(params, sharding.make_mesh(sharding.Config(data=2, fsdp=2, model=2)))
    settings = dataclasses.replace(settings, halvings=3)  # 24 rows to 3
    shrunk = policy.generate(placed, prompts, jax.random.key(0), settings)
    np.testing.assert_array_equal(shrunk.tokens, whole.tokens)
    np.testing.assert_allclose(shrunk.logps, whole.logps, rtol=0, atol=LOGPS_BOUND)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"halvings": -1}, "halvings must be >= 0, got -1"),
        ({"max_completion_tokens": 0}, "max_completion_tokens must be >= 1, got 0"),
        ({"num_completions": 0}, "num_completions must be >= 1, got 0"),
        *[({"temperature": x}, f"temperature must be >= 0 and finite, got {x}") for x in (-0.1, np.inf, np.nan)],
        ({"top_k": -1}, "top_k must be >= 0, got -1"),
        *[({"top_p": x}, rf"top_p must be in \(0, 1\], got {x}") for x in (0.0, -0.5, 1.5, np.nan)],
        *[({"min_p": x}, rf"min_p must be in \[0, 1\), got {x}") for x in (1.0, -0.5, np.nan)],
        ({"stop_tokens": (3, -1)}, r"stop_tokens must be token ids, >= 0, got \(3, -1\)"),
        *[({"stop_tokens": x}, "stop_tokens must be token ids, got ") for x in (2.5, "</s>", [[3]], None)],
        *[({"temperature": x}, "temperature must be a number, got ") for x in ("0.7", None, [0.7], True)],
        *[({"top_k": x}, f"top_k must be a whole number, got {x}") for x in (2.5, np.nan, np.inf)],
    ],
)
def test_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=f"^sampling: {message}"):
        Sampling(**{"max_completion_tokens": 4} | settings)


@pytest.mark.usefixtures("unchecked")
def test_settings_of_numpy_and_jax_are_python_s():
    plain = Sampling(max_completion_tokens=4, temperature=0.5, top_k=3, stop_tokens=(3, 5))
    for stop_tokens in ([3, 5], np.array([3, 5]), jnp.array([3, 5])):
        other = Sampling(
            max_completion_tokens=np.int64(4),
            temperature=jnp.bfloat16(0.5),
            top_k=jnp.array(3),
            stop_tokens=stop_tokens,
        )
        assert (other, hash(other)) == (plain, hash(plain))
        assert {type(value) for value in dataclasses.astuple(other)} == {int, float, tuple}
    assert Sampling(max_completion_tokens=4, stop_tokens=np.int32(7)).stop_tokens == (7,)
    assert Sampling(max_completion_tokens=4, stop_tokens=[]).stop_tokens == ()


@pytest.mark.usefixtures("unchecked")
def test_prompts_and_keys_may_be_whatever_says_the_same():
    policy, (tokens, mask) = tiny.make_policy(), make_prompts()
    params, whole = tiny.make_params(policy), np.ones_like(mask)

    def sample(prompts, key):
        return np.asarray(policy.generate(params, prompts, key, SETTINGS).tokens)

    expected = sample(Prompts(tokens, mask), jax.random.key(3))
    completions = np.full((4, 1, 2), 7, np.int32)
    batch = Batch.of(prompt_tokens=tokens, prompt_mask=mask, completion_tokens=completions)
    for prompts in ((tokens.tolist(), mask.tolist()), (tokens.astype(float), mask.astype(np.float32)), batch):
        np.testing.assert_array_equal(sample(prompts, jax.random.key(3)), expected)
    for key in (3, np.int64(3), jnp.array(3), jax.random.PRNGKey(3)):
        np.testing.assert_array_equal(sample((tokens, mask), key), expected)
    expected = sample((tokens, whole), 0)
    assert (expected != sample((tokens, mask), 0)).any()
    for prompts in (tokens, tokens.tolist(), (tokens, None)):
        np.testing.assert_array_equal(sample(prompts, 0), expected)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("prompts", "key", "message"),
    [
        ([[1, 2], [3]], 0, "prompt_tokens makes no array .* pad lists to one length"),
        (["a"], 0, "prompt_tokens makes no array of numbers"),
        (([[1, 2]], [[1, 0.5]]), 0, r"prompt_mask must be 0 or 1, got 0\.5"),
        ([[1, 2.5]], 0, r"prompt_tokens must be token ids, whole numbers, got 2\.5"),
        ([[1, 37]], 0, r"prompt_tokens \[0, 1\] is 37, outside the vocabulary of 37"),
        (([[1]], [[1]], [[1]]), 0, "tokens, or a pair of tokens and mask, got a tuple of 3"),
        ([1, 2], 0, r"of one shape \[B, P\], got \(2,\)"),
        ([[1, 2]], 0.5, "key must be a jax.random.key, .*, got 0.5"),
        ([[1, 2]], None, "key must be a jax.random.key, .*, got None"),
    ],
)
def test_prompts_and_keys_that_say_nothing_are_refused(prompts, key, message):
    policy = tiny.make_policy()
    with pytest.raises(ValueError, match=message):
        policy.generate({}, prompts, key, SETTINGS)


@pytest.mark.parametrize(
    ("prompts", "key", "settings", "message"),
    [
        ((np.zeros((2, 3), int), np.ones((2, 4), bool)), None, {}, r"of one shape \[B, P\], got \(2, 3\) and \(2, 4\)"),
        ((np.zeros(3, int), np.ones(3, bool)), None, {}, r"of one shape \[B, P\], got \(3,\)"),
        ((np.zeros((2, 3), int), np.array([[1, 1, 0], [0, 0, 0]], bool)), None, {}, "prompt 1 is empty"),
        (
            (np.zeros((2, 59), int), np.ones((2, 59), bool)),
            None,
            {},
            r"width 59 \+ max_completion_tokens 6 = 65 exceeds",
        ),
        (make_prompts(), None, {"stop_tokens": (3, 37)}, r"stop_tokens \[37\] are outside the vocabulary of 37"),
        (make_prompts(), (4, 2), {}, r"keys \[B, N\] = \(4, 3\), got \(4, 2\)"),
    ],
)
def test_prompts_and_keys_that_do_not_fit_are_refused(prompts, key, settings, message):
    policy = tiny.make_policy()
    key = jax.random.key(0) if key is None else sequence_keys(jax.random.key(0), *key)
    with pytest.raises(ValueError, match=message):
        policy.generate(tiny.make_params(policy), Prompts(*prompts), key, dataclasses.replace(SETTINGS, **settings))


@pytest.mark.parametrize(("in_blocks", "kind", "dtype"), [(True, filled, "float32"), (False, whole, "bfloat16")])
def test_what_is_decoded_in_blocks_is_kept_in_float32_and_all_else_as_it_came(in_blocks, kind, dtype):
    prompts = jnp.ones((2, 3, 5, 4), "bfloat16"), jnp.ones((2, 3, 5, 4), "bfloat16")
    cache = attention.decode_cache(prompts, 2, 6, in_blocks)
    assert isinstance(cache.own, kind.Cache)
    assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype(dtype)}
    assert (cache.prompt_k.shape, cache.prompt_v.shape) == ((2, 3, 4, 5), (2, 3, 5, 4))
