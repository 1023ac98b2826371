"""Label noise for studies of robustness: pairs whose chosen and rejected change places, drawn once."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pjpo.data.examples import Example


def flip(examples: Sequence[Example], flip_rate: float, seed: int) -> list[Example]:
    """Each pair swapped with probability `flip_rate`, independently; its column "flipped" says whether it was.

    The flips belong to the data, so draw them once and not anew in each epoch, and leave held-out pairs alone.

    Raises:
        ValueError: a rate outside [0, 0.5), or examples that are no pairs.
    """
    if not 0 <= flip_rate < 0.5:
        raise ValueError(f"flip_rate must be in [0, 0.5), got {flip_rate}; beyond it labels say the opposite")
    for example in examples:
        if len(example.completions) != 2:
            raise ValueError(f"{example.id}: only pairs can be flipped, not {len(example.completions)} completions")
    flipped = np.random.default_rng(seed).random(len(examples)) < flip_rate
    return [
        dataclasses.replace(
            example,
            completions=example.completions[::-1] if swap else example.completions,
            columns=example.columns | {"flipped": bool(swap)},
        )
        for example, swap in zip(examples, flipped, strict=True)
    ]
