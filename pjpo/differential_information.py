"""Preferences as information that turns a reference into a target. Won et al. 2025, arXiv:2505.23761.

Distributions over a finite set of K responses. Chosen responses are drawn from the reference, rejected ones from
`rejected_distribution`; labels are fixed by that origin. Then DPO's population minimiser is the target, and no other
form of the reward has it as its minimiser. The distribution that carries the information is itself concentrated where
mass moves to what the reference likes (reinforcement), and spread where mass leaves the mode (smoothing).
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

Distribution = Float[np.ndarray, " K"]


def information(policy: Distribution, ref: Distribution) -> Distribution:
    """The differential information distribution: (policy / reference), normalised."""
    return _normalised(np.log(policy) - np.log(ref))


def rejected_distribution(ref: Distribution, target: Distribution, beta: float | int) -> Distribution:
    """Where rejected responses must come from for DPO at `beta` to lead to `target`: ref (ref / target)^beta.

    Raises:
        ValueError: a beta that is not positive, or a response without probability.
    """
    _check(beta, ref=ref, target=target)
    return _normalised(np.log(ref) + beta * (np.log(ref) - np.log(target)))


def target_distribution(ref: Distribution, rejected: Distribution, beta: float | int) -> Distribution:
    """The inverse: what DPO at `beta` leads to when rejected responses come from `rejected`.

    Raises:
        ValueError: a beta that is not positive, or a response without probability.
    """
    _check(beta, ref=ref, rejected=rejected)
    return _normalised(np.log(ref) + (np.log(ref) - np.log(rejected)) / beta)


def preference(chosen: Distribution, rejected: Distribution) -> Float[np.ndarray, "K K"]:
    """p(i over j): the probability, by Bayes' rule, that of two responses i is the one drawn from `chosen`."""
    scores = np.log(chosen) - np.log(rejected)
    return 1 / (1 + np.exp(scores[None] - scores[:, None]))


def entropy(p: Distribution) -> float:
    """Nats."""
    kept = p[p > 0]
    return float(-(kept * np.log(kept)).sum())


def kl(p: Distribution, q: Distribution) -> float:
    """KL(p, q), nats."""
    kept = p > 0
    return float((p[kept] * (np.log(p[kept]) - np.log(q[kept]))).sum())


def jensen_shannon(p: Distribution, q: Distribution) -> float:
    """Jensen-Shannon divergence, nats; at most log 2."""
    middle = (p + q) / 2
    return (kl(p, middle) + kl(q, middle)) / 2


def estimate_entropy(
    log_policy: Float[np.ndarray, " n"], log_ref: Float[np.ndarray, " n"], log_proposal: Float[np.ndarray, " n"]
) -> tuple[float, float]:
    """Entropy of `information` from n responses that were drawn from a proposal, and its standard error.

    Self-normalised importance sampling: with w = policy / (reference x proposal) and f = log(policy / reference), the
    entropy is log Z - E_q[f], Z = E[w]. The error is by the delta method. Weights hold 1 / proposal, so where the
    reference is skewed both the estimate and its error rest on few samples: report them together.
    """
    ratios = log_policy - log_ref
    logs = ratios - log_proposal
    scale = logs.max()
    weights = np.exp(logs - scale)
    mean = weights.mean()
    expected = (weights * ratios).mean() / mean
    # d(log Z - E_q f): each sample moves log Z by w / Z and E_q f by w (f - E_q f) / Z.
    influence = weights / mean - 1 - weights * (ratios - expected) / mean
    return float(np.log(mean) + scale - expected), float(influence.std(ddof=1) / math.sqrt(len(ratios)))


def _check(beta: float | int, **distributions: Distribution) -> None:
    if not 0 < beta < math.inf:
        raise ValueError(f"differential information: beta must be > 0 and finite, got {beta}")
    for name, p in distributions.items():
        if not np.all(p > 0):
            raise ValueError(
                f"differential information: probabilities of {name} must be > 0, as they are divided by, got "
                f"{float(np.min(p))} at {int(np.argmin(p))}; leave out responses that nothing draws"
            )


def _normalised(logs: Distribution) -> Distribution:
    p = np.exp(logs - logs.max())
    return p / p.sum()
