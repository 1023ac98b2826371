"""Statistical rejection sampling of completions, and the pairs made of them. Liu et al. 2023, arXiv:2309.06657.

The target is the sampling policy tilted by exp(reward / beta); section 3.2 and appendix A.1 describe the sampler,
section 5.2 the pairs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Accepted:
    indices: list[int]  # of the candidates, in the order in which they were accepted
    num_passes: int
    num_uniforms: int  # how many were drawn


def acceptance(rewards: Float[np.ndarray, " n"], beta: float | int) -> Float[np.ndarray, " n"]:
    """Probability that a pass over these candidates accepts each: exp((reward - best) / beta), its limit at 0."""
    gaps = np.asarray(rewards, np.float64) - np.max(rewards)
    return np.exp(gaps / beta) if beta > 0 else (gaps == 0).astype(np.float64)


def sample(
    rewards: Sequence[float | int], num_samples: int, beta: float | int, uniform: Callable[[], float]
) -> Accepted:
    """Draw without replacement: passes over the candidates that remain, in list order, until enough are accepted.

    The best reward that remains is found once in each pass, so a pass accepts one candidate at least. The early stop
    favours the front of the list: shuffle the candidates (as `select` does), unless the order carries no meaning.
    Candidates are told apart by their place: equal texts are separate draws.

    Args:
        rewards: of each candidate.
        num_samples: how many to accept.
        beta: 0 takes the best ones, infinity the first ones.
        uniform: the next number from [0, 1); one is used for each candidate that is looked at.

    Raises:
        ValueError: fewer candidates than asked for, a negative beta, or a reward that is no number.
    """
    if not beta >= 0:
        raise ValueError(f"rejection sampling: beta must be >= 0, got {beta}")
    if not 0 < num_samples <= len(rewards):
        raise ValueError(
            f"rejection sampling: num_samples must be within the pool, 1 to {len(rewards)}, got {num_samples}; sample "
            "more candidates, or keep fewer"
        )
    if not all(math.isfinite(reward) for reward in rewards):
        raise ValueError(f"rejection sampling: rewards must be finite, got {list(rewards)}")
    remaining, accepted, num_passes, num_uniforms = list(range(len(rewards))), [], 0, 0
    while len(accepted) < num_samples:
        num_passes += 1
        probabilities = acceptance(np.array([rewards[i] for i in remaining]), beta)
        kept = []
        for index, probability in zip(remaining, probabilities, strict=True):
            if len(accepted) == num_samples:
                break
            num_uniforms += 1
            (accepted if uniform() < probability else kept).append(index)
        remaining = kept
    return Accepted(accepted, num_passes, num_uniforms)


def select(
    rewards: Float[np.ndarray, "B N"] | Sequence[Sequence[float | int]],
    num_samples: int,
    beta: float | int,
    seed: int,
) -> np.ndarray:
    """The sampler on a pool of completions for each of B prompts, candidates shuffled: indices [B, num_samples].

    Pools may differ in size where they are lists.
    """
    chosen = []
    for row, row_rewards in enumerate(rewards):
        rng = np.random.default_rng((seed, row))
        order = rng.permutation(len(row_rewards))
        found = sample([float(row_rewards[i]) for i in order], num_samples, beta, rng.random)
        chosen.append(order[found.indices])
    return np.array(chosen)


def first_round(rewards: Sequence[float | int]) -> list[tuple[int, int]]:
    """Neighbours in the list meet: (winner, loser) of each pair; of an odd number the last is left out.

    The first of two equal rewards wins; where ties carry no preference, drop pairs whose rewards agree.

    Raises:
        ValueError: a reward is nan, which loses and wins no game.
    """
    _check_comparable(rewards)
    return _play(range(len(rewards)), rewards)


def tournament(rewards: Sequence[float | int]) -> list[tuple[int, int]]:
    """Winners meet until one is left: n - 1 pairs, round by round. Of an odd number the last goes on unopposed.

    Raises:
        ValueError: a reward is nan.
    """
    _check_comparable(rewards)
    pairs, players = [], list(range(len(rewards)))
    while len(players) > 1:
        games = _play(players, rewards)
        pairs += games
        players = [winner for winner, _ in games] + players[len(games) * 2 :]
    return pairs


def rho(scores: Float[np.ndarray, "*B N"]) -> Float[np.ndarray, "*B N N"]:
    """The pairwise ranking model that a pointwise one makes: the probability [i, j] that completion i beats j.

    Args:
        scores: of a Bradley-Terry reward model, nats, for N completions of a prompt; such as `RewardModel.scores`.
    """
    margins = scores[..., :, None] - scores[..., None, :]
    return np.exp(-np.logaddexp(0, -margins))


def num_identical(tokens: Int[np.ndarray, "B N T"], mask: Bool[np.ndarray, "B N T"]) -> int:
    """How many candidates of the pools repeat an earlier one of their prompt; the sampler takes them as they are."""
    pools = [[tuple(row[kept]) for row, kept in zip(*pool, strict=True)] for pool in zip(tokens, mask, strict=True)]
    return sum(len(pool) - len(set(pool)) for pool in pools)


def rank_to_reward(first: Float[np.ndarray, " n"], second: Float[np.ndarray, " n"] | None = None) -> np.ndarray:
    """Pointwise rewards from a pairwise ranking model, relative to a baseline completion; nats.

    Of `rho` against baseline b these are scores less the baseline's: rank_to_reward(p[:, b], p[b]).

    Args:
        first: probability that the completion, shown first, beats the baseline.
        second: probability that the baseline, shown first, beats the completion; given, both orders are averaged, which
            the paper does not do.

    Raises:
        ValueError: probabilities outside [0, 1].
    """
    for values in (first, second):
        if values is not None and not np.all((np.asarray(values) >= 0) & (np.asarray(values) <= 1)):
            raise ValueError(f"a ranking model gives probabilities within [0, 1], got {values}")
    p = np.asarray(first) if second is None else (np.asarray(first) + 1 - np.asarray(second)) / 2
    with np.errstate(divide="ignore"):  # certainty is an infinite reward
        return np.log(p) - np.log1p(-p)


def _check_comparable(rewards: Sequence[float | int]) -> None:
    if unknown := [place for place, reward in enumerate(rewards) if math.isnan(reward)]:
        raise ValueError(f"ranking: the reward at place {unknown[0]} is nan; leave out completions without a reward")


def _play(players: Sequence[int], rewards: Sequence[float | int]) -> list[tuple[int, int]]:
    games = zip(players[::2], players[1::2], strict=False)
    return [(a, b) if rewards[a] >= rewards[b] else (b, a) for a, b in games]
