"""Best of n: what is expected of the best of n samples, from N >= n of them that are scored. Exact over all subsets."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float


def weights(num_samples: int, n: int) -> Float[np.ndarray, " N"]:
    """How often each of N samples, the worst first, is the best of a subset of n: C(i, n - 1) / C(N, n).

    Raises:
        ValueError: n is not in 1 to N.
    """
    if not 1 <= n <= num_samples:
        raise ValueError(f"best of n: n must be in 1 to the {num_samples} samples that there are, got {n}")
    total = math.comb(num_samples, n)  # of whole numbers, which may be larger than NumPy's
    return np.array([math.comb(i, n - 1) / total for i in range(num_samples)])


def expected_best(rewards: Float[np.ndarray, "*rows N"], n: int) -> Float[np.ndarray, "*rows"]:
    """The expected reward of the best of n; unbiased."""
    return np.asarray(np.sort(rewards, axis=-1) @ weights(np.shape(rewards)[-1], n))


def distribution(
    probabilities: Float[np.ndarray, " K"], rewards: Float[np.ndarray, " K"], n: int
) -> Float[np.ndarray, " K"]:
    """The best of n fresh samples as a policy of its own, over all K completions: F(R)^n - F(R-)^n of its reward R.

    Completions of equal reward share theirs as they do under the policy.
    """
    at_most = (rewards[None] <= rewards[:, None]) @ probabilities
    equal = (rewards[None] == rewards[:, None]) @ probabilities
    share = np.divide(probabilities, equal, out=np.zeros_like(equal), where=equal > 0)
    return (at_most**n - (at_most - equal) ** n) * share


def kl_bound(n: int) -> float:
    """KL(best of n || the policy sampled from), nats, from above. Beirami et al. 2024, arXiv:2401.01879."""
    return math.log(n) - (n - 1) / n
