"""Token-level implicit rewards, beta * (logps - ref_logps). Rafailov et al. 2024, arXiv:2404.12358, Eq. 10 and 11.

They are advantages: compare tokens of one place, not levels across prompts. Keep the end token, and score at
temperature 1: the sum over a completion is its implicit reward only then.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pjpo import distributed, sharding
from pjpo.data.batches import in_order
from pjpo.evals.preferences import implicit_rewards, kind_of
from pjpo.types import Batch

NUM_SHOWN = 4  # examples whose tokens a run shows


def token_rewards(beta: float | int, logps, ref_logps, mask=True) -> Float[np.ndarray, "*shape"]:
    """Of each token; 0 where `mask` is false."""
    return np.where(mask, beta * (np.asarray(logps) - np.asarray(ref_logps)), 0)


def largest_share(logratios: Float[Array, "B N T"], mask: Bool[Array, "B N T"], rounding: float) -> Float[Array, " B"]:
    """What share of a pair's token rewards, by absolute size, the largest one of both completions carries.

    1 where a single token decides, 1 over their number where all are alike; any scale of the rewards gives the same.
    nan where there is nothing to share: where rewards are no more than `rounding` nats a token on average.
    """
    sizes = jnp.where(mask, jnp.abs(logratios), 0)
    total, num_tokens = sizes.sum((1, 2)), mask.sum((1, 2))
    real = total > rounding * num_tokens
    return jnp.where(real, sizes.max((1, 2)) / jnp.where(real, total, 1), jnp.nan)


def rows(beta: float | int, batch: Batch, logps, ref_logps, tokenizer, labels: tuple[str, ...]) -> list[dict]:
    """Readable rows for a run's samples: each completion's tokens as text beside their rewards.

    Args:
        beta: of the method.
        batch: NumPy arrays.
        logps, ref_logps: of the policy and of the reference, [B, N, T].
        tokenizer: for the texts.
        labels: what the N completions are, such as ("chosen", "rejected").
    """
    rewards = token_rewards(beta, logps, ref_logps, batch.completion_mask)
    found = []
    for b, prompt in enumerate(batch.prompt_tokens):
        for n, label in enumerate(labels):
            kept = batch.completion_mask[b, n]
            found.append(
                {
                    "kind": "token_rewards",
                    "label": label,
                    "prompt": tokenizer.decode(prompt[batch.prompt_mask[b]]),
                    "tokens": [tokenizer.decode([t], skip_special=False) for t in batch.completion_tokens[b, n][kept]],
                    "token_rewards": [round(float(r), 4) for r in rewards[b, n][kept]],
                }
            )
    return found


def build(context, data, batch_size: int) -> Callable[[dict], list[dict]] | None:
    """A function of parameters to rows of the first held-out completions, against the start of the run.

    The start, whose log-probs are computed here, is the reference in all its forms; a method without one is held
    against it as well. The scale is that of `preferences.implicit_rewards`. Where nothing is held out, the rows are of
    training examples, and say so. None where there are no preferences to look at.

    Args:
        context: of the run.
        data: what it trains on and holds out.
        batch_size: as many rows are computed together, for which everything may be compiled already.
    """
    examples, of = (data.held_out, "") if data.held_out else (data.train, " (training)")
    kind = kind_of(examples, context.method)
    if kind is None:
        return None
    num_shown = min(NUM_SHOWN, batch_size, len(examples))
    batch = next(in_order(examples[:num_shown], batch_size, context.buckets))
    placed = sharding.place_batch(batch, context.mesh)
    start = distributed.fetch(context.policy.logps(context.params, placed))
    _, scale = implicit_rewards(context.method)

    def shown(params: dict) -> list[dict]:
        logps = distributed.fetch(context.policy.logps(params, placed))
        found = []
        for b in range(num_shown):
            labels = ("chosen", "rejected")
            if kind == "labelled":
                labels = ("desirable" if examples[b].labels[0] else "undesirable",)
            row = jax.tree.map(lambda x, b=b: x[b : b + 1], batch)
            labels = tuple(label + of for label in labels)
            found += rows(scale, row, logps[b : b + 1], start[b : b + 1], context.tokenizer, labels)
        return found

    return shown
