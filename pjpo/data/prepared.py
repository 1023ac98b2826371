"""Folders of rows in ArrayRecord, written once from a large file and read at random access ever after.

rows.array_record   a row's JSON in each record, checksummed
about.json          format, source, number of rows, bytes; written last, so that a folder without it is half a folder
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterable
from typing import Any

from pjpo.data.json_lines import parse

ROWS, ABOUT = "rows.array_record", "about.json"
FORMAT = "pjpo rows, version 1"


def is_prepared(folder: pathlib.Path) -> bool:
    """Whether `write` made it, or half of it."""
    return (folder / ROWS).exists()


def write(folder: pathlib.Path, rows: Iterable[bytes], source: str) -> int:
    """Rows, as JSON each, into a new folder; whole or not at all. Returns how many.

    Raises:
        FileExistsError: there is something under that name already.
        OSError: the disk is full.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    if folder.exists():
        raise FileExistsError(f"{folder} exists already; remove it, or choose another name")
    beside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    beside.mkdir(parents=True)
    try:
        number = 0
        try:
            writer = ArrayRecordWriter(str(beside / ROWS), "group_size:1")  # one record is read without its neighbours
            for row in rows:
                writer.write(row)
                number += 1
            writer.close()
        except RuntimeError as error:  # the writer's only one
            raise OSError(f"{folder} cannot be written: {error}; make room or choose another place") from error
        about = {"format": FORMAT, "source": source, "num_rows": number, "num_bytes": (beside / ROWS).stat().st_size}
        (beside / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
        os.rename(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return number


class Prepared:
    """The rows of a prepared folder; they count from 0."""

    def __init__(self, folder: pathlib.Path):
        """
        Raises:
            ValueError: a folder that is half-written, damaged, or of another version.
        """
        from array_record.python.array_record_module import ArrayRecordReader

        self.name = folder.name
        again = "prepare it again: python -m pjpo.data.prepare FILE.jsonl OUT"
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            form, self._num_rows, num_bytes = (about[name] for name in ("format", "num_rows", "num_bytes"))
        except FileNotFoundError:
            raise ValueError(f"{folder} is half-written: it has rows, but no {ABOUT}; {again}") from None
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{folder / ABOUT} is damaged ({error!r}); {again}") from error
        if form != FORMAT:
            raise ValueError(f"{folder} is of the format {form!r}, this reads {FORMAT!r}; {again}")
        found = (folder / ROWS).stat().st_size
        if found != num_bytes:
            raise ValueError(f"{folder} is half-written: {ROWS} has {found} of its {num_bytes} bytes; {again}")
        try:
            self._reader = ArrayRecordReader(str(folder / ROWS))
            num_rows = self._reader.num_records()
        except RuntimeError as error:
            raise ValueError(f"{folder / ROWS} is damaged ({error}); {again}") from error
        if num_rows != self._num_rows:
            raise ValueError(f"{folder / ROWS} is damaged: it holds {num_rows} of {self._num_rows} rows; {again}")

    def __len__(self) -> int:
        return self._num_rows

    def place(self, index: int) -> str:
        return f"{self.name}:{index}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            return parse(self._reader.read([index])[0], self.place(index))
        except RuntimeError as error:
            raise ValueError(
                f"{self.place(index)}: the record is damaged ({error}); prepare the folder again"
            ) from error
