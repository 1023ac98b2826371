"""Built data on disk, so that a run that goes on trains on what it began with."""

import dataclasses
import json
import pathlib

import numpy as np

from pjpo.data.examples import Data, Example, Examples
from pjpo.runs import write_whole

ABOUT = ("counts", "about", "sources", "weights", "sampled")
PARTS = ("train", "held_out")


def save(path: pathlib.Path, data: Data) -> None:
    """Built data as JSON lines, a row for each example; whole or not at all."""
    rows: list[dict] = [{name: getattr(data, name) for name in ABOUT}]
    rows[0]["examples"] = {part: len(getattr(data, part)) for part in PARTS}
    for part in PARTS:
        for example in getattr(data, part):
            fields = {field.name: getattr(example, field.name) for field in dataclasses.fields(example)}
            rows.append({"part": part} | {name: _plain(value) for name, value in fields.items()})
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def load(path: pathlib.Path) -> Data:
    """What `save` wrote.

    Raises:
        ValueError: the file is damaged; names it.
    """
    parts = {part: Examples() for part in PARTS}
    try:
        first, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        for row in rows:
            parts[row.pop("part")].append(_example(row))
        found = {part: len(examples) for part, examples in parts.items()}
        if (written := first.pop("examples", found)) != found:  # which files of earlier versions do not say
            raise ValueError(f"{written} examples were written, {found} are there")
        about = {name: tuple(value) if isinstance(value, list) else value for name, value in first.items()}
        return Data(**parts, **about)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}), and the run's data with it; start a new run") from error


def _plain(value):
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _example(row: dict) -> Example:
    masks, labels = row["loss_masks"], row["labels"]
    return Example(
        prompt=np.array(row["prompt"], np.int32),
        completions=tuple(np.array(ids, np.int32) for ids in row["completions"]),
        columns=row["columns"],
        id=row["id"],
        loss_masks=masks and tuple(np.array(mask, bool) for mask in masks),
        labels=labels and tuple(labels),
        source=row["source"],
    )
