"""Token environments that are tables, with exact answers, and how the methods of `pjpo.methods` learn in them.

A policy is a table of logits [S, A]: S states, A tokens. Everything here is a pure function of arrays, so that a claim
maps it over seeds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from pjpo import step
from pjpo.methods import dpo, reward_model
from pjpo.types import Batch

NUM_SEEDS = 10  # that a claim runs at once


class Environment(NamedTuple):
    """X prompts; every completion has `steps.size` tokens."""

    start: Int[Array, " X"]  # the state of each prompt
    following: Int[Array, "S A"]  # the state after a token
    rewards: Float[Array, "S A"]  # gold, of a token
    ref: Float[Array, "S A"]  # logits of the reference
    steps: Int[Array, " H"]  # 0, 1, ..


class Completions(NamedTuple):
    tokens: Int[Array, "X N H"]
    states: Int[Array, "X N H"]  # before each token


def token_chain(key: Array, num_tokens: int, length: int) -> Environment:
    """A state is the previous token. Rewards of tokens N(0, 0.3^2), reference logits N(0, 0.5^2)."""
    keys, shape = jax.random.split(key), (num_tokens + 1, num_tokens)
    return Environment(
        start=jnp.array([num_tokens]),
        following=jnp.broadcast_to(jnp.arange(num_tokens), shape),
        rewards=0.3 * jax.random.normal(keys[0], shape),
        ref=0.5 * jax.random.normal(keys[1], shape),
        steps=jnp.arange(length),
    )


def token_tree(key: Array, num_tokens: int, length: int, returns: Float[Array, "X K"]) -> Environment:
    """A state is a prompt with a prefix; the last token earns the return of the completion, in counting order."""
    num_prompts, width = len(returns), num_tokens ** np.arange(length + 1)
    num_inner, num_states = int(width[:-1].sum()), int(width.sum())
    number = np.arange(num_states)[:, None] * num_tokens + np.arange(1, num_tokens + 1)
    offsets = num_states * np.arange(num_prompts)[:, None, None]
    rewards = jnp.zeros((num_prompts, num_states, num_tokens))
    rewards = rewards.at[:, num_inner - width[-2] : num_inner].set(returns.reshape(num_prompts, -1, num_tokens))
    shape = (num_prompts * num_states, num_tokens)
    return Environment(
        start=jnp.asarray(offsets[:, 0, 0]),
        following=jnp.asarray((np.minimum(number, num_states - 1) + offsets).reshape(shape)),
        rewards=rewards.reshape(shape),
        ref=0.5 * jax.random.normal(key, shape),
        steps=jnp.arange(length),
    )


def lock(key: Array, num_tokens: int, length: int) -> Environment:
    """A state is a position and whether all tokens so far match a hidden key; the whole key earns 1."""
    secret = jax.random.randint(key, (length,), 0, num_tokens)
    places, right = np.repeat(np.arange(length + 1), 2), np.tile([False, True], length + 1)
    matches = right[:, None] & (jnp.arange(num_tokens)[None] == jnp.append(secret, -1)[places][:, None])
    return Environment(
        start=jnp.array([1]),
        following=2 * np.minimum(places + 1, length)[:, None] + matches,
        rewards=jnp.where((places == length - 1)[:, None] & matches, 1.0, 0.0),
        ref=jnp.zeros(matches.shape),
        steps=jnp.arange(length),
    )


LEVELS = (3.0, -0.5, -1.0, -1.0)  # what levels 1 to 4 earn


def levels(key: Array, num_prompts: int = 4) -> Environment:
    """Four tokens out of four; level 1 asks for the prompt's own two last tokens, behind two ways to fall."""
    keys = jax.random.split(key)
    first, second, *last = np.indices((4,) * 4).reshape(4, -1)
    wanted = jax.random.randint(keys[0], (num_prompts, 1), 0, 16)
    level = jnp.where((4 * last[0] + last[1])[None] == wanted, 1, 2)
    level = jnp.where((first >= 2)[None], 4, jnp.where((second == 3)[None], 3, level))
    return token_tree(keys[1], 4, 4, jnp.array(LEVELS)[level - 1])


def sample(environment: Environment, logits: Float[Array, "S A"], key: Array, num_completions: int) -> Completions:
    """So many completions of each prompt."""
    cumulative = jnp.cumsum(jax.nn.softmax(logits), axis=-1)
    shape = len(environment.start), num_completions
    uniform = jax.random.uniform(key, (environment.steps.size, *shape))

    def advance(states, uniform):
        tokens = jnp.sum(uniform[..., None] > cumulative[states][..., :-1], axis=-1)
        return environment.following[states, tokens], (tokens, states)

    start = jnp.broadcast_to(environment.start[:, None], shape)
    tokens, states = jax.lax.scan(advance, start, uniform)[1]
    return Completions(jnp.moveaxis(tokens, 0, -1), jnp.moveaxis(states, 0, -1))


def logps(logits: Float[Array, "S A"], completions: Completions) -> Float[Array, "X N H"]:
    return jax.nn.log_softmax(logits)[completions.states, completions.tokens]


def returns(rewards: Float[Array, "S A"], completions: Completions) -> Float[Array, "X N"]:
    return rewards[completions.states, completions.tokens].sum(-1)


def expectations(environment: Environment, logits: Float[Array, "S A"]) -> tuple[Array, Array]:
    """(expected return, KL to the reference in nats), exactly, means over prompts."""
    policy, log_ratios = jax.nn.softmax(logits), jax.nn.log_softmax(logits) - jax.nn.log_softmax(environment.ref)
    earned, spent = (policy * environment.rewards).sum(-1), (policy * log_ratios).sum(-1)

    def advance(occupied, _):
        after = jnp.zeros_like(occupied).at[environment.following].add(occupied[:, None] * policy)
        return after, (occupied @ earned, occupied @ spent)

    start = jnp.zeros(len(logits)).at[environment.start].add(1 / len(environment.start))
    gained, kl = jax.lax.scan(advance, start, environment.steps)[1]
    return gained.sum(), kl.sum()


def optimum(environment: Environment, beta: float) -> Float[Array, "S A"]:
    """Log-probs of the policy that maximises return - beta KL, where no state comes twice in a completion."""
    log_ref = jax.nn.log_softmax(environment.ref)

    def q(values):
        return log_ref + (environment.rewards + values[environment.following]) / beta

    def back(values, _):
        return beta * jax.nn.logsumexp(q(values), axis=-1), None

    values, _ = jax.lax.scan(back, jnp.zeros(len(log_ref)), environment.steps)
    return jax.nn.log_softmax(q(values))


class Pairs(NamedTuple):
    """Chosen and rejected completions, as how often each token of each state occurs: sums are all that losses read."""

    counts: Float[Array, "pairs 2 S*A"]

    def sums(self, table: Float[Array, "S A"]) -> Float[Array, "pairs 2"]:
        return self.counts @ table.reshape(-1)


def drawn(environment: Environment, logits, key: Array, num_pairs: int) -> Pairs:
    """Pairs of the policy's own completions, of prompt 0, in no order."""
    tokens, states = (x[0].reshape(num_pairs, 2, -1) for x in sample(environment, logits, key, 2 * num_pairs))
    rows, sides, _ = jnp.indices(tokens.shape)
    counts = jnp.zeros((num_pairs, 2, logits.size))
    return Pairs(counts.at[rows, sides, states * logits.shape[1] + tokens].add(1))


def preferences(environment: Environment, logits, key: Array, num_pairs: int, flip_rate=0.0) -> Pairs:
    """The policy's own pairs with Bradley-Terry labels of the gold rewards, some of them flipped."""
    keys = jax.random.split(key, 3)
    pairs = drawn(environment, logits, keys[0], num_pairs)
    gold = pairs.sums(environment.rewards)
    wins = jax.random.uniform(keys[1], (num_pairs,)) < jax.nn.sigmoid(gold[:, 0] - gold[:, 1])
    return ordered(pairs, wins ^ (jax.random.uniform(keys[2], (num_pairs,)) < flip_rate))


def ranked(environment: Environment, logits, key: Array, num_pairs: int, rewards: Float[Array, "S A"]) -> Pairs:
    """The policy's own pairs, the one with the higher reward chosen."""
    pairs = drawn(environment, logits, key, num_pairs)
    scores = pairs.sums(rewards)
    return ordered(pairs, scores[:, 0] > scores[:, 1])


def ordered(pairs: Pairs, first_wins) -> Pairs:
    return Pairs(jnp.where(first_wins[:, None, None], pairs.counts, pairs.counts[:, ::-1]))


def descend(objective: Callable, start: Array, num_steps: int, rate: float) -> Array:
    """Adam; what each step arrives at, [num_steps, ...]."""
    optimizer = optax.adam(rate)

    def update(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(objective)(params), state)
        params = jax.tree.map(jnp.add, params, updates)
        return (params, state), params

    return jax.lax.scan(update, (start, optimizer.init(start)), length=num_steps)[1]


def fit_dpo(start, ref, pairs: Pairs, num_steps: int, beta: Array | float = 0.1, rate: float = 0.05) -> Array:
    """Logits after each step of DPO from `start`, [num_steps, S, A]."""
    batch = Batch.of(completion_tokens=jnp.zeros((*pairs.counts.shape[:2], 1), jnp.int32))  # a completion is one token
    unit = dpo.Config(beta=1.0)  # with beta in the log-probs instead, so that strengths can be mapped over

    def scaled(logits):
        return beta * pairs.sums(jax.nn.log_softmax(logits))[..., None]

    return descend(lambda x: dpo.loss(unit, batch, scaled(x), scaled(ref))[0].value(), start, num_steps, rate)


def fit_rewards(environment: Environment, pairs: Pairs, num_steps: int = 200, rate: float = 0.05) -> Array:
    """A reward of each state and token, [S, A], by the Bradley-Terry loss: logistic regression on their counts."""
    batch = Batch.of(completion_tokens=jnp.zeros((*pairs.counts.shape[:2], 1), jnp.int32))

    def objective(rewards):
        return reward_model.loss(reward_model.Config(), batch, None, None, pairs.sums(rewards))[0].value()

    return descend(objective, jnp.zeros_like(environment.rewards), num_steps, rate)[-1]


class Settings(NamedTuple):
    """How an online method is run; hashable."""

    num_completions: int  # of each prompt and rollout
    num_iterations: int
    num_epochs: int = 1
    policy_rate: float = 0.02
    value_rate: float = 0.05


def learn(
    loss: Callable,
    config: Any,
    settings: Settings,
    environment: Environment,
    start: Float[Array, "S A"],
    key: Array,
    *,
    rewards: Float[Array, "S A"] | None = None,
    dpo: Float[Array, "S A"] | None = None,
    beta: Array | None = None,
) -> tuple[Float[Array, " iterations"], Float[Array, " iterations"]]:
    """(expected return, KL to the reference), exactly, after each rollout's updates.

    Args:
        loss, config: of a method with `advantages`; a critic is a table of values by state and place.
        settings: sizes and rates.
        environment: where.
        start: logits to begin with.
        key: of the rollouts.
        rewards: what completions are scored by; the gold rewards, if left out.
        dpo: logits of the DPO policy, for methods that need one.
        beta: the pull, where the method lets it vary.
    """
    rewards = environment.rewards if rewards is None else rewards
    critic = "values" in getattr(config, "outputs", ())
    params = {"policy": start, "values": jnp.zeros((len(start), environment.steps.size))}
    rates = {"policy": optax.adam(settings.policy_rate), "values": optax.adam(settings.value_rate)}
    optimizer = optax.multi_transform(rates, {name: name for name in rates})
    others = {} if beta is None else {"beta": beta}

    def iterate(carry, key):
        params, state = carry
        completions = sample(environment, params["policy"], key, settings.num_completions)

        def outputs(params):
            values = {"values": params["values"][completions.states, environment.steps]} if critic else {}
            return {"logps": logps(params["policy"], completions), **values}

        sampled, ref_logps = outputs(params), logps(environment.ref, completions)
        rollout = Batch.of(
            completion_tokens=completions.tokens,
            rewards=returns(rewards, completions),
            old_logps=sampled["logps"],
            ref_logps=ref_logps,
            values=sampled.get("values"),
        )
        if getattr(config, "needs_dpo", False):
            batch = config.advantages(rollout, dpo_logps=logps(dpo, completions), **others)
        else:
            batch = config.advantages(rollout, **others)

        def update(carry, _):
            params, state = carry
            slope = jax.grad(lambda p: step.apply(loss, config, batch, outputs(p), ref_logps)[0].value())(params)
            updates, state = optimizer.update(slope, state)
            return (jax.tree.map(jnp.add, params, updates), state), None

        (params, state), _ = jax.lax.scan(update, (params, state), length=settings.num_epochs)
        return (params, state), expectations(environment, params["policy"])

    keys = jax.random.split(key, settings.num_iterations)
    return jax.lax.scan(iterate, (params, optimizer.init(params)), keys)[1]


def by_seed(measure: Callable[[Array], dict[str, Array]]) -> Callable[[int], dict[str, float]]:
    """A measurement of a key as one of a seed, ten seeds at once, compiled once and kept."""

    @functools.cache
    def several(block: int) -> dict[str, np.ndarray]:
        keys = jax.vmap(jax.random.key)(jnp.arange(NUM_SEEDS) + NUM_SEEDS * block)
        return jax.device_get(jax.jit(jax.vmap(measure))(keys))

    def one(seed: int) -> dict[str, float]:
        found = several(seed // NUM_SEEDS)
        return {name: float(values[seed % NUM_SEEDS]) for name, values in found.items()}

    return one


def picked(measure: Callable[[int], dict[str, float]], *names: str) -> Callable[[int], dict[str, float]]:
    """Some of what is measured, where one run serves several claims."""

    def some(seed: int) -> dict[str, float]:
        found = measure(seed)
        return {name: found[name] for name in names}

    return some
