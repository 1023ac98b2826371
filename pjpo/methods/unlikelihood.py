"""Unlikelihood on rejected completions. Rafailov et al. 2023, arXiv:2305.18290, section 6, after Welleck et al. 2019.

Departures: none; DPO's paper, whose baseline it is, lowers the log-likelihood of whole rejected completions, where
Welleck et al. (arXiv:1908.04319, Eq. 4) raise log(1 - p) of single tokens. So it has no minimum: stop early.
"""

import dataclasses

from jaxtyping import Array, Float

from pjpo import checks, pairs
from pjpo.logps import sum_completion
from pjpo.metrics import Mean
from pjpo.types import CHOSEN, REJECTED, Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    weight: float = 0.5  # of the rejected completion's log-likelihood, alpha in the paper; >= 0, the paper's are <= 1

    def __post_init__(self):
        checks.not_negative(self, "weight")


def loss(config: Config, batch: Batch, logps: Float[Array, "B 2 T"], ref_logps: None) -> tuple[Mean, dict[str, Mean]]:
    """Negative log-likelihood of the chosen completion, less a part of the rejected one's.

    Args:
        config: hyperparameters, static under jit.
        batch: pairs; axis 1 is (chosen, rejected). A pair with nothing to score (padding of a batch) is not counted.
        logps: policy log-probability of each completion token; nats, float32.
        ref_logps: None, as there is no reference.

    Returns:
        Loss in nats per pair, and metrics (rewards are log-probs); each a `Mean` of sum and count over pairs.
    """
    rows = pairs.counted(config, batch)  # [B]
    sums = sum_completion(logps, batch.loss_mask)  # [B, 2]
    losses = config.weight * sums[:, REJECTED] - sums[:, CHOSEN]
    return Mean.of(losses, rows), pairs.metrics(batch, logps, sums)
