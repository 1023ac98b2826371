"""Direct Preference Optimization (DPO). Rafailov et al. 2023, arXiv:2305.18290, Eq. 7. Departures: none."""

import dataclasses

import jax
from jaxtyping import Array, Float

from pjpo import checks, pairs
from pjpo.metrics import Mean
from pjpo.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    beta: float = 0.1  # pull towards the reference; dimensionless, > 0

    def __post_init__(self):
        checks.positive(self, "beta")


def loss(
    config: Config, batch: Batch, logps: Float[Array, "B 2 T"], ref_logps: Float[Array, "B 2 T"]
) -> tuple[Mean, dict[str, Mean]]:
    """Logistic loss on the margin by which the policy, more than the reference, prefers chosen.

    Args:
        config: hyperparameters, static under jit.
        batch: pairs; axis 1 is (chosen, rejected). A pair with nothing to score (padding of a batch) is not counted.
        logps: policy log-probability of each completion token; nats, float32.
        ref_logps: the same under the reference model; a constant to the gradient.

    Returns:
        Loss in nats per pair, and metrics; each a `Mean` of sum and count over pairs.
    """
    rows = pairs.counted(config, batch)  # [B]
    rewards = pairs.implicit_rewards(config.beta, batch, logps, ref_logps)  # [B, 2]; Eq. 7 sums over tokens
    losses = -jax.nn.log_sigmoid(pairs.margins(rewards))  # [B]
    return Mean.of(losses, rows), pairs.metrics(batch, logps, rewards)
