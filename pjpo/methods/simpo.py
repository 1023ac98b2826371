"""Simple Preference Optimization (SimPO). Meng et al. 2024, arXiv:2405.14734, Eq. 6. Departures: none."""

import dataclasses
from typing import ClassVar

import jax
from jaxtyping import Array, Float

from pjpo import checks, pairs
from pjpo.logps import mean_completion
from pjpo.metrics import Mean
from pjpo.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    beta: float = 2.0  # scale of the mean log-probs that are compared; the paper uses 2 to 2.5 (10 once); > 0
    margin: float = 1.0  # by how much chosen should win, gamma in the paper, which uses 0.3 to 1.6; >= 0
    reward_scale: ClassVar = None  # its rewards are no log-ratios; see `pjpo.evals.preferences`

    def __post_init__(self):
        checks.positive(self, "beta")
        checks.not_negative(self, "margin")


def loss(config: Config, batch: Batch, logps: Float[Array, "B 2 T"], ref_logps: None) -> tuple[Mean, dict[str, Mean]]:
    """Logistic loss on the margin of log-probs per token, less a target margin.

    Args:
        config: hyperparameters, static under jit.
        batch: pairs; axis 1 is (chosen, rejected). A pair with nothing to score (padding of a batch) is not counted.
        logps: policy log-probability of each completion token; nats, float32.
        ref_logps: None, as there is no reference.

    Returns:
        Loss in nats per pair, and metrics; each a `Mean` of sum and count over pairs.
    """
    rows = pairs.counted(config, batch)  # [B]
    rewards = config.beta * mean_completion(logps, batch.loss_mask)  # [B, 2]; Eq. 4
    losses = -jax.nn.log_sigmoid(pairs.margins(rewards) - config.margin)  # [B]
    return Mean.of(losses, rows), pairs.metrics(batch, logps, rewards)
