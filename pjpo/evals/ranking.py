"""How likelihoods rank completions, and how they could. Chen et al. 2024, arXiv:2405.19534.

Sums of log-probs [n, 2], (chosen, rejected), in nats; lengths in tokens. Not to be confused with reward accuracy, which
compares log-ratios and counts a tie as a failure.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from pjpo.types import CHOSEN, REJECTED

BETAS = (0.01, 0.1, 1.0, 5.0, 10.0)  # over which the paper takes the median of the idealised accuracy
CERTAIN = 0.001  # 1 - alpha where all raters agree
ALIKE = 0.01  # likelihoods that differ by less are a tie, Definition C.1


def ranked(logps: Float[np.ndarray, "n 2"], lengths: Int[np.ndarray, "n 2"] | None = None) -> Bool[np.ndarray, " n"]:
    """Whether chosen is at least as likely as rejected, by sums, or with `lengths` by means (Definition 2.3)."""
    values = logps if lengths is None else logps / np.maximum(lengths, 1)
    return values[:, CHOSEN] >= values[:, REJECTED]


def accuracy(logps: Float[np.ndarray, "n 2"], lengths: Int[np.ndarray, "n 2"] | None = None) -> float:
    """Share of pairs that are `ranked` rightly."""
    return float(np.mean(ranked(logps, lengths)))


def accuracy_with_ties(logps: Float[np.ndarray, "n 2"], alpha: Float[np.ndarray, " n"]) -> float:
    """The same where raters may be split evenly, alpha = 1/2: right if likelihoods are alike there (Definition C.1)."""
    alike = np.abs(np.exp(logps[:, CHOSEN]) - np.exp(logps[:, REJECTED])) < ALIKE
    return float(np.mean(np.where(np.asarray(alpha) == 0.5, alike, ranked(logps))))


def order_accuracy(logps: Float[np.ndarray, "n k"]) -> float:
    """Share of rows of k completions, best first, whose whole order matches (Definition A.8)."""
    return float(np.mean(np.all(np.diff(logps, axis=1) <= 0, axis=1)))


def idealised_margins(
    ref_logps: Float[np.ndarray, "n 2"],
    alpha: Float[np.ndarray, " n"],
    beta: float | int,
    lengths: Int[np.ndarray, "n 2"] | None = None,
) -> Float[np.ndarray, " n"]:
    """log pi*(chosen) - log pi*(rejected) of the optimum of the DPO objective (Theorem 3.1), in logs throughout.

    Args:
        ref_logps: of the reference.
        alpha: share of raters that prefer chosen.
        beta: pull to the reference.
        lengths: given, the reference's log-probs are means over tokens.

    Raises:
        ValueError: shares outside [0, 1], or a beta that is not positive.
    """
    alpha = np.asarray(alpha, np.float64)
    if not beta > 0:
        raise ValueError(f"ranking: beta must be > 0, got {beta}")
    if not np.all((alpha >= 0) & (alpha <= 1)):
        raise ValueError(f"ranking: alpha is a share of raters, within [0, 1]; got {alpha}")
    alpha = np.where(alpha == 1, 1 - CERTAIN, np.where(alpha == 0, CERTAIN, alpha))
    values = ref_logps if lengths is None else ref_logps / np.maximum(lengths, 1)
    return values[:, CHOSEN] - values[:, REJECTED] + np.log(alpha / (1 - alpha)) / beta


def idealised_accuracy(ref_logps, alpha, beta: float | int, lengths=None) -> float:
    """Ranking accuracy of that optimum (Corollary 3.3); a tie is no success here."""
    return float(np.mean(idealised_margins(ref_logps, alpha, beta, lengths) > 0))


def idealised_range(ref_logps, alpha, lengths=None) -> dict[str, float]:
    """Minimum, median and maximum of the idealised accuracy over `BETAS`."""
    values = [idealised_accuracy(ref_logps, alpha, beta, lengths) for beta in BETAS]
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)}


def alignment_gap(logps, ref_logps, alpha, lengths=None) -> float:
    """Median idealised accuracy less the observed one."""
    return idealised_range(ref_logps, alpha, lengths)["median"] - accuracy(logps, lengths)


def difficulty(ref_logps: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, " n"]:
    """c = log ref(rejected) - log ref(chosen): by how many nats the reference ranks a pair wrongly."""
    return ref_logps[:, REJECTED] - ref_logps[:, CHOSEN]


def loss_threshold(ref_logps: Float[np.ndarray, "n 2"], beta: float | int) -> Float[np.ndarray, " n"]:
    """The DPO loss at or below which a pair is ranked rightly (Theorem 4.1): -log sigmoid(beta c)."""
    return np.logaddexp(0, -beta * difficulty(ref_logps))


def threshold_violations(
    logps: Float[np.ndarray, "n 2"],
    ref_logps: Float[np.ndarray, "n 2"],
    beta: float | int,
    within: Float[np.ndarray, " n"] | float = 0.0,
) -> int:
    """How many pairs contradict Theorem 4.1: ranked rightly with a DPO loss above `loss_threshold`, or wrongly below.

    Args:
        logps, ref_logps: of the policy and of the reference.
        beta: of the loss. Where it would make losses too small for float64 a smaller one is taken, for which the
            theorem holds as well.
        within: nats; pairs whose log-probs differ by no more are not looked at, as rounding ranks them.
    """
    ratios = np.asarray(logps - ref_logps, np.float64)
    margins = ratios[:, CHOSEN] - ratios[:, REJECTED]
    largest = np.abs([margins, difficulty(ref_logps)]).max(initial=0)
    beta = beta / max(1, beta * largest / 500)  # exp(-500) is still a number
    below = np.logaddexp(0, -beta * margins) <= loss_threshold(np.asarray(ref_logps, np.float64), beta)
    decided = np.abs(logps[:, CHOSEN] - logps[:, REJECTED]) > within
    return int(np.sum((below != ranked(logps)) & decided))


def reward_accuracy(logps: Float[np.ndarray, "n 2"], ref_logps: Float[np.ndarray, "n 2"]) -> float:
    """Share of pairs whose implicit reward is higher for chosen; a tie is no success."""
    ratios = logps - ref_logps
    return float(np.mean(ratios[:, CHOSEN] > ratios[:, REJECTED]))


def flipped(logps: Float[np.ndarray, "n 2"], ref_logps: Float[np.ndarray, "n 2"]) -> float:
    """Share of the pairs that the reference ranks wrongly which the policy ranks rightly; 0 where there are none."""
    wrong = ~ranked(ref_logps)
    return float(np.mean(ranked(logps)[wrong])) if wrong.any() else 0.0
