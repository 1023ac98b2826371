"""Biases by length and difficulty against exact numbers, and that the biased and the unbiased configs are GRPO's."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims import grpo as claims
from pjpo.methods import grpo

EVEN = np.zeros(3)  # right, and going on, with probability 1/2
LENGTHS = np.arange(2, 50)
GRPO = dataclasses.replace(claims.GRPO, std_eps=1e-6)  # as the published numbers have it


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_length_bias():
    np.testing.assert_allclose(claims.pull(GRPO, EVEN, 4, LENGTHS)[1:], [-0.02779494, 0.02779494], atol=1e-8)
    np.testing.assert_allclose(claims.pull(claims.DR_GRPO, EVEN, 4, LENGTHS)[1:], 0, atol=1e-8)


@pytest.mark.parametrize(("rate", "plain", "divided"), [(0.05, 0.0415625, 0.10988327), (0.5, 0.21875, 0.43395093)])
def test_difficulty_bias(rate, plain, divided):
    np.testing.assert_allclose(claims.weight(claims.DR_GRPO, rate, 8), plain, atol=1e-8)
    np.testing.assert_allclose(claims.weight(GRPO, rate, 8), divided, atol=1e-8)


def test_the_pull_is_that_of_single_completions():
    # Groups of two, completions of 2 or 3 tokens, one by one: advantage times slope over length.
    logits = jnp.array([0.3, -0.4, 0.8])

    def answer(logits, right):
        return jax.nn.log_sigmoid(logits[0] if right else -logits[0])

    def rest(logits, right, length):
        going = logits[1 if right else 2]
        return (length - 2) * jax.nn.log_sigmoid(going) + jax.nn.log_sigmoid(-going)

    expected = jnp.zeros(3)
    for group in itertools.product([True, False], repeat=2):
        outcome = jnp.exp(sum(answer(logits, right) for right in group))
        for right, length in itertools.product(group, (2, 3)):
            slope = jax.grad(lambda x, *about: answer(x, about[0]) + rest(x, *about))(logits, right, length)
            chance = outcome * jnp.exp(rest(logits, right, length))
            expected += chance * (right - np.mean(group)) * slope / length / 2
    found = claims.pull(grpo.Config(std="none", beta=0.0), logits, 2, np.array([2, 3]))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
