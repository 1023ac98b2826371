"""Conservative DPO (cDPO). Mitchell 2023, "A note on DPO with noisy preferences". Departures: none.

DPO's loss with smoothed labels: biased where labels are flipped, but margins stop at log((1 - flip_rate) / flip_rate).
"""

import dataclasses

import jax
from jaxtyping import Array, Float

from pjpo import checks, pairs
from pjpo.metrics import Mean
from pjpo.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    beta: float = 0.1  # pull towards the reference; dimensionless, > 0
    flip_rate: float = 0.1  # share of labels that are taken to be wrong; in [0, 0.5)

    def __post_init__(self):
        checks.positive(self, "beta")
        checks.flip_rate(self)


def loss(
    config: Config, batch: Batch, logps: Float[Array, "B 2 T"], ref_logps: Float[Array, "B 2 T"]
) -> tuple[Mean, dict[str, Mean]]:
    """DPO's loss of the pair and of the swapped pair, weighted by how likely each is.

    Args:
        config: hyperparameters, static under jit.
        batch: pairs; axis 1 is (chosen, rejected). A pair with nothing to score (padding of a batch) is not counted.
        logps: policy log-probability of each completion token; nats, float32.
        ref_logps: the same under the reference model; a constant to the gradient.

    Returns:
        Loss in nats per pair, and metrics; each a `Mean` of sum and count over pairs.
    """
    rows = pairs.counted(config, batch)  # [B]
    rewards = pairs.implicit_rewards(config.beta, batch, logps, ref_logps)  # [B, 2]
    margins = pairs.margins(rewards)  # [B]
    losses = -(1 - config.flip_rate) * jax.nn.log_sigmoid(margins) - config.flip_rate * jax.nn.log_sigmoid(-margins)
    return Mean.of(losses, rows), pairs.metrics(batch, logps, rewards)
