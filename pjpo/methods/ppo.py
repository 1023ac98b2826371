"""Proximal Policy Optimization (PPO) with a critic. Schulman et al. 2017, arXiv:1707.06347, Eq. 7, on language.

As Ziegler et al. 2019, arXiv:1909.08593, have it: the pull to the reference is a reward of each token, and the value
loss is clipped too. Defaults are those of Ivison et al. 2024, arXiv:2406.09279, but that a completion which was cut off
keeps its score, where they give it -10: `missing_end_score`, or `truncated="replace"` of the rollouts. Departures:
advantages are whitened once, over the whole rollout; a log-ratio beyond 20 nats counts as 20.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from pjpo import checks, surrogate
from pjpo.advantages import at_last, gae, whiten
from pjpo.kl import k1, k3
from pjpo.logps import sum_completion, widened
from pjpo.metrics import Mean
from pjpo.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    epsilon_low: float = 0.2  # a ratio below 1 - this loses no more
    epsilon_high: float = 0.2  # a ratio above 1 + this wins no more
    value_clip: float = 0.2  # how far a value may move from the rollout's and still win; > 0
    value_weight: float = 0.1  # of the value loss beside the policy's; >= 0
    aggregation: Literal["token", "sequence", "sequence_sum"] = "token"  # what both are a mean of
    gamma: float = 1.0  # discount of a token, in [0, 1]
    lam: float = 0.95  # of GAE, in [0, 1]: 0 trusts the critic, 1 the rewards
    beta: float = 0.05  # pull towards the reference, in the rewards; where it adapts, what it starts from
    kl_target: float | None = None  # nats a completion that beta adapts to hold; None keeps beta as it is
    kl_horizon: int = 10_000  # completions over which it adapts
    missing_end_score: float | None = None  # instead of the score of a completion that was cut off; -10 in the paper
    # "recompute" takes ratios and values of the policy as it is, as the released code did: nothing is ever clipped.
    old_logps: Literal["rollout", "recompute"] = "rollout"
    outputs: ClassVar = ("logps", "values")  # what the loss reads of the policy; see `pjpo.step`

    def __post_init__(self):
        checks.not_negative(self, "epsilon_low", "epsilon_high", "value_weight", "beta")
        checks.positive(self, "value_clip")
        checks.one_of(self, "aggregation", ("token", "sequence", "sequence_sum"))
        checks.one_of(self, "old_logps", ("rollout", "recompute"))
        checks.between(self, 0, 1, "gamma", "lam")
        checks.at_least(self, 1, "kl_horizon")
        if self.kl_target is not None:
            checks.positive(self, "kl_target", "beta")  # which starts from no pull at all would stay there
        if self.missing_end_score is not None:
            checks.finite(self, "missing_end_score")

    @property
    def needs_reference(self) -> bool:
        """Whether a rollout needs `ref_logps`."""
        return self.beta > 0

    def advantages(self, batch: Batch, *, beta: ArrayLike | None = None, truncated: ArrayLike | None = None) -> Batch:
        """The rollout with whitened `advantages` and, as `labels`, returns, both [B, N, T]. Call it on all of it.

        Args:
            batch: a whole rollout with `rewards` [B, N], `old_logps`, `ref_logps` (if beta is not 0) and `values`.
            beta: the pull as it has adapted; the config's, if left out.
            truncated: which completions were cut off before they ended, [B, N]; for `missing_end_score`.

        Raises:
            ValueError: something of that is missing.
        """
        return estimated(self, batch, token_rewards(self, batch, scores(self, batch, truncated), beta))

    def rollout_metrics(
        self, batch: Batch, *, beta: ArrayLike | None = None, truncated: ArrayLike | None = None
    ) -> dict[str, Mean]:
        """The mean over completions of the sum of their tokens' rewards; arguments as `advantages` has them."""
        return {"returns/mean": mean_return(batch, token_rewards(self, batch, scores(self, batch, truncated), beta))}

    def adapted(self, beta: ArrayLike, kl: ArrayLike, num_completions: int) -> ArrayLike:
        """beta after a rollout of so many completions, a proportional controller. Ziegler et al. 2019, section 2.2.

        Args:
            beta: before it.
            kl: the rollout's, nats a completion: the mean over completions that count of the sum of k1.
            num_completions: of them.
        """
        if self.kl_target is None:
            return beta
        error = jnp.clip(kl / self.kl_target - 1, -0.2, 0.2)
        return beta * (1 + error * num_completions / self.kl_horizon)


def scores(config: Config, batch: Batch, truncated: ArrayLike | None) -> Float[Array, "B N"]:
    """The rollout's rewards, with what a completion that was cut off gets instead.

    Raises:
        ValueError: no rewards, or nothing says what was cut off.
    """
    if batch.rewards is None:
        raise ValueError(f"{_name(config)}: the rollout has no rewards; score its completions first")
    if config.missing_end_score is None:
        return widened(batch.rewards)
    if truncated is None:
        raise ValueError(f"{_name(config)}: missing_end_score asks which completions were cut off; pass truncated")
    return jnp.where(truncated, config.missing_end_score, widened(batch.rewards))


def token_rewards(
    config: Config, batch: Batch, scores: Float[Array, "B N"], beta: ArrayLike | None = None
) -> Float[Array, "B N T"]:
    """The score at each completion's last token, less beta times the log-ratio of each; 0 where nothing counts.

    Raises:
        ValueError: no log-probs of the rollout or of the reference, but a pull.
    """
    mask = jnp.asarray(batch.loss_mask)
    rewards = at_last(scores, mask)
    if not config.beta:
        return rewards
    if batch.old_logps is None or batch.ref_logps is None:
        raise ValueError(f"{_name(config)}: beta {config.beta} needs the rollout's old_logps and ref_logps")
    logratios = k1(jnp.asarray(batch.old_logps), jnp.asarray(batch.ref_logps))
    return rewards - jnp.where(mask, (config.beta if beta is None else beta) * logratios, 0)


def mean_return(batch: Batch, rewards: Float[Array, "B N T"]) -> Mean:
    """Over completions that count, of the sum of their tokens' rewards."""
    mask = jnp.asarray(batch.loss_mask)
    return Mean.of(sum_completion(rewards, mask), mask.any(-1))


def estimated(config: Config, batch: Batch, rewards: Float[Array, "B N T"]) -> Batch:
    """The rollout with advantages and returns of these token rewards.

    Raises:
        ValueError: no values.
    """
    if batch.values is None:
        raise ValueError(f"{_name(config)}: the rollout has no values; attach those of its critic")
    mask = jnp.asarray(batch.loss_mask)
    advantages, returns = gae(rewards, jnp.asarray(batch.values), mask, gamma=config.gamma, lam=config.lam)
    return dataclasses.replace(batch, advantages=whiten(advantages, mask), labels=returns)


def loss(
    config: Config,
    batch: Batch,
    logps: Float[Array, "B N T"],
    ref_logps: Float[Array, "B N T"] | None,
    values: Float[Array, "B N T"],
) -> tuple[Mean, dict[str, Mean]]:
    """Clipped policy gradient, and the critic's clipped squared error.

    Args:
        config: hyperparameters, static under jit.
        batch: of a rollout, with what `Config.advantages` added; `old_logps` and `values` are the rollout's, and where
            they are missing, the present ones without gradient.
        logps: policy log-probability of each completion token; nats, float32.
        ref_logps: the same under the reference model, for the metric `kl` alone (k3 per token).
        values: the critic's, before each token.

    Returns:
        Loss over what `config.aggregation` says, and metrics; each a `Mean`.

    Raises:
        ValueError: no advantages or returns.
    """
    if batch.labels is None:
        raise ValueError(f"{_name(config)}: the batch has no returns; pass the whole rollout through Config.advantages")
    of_policy, metrics = policy_loss(config, batch, logps, ref_logps)
    mask = jnp.asarray(batch.loss_mask)
    # Zeros where nothing counts, so that nothing there reaches the gradient, not even as 0 * inf.
    values, returns = jnp.where(mask, widened(values), 0), jnp.where(mask, batch.labels, 0)
    old_values = None if config.old_logps == "recompute" else batch.values
    errors, moved = value_losses(values, old_values, returns, config.value_clip)
    value_loss = surrogate.aggregate(errors, mask, config.aggregation)
    metrics |= {"loss/value_avg": value_loss, "val/clipfrac_avg": Mean.of(moved, mask)}
    return Mean(of_policy.sum + config.value_weight * value_loss.sum, of_policy.count), metrics


def policy_loss(
    config: Config, batch: Batch, logps: Float[Array, "B N T"], ref_logps: Float[Array, "B N T"] | None
) -> tuple[Mean, dict[str, Mean]]:
    """The clipped policy gradient alone; arguments as `loss` has them.

    Raises:
        ValueError: no advantages.
    """
    if batch.advantages is None:
        raise ValueError(
            f"{_name(config)}: the batch has no advantages; pass the whole rollout through Config.advantages"
        )
    mask = jnp.asarray(batch.loss_mask)
    advantages = surrogate.per_token(jnp.asarray(batch.advantages), mask)
    ratios = surrogate.ratios(logps, None if config.old_logps == "recompute" else batch.old_logps, mask)
    clip = config.epsilon_low, config.epsilon_high
    found = surrogate.aggregate(surrogate.clipped(ratios, advantages, *clip), mask, config.aggregation)
    metrics = {"loss/policy_avg": found, **surrogate.clip_metrics(ratios, advantages, mask, *clip)}
    if ref_logps is not None:
        metrics["kl"] = Mean.of(k3(jax.lax.stop_gradient(widened(logps)), widened(ref_logps)), mask)
    return found, metrics


def value_losses(
    values: Float[Array, "B N T"], old_values: ArrayLike | None, returns: Float[Array, "B N T"], clip: float
) -> tuple[Float[Array, "B N T"], Bool[Array, "B N T"]]:
    """Half the squared error of each value, or of the value moved no further than `clip` if that is more.

    Returns:
        (losses, whether the moved value was the worse one).
    """
    old_values = jax.lax.stop_gradient(values if old_values is None else old_values)
    moved = old_values + jnp.clip(values - old_values, -clip, clip)
    free, held = jnp.square(values - returns), jnp.square(moved - returns)
    return 0.5 * jnp.maximum(free, held), held > free


def _name(config: Config) -> str:
    return type(config).__module__.rpartition(".")[2]
