"""Contrastive Preference Optimization (CPO). Xu et al. 2024, arXiv:2401.08417, Eq. 3.

Departures: the likelihood term is a mean over the batch's chosen tokens by default, as in the released code; the paper
sums it over each sequence (`nll_reduction="sum"`). The two differ by the mean length of the chosen completions.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pjpo import checks, pairs
from pjpo.logps import sum_completion
from pjpo.metrics import Mean
from pjpo.types import CHOSEN, Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    beta: float = 0.1  # scale of the log-probs that are compared; dimensionless, > 0
    nll_weight: float = 1.0  # of the chosen completions' negative log-likelihood; >= 0
    nll_reduction: Literal["mean", "sum"] = "mean"  # over all chosen tokens of the batch, or over a sequence's own
    reward_scale: ClassVar = None  # its rewards are no log-ratios; see `pjpo.evals.preferences`

    def __post_init__(self):
        checks.positive(self, "beta")
        checks.not_negative(self, "nll_weight")
        checks.one_of(self, "nll_reduction", ("mean", "sum"))

    @property
    def whole_batch(self) -> bool:
        """Whether a pair's loss depends on the other pairs of the batch, see `pjpo.step`."""
        return self.nll_reduction == "mean"


def loss(config: Config, batch: Batch, logps: Float[Array, "B 2 T"], ref_logps: None) -> tuple[Mean, dict[str, Mean]]:
    """Logistic loss on the log-prob margin, and the likelihood of the chosen completions.

    Args:
        config: hyperparameters, static under jit.
        batch: pairs; axis 1 is (chosen, rejected). A pair with nothing to score (padding of a batch) is not counted.
        logps: policy log-probability of each completion token; nats, float32.
        ref_logps: None, as there is no reference.

    Returns:
        Loss in nats per pair, and metrics; each a `Mean` of sum and count over pairs.
    """
    rows = pairs.counted(config, batch)
    rewards = config.beta * sum_completion(logps, batch.loss_mask)  # [B, 2]; Eq. 3: the reference is taken as uniform
    nll = -sum_completion(logps, batch.loss_mask)[:, CHOSEN]  # [B]
    num_tokens, num_pairs = batch.loss_mask[:, CHOSEN].sum(), rows.sum()
    # A mean over tokens is a mean over pairs in units of their mean length.
    unit = jnp.maximum(num_tokens, 1) / jnp.maximum(num_pairs, 1) if config.nll_reduction == "mean" else jnp.ones(())
    losses = -jax.nn.log_sigmoid(pairs.margins(rewards)) + config.nll_weight * nll / unit.astype(nll.dtype)
    metrics = pairs.metrics(batch, logps, rewards) | {
        "nll_loss": Mean.of(-logps[:, CHOSEN], batch.loss_mask[:, CHOSEN])
    }
    return Mean.of(losses, rows), metrics
