"""What methods on pairs share: which pairs count, implicit rewards, margins, and TRL's metrics of them."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pjpo.logps import log_ratios, sum_completion
from pjpo.metrics import Mean
from pjpo.types import CHOSEN, REJECTED, Batch


def counted(batch: Batch) -> Bool[Array, " B"]:
    """Rows with something to score; the others are padding of a batch."""
    return jnp.asarray(batch.loss_mask).any((1, 2))


def implicit_rewards(
    beta: float | int, batch: Batch, logps: Float[Array, "B N T"], ref_logps: Float[Array, "B N T"]
) -> Float[Array, "B N"]:
    """beta * log(policy / reference) of whole completions, nats. Rafailov et al. 2023, Eq. 5 less its partition."""
    return beta * sum_completion(log_ratios(logps, ref_logps), batch.loss_mask)


def margins(values: Float[Array, "B N"]) -> Float[Array, " B"]:
    """Chosen less rejected."""
    return values[:, CHOSEN] - values[:, REJECTED]


def metrics(batch: Batch, logps: Float[Array, "B N T"], rewards: Float[Array, "B N"]) -> dict[str, Mean]:
    """Means over the pairs that count, under TRL's names.

    Args:
        batch: pairs; completions beside the first two of a row are not looked at.
        logps: of the policy, for `logps/...`, which are sums over tokens; nats.
        rewards: what the method compares.
    """
    sums, rows = sum_completion(logps, batch.loss_mask), counted(batch)
    return {
        "rewards/chosen": Mean.of(rewards[:, CHOSEN], rows),
        "rewards/rejected": Mean.of(rewards[:, REJECTED], rows),
        "rewards/margins": Mean.of(margins(rewards), rows),
        "rewards/accuracies": Mean.of(margins(rewards) > 0, rows),  # strict: a tie is no success
        "logps/chosen": Mean.of(sums[:, CHOSEN], rows),
        "logps/rejected": Mean.of(sums[:, REJECTED], rows),
    }
