"""What methods on pairs share: which pairs count, implicit rewards, margins, and TRL's metrics of them."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pjpo import checks
from pjpo.logps import log_ratios, sum_completion, widened
from pjpo.metrics import Mean
from pjpo.types import CHOSEN, REJECTED, Batch


def counted(config: Any, batch: Batch, *, most: int = 2) -> Bool[Array, " B"]:
    """Rows with something to score; the others are padding of a batch.

    Args:
        config: the method's, whose name an error gives.
        batch: pairs; axis 1 is (chosen, rejected), and what else the method reads.
        most: completions of a row.

    Raises:
        ValueError: rows that are no pairs.
    """
    if not 2 <= (number := batch.completion_tokens.shape[1]) <= most:
        raise ValueError(
            f"{checks.name_of(config)}: rows must be pairs, (chosen, rejected) on axis 1, got {number} completions of "
            "each prompt; choose two of them"
        )
    return _scored(batch)


def implicit_rewards(
    beta: float | int, batch: Batch, logps: Float[Array, "B N T"], ref_logps: Float[Array, "B N T"]
) -> Float[Array, "B N"]:
    """beta * log(policy / reference) of whole completions, nats. Rafailov et al. 2023, Eq. 5 less its partition."""
    return beta * sum_completion(log_ratios(logps, ref_logps), batch.loss_mask)


def margins(values: Float[Array, "B N"]) -> Float[Array, " B"]:
    """Chosen less rejected; float32 or wider.

    Raises:
        ValueError: fewer than two values of a row.
    """
    if values.shape[1] < 2:
        raise ValueError(f"margins are of pairs, (chosen, rejected) on axis 1, got shape {values.shape}")
    values = widened(values)
    return values[:, CHOSEN] - values[:, REJECTED]


def metrics(batch: Batch, logps: Float[Array, "B N T"], rewards: Float[Array, "B N"]) -> dict[str, Mean]:
    """Means over the pairs that count, under TRL's names.

    Args:
        batch: pairs; completions beside the first two of a row are not looked at.
        logps: of the policy, for `logps/...`, which are sums over tokens; nats.
        rewards: what the method compares.
    """
    sums, rows = sum_completion(logps, batch.loss_mask), _scored(batch)
    return {
        "rewards/chosen": Mean.of(rewards[:, CHOSEN], rows),
        "rewards/rejected": Mean.of(rewards[:, REJECTED], rows),
        "rewards/margins": Mean.of(margins(rewards), rows),
        "rewards/accuracies": Mean.of(margins(rewards) > 0, rows),  # strict: a tie is no success
        "logps/chosen": Mean.of(sums[:, CHOSEN], rows),
        "logps/rejected": Mean.of(sums[:, REJECTED], rows),
    }


def _scored(batch: Batch) -> Bool[Array, " B"]:
    return jnp.asarray(batch.loss_mask).any((1, 2))
