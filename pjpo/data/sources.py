"""Rows at random access: JSON-lines files, and TFDS builders read without TensorFlow.

A source has `len`, `source[i] -> dict` of plain Python values, and `place(i)`, which names a row for people.
"""

from __future__ import annotations

import codecs
import difflib
import gzip
import json
import os
import pathlib
import zlib
from typing import Any

import numpy as np

TFDS = "tfds:"


def open_source(path: str) -> JsonLines | TfdsSplit:
    """The rows under `path`.

    Args:
        path: a `.jsonl` or `.jsonl.gz` file; or a prepared TFDS data set, as its folder (the one that holds
            dataset_info.json) or as `tfds:name/config:version`, either with `#split` behind it (`#train` if not).

    Raises:
        FileNotFoundError: nothing there; names what is nearest.
        ValueError: something else than the above, or a file that is damaged.
    """
    if not path:
        raise ValueError("no data file is given; name one with --data.path=pairs.jsonl")
    path = os.path.expanduser(path)
    location, _, split = path.partition("#")
    if path.startswith(TFDS) or pathlib.Path(location).is_dir():
        return TfdsSplit(location, split or "train")
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; {_nearest(pathlib.Path(path))}")
    if not path.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{path} is neither a .jsonl or .jsonl.gz file, nor a TFDS folder, nor {TFDS}name; convert it")
    return JsonLines(path)


class JsonLines:
    """One JSON object a line, UTF-8, gzipped or not; blank lines do not count. The file is held in memory, unparsed."""

    def __init__(self, path: str):
        file = pathlib.Path(path)
        self.name = file.name
        data = file.read_bytes()
        if path.endswith(".gz"):
            try:
                data = gzip.decompress(data)
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"{path} is not a whole gzip file ({error}); fetch or compress it again") from error
        lines = data.removeprefix(codecs.BOM_UTF8).split(b"\n")
        self._lines = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]

    def __len__(self) -> int:
        return len(self._lines)

    def place(self, index: int) -> str:
        return f"{self.name}:{self._lines[index][0]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            row = json.loads(self._lines[index][1].decode())
            json.dumps(row, ensure_ascii=False).encode()  # an escaped half of a surrogate pair is no text
        except UnicodeError as error:
            raise ValueError(f"{self.place(index)}: the line is not UTF-8: {error}; save the file as UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{self.place(index)}: the line is not JSON: {error}; one object a line is read"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{self.place(index)}: the line holds a {type(row).__name__}, not an object of columns")
        return row


class TfdsSplit:
    """A split of a prepared TFDS data set in the array_record format; rows count from 0."""

    def __init__(self, location: str, split: str):
        import tensorflow_datasets as tfds  # here, because it costs a third of a second

        if location.startswith(TFDS):
            name = location.removeprefix(TFDS)
            try:
                builder = tfds.builder(name)
            except tfds.core.DatasetNotFoundError:
                near = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False))
                raise FileNotFoundError(f"TFDS has no data set {name!r}; near: {', '.join(near) or 'none'}") from None
        else:
            folder = pathlib.Path(location)
            if not (folder / "dataset_info.json").is_file():
                found = [
                    str(info.parent) for depth in ("*", "*/*") for info in folder.glob(f"{depth}/dataset_info.json")
                ]
                raise ValueError(
                    f"{location} holds no dataset_info.json, so it is not a prepared TFDS data set; "
                    f"below it are: {', '.join(sorted(found)) or 'none'}"
                )
            builder = tfds.builder_from_directory(folder)
        splits = list(builder.info.splits or ())
        if split.partition("[")[0] not in splits:
            raise ValueError(
                f"{location} has no split {split!r}, only: {', '.join(splits) or 'none'}; choose one with #split, or "
                "prepare the data set with download_and_prepare(), file_format='array_record'"
            )
        self.name = f"{builder.info.full_name}#{split}"
        try:
            # tfds wraps this function in a way that hides its arguments from pyright.
            self._rows = builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]
        except NotImplementedError as error:
            raise ValueError(
                f"{location} is not stored as array_record, which is what can be read at random access; "
                "prepare it again, in another data_dir, with file_format='array_record'"
            ) from error

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, index: int) -> str:
        return f"{self.name}:{index}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return {name: _plain(value) for name, value in self._rows[index].items()}
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.place(index)}: text that is not UTF-8: {error}; prepare it as UTF-8") from error


def _plain(value: Any) -> Any:
    """TFDS hands out bytes, NumPy values, and a sequence of dicts as a dict of sequences."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        value = {name: _plain(item) for name, item in value.items()}
        if set(value) == {"role", "content"} and isinstance(value["role"], list):  # chat messages
            return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    return value


def _nearest(file: pathlib.Path) -> str:
    folder = next(parent for parent in file.absolute().parents if parent.is_dir())
    missing = file.absolute().relative_to(folder).parts[0]  # the file, or the first folder on the way that is not there
    near = difflib.get_close_matches(missing, [entry.name for entry in folder.iterdir()])
    return f"nothing in {folder} is named {missing!r}; near: {', '.join(near) or 'none'}"
