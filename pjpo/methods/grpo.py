"""Group Relative Policy Optimization (GRPO). Shao et al. 2024, arXiv:2402.03300, Eq. 3 and 4.

And what its successors change, as settings: see the constants below `Config`. Departures: a log-ratio beyond 20 nats
counts as 20, and a completion whose reward could not be had is left out of its group.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pjpo import checks, surrogate
from pjpo.advantages import STDS, Std, at_last, group_relative, leave_one_out, reinforce_pp, reinforce_pp_baseline
from pjpo.kl import ESTIMATORS, Estimator, k3
from pjpo.logps import sum_completion, widened
from pjpo.metrics import Mean
from pjpo.types import Batch

BASELINES = ("group", "leave_one_out", "reinforce_pp", "reinforce_pp_baseline")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    baseline: Literal["group", "leave_one_out", "reinforce_pp", "reinforce_pp_baseline"] = "group"  # pjpo.advantages
    std: Std = "group"  # that the baseline "group" divides by: of a prompt's rewards, of the batch's, or none
    std_ddof: int = 1  # taken off the count in it
    std_eps: float = 1e-4  # added to it; >= 0
    importance: surrogate.Importance = "token"  # whose ratio is clipped
    epsilon_low: float = 0.2  # a ratio below 1 - this loses no more
    epsilon_high: float = 0.2  # a ratio above 1 + this wins no more
    dual_clip: float | None = None  # the most that a ratio weighs a negative advantage by; > 1
    aggregation: surrogate.Aggregation = "sequence"  # what the loss is a mean of
    max_completion_tokens: int | None = None  # what "constant" divides by: the longest completion that is sampled
    beta: float = 0.04  # pull towards the reference, nats; 0 needs no reference
    kl: Estimator = "k3"  # how the pull is estimated
    kl_in: Literal["loss", "reward"] = "loss"  # where it is added

    def __post_init__(self):
        checks.one_of(self, "baseline", BASELINES)
        checks.one_of(self, "std", STDS)
        checks.one_of(self, "importance", surrogate.IMPORTANCES)
        checks.one_of(self, "aggregation", surrogate.AGGREGATIONS)
        checks.one_of(self, "kl", ESTIMATORS)
        checks.one_of(self, "kl_in", ("loss", "reward"))
        checks.not_negative(self, "std_ddof", "std_eps", "epsilon_low", "epsilon_high", "beta")
        if self.dual_clip is not None:
            checks.above(self, 1, "dual_clip")
            if self.importance == "cispo":
                raise ValueError(f"grpo: dual_clip must be None for 'cispo', which clips weights; got {self.dual_clip}")
        if self.max_completion_tokens is not None:
            checks.at_least(self, 1, "max_completion_tokens")
        elif self.aggregation == "constant":
            raise ValueError("grpo: aggregation 'constant' divides by max_completion_tokens, got None; set it")

    @property
    def needs_reference(self) -> bool:
        """Whether a rollout needs `ref_logps`."""
        return self.beta > 0

    def check_group(self, num_completions: int) -> None:
        """
        Raises:
            ValueError: too few completions of a prompt for the baseline.
        """
        if num_completions < 2 and self.baseline != "reinforce_pp":
            raise ValueError(
                f"grpo: baseline {self.baseline!r} compares a prompt's completions, so it needs 2 or more of each, got "
                f"{num_completions}; sample more, or use 'reinforce_pp'"
            )

    def advantages(self, batch: Batch) -> Batch:
        """The rollout with `advantages`, [B, N] or [B, N, T]. Call it before the rollout is cut into minibatches.

        Args:
            batch: a whole rollout. `rewards` [B, N]; one that is not finite is left out of its prompt's baseline, and
                has no advantage. With KL in the reward, `old_logps` and `ref_logps` too.

        Raises:
            ValueError: something of that is missing, or too few completions of a prompt.
        """
        self.check_group(batch.completion_tokens.shape[1])
        if batch.rewards is None:
            raise ValueError("grpo: the rollout has no rewards; score its completions first")
        mask = jnp.asarray(batch.loss_mask)
        rewards = widened(batch.rewards)
        scored = jnp.isfinite(rewards) & jnp.asarray(batch.completion_mask).any(-1)
        rewards = jnp.where(scored, rewards, 0)
        penalties = jnp.zeros(mask.shape, rewards.dtype)
        if self.kl_in == "reward" and self.beta:
            if batch.old_logps is None or batch.ref_logps is None:
                raise ValueError("grpo: KL in the reward needs the rollout's old_logps and ref_logps; attach both")
            penalties = self.beta * ESTIMATORS[self.kl](jnp.asarray(batch.old_logps), jnp.asarray(batch.ref_logps))
        if self.baseline == "reinforce_pp":
            mask &= scored[..., None]
            found, _ = reinforce_pp(at_last(rewards, mask) - penalties, mask)
            return dataclasses.replace(batch, advantages=found)
        rewards -= sum_completion(penalties, mask)
        if self.baseline == "leave_one_out":
            found = leave_one_out(rewards, scored)
        elif self.baseline == "reinforce_pp_baseline":
            found = reinforce_pp_baseline(rewards, mask & scored[..., None], scored)
        else:
            found = group_relative(rewards, scored, std=self.std, ddof=self.std_ddof, eps=self.std_eps)
        return dataclasses.replace(batch, advantages=found)


GRPO = Config()
# Liu et al. 2025, arXiv:2503.20783: neither length nor difficulty weighs an answer. 3000 is the paper's limit.
DR_GRPO = Config(std="none", aggregation="constant", max_completion_tokens=3000, beta=0.0)
# Yu et al. 2025, arXiv:2503.14476: clip higher, mean over tokens; its dynamic sampling is the rollout's, its penalty on
# overlong completions a reward.
DAPO = Config(epsilon_high=0.28, aggregation="token", beta=0.0)
# Zheng et al. 2025, arXiv:2507.18071.
GSPO = Config(importance="sequence", epsilon_low=3e-4, epsilon_high=4e-4, beta=0.0)
# Ahmadian et al. 2024, arXiv:2402.14740. Token ratios are clipped, where TRL clips a completion's product of them; in
# the first update of a rollout there is nothing to clip.
RLOO = Config(baseline="leave_one_out", aggregation="sequence_sum", beta=0.05, kl="k1", kl_in="reward")
# Hu 2025, arXiv:2501.03262; one completion of a prompt will do.
REINFORCE_PP = Config(baseline="reinforce_pp", aggregation="token", beta=0.01, kl="k1", kl_in="reward")


def loss(
    config: Config, batch: Batch, logps: Float[Array, "B N T"], ref_logps: Float[Array, "B N T"] | None
) -> tuple[Mean, dict[str, Mean]]:
    """Clipped policy gradient, with the pull towards the reference where it is in the loss.

    Args:
        config: hyperparameters, static under jit.
        batch: of a rollout, with `advantages` from `Config.advantages` and `old_logps` of the policy that sampled it;
            without them each ratio is 1, as in a rollout's first update.
        logps: policy log-probability of each completion token; nats, float32.
        ref_logps: the same under the reference model; a constant to the gradient; None where nothing needs it.

    Returns:
        Loss over what `config.aggregation` says, and metrics; each a `Mean`. `kl` is k3 per token.

    Raises:
        ValueError: no advantages, or no reference although it is to be kept near to.
    """
    if batch.advantages is None:
        raise ValueError("grpo: the batch has no advantages; pass the whole rollout through Config.advantages")
    mask = jnp.asarray(batch.loss_mask)
    logps = jnp.where(mask, widened(logps), 0)  # so that nothing there reaches the gradient, not even as 0 * inf
    advantages = surrogate.per_token(jnp.asarray(batch.advantages), mask)
    ratios = surrogate.ratios(logps, batch.old_logps, mask, config.importance)
    clip = config.epsilon_low, config.epsilon_high
    if config.importance == "cispo":
        losses = surrogate.cispo(logps, ratios, advantages, *clip)
    else:
        losses = surrogate.clipped(ratios, advantages, *clip, config.dual_clip)
    metrics = surrogate.clip_metrics(ratios, advantages, mask, *clip, config.importance, config.dual_clip)
    if ref_logps is not None:
        ref_logps = jnp.where(mask, jax.lax.stop_gradient(widened(ref_logps)), 0)
        metrics["kl"] = Mean.of(k3(logps, ref_logps), mask)
    if config.beta and config.kl_in == "loss":
        if ref_logps is None:
            raise ValueError(f"grpo: beta {config.beta} pulls towards a reference, but there is none; set it to 0")
        losses += config.beta * ESTIMATORS[config.kl](logps, ref_logps)
    exists = jnp.asarray(batch.completion_mask).any(-1)
    return surrogate.aggregate(losses, mask, config.aggregation, config.max_completion_tokens, exists), metrics
