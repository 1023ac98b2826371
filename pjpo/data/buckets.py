"""Examples of any length to batches of a few static shapes, since each shape that occurs is a compilation."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from pjpo.data.examples import Example
from pjpo.types import Batch


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes that P and T may have, ascending; a batch takes the smallest that hold it."""

    prompt_tokens: tuple[int, ...]
    completion_tokens: tuple[int, ...]

    @classmethod
    def of(cls, examples: Iterable[Example], *, num_sizes: int = 3) -> Buckets:
        """The longest length in `examples`, its half, its quarter, ..., as far as examples are so short.

        Args:
            examples: all that will be collated, held-out ones too.
            num_sizes: at most so many for prompts and for completions, thus at most its square of shapes.

        Raises:
            ValueError: no examples, or no size.
        """
        lengths = np.array([lengths_of(example) for example in examples])
        if lengths.size == 0 or num_sizes < 1:
            raise ValueError(
                f"buckets need at least one example and size, got {len(lengths)} and num_sizes {num_sizes}"
            )
        return cls(*(_halvings(int(column.min()), int(column.max()), num_sizes) for column in lengths.T))

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Every (P, T) that a batch can have; their number bounds the compilations of one step."""
        return list(itertools.product(self.prompt_tokens, self.completion_tokens))

    def fit(self, prompt_tokens: int, completion_tokens: int) -> tuple[int, int]:
        """The smallest (P, T) that holds these lengths.

        Raises:
            ValueError: no bucket is so long.
        """
        fitted = []
        for what, length, sizes in (
            ("prompt", prompt_tokens, self.prompt_tokens),
            ("completion", completion_tokens, self.completion_tokens),
        ):
            if length > sizes[-1]:
                raise ValueError(
                    f"a {what} of {length} tokens is longer than the largest bucket, {sizes[-1]}; make the buckets "
                    f"from all examples, or set max_{what}_tokens"
                )
            fitted.append(next(size for size in sizes if size >= length))
        return fitted[0], fitted[1]


def lengths_of(example: Example) -> tuple[int, int]:
    """Tokens of the prompt, and of the longest completion (0 if there is none)."""
    return len(example.prompt), max(map(len, example.completions), default=0)


def check_room(examples: Iterable[Example], max_positions: int) -> None:
    """Before anything is compiled: every batch of these must fit the model, whichever rows meet in it.

    Raises:
        ValueError: a row that is too long by itself, or two rows whose widths are, together in a batch.
    """
    rows = [(example.id, *lengths_of(example)) for example in examples]
    way_out = "set data.max_prompt_tokens and data.max_completion_tokens, which leave out and count what is longer"
    name, prompt, completion = max(rows, key=lambda row: row[1] + row[2])
    if prompt + completion > max_positions:
        raise ValueError(
            f"{name} has {prompt} tokens of prompt and {completion} of completion, together more than the model's "
            f"{max_positions} positions; {way_out}"
        )
    first, prompt, _ = max(rows, key=lambda row: row[1])
    second, _, completion = max(rows, key=lambda row: row[2])
    if prompt + completion > max_positions:
        raise ValueError(
            f"a batch that holds the prompt of {first}, {prompt} tokens, and the completion of {second}, {completion}, "
            f"is padded to more than the model's {max_positions} positions; {way_out}"
        )


def collate(examples: Sequence[Example], buckets: Buckets) -> Batch:
    """One batch, padded on the right to the buckets that hold its longest prompt and completion.

    Raises:
        ValueError: no examples, examples with different numbers of completions, or one that no bucket holds.
    """
    if not examples:
        raise ValueError("there is nothing to collate: no examples")
    return pad(examples, buckets.fit(*map(max, zip(*map(lengths_of, examples), strict=True))), len(examples))


def pad(examples: Sequence[Example], shape: tuple[int, int], num_rows: int) -> Batch:
    """NumPy batch of P, T = `shape`; rows beyond the examples are empty: all their masks are False."""
    (P, T), N = shape, len(examples[0].completions)
    others = [example for example in examples if len(example.completions) != N]
    if others:
        raise ValueError(
            f"a batch needs one number of completions: {examples[0].id} has {N}, {others[0].id} has "
            f"{len(others[0].completions)}; do not mix data of different kinds"
        )
    labelled, mixed = examples[0].labels is not None, examples[0].source is not None
    others = [example for example in examples if (example.labels is not None) != labelled]
    if others:
        raise ValueError(f"only one of {examples[0].id} and {others[0].id} has labels; do not mix data of two kinds")
    prompt_tokens, prompt_mask = np.zeros((num_rows, P), np.int32), np.zeros((num_rows, P), bool)
    completion_tokens, completion_mask = np.zeros((num_rows, N, T), np.int32), np.zeros((num_rows, N, T), bool)
    loss_mask, labels = np.zeros((num_rows, N, T), bool), np.zeros((num_rows, N), bool)
    sources = np.zeros(num_rows, np.int32)
    for b, example in enumerate(examples):
        prompt_tokens[b, : len(example.prompt)] = example.prompt
        prompt_mask[b, : len(example.prompt)] = True
        sources[b] = example.source or 0
        if example.labels is not None:
            labels[b] = example.labels
        for n, completion in enumerate(example.completions):
            completion_tokens[b, n, : len(completion)] = completion
            completion_mask[b, n, : len(completion)] = True
            loss_mask[b, n, : len(completion)] = True if example.loss_masks is None else example.loss_masks[n]
    return Batch.of(
        prompt_tokens=prompt_tokens,
        prompt_mask=prompt_mask,
        completion_tokens=completion_tokens,
        completion_mask=completion_mask,
        loss_mask=loss_mask,
        labels=labels if labelled else None,
        sources=sources if mixed else None,
    )


def _halvings(shortest: int, longest: int, num_sizes: int) -> tuple[int, ...]:
    sizes = {-(-longest // 2**halvings) for halvings in range(num_sizes)}
    return tuple(size for size in sorted(sizes) if size >= shortest)
