"""Bradley-Terry reward model. Ouyang et al. 2022, arXiv:2203.02155, Eq. 1.

Departures: one pair of each prompt. Options of later work: annotated margins (Touvron et al. 2023, arXiv:2307.09288,
Eq. 2) and centring (Eisenstein et al. 2023, arXiv:2312.09244, Eq. 2), both off.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pjpo import checks, pairs
from pjpo.logps import widened
from pjpo.metrics import Mean
from pjpo.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    center_weight: float = 0.0  # of (reward of chosen + reward of rejected)^2, which keeps rewards around zero; >= 0
    annotated_margins: bool = False  # chosen must win by the difference of `batch.rewards`, [B, 2]
    outputs: ClassVar = ("scores",)  # what the loss reads of the policy; see `pjpo.step`

    def __post_init__(self):
        checks.not_negative(self, "center_weight")


def loss(
    config: Config, batch: Batch, logps: None, ref_logps: None, scores: Float[Array, "B 2"]
) -> tuple[Mean, dict[str, Mean]]:
    """Logistic loss on the margin of the scores.

    Args:
        config: hyperparameters, static under jit.
        batch: pairs; axis 1 is (chosen, rejected). A pair with nothing to score (padding of a batch) is not counted.
        logps, ref_logps: None, as nothing is generated.
        scores: the scalar head after the last token of each completion, float32; `policy.scores`.

    Returns:
        Loss in nats per pair, and metrics; each a `Mean` of sum and count over pairs.

    Raises:
        ValueError: annotated margins are asked for, and the batch has none.
    """
    rows = pairs.counted(config, batch)  # [B]
    scores = jnp.where(rows[:, None], widened(scores), 0)  # whatever padding has, it reaches no gradient
    margins = pairs.margins(scores)  # [B]
    needed = jnp.zeros_like(margins)
    if config.annotated_margins:
        if batch.rewards is None:
            raise ValueError(
                "reward_model: annotated_margins needs the batch's rewards [B, 2]; add them, or set it to False"
            )
        needed = jnp.where(rows, pairs.margins(batch.rewards), 0)
    losses = -jax.nn.log_sigmoid(margins - needed) + config.center_weight * scores.sum(-1) ** 2
    metrics = {
        "accuracy": Mean.of(accuracies(margins), rows),
        "margin": Mean.of(margins, rows),
        "mean_reward": Mean.of(scores.mean(-1), rows),
    }
    return Mean.of(losses, rows), metrics


def accuracies(margins: Float[Array, " B"]) -> Float[Array, " B"]:
    """1 where chosen scores higher, 1/2 where both score alike."""
    return (jnp.sign(margins) + 1) / 2
