"""DPO with an attenuated reference. Chen et al. 2024, arXiv:2405.19534, Eq. 4. Departures: none.

With gamma = 1 it is DPO, with gamma = 0 a loss on the policy's own log-probs, whose sign is the ranking's.
"""

import dataclasses

import jax
from jaxtyping import Array, Float

from pjpo import checks, pairs
from pjpo.logps import sum_completion, widened
from pjpo.metrics import Mean
from pjpo.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    beta: float = 0.1  # scale of the margin; dimensionless, > 0
    gamma: float = 0.5  # share of the reference's own margin that counts; the paper tries 0, 0.25, ..., 2; >= 0

    def __post_init__(self):
        checks.positive(self, "beta")
        checks.not_negative(self, "gamma")


def loss(
    config: Config, batch: Batch, logps: Float[Array, "B 2 T"], ref_logps: Float[Array, "B 2 T"]
) -> tuple[Mean, dict[str, Mean]]:
    """Logistic loss on the policy's log-prob margin less `gamma` times the reference's.

    Args:
        config: hyperparameters, static under jit.
        batch: pairs; axis 1 is (chosen, rejected). A pair with nothing to score (padding of a batch) is not counted.
        logps: policy log-probability of each completion token; nats, float32.
        ref_logps: the same under the reference model; a constant to the gradient.

    Returns:
        Loss in nats per pair, and metrics; each a `Mean` of sum and count over pairs.
    """
    rows = pairs.counted(config, batch)  # [B]
    scaled = config.gamma * jax.lax.stop_gradient(widened(ref_logps))
    rewards = config.beta * sum_completion(widened(logps) - scaled, batch.loss_mask)  # [B, 2]
    losses = -jax.nn.log_sigmoid(pairs.margins(rewards))  # [B]
    return Mean.of(losses, rows), pairs.metrics(batch, logps, rewards)
