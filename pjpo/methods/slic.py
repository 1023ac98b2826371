"""Sequence Likelihood Calibration with human feedback (SLiC-HF). Zhao et al. 2023, arXiv:2305.10425.

Departures: none. The likelihood term is of the fine-tuning target, a third completion of the prompt, not of the chosen
one: `preference.Config(with_target=True)` reads it from the column `target`. Where pairs come without targets, let the
column repeat what is to be imitated.
"""

import dataclasses

import jax
from jaxtyping import Array, Float

from pjpo import checks, pairs
from pjpo.logps import sum_completion
from pjpo.metrics import Mean
from pjpo.types import TARGET, Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    margin: float = 1.0  # by how many nats chosen should be likelier than rejected; delta in the paper, > 0
    nll_weight: float = 0.5  # of the target's negative log-likelihood, lambda in the paper; >= 0

    def __post_init__(self):
        checks.positive(self, "margin")
        checks.not_negative(self, "nll_weight")


def loss(config: Config, batch: Batch, logps: Float[Array, "B N T"], ref_logps: None) -> tuple[Mean, dict[str, Mean]]:
    """Hinge loss on the log-prob margin, and the likelihood of the target.

    Args:
        config: hyperparameters, static under jit.
        batch: axis 1 is (chosen, rejected, target), or without the target where `nll_weight` is 0. A row with nothing
            to score (padding of a batch) is not counted.
        logps: policy log-probability of each completion token; nats, float32.
        ref_logps: None, as there is no reference.

    Returns:
        Loss in nats per pair, and metrics (rewards are log-probs); each a `Mean` of sum and count over pairs.

    Raises:
        ValueError: other completions than these.
    """
    needed = 3 if config.nll_weight else 2
    if not needed <= logps.shape[1] <= 3:
        raise ValueError(
            f"slic: nll_weight {config.nll_weight} needs {needed} completions of each prompt, (chosen, rejected"
            f"{', target' if config.nll_weight else ''}), got {logps.shape[1]}; add the target, or set nll_weight to 0"
        )
    rows = pairs.counted(config, batch, most=3)  # [B]
    sums = sum_completion(logps, batch.loss_mask)  # [B, N]
    losses = jax.nn.relu(config.margin - pairs.margins(sums))  # [B]
    if config.nll_weight:
        losses = losses - config.nll_weight * sums[:, TARGET]
    return Mean.of(losses, rows), pairs.metrics(batch, logps, sums)
