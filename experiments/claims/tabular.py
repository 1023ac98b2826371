"""Policies that are tables: whole completions with one log-prob each, and what minimises a method's loss on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from pjpo.types import Batch

PAIR = Batch.of(completion_tokens=np.zeros((1, 2, 1), np.int32))  # a completion is one token


def losses(method: Any, config: Any, logps: jax.Array, ref_logps: jax.Array | None = None) -> jax.Array:
    """The method's loss of each of n pairs [n, 2]: (chosen, rejected) log-probs of whole completions."""

    def one(logps, ref_logps):
        ref_logps = None if ref_logps is None else ref_logps[None, :, None]
        return method.loss(config, PAIR, logps[None, :, None], ref_logps)[0].value()

    return jax.vmap(one, in_axes=(0, None if ref_logps is None else 0))(logps, ref_logps)


def ordered_pairs(num_responses: int) -> np.ndarray:
    """(chosen, rejected) for every two different responses, both ways round: [K (K - 1), 2]."""
    return np.array([(i, j) for i in range(num_responses) for j in range(num_responses) if i != j])


def population_minimiser(method: Any, config: Any, ref: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The softmax policy that minimises the expected loss, for weights [K, K] of "i is preferred to j"."""
    pairs = ordered_pairs(len(ref))
    each = weights[pairs[:, 0], pairs[:, 1]]

    def objective(free):
        logps = jax.nn.log_softmax(jnp.concatenate([jnp.zeros(1), free]))  # one logit is free to choose
        return jnp.sum(each * losses(method, config, logps[pairs], jnp.log(ref)[pairs])) / each.sum()

    free = minimise(objective, np.log(ref[1:] / ref[0]))
    return np.asarray(jax.nn.softmax(np.concatenate([[0.0], free])))


def minimise(objective: Callable, start: np.ndarray) -> np.ndarray:
    """A minimum of a smooth function, to float64 precision, by a trust region with exact curvature."""
    value, slope, curvature = jax.jit(objective), jax.jit(jax.grad(objective)), jax.jit(jax.hessian(objective))
    found = optimize.minimize(
        value,
        start,
        jac=lambda x: np.asarray(slope(x)),
        hess=lambda x: np.asarray(curvature(x)),
        method="trust-exact",
        options={"gtol": 1e-12, "maxiter": 500},
    )
    return found.x


def bradley_terry(rewards: np.ndarray) -> np.ndarray:
    """P(i over j) [K, K] of rewards."""
    return 1 / (1 + np.exp(rewards[None] - rewards[:, None]))
