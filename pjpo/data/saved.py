"""Built data on disk, so that a run that goes on trains on what it began with."""

import json
import pathlib

import numpy as np

from pjpo.data.examples import Data, Example
from pjpo.runs import write_whole


def save(path: pathlib.Path, data: Data) -> None:
    """Built data as JSON lines, a row for each example; whole or not at all."""
    rows = [{"counts": data.counts, "about": data.about}]
    for part in ("train", "held_out"):
        for example in getattr(data, part):
            completions = [completion.tolist() for completion in example.completions]
            rows.append(
                {"part": part, "prompt": example.prompt.tolist(), "completions": completions}
                | {"columns": example.columns, "id": example.id}
            )
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def load(path: pathlib.Path) -> Data:
    """What `save` wrote."""
    first, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    parts: dict[str, list[Example]] = {"train": [], "held_out": []}
    for row in rows:
        completions = tuple(np.array(completion, np.int32) for completion in row["completions"])
        prompt = np.array(row["prompt"], np.int32)
        parts[row["part"]].append(Example(prompt, completions, row["columns"], row["id"]))
    return Data(train=parts["train"], held_out=parts["held_out"], counts=first["counts"], about=first["about"])
