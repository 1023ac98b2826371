"""Identity Preference Optimization (IPO). Azar et al. 2023, arXiv:2310.12036, Eq. 17.

Departures: log-ratios are averaged over tokens by default, as published comparisons after January 2024 did; the paper
sums them (`reduction="sum"`), which makes the pull depend on length. Values of beta do not carry over between the two.
"""

import dataclasses
from typing import Literal

from jaxtyping import Array, Float

from pjpo import checks, pairs
from pjpo.logps import log_ratios, mean_completion, sum_completion
from pjpo.metrics import Mean
from pjpo.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    beta: float = 0.1  # pull towards the reference, tau in the paper; the margin to reach is 1 / (2 beta) nats; > 0
    reduction: Literal["mean", "sum"] = "mean"  # of a completion's log-ratios over its tokens

    def __post_init__(self):
        checks.positive(self, "beta")
        checks.one_of(self, "reduction", ("mean", "sum"))


def loss(
    config: Config, batch: Batch, logps: Float[Array, "B 2 T"], ref_logps: Float[Array, "B 2 T"]
) -> tuple[Mean, dict[str, Mean]]:
    """Squared distance of the log-ratio margin from 1 / (2 beta).

    Args:
        config: hyperparameters, static under jit.
        batch: pairs; axis 1 is (chosen, rejected). A pair with nothing to score (padding of a batch) is not counted.
        logps: policy log-probability of each completion token; nats, float32.
        ref_logps: the same under the reference model; a constant to the gradient.

    Returns:
        Loss in squared nats per pair, and metrics (rewards are beta times summed log-ratios, as in DPO, whatever the
        reduction); each a `Mean` of sum and count over pairs.
    """
    rows = pairs.counted(config, batch)  # [B]
    reduce = mean_completion if config.reduction == "mean" else sum_completion
    logratios = reduce(log_ratios(logps, ref_logps), batch.loss_mask)  # [B, 2]
    losses = (pairs.margins(logratios) - 1 / (2 * config.beta)) ** 2  # [B]
    rewards = pairs.implicit_rewards(config.beta, batch, logps, ref_logps)
    return Mean.of(losses, rows), pairs.metrics(batch, logps, rewards)
