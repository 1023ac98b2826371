"""Batches in an order that a seed decides and a saved position resumes, whatever the number of hosts."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pjpo.data.buckets import Buckets, lengths_of, pad
from pjpo.data.examples import Example
from pjpo.types import Batch


class Batches(Iterator[Batch]):
    """Training batches: every epoch shuffled anew, epochs following each other without a gap.

    Rows that are left over at the end of the last epoch, too few for a batch, are dropped. Batches are made of rows of
    similar length: a window of several batches' rows is sorted by length, cut into batches, and these are shuffled.
    Order and shapes are those of the whole batch, of which each host takes its own rows: shapes agree across hosts, and
    a run goes on with another number of them.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        seed: int,
        buckets: Buckets,
        shuffle: bool = True,
        num_epochs: int | None = None,
        window: int = 32,
        shard_index: int = 0,
        shard_count: int = 1,
    ):
        """Checks and orders; tokens are padded when a batch is asked for.

        Args:
            examples: what to draw from.
            batch_size: examples in a batch, over all hosts.
            seed: of the order.
            buckets: the sizes to pad to.
            shuffle: False keeps the order of `examples`, which leaves windows unsorted too.
            num_epochs: None goes on for ever.
            window: batches whose rows are sorted by length together; 1 sorts nothing.
            shard_index: which host this is, of `shard_count`.
            shard_count: hosts.

        Raises:
            ValueError: sizes that do not fit each other, by name.
        """
        import grain  # here, because it costs a third of a second

        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("num_epochs", num_epochs, 1),
            ("window", window, 1),
            ("shard_count", shard_count, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        _check_shares(len(examples), batch_size, shard_index, shard_count)
        self.examples, self.buckets = examples, buckets
        self._batch_size, self._seed, self._shuffle = batch_size, seed, shuffle
        self._window = window if shuffle else 1
        share = batch_size // shard_count
        self._own = slice(shard_index * share, (shard_index + 1) * share)
        self._lengths = np.array([lengths_of(example) for example in examples])
        order = grain.MapDataset.range(len(examples)).seed(seed)
        order = (order.shuffle() if shuffle else order).repeat(num_epochs)
        order = order[: len(order) // batch_size * batch_size]
        self._windows = order.batch(self._window * batch_size, batch_fn=np.array)
        self._cut_window = functools.lru_cache(maxsize=1)(self._cut_window)
        batches = grain.MapDataset.range(len(order) // batch_size).map(self._batch)
        # No threads: a batch takes a fraction of a millisecond.
        self._iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position, and what it is a position in; as JSON knows it."""
        return {"position": self._iterator.get_state(), **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where `get_state` was called, with the same batches that would have come then.

        Raises:
            ValueError: the position is one in other data or another order; names what differs.
        """
        differ = {
            name: f"{state.get(name)!r} then, {value!r} now"
            for name, value in self._identity.items()
            if state.get(name) != value
        }
        if differ:
            differences = "; ".join(f"{name} was {difference}" for name, difference in differ.items())
            raise ValueError(
                f"the saved data position does not fit: {differences}. Use the same settings, or a new run"
            )
        self._iterator.set_state(state["position"])

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for example in self.examples:
            for ids in (example.prompt, *example.completions):
                digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
        return {
            "batch_size": self._batch_size,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "window": self._window,
            "buckets": [list(self.buckets.prompt_tokens), list(self.buckets.completion_tokens)],
            "num_examples": len(self.examples),
            "examples_sha256": digest.hexdigest(),
        }

    def _batch(self, index: int) -> Batch:
        rows = self._cut_window(index // self._window)[index % self._window]
        shape = self.buckets.fit(*self._lengths[rows].max(axis=0).tolist())  # of the whole batch
        own = [self.examples[row] for row in rows[self._own]]
        return pad(own, shape, len(own))

    def _cut_window(self, index: int) -> list[np.ndarray]:
        rows = self._windows[index]
        assert rows is not None, "nothing filters rows"
        if self._window == 1:
            return [rows]
        prompts, completions = self._lengths[rows].T
        sizes = np.searchsorted(self.buckets.completion_tokens, completions)
        batches = rows[np.lexsort((prompts, sizes))].reshape(-1, self._batch_size)
        return list(np.random.default_rng((self._seed, index)).permutation(batches))


def in_order(examples: Sequence[Example], batch_size: int, buckets: Buckets) -> Iterator[Batch]:
    """All examples once, for evaluation; the last batch is filled up with empty rows, whose masks are all False."""
    for start in range(0, len(examples), batch_size):
        rows = examples[start : start + batch_size]
        yield pad(rows, buckets.fit(*map(max, zip(*map(lengths_of, rows), strict=True))), batch_size)


def _check_shares(num_examples: int, batch_size: int, shard_index: int, shard_count: int) -> None:
    if not 0 <= shard_index < shard_count:
        raise ValueError(
            f"shard_index must be in 0..{shard_count - 1} as shard_count is {shard_count}, got {shard_index}"
        )
    if batch_size % shard_count:
        below, above = batch_size // shard_count * shard_count, -(-batch_size // shard_count) * shard_count
        raise ValueError(
            f"batch_size {batch_size} is not divisible by shard_count {shard_count}; use "
            + (f"{below} or {above}" if below else f"{above}")
        )
    if batch_size > num_examples:
        raise ValueError(
            f"batch_size {batch_size} is larger than the {num_examples} examples; use {num_examples} or less"
        )
