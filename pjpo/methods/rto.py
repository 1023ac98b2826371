"""Reinforced Token Optimization (RTO). Zhong et al. 2024, arXiv:2404.18922, Eq. 4.7: PPO with a DPO policy's rewards.

The loss is PPO's; what differs is the reward of a token. Appendix E's version without a critic is `estimator`
"reinforce_pp". Departures: advantages are whitened with n - 1. As the released code, not the paper, has it, a token's
reward is clipped.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from pjpo import checks
from pjpo.advantages import at_last, reinforce_pp
from pjpo.methods import ppo
from pjpo.metrics import Mean
from pjpo.types import Batch

VARIANTS = ("rto", "semi", "ddpo", "rs", "ppo")
ESTIMATORS = ("gae", "reinforce_pp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ppo.Config):
    variant: Literal["rto", "semi", "ddpo", "rs", "ppo"] = "rto"  # section 5.2; see `dpo_rewards`
    dpo_weight: float = 0.05  # of the DPO policy's log-ratio, beta_1; not the beta that it was trained with; >= 0
    dpo_clip: float | None = 0.05  # of a weighted log-ratio; > 0, or None
    score_weight: float = 1.0  # of the completion's score, beta_3; >= 0
    score_clip: float | None = 10.0  # of the score before it is weighted; > 0, or None
    delimiters: tuple[int, ...] = ()  # token ids that end a sentence, for "semi"
    # "gae" asks a critic, "reinforce_pp" nobody: the sum of a token's own and later rewards, whitened over the rollout.
    estimator: Literal["gae", "reinforce_pp"] = "gae"
    beta: float = 0.01  # beta_2
    value_weight: float = 0.5
    aggregation: Literal["token", "sequence", "sequence_sum"] = "sequence"

    def __post_init__(self):
        super().__post_init__()
        checks.one_of(self, "variant", VARIANTS)
        checks.one_of(self, "estimator", ESTIMATORS)
        checks.not_negative(self, "dpo_weight", "score_weight")
        for field in ("dpo_clip", "score_clip"):
            if getattr(self, field) is not None:
                checks.positive(self, field)
        if self.variant == "semi" and not self.delimiters:
            raise ValueError("rto: variant 'semi' needs delimiters, the ids of tokens that end a sentence; got none")

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the loss reads of the policy; see `pjpo.step`."""
        return ("logps", "values") if self.estimator == "gae" else ("logps",)

    @property
    def needs_dpo(self) -> bool:
        """Whether `advantages` needs the DPO policy's log-probs."""
        return self.variant != "ppo"

    @property
    def needs_reference(self) -> bool:
        """Whether a rollout needs `ref_logps`; the DPO policy is compared with them too."""
        return self.needs_dpo or super().needs_reference

    def advantages(
        self,
        batch: Batch,
        *,
        dpo_logps: ArrayLike | None = None,
        beta: ArrayLike | None = None,
        truncated: ArrayLike | None = None,
    ) -> Batch:
        """As PPO's, with `dpo_logps` [B, N, T] of a policy that DPO trained with the rollout's reference as its own.

        Raises:
            ValueError: something is missing.
        """
        rewards = token_rewards(self, batch, ppo.scores(self, batch, truncated), dpo_logps, beta)
        if self.estimator == "gae":
            return ppo.estimated(self, batch, rewards)
        found, _ = reinforce_pp(rewards, jnp.asarray(batch.loss_mask), gamma=self.gamma)
        return dataclasses.replace(batch, advantages=found)

    def rollout_metrics(
        self,
        batch: Batch,
        *,
        dpo_logps: ArrayLike | None = None,
        beta: ArrayLike | None = None,
        truncated: ArrayLike | None = None,
    ) -> dict[str, Mean]:
        """PPO's, and of the DPO policy's log-ratios the mean, nats a token, and the share that is clipped, weighted."""
        rewards = token_rewards(self, batch, ppo.scores(self, batch, truncated), dpo_logps, beta)
        found = {"returns/mean": ppo.mean_return(batch, rewards)}
        if not self.needs_dpo:
            return found
        mask, logratios = jnp.asarray(batch.loss_mask), dpo_logratios(batch, dpo_logps)
        limit = jnp.inf if self.dpo_clip is None else self.dpo_clip
        return found | {
            "dpo_logratios/mean": Mean.of(logratios, mask),
            "dpo_logratios/clipped_ratio": Mean.of(jnp.abs(self.dpo_weight * logratios) > limit, mask),
        }


def loss(
    config: Config,
    batch: Batch,
    logps: Float[Array, "B N T"],
    ref_logps: Float[Array, "B N T"] | None,
    values: Float[Array, "B N T"] | None = None,
) -> tuple[Mean, dict[str, Mean]]:
    """PPO's, see `pjpo.methods.ppo.loss`; without a critic, whose `values` nobody reads then, its policy's part alone.

    Raises:
        ValueError: no advantages, or no returns although there is a critic.
    """
    if config.estimator == "reinforce_pp":
        return ppo.policy_loss(config, batch, logps, ref_logps)
    assert values is not None, "the config says that they are read"
    return ppo.loss(config, batch, logps, ref_logps, values)


def token_rewards(
    config: Config,
    batch: Batch,
    scores: Float[Array, "B N"],
    dpo_logps: ArrayLike | None,
    beta: ArrayLike | None = None,
) -> Float[Array, "B N T"]:
    """Eq. 4.7: PPO's token rewards of the weighted score, and what `dpo_rewards` makes of the DPO policy.

    Raises:
        ValueError: no log-probs of the DPO policy or of the reference.
    """
    if config.score_clip is not None:
        scores = jnp.clip(scores, -config.score_clip, config.score_clip)
    rewards = ppo.token_rewards(config, batch, config.score_weight * scores, beta)
    if not config.needs_dpo:
        return rewards
    mask = jnp.asarray(batch.loss_mask)
    weighted = config.dpo_weight * dpo_logratios(batch, dpo_logps)
    if config.dpo_clip is not None:
        weighted = jnp.clip(weighted, -config.dpo_clip, config.dpo_clip)
    ends = jnp.isin(jnp.asarray(batch.completion_tokens), jnp.array(config.delimiters, jnp.int32))
    return rewards + dpo_rewards(jnp.where(mask, weighted, 0), mask, config.variant, ends)


def dpo_logratios(batch: Batch, dpo_logps: ArrayLike | None) -> Float[Array, "B N T"]:
    """By how much the DPO policy, more than its reference, likes each token.

    Raises:
        ValueError: no log-probs of the DPO policy or of the reference.
    """
    if dpo_logps is None or batch.ref_logps is None:
        raise ValueError("rto: rewards of tokens need the DPO policy's dpo_logps and its reference's ref_logps")
    return jnp.asarray(dpo_logps) - jnp.asarray(batch.ref_logps)


def dpo_rewards(
    rewards: Float[Array, "B N T"], mask: Bool[Array, "B N T"], variant: str, ends: Bool[Array, "B N T"]
) -> Float[Array, "B N T"]:
    """The DPO policy's part in the reward of a token.

    Args:
        rewards: weighted and clipped log-ratios; 0 where nothing counts.
        mask: what counts.
        variant: "rto": as they are. "semi": each sentence's sum, at its end. "ddpo": their sum, at the last token.
            "rs": as they are, less their sum at the last token, so that the return is PPO's.
        ends: tokens that end a sentence.
    """
    total = at_last(rewards.sum(-1), mask)
    if variant == "semi":
        return _summed_to(rewards, (ends & mask) | (at_last(jnp.ones(mask.shape[:2]), mask) > 0))
    return {"rto": rewards, "ddpo": total, "rs": rewards - total}[variant]


def _summed_to(rewards: Array, ends: Array) -> Array:
    """Each token's reward moved to the next true place of `ends`."""

    def step(carried, token):
        reward, end = token
        carried += reward
        return jnp.where(end, 0, carried), jnp.where(end, carried, 0)

    tokens_first = jnp.moveaxis(rewards, -1, 0), jnp.moveaxis(ends, -1, 0)
    return jnp.moveaxis(jax.lax.scan(step, jnp.zeros_like(rewards[..., 0]), tokens_first)[1], 0, -1)
