"""Places that results will be written to, checked before the work that makes them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def check_folder(path: str | os.PathLike, what: str, way_out: str) -> None:
    """Whether a folder is there to be written into, or could be made.

    Args:
        path: the folder.
        what: is to be written, for the message.
        way_out: the same, what to do instead.

    Raises:
        ValueError: `path` is no folder, or lies in what is none, or nothing can be written there.
    """
    path = Path(path).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"no {what} can be written to {path}: {there} is a file; {way_out}")
    try:
        tempfile.TemporaryFile(dir=there).close()  # permissions alone do not say that it works
    except OSError as error:
        raise ValueError(f"no {what} can be written to {path}: {there}: {error.strerror}; {way_out}") from None


def check_file(path: str | os.PathLike, what: str, way_out: str) -> None:
    """The same of a file, which may be there.

    Raises:
        ValueError: `path` is a folder, or none can be written where it lies.
    """
    if Path(path).is_dir():
        raise ValueError(f"no {what} can be written to {path}: it is a folder; {way_out}")
    check_folder(Path(path).absolute().parent, what, way_out)
