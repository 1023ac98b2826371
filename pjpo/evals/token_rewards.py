"""Token-level implicit rewards, beta * (logps - ref_logps). Rafailov et al. 2024, arXiv:2404.12358, Eq. 12."""

import numpy as np

from pjpo.types import Batch


def rows(beta: float, batch: Batch, logps, ref_logps, tokenizer, labels: tuple[str, ...]) -> list[dict]:
    """Readable rows for a run's samples: each completion's tokens as text beside their rewards.

    Args:
        beta: of the method.
        batch: NumPy arrays.
        logps, ref_logps: of the policy and of the reference, [B, N, T].
        tokenizer: for the texts.
        labels: what the N completions are, such as ("chosen", "rejected").
    """
    rewards = beta * (np.asarray(logps) - np.asarray(ref_logps))
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
