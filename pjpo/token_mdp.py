"""Language models as optimal soft Q-functions of a token MDP. Rafailov et al. 2024, arXiv:2404.12358.

A state is the prompt with the tokens so far; a token is appended for certain, nothing is discounted, and after the last
token there is nothing to gain. Equations are the paper's, less its misprints: the policy of Eq. 5 is
exp((Q - V) / beta), and Eq. 13 adds V(s_0).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Array, Float

from pjpo.types import Batch

State = tuple[int, ...]  # the tokens so far
PerState = dict[State, Float[np.ndarray, " V"]]


@dataclasses.dataclass(frozen=True)
class Solution:
    """What backward recursion finds, by state."""

    q: PerState
    v: dict[State, float]
    policy: PerState  # probabilities of the next token
    advantages: PerState  # beta log(policy / reference) = r + V(next) - V


def solve(rewards: Mapping[State, np.ndarray], ref: Mapping[State, np.ndarray], beta: float | int) -> Solution:
    """The optimal soft Q-function of a tree of states (Eq. 5 to 7), and the advantages of Eq. 11.

    Args:
        rewards: of each next token in every state that is not the end, [V].
        ref: probabilities of each next token under the reference, [V].
        beta: pull to the reference.

    Raises:
        ValueError: a beta that is not positive, states that differ, one that is no tuple of the tokens so far, or a
            reference that rules a token out.
    """
    if not beta > 0:
        raise ValueError(f"token MDP: beta must be > 0, got {beta}")
    if rewards.keys() != ref.keys():
        raise ValueError(f"token MDP: rewards and reference differ in states {sorted(rewards.keys() ^ ref.keys())}")
    if wrong := [state for state in rewards if not isinstance(state, tuple)]:
        raise ValueError(f"token MDP: a state is the tuple of its tokens, () at the start, got {wrong[0]!r}")
    for state, probabilities in ref.items():
        if not np.all(np.asarray(probabilities) > 0):
            raise ValueError(
                f"token MDP: reference probabilities must be > 0, as they are divided by, got {list(probabilities)} in "
                f"state {state}; leave tokens that cannot be out of the vocabulary"
            )
    q, v, policy, advantages = {}, {}, {}, {}
    for state in sorted(rewards, key=len, reverse=True):
        log_ref = np.log(ref[state])
        after = np.array([v.get((*state, token), 0.0) for token in range(len(log_ref))])
        q[state] = np.asarray(rewards[state], np.float64) + beta * log_ref + after  # Eq. 7
        v[state] = float(beta * np.logaddexp.reduce(q[state] / beta))  # Eq. 6
        policy[state] = np.exp((q[state] - v[state]) / beta)  # Eq. 5
        advantages[state] = beta * (np.log(policy[state]) - log_ref)
    return Solution(q, v, policy, advantages)


def beam_search(
    logps: Callable[[State], np.ndarray], num_tokens: int, num_beams: int, end: int | None = None
) -> tuple[State, float]:
    """The likeliest sequence that a beam finds, with its log-prob: Eq. 13 makes this a search for return.

    Log-probs are summed and not divided by length, which the theory does not allow.

    Args:
        logps: log-probs of the next token after these, [V].
        num_tokens: the most a sequence may hold.
        num_beams: how many are kept.
        end: a token that ends a sequence.
    """
    if num_beams < 1 or num_tokens < 1:
        raise ValueError(f"beam search: num_beams and num_tokens must be >= 1, got {num_beams} and {num_tokens}")
    beams: list[tuple[State, float]] = [((), 0.0)]
    for _ in range(num_tokens):
        grown = []
        for state, total in beams:
            if end is not None and state[-1:] == (end,):
                grown.append((state, total))
                continue
            grown += [((*state, token), total + float(logp)) for token, logp in enumerate(logps(state))]
        beams = sorted(grown, key=lambda beam: -beam[1])[:num_beams]
    return beams[0]


def next_logps(
    logps: Callable[[Batch], Array], *, vocab_size: int, num_tokens: int, prompt: Sequence[int] = ()
) -> Callable[[State], np.ndarray]:
    """What `beam_search` asks of a policy, from its log-probs of given completions.

    All continuations of a state are scored together, so it is for small vocabularies; one shape serves all states.

    Args:
        logps: of a batch, [1, V, T] nats; `functools.partial(policy.logps, params)`.
        vocab_size: V.
        num_tokens: T, the longest sequence.
        prompt: token ids that come first.
    """
    every = np.arange(vocab_size, dtype=np.int32)

    def after(state: State) -> np.ndarray:
        tokens = np.zeros((1, vocab_size, num_tokens), np.int32)
        tokens[0, :, : len(state)], tokens[0, :, len(state)] = state, every
        mask = np.broadcast_to(np.arange(num_tokens) <= len(state), tokens.shape)
        prompts = np.asarray(prompt, np.int32)[None]
        batch = Batch.of(prompt_tokens=prompts, completion_tokens=tokens, completion_mask=mask)
        return np.asarray(logps(batch))[0, :, len(state)]

    return after


def sequence_logp(policy: Mapping[State, np.ndarray], sequence: State) -> float:
    """Log-prob of a sequence."""
    return float(sum(np.log(policy[sequence[:t]][token]) for t, token in enumerate(sequence)))


def sequence_return(rewards: Mapping[State, np.ndarray], sequence: State) -> float:
    """Sum of its rewards."""
    return float(sum(rewards[sequence[:t]][token] for t, token in enumerate(sequence)))
