"""The second completion that KTO asks of every row: that of the batch's next row, under this row's prompt."""

import dataclasses

import numpy as np

from pjpo.types import Batch


def mismatched(batch: Batch) -> Batch:
    """[B, 1, T] -> [B, 2, T]: each row's own completion, then that of the next row that is not padding.

    Call it before `pjpo.packing.pack`, and before reference log-probs are attached.

    Args:
        batch: NumPy arrays; labels [B, 1] are true where the completion is desirable.

    Raises:
        ValueError: rows that hold another number of completions, labels that are none, fewer than two rows.
    """
    if batch.completion_tokens.shape[1] != 1:
        raise ValueError(
            f"kto: rows must hold one completion with its label, got {batch.completion_tokens.shape[1]}; "
            "split a pair into its chosen completion, labelled true, and its rejected one, labelled false"
        )
    if batch.packing is not None or batch.ref_logps is not None:
        raise ValueError("kto: add mismatched completions before the batch is packed or given ref_logps, not after")
    if batch.labels is None:
        raise ValueError("kto: the batch has no labels; give each completion one, true where it is desirable")
    labels = np.asarray(batch.labels)
    check_labels(labels)
    real = np.flatnonzero(np.asarray(batch.completion_mask).any((1, 2)))
    if real.size < 2:
        raise ValueError(
            f"kto: the batch has {real.size} completion(s); it takes 2 or more, as the reference point is measured on "
            "completions of other prompts; choose sizes that leave no row alone in a batch"
        )
    following = np.arange(len(labels))
    following[real] = np.roll(real, -1)

    def beside(values):
        return np.concatenate([values, values[following]], axis=1)

    return dataclasses.replace(
        batch,
        completion_tokens=beside(batch.completion_tokens),
        completion_mask=beside(batch.completion_mask),
        loss_mask=beside(batch.loss_mask),
        labels=np.repeat(labels.astype(bool), 2, axis=1),
        **dict.fromkeys(("rewards", "advantages", "old_logps", "values")),
    )


def check_labels(labels: np.ndarray) -> None:
    """
    Raises:
        ValueError: labels that are neither true nor false.
    """
    unknown = sorted(set(labels.reshape(-1).tolist()) - {0, 1})
    if unknown:
        raise ValueError(f"kto: labels must be true (desirable) or false, got {', '.join(map(repr, unknown[:5]))}")
