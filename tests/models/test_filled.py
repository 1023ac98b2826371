"""A cache in blocks gives what a whole one gives, and what lies beyond the newest block is never read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjpo.models import filled, whole

ROWS, KV_HEADS, QUERIES = 3, 2, 2


def numbers(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def grown(of, length, head_dim, upto):
    """A cache of tokens 0 to `upto`."""
    cache = of.Cache.blank(ROWS, KV_HEADS, length, head_dim, jnp.dtype("float32"))
    of_tokens = numbers(2, length, ROWS, KV_HEADS, head_dim)
    write = jax.jit(of.Cache.write)
    for step in range(upto + 1):
        cache = write(cache, *of_tokens[:, step], jnp.int32(step))
    return cache


@pytest.mark.parametrize(
    ("length", "head_dim", "upto"), [(40, 32, 0), (40, 32, 15), (40, 32, 16), (33, 24, 32), (5, 7, 4)]
)
def test_scores_and_mixtures_are_those_of_a_whole_cache(length, head_dim, upto):
    q, start = numbers(ROWS, KV_HEADS, QUERIES, head_dim), numbers(ROWS, KV_HEADS, QUERIES, head_dim) / 3
    in_blocks, plain = (grown(of, length, head_dim, upto) for of in (filled, whole))
    step = jnp.int32(upto)
    found, expected = in_blocks.scores(q, step), plain.scores(q, step)
    assert found.shape[-1] == -(-length // 16) * 16
    np.testing.assert_allclose(found[..., : upto + 1], expected[..., : upto + 1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[..., (upto // 16 + 1) * 16 :], np.float32(-1e30))
    weights = jax.nn.softmax(expected[..., : upto + 1])
    padded = jnp.pad(weights, ((0, 0), (0, 0), (0, 0), (0, found.shape[-1] - upto - 1)))
    whole_weights = jnp.pad(weights, ((0, 0), (0, 0), (0, 0), (0, length - upto - 1)))
    np.testing.assert_allclose(
        in_blocks.mix(padded, step, start), plain.mix(whole_weights, step, start), rtol=1e-5, atol=1e-5
    )


def test_later_blocks_are_not_read():
    cache = jax.tree.map(lambda x: x.at[:, :, 2:].set(jnp.nan), grown(filled, 48, 16, 20))
    q, step = numbers(ROWS, KV_HEADS, QUERIES, 16), jnp.int32(20)
    assert np.isfinite(cache.scores(q, step)).all()
    weights = jnp.ones((ROWS, KV_HEADS, QUERIES, 48))
    assert np.isfinite(cache.mix(weights, step, jnp.zeros_like(q))).all()


def test_bfloat16_is_widened_before_it_is_multiplied():
    cache = grown(filled, 16, 16, 15)
    q = numbers(ROWS, KV_HEADS, QUERIES, 16).astype("bfloat16")
    found = cache.scores(q, jnp.int32(15))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, cache.scores(q.astype("float32"), jnp.int32(15)))
    weights = jax.nn.softmax(found).astype("bfloat16")
    mixed = cache.mix(weights, jnp.int32(15), jnp.zeros(q.shape))
    assert mixed.dtype == jnp.float32
    np.testing.assert_array_equal(mixed, cache.mix(weights.astype("float32"), jnp.int32(15), jnp.zeros(q.shape)))
