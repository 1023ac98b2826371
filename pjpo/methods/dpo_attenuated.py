"""DPO with an attenuated reference. Chen et al. 2024, arXiv:2405.19534, Eq. 4. Departures: none.

With gamma = 1 it is DPO, with gamma = 0 a loss on the policy's own log-probs, whose sign is the ranking's.
"""

import dataclasses

import jax
from jaxtyping import Array, Float

from pjpo import checks, pairs
from pjpo.logps import constant, sum_completion, widened
from pjpo.metrics import Mean
from pjpo.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    beta: float = 0.1  # scale of the margin; dimensionless, > 0
    gamma: float = 0.5  # share of the reference's own margin that counts; the paper tries 0, 0.25, ..., 2; >= 0

    def __post_init__(self):
        checks.positive(self, "beta")
        checks.not_negative(self, "gamma")

    @property
    def needs_reference(self) -> bool:
        """Whether log-probs of the reference are read."""
        return self.gamma > 0

    @property
    def reward_scale(self) -> float | None:
        """What log-ratios are multiplied by for its rewards, which only at gamma = 1 they are; see `pjpo.evals`."""
        return self.beta if self.gamma == 1 else None


def loss(
    config: Config, batch: Batch, logps: Float[Array, "B 2 T"], ref_logps: Float[Array, "B 2 T"] | None
) -> tuple[Mean, dict[str, Mean]]:
    """Logistic loss on the policy's log-prob margin less `gamma` times the reference's.

    Args:
        config: hyperparameters, static under jit.
        batch: pairs; axis 1 is (chosen, rejected). A pair with nothing to score (padding of a batch) is not counted.
        logps: policy log-probability of each completion token; nats, float32.
        ref_logps: the same under the reference model; a constant to the gradient. May be None where gamma is 0.

    Returns:
        Loss in nats per pair, and metrics; each a `Mean` of sum and count over pairs.
    """
    rows = pairs.counted(config, batch)  # [B]
    attenuated = widened(logps) - config.gamma * constant(ref_logps) if config.gamma else widened(logps)
    rewards = config.beta * sum_completion(attenuated, batch.loss_mask)  # [B, 2]
    losses = -jax.nn.log_sigmoid(pairs.margins(rewards))  # [B]
    return Mean.of(losses, rows), pairs.metrics(batch, logps, rewards)
