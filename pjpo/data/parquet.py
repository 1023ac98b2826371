"""Parquet files, a row group in memory at a time."""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from pjpo.data.plain import plain


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The Parquet files of a folder, or of `data/` in it, where hubs put them."""
    return sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))


class Parquet:
    """The rows of one or several files, in their order; rows of a file count from 0."""

    def __init__(self, *paths: str | pathlib.Path):
        """
        Raises:
            ValueError: a file that is damaged, or no Parquet file.
        """
        import pyarrow.parquet  # here, because it costs a tenth of a second

        self._paths, self._files = list(map(pathlib.Path, paths)), []
        groups = []  # (file, row group, first row) of each row group
        sizes = []
        for number, path in enumerate(self._paths):
            with _named(str(path)):
                self._files.append(pyarrow.parquet.ParquetFile(path, page_checksum_verification=True))
                metadata, first = self._files[-1].metadata, 0
                for group in range(metadata.num_row_groups):
                    groups.append((number, group, first))
                    sizes.append(metadata.row_group(group).num_rows)
                    first += sizes[-1]
        self._groups, self._ends = groups, np.cumsum(sizes, dtype=np.int64)
        self._table = functools.lru_cache(maxsize=1)(self._table)

    @classmethod
    def of_folder(cls, folder: pathlib.Path, split: str) -> Parquet:
        """The files named `<split>-....parquet` or `<split>.parquet`.

        Raises:
            ValueError: there is no such split; names those that are there.
        """
        splits: dict[str, list[pathlib.Path]] = {}
        for path in files(folder):
            splits.setdefault(path.stem.split("-")[0], []).append(path)
        if split not in splits:
            raise ValueError(
                f"{folder} has no split {split!r}, only: {', '.join(splits)}; choose one with #split behind the folder"
            )
        return cls(*splits[split])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def place(self, index: int) -> str:
        number, _, first, row = self._find(index)
        return f"{self._paths[number].name}:{first + row}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, group, _, row = self._find(index)
        with _named(self.place(index)):
            rows = self._table(number, group).slice(row, 1)
        try:
            return {name: plain(value) for name, value in rows.to_pylist()[0].items()}
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.place(index)}: bytes that are not UTF-8: {error}; store text as strings"
            ) from error
        except (ValueError, OverflowError, LookupError) as error:  # times and zones that Python has not
            raise ValueError(
                f"{self.place(index)}: a value that Python cannot hold: {error}; leave its column out, or store text"
            ) from error

    def _find(self, index: int) -> tuple[int, int, int, int]:
        """File, row group, the group's first row in the file, row in the group."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        at = int(np.searchsorted(self._ends, index, side="right"))
        return *self._groups[at], index - int(self._ends[at - 1] if at else 0)

    def _table(self, number: int, group: int):
        return self._files[number].read_row_group(group)


@contextlib.contextmanager
def _named(place: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # corrupt pages raise OSError
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the machine's
        raise ValueError(f"{place} is not readable Parquet ({error}); fetch or write the file again") from error
