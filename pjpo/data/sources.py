"""Rows at random access, whatever they are kept in: one function from a path to a source.

A source has `len`, `source[i] -> dict` of plain Python values as JSON knows them, and `place(i)`, which names a row for
people. None holds its rows in memory.
"""

from __future__ import annotations

import difflib
import os
import pathlib
from typing import Any, Protocol, runtime_checkable

from pjpo.data import json_lines, parquet, prepared, tfds_split


@runtime_checkable
class Source(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def place(self, index: int) -> str: ...


def open_source(path: str) -> Source:
    """The rows under `path`.

    Args:
        path: one of
            - a `.jsonl` or `.jsonl.gz` file;
            - a `.parquet` file, or a folder of them named `<split>-....parquet`, as hubs have them;
            - a folder that `python -m pjpo.data.prepare` wrote;
            - a prepared TFDS data set, as its folder (the one that holds dataset_info.json) or as
              `tfds:name/config:version`.
            Behind what has splits, `#split` chooses one; `#train` if nothing does.

    Raises:
        FileNotFoundError: nothing there; names what is nearest.
        ValueError: something else than the above, a split that does not exist (with those that do), or a file that is
            damaged.
    """
    if not path:
        raise ValueError("no data file is given; name one with --data.path=pairs.jsonl")
    path = os.path.expanduser(path)
    location, _, split = path.partition("#")
    folder = pathlib.Path(location)
    if path.startswith(tfds_split.PREFIX):
        return tfds_split.TfdsSplit(location, split or "train")
    if folder.is_dir():
        if prepared.is_prepared(folder):
            return prepared.Prepared(folder)
        if parquet.files(folder):
            return parquet.Parquet.of_folder(folder, split or "train")
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            raise ValueError(
                f"{folder} was written by save_to_disk of Hugging Face's datasets; write Parquet from there instead, "
                "dataset.to_parquet('train.parquet')"
            )
        return tfds_split.TfdsSplit(location, split or "train")
    check_file(path)
    if path.endswith(".parquet"):
        return parquet.Parquet(path)
    if path.endswith((".jsonl", ".jsonl.gz")):
        return json_lines.JsonLines(path)
    raise ValueError(
        f"{path} is neither a .jsonl, .jsonl.gz or .parquet file, nor a folder of rows, nor {tfds_split.PREFIX}name; "
        "convert it"
    )


def check_file(path: str) -> None:
    """
    Raises:
        FileNotFoundError: it is not there; names what is near.
    """
    if "://" in path:
        raise FileNotFoundError(f"{path} is an address, and nothing is downloaded; fetch the file and give its path")
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; {_nearest(pathlib.Path(path))}")


def _nearest(file: pathlib.Path) -> str:
    folder = next(parent for parent in file.absolute().parents if parent.is_dir())
    missing = file.absolute().relative_to(folder).parts[0]  # the file, or the first folder on the way that is not there
    near = difflib.get_close_matches(missing, [entry.name for entry in folder.iterdir()])
    return f"nothing in {folder} is named {missing!r}; near: {', '.join(near) or 'none'}"
