"""A window of rows to batches: similar lengths together and, where they are packed, equal numbers of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from pjpo.data.buckets import Buckets
from pjpo.data.dealing import deal

Shape = tuple[int, int]  # P, T
SLACKS = (1.02, 1.05, 1.1, 1.2, 1.4)  # sizes of packed groups over the typical one; the last resort leaves nothing out
PLACE_STEP = 8  # places are a multiple of this, which suits tensor cores


def arrange(
    lengths: Int[np.ndarray, "n 2"],
    tokens: Int[np.ndarray, "n 2"] | None,
    buckets: Buckets,
    batch_size: int,
    rng: np.random.Generator,
) -> list[tuple[np.ndarray, Shape]]:
    """Sort rows by length, cut them into batches, and shuffle these.

    Args:
        lengths: of each row, of its prompt and of its longest completion; n is a multiple of `batch_size`.
        tokens: what each row computes of prompts and of completions where padding is left out; batches of one padded
            shape then exchange rows until these add up to the same. None leaves rows where they are.
        buckets: the padded shapes.
        batch_size: rows in a batch.
        rng: of the shuffle, and of the exchange.

    Returns:
        For each batch its rows, as places in `lengths`, and its padded shape.
    """
    prompts, completions = lengths.T
    rows = np.lexsort((prompts, np.searchsorted(buckets.completion_tokens, completions))).reshape(-1, batch_size)
    shapes = [buckets.fit(*lengths[batch].max(axis=0).tolist()) for batch in rows]
    if tokens is not None:
        for shape in sorted(set(shapes)):
            alike = [number for number, other in enumerate(shapes) if other == shape]
            mixed = rng.permutation(rows[alike].ravel())
            rows[alike] = mixed[deal(tokens[mixed], batch_size, rng)]
    return [(rows[number], shapes[number]) for number in rng.permutation(len(rows))]


class PackedSizes:
    """The few (prompt places, completion places) that a packed group may have, by its batch's padded shape.

    They are planned on one window of batches: a little more than the mean, since groups have nearly equal numbers of
    tokens. Six sizes bound the compilations of each padded shape; nearly all batches need the first.
    """

    def __init__(
        self,
        window: Sequence[tuple[np.ndarray, Shape]],
        tokens: Int[np.ndarray, "n 2"],
        num_groups: int,
        num_completions: int,
    ):
        of_shape: dict[Shape, list[np.ndarray]] = {}
        for rows, shape in window:
            of_shape.setdefault(shape, []).append(tokens[rows].sum(0) / num_groups)
        self._typical = {shape: np.maximum(np.mean(sums, axis=0), 1) for shape, sums in of_shape.items()}
        self._slots = len(window[0][0]) // num_groups * np.array([1, num_completions])  # rows of tokens in a group

    def fit(self, shape: Shape, needed: Int[np.ndarray, " 2"]) -> tuple[int, int]:
        """The smallest size that holds so many prompt and completion tokens."""
        most = self._slots * shape  # all of the padding too
        sizes = [most]
        if shape in self._typical:
            rounded = (-(-self._typical[shape] * slack // PLACE_STEP) * PLACE_STEP for slack in SLACKS)
            sizes = [*(np.minimum(size, most) for size in rounded), most]
        prompts, completions = next(size for size in sizes if (size >= needed).all())
        return int(prompts), int(completions)
