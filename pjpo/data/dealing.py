"""Rows to groups whose token counts agree, so that one static shape holds every group and is nearly full."""

import numpy as np
from jaxtyping import Float, Int

NUM_ROUNDS = 30  # after which groups of eight of HH's rows agree to about one part in a hundred
NUM_ROUNDS_OF_TWO = 8  # the same where there are two groups
NUM_TRIED = 8  # rows of each group that a round considers for a swap


def deal(
    tokens: Float[np.ndarray, "n 2"] | Int[np.ndarray, "n 2"],
    size: int,
    rng: np.random.Generator,
    num_rounds: int = NUM_ROUNDS,
):
    """Cut rows into groups of `size` neighbours, then swap rows between groups until their sums of tokens agree.

    Each round pairs groups that are heavy in a random direction with light ones, and each pair swaps the two rows that
    bring its sums closest. So groups stay random but for what has to be evened out.

    Args:
        tokens: of each row, in each of two kinds; n is a multiple of `size`.
        size: rows in a group.
        rng: chooses directions and candidates.
        num_rounds: of swaps.

    Returns:
        Row numbers [n/size, size]; every row once.
    """
    groups = np.arange(len(tokens)).reshape(-1, size)
    weights = tokens / np.maximum(tokens.mean(0), 1)  # the two kinds count alike
    half = len(groups) // 2
    pairs = np.arange(half)
    for _ in range(num_rounds if half else 0):
        sums = weights[groups].sum(1)  # [groups, 2]
        angle = rng.uniform(0, np.pi)
        ranked = np.argsort(sums @ [np.cos(angle), np.sin(angle)], kind="stable")
        light, heavy = ranked[:half], ranked[::-1][:half]
        i, j = (rng.permutation(size)[:NUM_TRIED] for _ in range(2))
        gap = sums[heavy] - sums[light]  # [pairs, 2]
        moved = weights[groups[heavy][:, i]][:, :, None] - weights[groups[light][:, j]][:, None, :]
        left = ((gap[:, None, None] - 2 * moved) ** 2).sum(-1).reshape(half, -1)  # squared gap after each swap
        best = left.argmin(1)
        helps = left[pairs, best] < (gap**2).sum(-1)
        heavy, light, best = heavy[helps], light[helps], best[helps]
        i, j = i[best // len(j)], j[best % len(j)]
        groups[heavy, i], groups[light, j] = groups[light, j], groups[heavy, i]
    return groups


def halve(tokens: Int[np.ndarray, "n 2"], rng: np.random.Generator) -> np.ndarray:
    """An order of rows of which both halves have about the same tokens, and so have their halves, and so on.

    So it suits any number of groups that is a power of two, and does not depend on it.
    """
    number = len(tokens)
    if number % 2 or number < 4:
        return np.arange(number)
    halves = deal(tokens, number // 2, rng, NUM_ROUNDS_OF_TWO)
    return np.concatenate([half[halve(tokens[half], rng)] for half in halves])
