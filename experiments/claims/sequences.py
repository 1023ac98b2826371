"""A tiny autoregressive policy: a table of logits by position and previous token, with `logps` as any policy has."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pjpo import step
from pjpo.types import Batch


@dataclasses.dataclass(frozen=True)
class Table:
    """Sequences of T tokens out of V; logits [T, V + 1, V], the last row of axis 1 for no previous token."""

    num_tokens: int
    vocab_size: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.num_tokens, self.vocab_size + 1, self.vocab_size

    def init(self) -> jax.Array:
        return jnp.zeros(self.shape)

    def logps(self, params: jax.Array, batch: Batch) -> jax.Array:
        tokens = jnp.asarray(batch.completion_tokens)
        before = jnp.pad(tokens[..., :-1], [(0, 0), (0, 0), (1, 0)], constant_values=self.shape[2])
        places = jnp.broadcast_to(jnp.arange(self.shape[0])[None, None], tokens.shape)
        return jax.nn.log_softmax(params)[places, before, tokens]

    def sample(self, params: jax.Array, count: int, rng: np.random.Generator) -> np.ndarray:
        """[count, T]."""
        cumulative = np.cumsum(np.asarray(jax.nn.softmax(params)), axis=-1)
        tokens, before = np.zeros((count, self.shape[0]), np.int32), np.full(count, self.shape[2])
        for t in range(self.shape[0]):
            drawn = (rng.random((count, 1)) > cumulative[t, before]).sum(1)
            tokens[:, t] = before = np.minimum(drawn, self.shape[2] - 1)
        return tokens

    def expectations(self, params: jax.Array, reference: jax.Array, rewards: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(reward of a sequence, its KL to the reference in nats), exactly, for rewards of its tokens [V]."""
        policy, log_ratios = jax.nn.softmax(params), jax.nn.log_softmax(params) - jax.nn.log_softmax(reference)

        def advance(before, place):
            policy, log_ratios = place  # [V + 1, V]
            tokens = before @ policy
            after = jnp.pad(tokens, (0, 1))  # something was before
            return after, (tokens @ rewards, before @ (policy * log_ratios).sum(-1))

        nothing = jax.nn.one_hot(self.shape[2], self.shape[1])
        gained, kl = jax.lax.scan(advance, nothing, (policy, log_ratios))[1]
        return gained.sum(), kl.sum()

    def fit(self, sequences: np.ndarray, smoothing: float = 0.1) -> jax.Array:
        """The likeliest table for these sequences [n, T], with `smoothing` added to each count."""
        counts = np.full(self.shape, smoothing)
        before = np.pad(sequences[:, :-1], [(0, 0), (1, 0)], constant_values=self.shape[2])
        for t in range(self.shape[0]):
            np.add.at(counts[t], (before[:, t], sequences[:, t]), 1)
        return jnp.log(counts / counts.sum(-1, keepdims=True)).astype(jnp.float32)


def train(
    policy: Any, loss: Callable, method: Any, start: Any, batch: Batch, *, num_steps: int, learning_rate: float
) -> Any:
    """Full-batch Adam from `start`, which is also the reference where the loss has one; a table or any other policy."""
    params = path(policy, loss, method, start, batch, num_steps=num_steps, learning_rate=learning_rate)
    return jax.tree.map(lambda x: x[-1], params)


def path(
    policy: Any, loss: Callable, method: Any, start: Any, batch: Batch, *, num_steps: int, learning_rate: float
) -> Any:
    """As `train`, with what each step arrives at, [num_steps, ...]."""
    return _path(policy, loss, method, start, batch, num_steps, learning_rate)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 5, 6))
def _path(policy, loss, method, start, batch, num_steps, learning_rate):
    optimizer = optax.adam(learning_rate)
    has_reference = inspect.signature(loss).parameters["ref_logps"].annotation is not None
    ref_logps = policy.logps(start, batch) if has_reference else None

    def objective(params):
        return step.apply(loss, method, batch, step.outputs_of(method, policy, params, batch), ref_logps)[0].value()

    def update(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(objective)(params), state)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.lax.scan(update, (start, optimizer.init(start)), length=num_steps)[1]


def pairs(first: np.ndarray, second: np.ndarray, prefers_first: np.ndarray) -> Batch:
    """Sequences [n, T] twice and who won [n], as a batch."""
    both = np.stack([first, second], axis=1)
    return Batch.of(completion_tokens=np.where(prefers_first[:, None, None], both, both[:, ::-1]).astype(np.int32))


def unpaired(batch: Batch) -> Batch:
    """KTO's rows of a batch of pairs: each completion with its label, then the next row's."""
    tokens = np.concatenate([batch.completion_tokens[:, 0], batch.completion_tokens[:, 1]])
    labels = np.repeat([True, False], len(batch.completion_tokens))
    order = np.random.default_rng(0).permutation(len(tokens))
    tokens, labels = tokens[order], labels[order]
    both = np.stack([tokens, np.roll(tokens, -1, axis=0)], axis=1)
    return Batch.of(completion_tokens=both, labels=np.repeat(labels[:, None], 2, axis=1))
