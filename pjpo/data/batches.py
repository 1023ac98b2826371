"""Batches in an order that a seed decides and a saved position resumes, whatever the number of hosts."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pjpo.data.arrange import PackedSizes, arrange
from pjpo.data.buckets import Buckets, lengths_of, pad
from pjpo.data.dealing import halve
from pjpo.data.examples import Example
from pjpo.packing import pack
from pjpo.types import Batch

WINDOW = 32  # batches that are sorted together, unless told
PACKED_WINDOW_ROWS = 65536  # the same where batches are packed


class Batches(Iterator[Batch]):
    """Training batches: every epoch shuffled anew, epochs following each other without a gap.

    Rows that are left over at the end of the last epoch, too few for a batch, are dropped. Batches are made of rows of
    similar length: a window of several batches' rows is sorted by length, cut into batches, and these are shuffled.
    Where batches are packed, those of one padded shape then exchange rows until they have the same number of tokens, so
    that few packed shapes do for all, each nearly full; which rows a window holds does not change.
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
        window: int | None = None,
        num_groups: int | None = None,
        weights: Sequence[float] = (),
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
            window: batches of one epoch whose rows are sorted by length together, at most; 1 sorts nothing. None is 32,
                or an epoch of up to 65,536 rows where batches are packed.
            num_groups: pack each batch into so many groups, over all hosts, see `pjpo.packing`; None packs nothing.
                Batches do not depend on the number; a power of two makes even groups.
            weights: where data is mixed, the share of each `Example.source`; epochs have no meaning then.
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
            ("num_groups", num_groups, 1),
            ("shard_count", shard_count, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        _check_shares(len(examples), batch_size, shard_index, shard_count)
        if num_groups is not None and (batch_size % num_groups or num_groups % shard_count):
            raise ValueError(
                f"num_groups {num_groups} must divide batch_size {batch_size} and be divisible by shard_count "
                f"{shard_count}; choose a batch_size that is a multiple of devices x microbatches"
            )
        self.examples, self.buckets = examples, buckets
        self._batch_size, self._seed, self._shuffle = batch_size, seed, shuffle
        if window is None:
            window = WINDOW if num_groups is None else max(WINDOW, PACKED_WINDOW_ROWS // batch_size)
        self._window = window if shuffle else 1
        self._num_groups, self._shard_count = num_groups, shard_count
        share = batch_size // shard_count
        self._own = slice(shard_index * share, (shard_index + 1) * share)
        sizes = np.array([(*lengths_of(example), *_tokens_of(example)) for example in examples])
        self._lengths, self._tokens = sizes[:, :2], sizes[:, 2:]
        if weights and num_epochs is not None:
            raise ValueError(f"num_epochs must be None where sources are mixed by weight, got {num_epochs}")
        self._weights = tuple(weights)
        self._order = order(examples, seed, shuffle=shuffle, num_epochs=num_epochs, weights=weights)
        self._num_batches = len(self._order) // batch_size
        self._arrange = functools.lru_cache(maxsize=2)(self._arrange)
        batches = grain.MapDataset.range(self._num_batches).map(self._batch)
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
            "packed": self._num_groups is not None,
            "weights": list(self._weights),
            "buckets": [list(self.buckets.prompt_tokens), list(self.buckets.completion_tokens)],
            "num_examples": len(self.examples),
            "examples_sha256": digest.hexdigest(),
        }

    def _batch(self, index: int) -> Batch:
        rows, shape = self._rows(index)
        own = [self.examples[row] for row in rows[self._own]]
        batch = pad(own, shape, len(own))
        if self._num_groups is None:
            return batch
        needed = self._tokens[rows].reshape(self._num_groups, -1, 2).sum(1).max(0)
        places = self._packed_sizes.fit(shape, needed)
        return pack(batch, num_groups=self._num_groups // self._shard_count, places=places)

    def _rows(self, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        """The rows of a batch, of all hosts, and its padded shape."""
        start, stop = self._window_around(index)
        rows, shape = self._arrange(start, stop)[index - start]
        if self._num_groups is not None:
            rows = rows[halve(self._tokens[rows], self._rng(index))]
        return rows, shape

    def _rng(self, *place: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, *place))

    def _window_around(self, index: int) -> tuple[int, int]:
        """First batch of the window and one past its last: a part of the batches that begin in one epoch."""
        num_rows = len(self.examples)
        epoch = index * self._batch_size // num_rows
        first, last = (-(-at * num_rows // self._batch_size) for at in (epoch, epoch + 1))
        num_windows = -(-(last - first) // self._window)
        size = -(-(last - first) // num_windows)
        start = first + (index - first) // size * size
        return start, min(start + size, last, self._num_batches)

    def _arrange(self, start: int, stop: int) -> list[tuple[np.ndarray, tuple[int, int]]]:
        """The window's batches: rows and padded shape of each."""
        rows = np.array([self._order[at] for at in range(start * self._batch_size, stop * self._batch_size)])
        lengths, tokens = self._lengths[rows], self._tokens[rows] if self._num_groups else None
        if self._window == 1:
            return [(rows, self.buckets.fit(*lengths.max(axis=0).tolist()))]
        batches = arrange(lengths, tokens, self.buckets, self._batch_size, self._rng(start))
        return [(rows[batch], shape) for batch, shape in batches]

    @functools.cached_property
    def _packed_sizes(self) -> PackedSizes:
        """Of the first window, wherever a run begins: a run that goes on has the same shapes."""
        num_completions = len(self.examples[0].completions)
        return PackedSizes(self._arrange(*self._window_around(0)), self._tokens, self._num_groups, num_completions)


def order(
    examples: Sequence[Example],
    seed: int,
    *,
    shuffle: bool = True,
    num_epochs: int | None = None,
    weights: Sequence[float] = (),
) -> Any:
    """The row at each place of a run, by index: epoch after epoch, each shuffled anew. Arguments as in `Batches`."""
    import grain  # here, because it costs a third of a second

    def repeated(rows: np.ndarray, seed: int):
        places = grain.MapDataset.range(len(rows)).seed(seed)
        return (places.shuffle() if shuffle else places).repeat(num_epochs).map(lambda at: rows[at])

    if not weights:
        return repeated(np.arange(len(examples)), seed)
    sources = np.array([example.source for example in examples])
    seeds = np.random.SeedSequence(seed).generate_state(len(weights)).tolist()
    parts = [repeated(np.flatnonzero(sources == number), seeds[number]) for number in range(len(weights))]
    return grain.MapDataset.mix(parts, weights)


def in_order(examples: Sequence[Example], batch_size: int, buckets: Buckets) -> Iterator[Batch]:
    """All examples once, for evaluation; the last batch is filled up with empty rows, whose masks are all False."""
    for start in range(0, len(examples), batch_size):
        rows = examples[start : start + batch_size]
        yield pad(rows, buckets.fit(*map(max, zip(*map(lengths_of, rows), strict=True))), batch_size)


def _tokens_of(example: Example) -> tuple[int, int]:
    """What an example computes where padding is left out: its prompt less the last token, and its completions."""
    return max(len(example.prompt) - 1, 0), sum(map(len, example.completions))


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
