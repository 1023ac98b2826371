"""Kahneman-Tversky Optimization (KTO). Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 7 and 8. Departures: none.

The reference point is the mean log-ratio of completions that do not belong to their prompts, over the whole batch,
and not below zero. So a row holds two completions of one prompt: its own, and that of the batch's next row, which
`pjpo.mismatched` puts there.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pjpo import checks
from pjpo.logps import log_ratios, sum_completion
from pjpo.metrics import Mean
from pjpo.mismatched import check_labels, mismatched
from pjpo.types import Batch

OWN, MISMATCHED = 0, 1  # places on the N axis


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    beta: float = 0.1  # pull towards the reference; dimensionless, > 0
    weight_chosen: float = 1.0  # of desirable completions, lambda_D in the paper; >= 0
    weight_rejected: float = 1.0  # of undesirable ones; keep (weight x number) of chosen to rejected within 1 to 1.5

    def __post_init__(self):
        checks.positive(self, "beta")
        checks.not_negative(self, "weight_chosen", "weight_rejected")

    @property
    def whole_batch(self) -> bool:
        """A completion's loss depends on the others of the batch, through the reference point; see `pjpo.step`."""
        return True

    def notice(self, labels: Sequence[bool]) -> str:
        """What a run says of the labels of its training data, before it starts."""
        num_chosen, num_rejected = sum(labels), len(labels) - sum(labels)
        chosen, rejected = self.weight_chosen * num_chosen, self.weight_rejected * num_rejected
        ratio = "one kind alone"
        if rejected:
            ratio = f"{chosen / rejected:.3g} to 1 by weight (the paper keeps within 1 and 1.5)"
        return (
            f"kto: {num_chosen} desirable and {num_rejected} undesirable completions, {ratio}. The reference point "
            "does not look at labels, so a batch of one kind has it too, and logs nothing of the other"
        )

    def prepare(self, batch: Batch) -> Batch:
        """What a run does to every batch on the host: one labelled completion of each prompt becomes the two."""
        return mismatched(batch)


def loss(
    config: Config, batch: Batch, logps: Float[Array, "B 2 T"], ref_logps: Float[Array, "B 2 T"]
) -> tuple[Mean, dict[str, Mean]]:
    """How far desirable completions fall short of the reference point, and undesirable ones exceed it.

    A batch with one label alone is legal: the reference point does not look at labels.

    Args:
        config: hyperparameters, static under jit.
        batch: axis 1 is (the prompt's own completion, a mismatched one); `labels[:, 0]` is true where the own one is
            desirable. A row with nothing to score (padding of a batch) is not counted.
        logps: policy log-probability of each completion token; nats, float32.
        ref_logps: the same under the reference model; a constant to the gradient.

    Returns:
        Loss per completion, both kinds together, and metrics; each a `Mean` of sum and count over completions, but
        `kl` (the reference point) and `rewards/margins`, which are one number of a batch.

    Raises:
        ValueError: no labels, or unknown ones; rows of another number of completions.
    """
    _check_rows(batch)
    logratios = sum_completion(log_ratios(logps, ref_logps), batch.loss_mask)  # [B, 2]
    own, mismatched = batch.loss_mask[:, OWN].any(-1), batch.loss_mask[:, MISMATCHED].any(-1)  # [B]
    point = Mean.of(jax.lax.stop_gradient(logratios[:, MISMATCHED]), mismatched).value()
    point = jnp.maximum(point, 0)  # after the mean: z_0 of Eq. 7
    desirable = jnp.asarray(batch.labels)[:, OWN].astype(bool)
    gains = config.beta * (logratios[:, OWN] - point)
    losses = jnp.where(
        desirable, config.weight_chosen * jax.nn.sigmoid(-gains), config.weight_rejected * jax.nn.sigmoid(gains)
    )

    rewards, sums = config.beta * logratios[:, OWN], sum_completion(logps, batch.loss_mask)[:, OWN]
    chosen, rejected = own & desirable, own & ~desirable
    metrics = {
        "rewards/chosen": Mean.of(rewards, chosen),
        "rewards/rejected": Mean.of(rewards, rejected),
        "logps/chosen": Mean.of(sums, chosen),
        "logps/rejected": Mean.of(sums, rejected),
    }
    margin = metrics["rewards/chosen"].value() - metrics["rewards/rejected"].value()
    metrics["rewards/margins"] = Mean.of(margin[None], (chosen.any() & rejected.any())[None])
    metrics["kl"] = Mean.of(point[None], mismatched.any()[None])
    return Mean.of(losses, own), metrics


def _check_rows(batch: Batch) -> None:
    if batch.labels is None:
        raise ValueError("kto: the batch has no labels; give each completion one, true where it is desirable")
    if batch.completion_tokens.shape[1] != 2:
        raise ValueError(
            "kto: axis 1 must be (a prompt's own completion, a mismatched one), got "
            f"{batch.completion_tokens.shape[1]} completions; Config.prepare adds the second to batches of one each"
        )
    if not isinstance(batch.labels, jax.core.Tracer):  # a run's are checked where they are prepared
        check_labels(np.asarray(batch.labels)[:, OWN])
