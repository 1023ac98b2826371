"""The objective of policy-gradient methods: importance ratios, clipping, and what a batch's loss is a mean of.

Every array is [B, N, T], with the advantage of a completion repeated over its tokens.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from pjpo.logps import mean_completion, sum_completion, widened
from pjpo.metrics import Largest, Mean, Smallest

Importance = Literal["token", "sequence", "sequence_token", "cispo"]
Aggregation = Literal["token", "sequence", "sequence_sum", "constant"]
IMPORTANCES = ("token", "sequence", "sequence_token", "cispo")
AGGREGATIONS = ("token", "sequence", "sequence_sum", "constant")
LARGEST = 20.0  # of a log-ratio, so that exp stays finite; far outside of every clip range


def per_token(advantages: Float[Array, "B N"] | Float[Array, "B N T"], mask: Bool[Array, "B N T"]) -> Array:
    """Advantages of completions or of tokens as those of tokens."""
    return advantages if advantages.ndim == 3 else jnp.broadcast_to(advantages[..., None], mask.shape)


def ratios(
    logps: Float[Array, "B N T"],
    old_logps: ArrayLike | None,
    mask: Bool[Array, "B N T"],
    importance: Importance = "token",
) -> Float[Array, "B N T"]:
    """How much likelier the policy makes a token than the one that sampled it: exp(logps - old_logps).

    Args:
        logps: of the policy.
        old_logps: of the policy that sampled; None is the policy itself, without gradient.
        mask: what counts.
        importance: "token" and "cispo": of the token. "sequence" (GSPO, Zheng et al. 2025, arXiv:2507.18071, Eq. 7):
            the geometric mean over the completion, at each token. "sequence_token" (its Eq. 14): the same value, with
            the gradient of the token's own.
    """
    logps = widened(logps)
    logratios = jnp.where(mask, logps - jax.lax.stop_gradient(logps if old_logps is None else old_logps), 0)
    if importance in ("sequence", "sequence_token"):
        own = jnp.where(mask, logps - jax.lax.stop_gradient(logps), 0)  # zero, with a gradient
        means = jnp.broadcast_to(mean_completion(logratios, mask)[..., None], mask.shape)
        logratios = means if importance == "sequence" else jax.lax.stop_gradient(means) + own
    return jnp.exp(jnp.minimum(logratios, LARGEST))


def clipped(
    ratios: Float[Array, "B N T"],
    advantages: Float[Array, "B N T"],
    epsilon_low: float | int,
    epsilon_high: float | int,
    dual_clip: float | int | None = None,
) -> Float[Array, "B N T"]:
    """PPO's loss of each token, Schulman et al. 2017, arXiv:1707.06347, Eq. 7.

    Args:
        ratios: from `ratios`.
        advantages: constants.
        epsilon_low, epsilon_high: beyond 1 - epsilon_low and 1 + epsilon_high a ratio wins nothing more.
        dual_clip: the most that a ratio can weigh a negative advantage by (Ye et al. 2020, arXiv:1912.09729, Eq. 6).
    """
    within = jnp.clip(ratios, 1 - epsilon_low, 1 + epsilon_high)
    losses = jnp.maximum(-advantages * ratios, -advantages * within)
    if dual_clip is None:
        return losses
    return jnp.where(advantages < 0, jnp.minimum(losses, -dual_clip * advantages), losses)


def cispo(
    logps: Float[Array, "B N T"],
    ratios: Float[Array, "B N T"],
    advantages: Float[Array, "B N T"],
    epsilon_low: float | int,
    epsilon_high: float | int,
) -> Float[Array, "B N T"]:
    """CISPO's loss of each token: the clipped ratio is a weight, so no token loses its gradient.

    MiniMax 2025, arXiv:2506.13585, Eq. 4.
    """
    return -jax.lax.stop_gradient(jnp.clip(ratios, 1 - epsilon_low, 1 + epsilon_high)) * advantages * logps


def aggregate(
    losses: Float[Array, "B N T"],
    mask: Bool[Array, "B N T"],
    how: Aggregation,
    max_completion_tokens: int | None = None,
    exists: Bool[Array, "B N"] | None = None,
) -> Mean:
    """The loss of a batch as a sum and what to divide it by, which add up over any cut of the batch.

    Args:
        losses: of each token.
        mask: what counts; a completion with nothing is not counted, but by "constant".
        how: "token" (DAPO): the mean over all tokens. "sequence" (GRPO): the mean over completions of the mean over
            their tokens. "sequence_sum": of the sum over their tokens. "constant" (Dr. GRPO): the sum over all tokens
            by `max_completion_tokens` times the number of completions, those of which nothing counts included.
        max_completion_tokens: a constant, such as the longest completion that can be sampled.
        exists: which completions are none of a batch's empty rows, for "constant"; all, if left out.
    """
    if how == "token":
        return Mean.of(losses, mask)
    sequences = mask.any(-1)
    if how == "sequence":
        return Mean.of(mean_completion(losses, mask), sequences)
    total = Mean.of(sum_completion(losses, mask), sequences)
    if how == "sequence_sum":
        return total
    assert max_completion_tokens, "the config refuses 'constant' without it"
    number = jnp.ones(sequences.shape, bool) if exists is None else exists
    return Mean(total.sum, number.sum().astype(losses.dtype) * max_completion_tokens)


def clip_metrics(
    ratios: Float[Array, "B N T"],
    advantages: Float[Array, "B N T"],
    mask: Bool[Array, "B N T"],
    epsilon_low: float | int,
    epsilon_high: float | int,
    importance: Importance = "token",
    dual_clip: float | int | None = None,
) -> dict[str, Mean]:
    """TRL's shares of clipped ratios: of tokens, or of completions where a ratio is a completion's.

    And, under no name of TRL's, the largest ratio, and the share that `dual_clip` bounds where there is one.
    """
    low, high = ratios < 1 - epsilon_low, ratios > 1 + epsilon_high
    lost, won = low & (advantages < 0), high & (advantages > 0)
    if importance != "cispo":  # which clips a ratio whatever it multiplies
        low, high = lost, won
    shares = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low | high}
    if importance == "cispo":
        shares["cispo_clip_ratio"] = won
    if dual_clip is not None:
        shares["clip_ratio/dual_mean"] = (ratios > dual_clip) & (advantages < 0)
    how = "sequence" if importance.startswith("sequence") else "token"
    found = {name: aggregate(share.astype(ratios.dtype), mask, how) for name, share in shares.items()}
    of_completions = [mean_completion(share.astype(ratios.dtype), mask) for share in (low, high)]
    return found | {
        "clip_ratio/low_min": Smallest.of(of_completions[0], mask.any(-1)),
        "clip_ratio/high_max": Largest.of(of_completions[1], mask.any(-1)),
        "ratios/max": Largest.of(ratios, mask),
    }
