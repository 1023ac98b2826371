"""Supervised fine-tuning (SFT): next-token cross-entropy on completions. Departures: none.

The mean is over tokens of the whole batch, so a long completion counts for more than a short one, as in TRL.
"""

import dataclasses

from jaxtyping import Array, Float

from pjpo.logps import sum_completion
from pjpo.metrics import Mean
from pjpo.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing to set."""


def loss(config: Config, batch: Batch, logps: Float[Array, "B N T"], ref_logps: None) -> tuple[Mean, dict[str, Mean]]:
    """Negative log-likelihood of the tokens that count.

    Args:
        config: hyperparameters, static under jit; none.
        batch: prompts with any number of completions; each completion is a target.
        logps: policy log-probability of each completion token; nats, float32.
        ref_logps: None, as there is no reference.

    Returns:
        Loss in nats per token, and metrics; each a `Mean` of sum and count.
    """
    completions = batch.loss_mask.any(-1)  # [B, N]
    metrics = {"logps/completion": Mean.of(sum_completion(logps, batch.loss_mask), completions)}
    return Mean.of(-logps, batch.loss_mask), metrics
