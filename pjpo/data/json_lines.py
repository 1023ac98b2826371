"""JSON-lines files, read a line at a time."""

from __future__ import annotations

import array
import codecs
import gzip
import json
import os
import pathlib
import weakref
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from pjpo.data.scratch import Scratch

MAX_LINE = 2**26  # bytes; a small file that unpacks to one endless line would fill memory


class JsonLines:
    """One JSON object a line, UTF-8, gzipped or not; blank lines do not count.

    What is in memory is where the lines begin. A gzipped file is unpacked once, into a temporary file.
    """

    def __init__(self, path: str):
        self.name = pathlib.Path(path).name
        self._starts, self._lengths, self._numbers = (array.array("Q") for _ in range(3))
        unpacked = Scratch() if path.endswith(".gz") else None
        start = 0
        for number, line in enumerate(read_lines(path), 1):
            if line.removeprefix(codecs.BOM_UTF8).strip():
                self._starts.append(start)
                self._lengths.append(len(line))
                self._numbers.append(number)
            if unpacked:
                unpacked.append(line)
            start += len(line)
        if unpacked:
            self._read = unpacked.read
        else:
            descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, descriptor)
            self._read = lambda start, length: os.pread(descriptor, length, start)

    def __len__(self) -> int:
        return len(self._starts)

    def place(self, index: int) -> str:
        return f"{self.name}:{self._numbers[index]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        return parse(self._read(self._starts[index], self._lengths[index]), self.place(index))


def read_lines(path: str, advance: Callable[[int], object] = lambda num_bytes: None) -> Iterator[bytes]:
    """The lines of a file, gzipped or not, with their ends; `advance` hears how many bytes of the file were read.

    Raises:
        ValueError: not a whole gzip file, or a line that is too long.
    """
    done = number = 0
    try:
        with open(path, "rb") as file, gzip.open(file) if path.endswith(".gz") else file as lines:
            while line := lines.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise ValueError(
                        f"{path}:{number}: the line is longer than {MAX_LINE:,} bytes; one object a line is read"
                    )
                advance(file.tell() - done)
                done = file.tell()
                yield line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}); fetch or compress it again") from error


def parse(line: bytes, place: str) -> dict[str, Any]:
    """The columns on a line.

    Raises:
        ValueError: not UTF-8, not JSON, or no object; names the place.
    """
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
        json.dumps(row, ensure_ascii=False).encode()  # an escaped half of a surrogate pair is no text
    except UnicodeError as error:
        raise ValueError(f"{place}: the line is not UTF-8: {error}; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: the line is not JSON: {error}; one object a line is read") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: the line holds a {type(row).__name__}, not an object of columns")
    return row
