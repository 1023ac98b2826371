"""Provably robust DPO (rDPO). Chowdhury et al. 2024, arXiv:2403.00409, section 3. Departures: none.

An unbiased estimate of DPO's loss on clean labels. It has no lower bound: where every label agrees it falls for ever,
by flip_rate / (1 - 2 flip_rate) for each unit of margin, so losses below zero are normal, and runs must end early.
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
    flip_rate: float = 0.1  # probability that a label was flipped, assumed known; in [0, 0.5)

    def __post_init__(self):
        checks.positive(self, "beta")
        checks.flip_rate(self)


def loss(
    config: Config, batch: Batch, logps: Float[Array, "B 2 T"], ref_logps: Float[Array, "B 2 T"]
) -> tuple[Mean, dict[str, Mean]]:
    """DPO's loss of the pair, less what flipped labels add to it on average.

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
    kept, swapped = -jax.nn.log_sigmoid(margins), -jax.nn.log_sigmoid(-margins)
    losses = ((1 - config.flip_rate) * kept - config.flip_rate * swapped) / (1 - 2 * config.flip_rate)
    return Mean.of(losses, rows), pairs.metrics(batch, logps, rewards)
