"""Token-level implicit rewards, beta * (logps - ref_logps). Rafailov et al. 2024, arXiv:2404.12358, Eq. 10 and 11.

They are advantages: compare tokens of one place, not levels across prompts. Keep the end token, and score at
temperature 1: the sum over a completion is its implicit reward only then.
"""

import numpy as np
from jaxtyping import Float

from pjpo.types import Batch


def token_rewards(beta: float | int, logps, ref_logps, mask=True) -> Float[np.ndarray, "*shape"]:
    """Of each token; 0 where `mask` is false."""
    return np.where(mask, beta * (np.asarray(logps) - np.asarray(ref_logps)), 0)


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
