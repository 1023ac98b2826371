"""Odds Ratio Preference Optimization (ORPO). Hong et al. 2024, arXiv:2403.07691, Eq. 6 and 7. Departures: none.

A completion's probability is the exponential of its mean log-prob per token, in the likelihood and in the odds, and
the likelihood is averaged over pairs as Eq. 6 has it (the released code averages it over the batch's tokens).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pjpo import checks, pairs
from pjpo.logps import mean_completion
from pjpo.metrics import Mean
from pjpo.types import CHOSEN, Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    weight: float = 0.1  # of the odds ratio beside the likelihood, lambda in the paper; >= 0

    def __post_init__(self):
        checks.not_negative(self, "weight")


def loss(config: Config, batch: Batch, logps: Float[Array, "B 2 T"], ref_logps: None) -> tuple[Mean, dict[str, Mean]]:
    """Negative log-likelihood of chosen, and a logistic loss on the ratio of the odds of chosen and rejected.

    Args:
        config: hyperparameters, static under jit.
        batch: pairs; axis 1 is (chosen, rejected). A pair with nothing to score (padding of a batch) is not counted.
        logps: policy log-probability of each completion token; nats, float32.
        ref_logps: None, as there is no reference.

    Returns:
        Loss in nats per pair, and metrics (rewards are `weight` times log-probs per
        token); each a `Mean` of sum and count over pairs.
    """
    rows = pairs.counted(config, batch)  # [B]
    means = mean_completion(logps, batch.loss_mask)  # [B, 2]
    ratios = pairs.margins(log_odds(means))  # [B]
    odds_losses = jax.nn.log_sigmoid(ratios)
    losses = -means[:, CHOSEN] - config.weight * odds_losses
    metrics = pairs.metrics(batch, logps, config.weight * means) | {
        "nll_loss": Mean.of(-means[:, CHOSEN], rows),
        "log_odds_ratio": Mean.of(odds_losses, rows),
        "log_odds_chosen": Mean.of(ratios, rows),
    }
    return Mean.of(losses, rows), metrics


def log_odds(logps: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """log(p / (1 - p)) from log p, with p kept below 1 by a rounding error: the odds of certainty are infinite."""
    logps = jnp.minimum(logps, -jnp.finfo(logps.dtype).eps)
    return logps - jnp.log(-jnp.expm1(logps))
