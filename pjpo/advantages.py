"""Rewards to advantages: group-relative, leave-one-out, GAE and REINFORCE++, as pure functions of a whole rollout.

Call them on all prompts of a rollout before it is cut into minibatches: a mean over a part is another baseline.
Masks say what exists; numbers under a false mask are never read.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from pjpo.logps import widened

Std = Literal["group", "batch", "none"]
STDS = ("group", "batch", "none")


def group_relative(
    rewards: Float[Array, "*rows N"],
    mask: Bool[Array, "*rows N"] | None = None,
    *,
    std: Std = "group",
    ddof: int = 1,
    eps: float | int = 1e-4,
) -> Float[Array, "*rows N"]:
    """Each reward less the mean of its prompt's, over a standard deviation. Shao et al. 2024, arXiv:2402.03300, 4.1.2.

    A prompt whose rewards are all equal has advantages of exactly zero.

    Args:
        rewards: of whole completions.
        mask: which completions have a reward; all, if left out.
        std: of the prompt's rewards; of all rewards; or none (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783).
        ddof: what is taken off the count in the standard deviation.
        eps: added to the standard deviation.

    Raises:
        ValueError: one completion for each prompt, which is its own mean; an unknown `std`.
    """
    if std not in STDS:
        raise ValueError(f"group_relative: std must be one of {', '.join(STDS)}, got {std!r}")
    rewards, mask = widened(rewards), _mask_of(rewards, mask)
    axis = None if std == "batch" else -1
    rewards, unit = _in_units(rewards, mask, axis)
    centred = _centred(rewards, mask, "group_relative")
    if std == "none":
        return centred * unit
    scale = jnp.sqrt(_variance(rewards, mask, axis, ddof)) + eps / unit
    return centred / jnp.where(scale > 0, scale, 1)


def leave_one_out(
    rewards: Float[Array, "*rows N"], mask: Bool[Array, "*rows N"] | None = None
) -> Float[Array, "*rows N"]:
    """Each reward less the mean of its prompt's others. RLOO, Ahmadian et al. 2024, arXiv:2402.14740, Eq. 7.

    Raises:
        ValueError: one completion for each prompt, which has no others.
    """
    mask = _mask_of(rewards, mask)
    rewards, unit = _in_units(widened(rewards), mask, axis=-1)
    count = mask.sum(-1, keepdims=True).astype(rewards.dtype)
    return _centred(rewards, mask, "leave_one_out") * count / jnp.maximum(count - 1, 1) * unit


def gae(
    rewards: Float[Array, "*rows T"],
    values: Float[Array, "*rows T"],
    mask: Bool[Array, "*rows T"],
    gamma: float | int = 1.0,
    lam: float | int = 0.95,
) -> tuple[Float[Array, "*rows T"], Float[Array, "*rows T"]]:
    """Generalised advantage estimation. Schulman et al. 2015, arXiv:1506.02438, Eq. 16; the value after the end is 0.

    Args:
        rewards: of each token.
        values: expected sum of rewards before each token.
        mask: which tokens are the policy's; the others are stepped over, in the middle of a row too.
        gamma: discount of a token.
        lam: 0 trusts the values, 1 the rewards.

    Returns:
        (advantages, returns), where returns are advantages plus values; 0 where `mask` is false.
    """

    def back(after, token):
        (next_value, next_advantage), (reward, value, own) = after, token
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        here = jnp.where(own, value, next_value), jnp.where(own, advantage, next_advantage)
        return here, advantage

    gamma, lam = float(gamma), float(lam)  # a number of NumPy would widen what it meets
    rewards, values, mask = widened(rewards), widened(values), _mask_of(rewards, mask)
    dtype = jnp.promote_types(rewards.dtype, values.dtype)
    tokens_first = [jnp.moveaxis(x, -1, 0) for x in (rewards.astype(dtype), values.astype(dtype), mask)]
    end = jnp.zeros(values.shape[:-1], dtype)
    _, advantages = jax.lax.scan(back, (end, end), tuple(tokens_first), reverse=True)
    advantages = jnp.moveaxis(advantages, 0, -1)
    return jnp.where(mask, advantages, 0), jnp.where(mask, advantages + values, 0)


def reinforce_pp(
    rewards: Float[Array, "*rows T"], mask: Bool[Array, "*rows T"], gamma: float | int = 1.0
) -> tuple[Float[Array, "*rows T"], Float[Array, "*rows T"]]:
    """REINFORCE++, Hu 2025, arXiv:2501.03262: the sum of each token's own and later rewards, whitened.

    Returns:
        (advantages, returns); 0 where `mask` is false.
    """
    rewards = widened(rewards)
    returns, _ = gae(rewards, jnp.zeros_like(rewards), mask, gamma=gamma, lam=1.0)
    return whiten(returns, mask), returns


def reinforce_pp_baseline(
    rewards: Float[Array, "B N"], mask: Bool[Array, "B N T"], scored: Bool[Array, "B N"] | None = None
) -> Float[Array, "B N T"]:
    """REINFORCE++ with a baseline: reward less its prompt's mean, at each token, whitened over all tokens.

    Args:
        rewards: of whole completions.
        mask: tokens that count.
        scored: completions that are in the mean; those with a token that counts, if left out.

    Raises:
        ValueError: one completion for each prompt.
    """
    mask = jnp.asarray(mask, bool)
    scored = mask.any(-1) if scored is None else jnp.asarray(scored, bool)
    rewards, unit = _in_units(widened(rewards), scored)
    centred = _centred(rewards, scored, "reinforce_pp_baseline") * unit
    return whiten(jnp.broadcast_to(centred[..., None], mask.shape), mask)


def whiten(
    values: Float[Array, "*shape"], mask: Bool[Array, "*shape"], *, eps: float | int = 1e-8
) -> Float[Array, "*shape"]:
    """Less the mean, over the standard deviation (n - 1; `eps` is added to the variance); 0 where `mask` is false."""
    mask = _mask_of(values, mask)
    values, unit = _in_units(widened(values), mask)
    scaled = (values - _mean(values, mask)) / jnp.sqrt(_variance(values, mask) + eps / unit / unit)
    return jnp.where(mask, scaled, 0)


def at_last(scores: Float[Array, "*rows"], mask: Bool[Array, "*rows T"]) -> Float[Array, "*rows T"]:
    """The score of a completion as a reward of its last token; 0 elsewhere."""
    return jnp.where(last(mask), widened(scores)[..., None], 0)


def last(mask: Bool[Array, "*rows T"]) -> Bool[Array, "*rows T"]:
    """True at the last token of each row where `mask` is true."""
    mask = jnp.asarray(mask, bool)
    return mask & (jnp.cumsum(mask[..., ::-1], axis=-1)[..., ::-1] == 1)


def mixed(rewards: Float[Array, "*rows N"], mask: Bool[Array, "*rows N"]) -> Bool[Array, "*rows"]:
    """Prompts whose rewards differ; the others teach a group-relative method nothing."""
    largest = jnp.where(mask, rewards, -jnp.inf).max(-1)
    return largest > jnp.where(mask, rewards, jnp.inf).min(-1)


def _centred(rewards: Array, mask: Array, name: str) -> Array:
    if rewards.shape[-1] < 2:
        raise ValueError(
            f"{name}: a baseline of a prompt's own completions needs 2 of them or more, got {rewards.shape[-1]}; "
            "sample more of each prompt, or use reinforce_pp, whose baseline is the batch"
        )
    # The mean of equal numbers can differ from them by rounding, which a small deviation would blow up.
    return jnp.where(mask & mixed(rewards, mask)[..., None], rewards - _mean(rewards, mask, axis=-1), 0)


def _in_units(values: Array, mask: Array, axis: int | None = None) -> tuple[Array, Array]:
    """Values in a unit in which no sum or square of them is too large for float32; 1 unless some are beyond 1e9."""
    largest = jnp.where(mask, jnp.abs(values), 0).max(axis, keepdims=True, initial=0)
    unit = jnp.maximum(largest / 1e9, 1)
    return values / unit, unit


def _mask_of(values: ArrayLike, mask: ArrayLike | None) -> Array:
    return jnp.ones(np.shape(values), bool) if mask is None else jnp.asarray(mask, bool)


def _mean(values: Array, mask: Array, axis: int | None = None) -> Array:
    count = jnp.maximum(mask.sum(axis, keepdims=True), 1).astype(values.dtype)
    return jnp.where(mask, values, 0).sum(axis, keepdims=True) / count


def _variance(values: Array, mask: Array, axis: int | None = None, ddof: int = 1) -> Array:
    count = jnp.maximum(mask.sum(axis, keepdims=True) - ddof, 1).astype(values.dtype)
    return jnp.where(mask, jnp.square(values - _mean(values, mask, axis)), 0).sum(axis, keepdims=True) / count
