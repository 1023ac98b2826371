"""Toy environments: expectations against enumeration and samples, optima against search, and pairs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims import environments as env


def enumerated(environment):
    """Every completion of every prompt."""
    num_tokens, length = environment.rewards.shape[1], environment.steps.size
    tokens = np.array(list(itertools.product(range(num_tokens), repeat=length)))
    tokens = np.broadcast_to(tokens, (len(environment.start), *tokens.shape))
    states = np.zeros(tokens.shape, int)
    following, at = np.asarray(environment.following), np.array(environment.start)[:, None]
    for t in range(length):
        states[..., t] = at
        at = following[at, tokens[..., t]]
    return env.Completions(jnp.asarray(tokens), jnp.asarray(states))


def small(name, key):
    keys = jax.random.split(key)
    return {
        "chain": lambda: env.token_chain(key, 3, 4),
        "tree": lambda: env.token_tree(keys[0], 3, 3, jax.random.normal(keys[1], (2, 27))),
        "lock": lambda: env.lock(key, 3, 4),
        "levels": lambda: env.levels(key),
    }[name]()


@pytest.mark.parametrize("name", ["chain", "tree", "lock", "levels"])
def test_expectations_are_those_of_all_completions_and_of_samples(name):
    environment = small(name, jax.random.key(1))
    logits = 0.7 * jax.random.normal(jax.random.key(2), environment.ref.shape)
    found = env.expectations(environment, logits)
    every = enumerated(environment)
    each, under_ref = (env.logps(x, every).sum(-1) for x in (logits, environment.ref))
    gold = env.returns(environment.rewards, every)
    np.testing.assert_allclose(jnp.exp(each).sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(found[0], (jnp.exp(each) * gold).sum(-1).mean(), atol=1e-5)
    np.testing.assert_allclose(found[1], (jnp.exp(each) * (each - under_ref)).sum(-1).mean(), rtol=1e-4)
    drawn = env.sample(environment, logits, jax.random.key(3), 40_000)
    seen = env.returns(environment.rewards, drawn)
    np.testing.assert_allclose(seen.mean(), found[0], atol=4 * float(seen.std()) / np.sqrt(seen.size))


@pytest.mark.parametrize("name", ["tree", "lock", "levels"])
def test_the_optimum_is_the_tilted_reference(name):
    environment = small(name, jax.random.key(4))
    every = enumerated(environment)
    tilted = env.logps(environment.ref, every).sum(-1) + env.returns(environment.rewards, every) / 0.3
    expected = jax.nn.log_softmax(tilted, axis=-1)
    found = env.logps(env.optimum(environment, 0.3), every).sum(-1)
    np.testing.assert_allclose(jnp.exp(found), jnp.exp(expected), atol=1e-5)


def test_a_lock_opens_for_its_key_alone():
    environment = env.lock(jax.random.key(0), 3, 4)
    opened = env.returns(environment.rewards, enumerated(environment))
    assert sorted(np.unique(opened)) == [0, 1]
    assert opened.sum() == 1


def test_levels():
    environment = env.levels(jax.random.key(0))
    every = enumerated(environment)
    gold = env.returns(environment.rewards, every)
    first, second = every.tokens[..., 0], every.tokens[..., 1]
    np.testing.assert_array_equal(gold[first >= 2], -1)
    np.testing.assert_array_equal(gold[(first < 2) & (second == 3)], -1)
    rest = gold[(first < 2) & (second < 3)].reshape(4, -1)
    np.testing.assert_array_equal((rest == 3).sum(1), [6] * 4)  # one pair of last tokens behind 2 x 3 first ones
    np.testing.assert_array_equal((rest == -0.5).sum(1), [90] * 4)


def test_pairs_hold_what_was_drawn_and_who_won():
    chain = env.token_chain(jax.random.key(0), 4, 6)
    pairs = env.ranked(chain, chain.ref, jax.random.key(1), 50, chain.rewards)
    gold = pairs.sums(chain.rewards)
    assert (gold[:, 0] >= gold[:, 1]).all()
    np.testing.assert_array_equal(pairs.counts.sum(-1), 6)
    np.testing.assert_array_equal(pairs.counts.reshape(50, 2, 5, 4)[:, :, 4].sum(-1), 1)  # one first token
    for flip_rate in (0.0, 1.0):
        gold = env.preferences(chain, chain.ref, jax.random.key(1), 2000, flip_rate).sums(chain.rewards)
        right = (gold[:, 0] > gold[:, 1]).mean()
        expected = jax.nn.sigmoid(jnp.abs(gold[:, 0] - gold[:, 1])).mean()
        np.testing.assert_allclose(right, 1 - expected if flip_rate else expected, atol=0.04)


def test_a_reward_model_learns_the_gold_order():
    chain = env.token_chain(jax.random.key(0), 4, 6)
    rewards = env.fit_rewards(chain, env.preferences(chain, chain.ref, jax.random.key(1), 3000))
    fresh = env.drawn(chain, chain.ref, jax.random.key(2), 1000)
    learned, gold = (fresh.sums(x) @ jnp.array([1.0, -1.0]) for x in (rewards, chain.rewards))
    assert (jnp.sign(learned) == jnp.sign(gold)).mean() > 0.9


def test_seeds_are_mapped_and_kept():
    calls = []

    def measure(key):
        calls.append(key)
        return {"draw": jax.random.uniform(key)}

    one = env.by_seed(measure)
    np.testing.assert_allclose(one(3)["draw"], jax.random.uniform(jax.random.key(3)), rtol=1e-6)
    np.testing.assert_allclose(one(12)["draw"], jax.random.uniform(jax.random.key(12)), rtol=1e-6)
    one(4)
    assert len(calls) == 2  # traced once for each ten
