"""TFDS builders, read without TensorFlow."""

from __future__ import annotations

import difflib
import json
import pathlib
import re
from typing import Any

from pjpo.data.plain import plain

PREFIX = "tfds:"
FEATURES = "tensorflow_datasets.core.features."  # where TFDS has its own kinds of columns
MOST_NESTED = 50  # levels of features.json; TFDS's own use a dozen


class TfdsSplit:
    """A split of a prepared TFDS data set in the array_record format; rows count from 0.

    A data set from a stranger runs no code, and leads to no file outside its folder.
    """

    def __init__(self, location: str, split: str):
        import tensorflow_datasets as tfds  # here, because it costs a third of a second

        if location.startswith(PREFIX):
            name = location.removeprefix(PREFIX)
            if stem := re.match(r"\w+", name):  # of every version that was prepared
                for file in pathlib.Path(tfds.core.constants.DATA_DIR, stem[0]).expanduser().rglob("features.json"):
                    _check_features(file)
            try:
                builder = tfds.builder(name)
            except tfds.core.DatasetNotFoundError:
                near = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False))
                raise FileNotFoundError(f"TFDS has no data set {name!r}; near: {', '.join(near) or 'none'}") from None
            except (ValueError, AssertionError) as error:  # how it tells of names, configs and versions
                about = str(error).partition("\n")[0]
                raise ValueError(f"TFDS refuses {name!r}: {about}; name it as in tfds:name/config:1.0.0") from error
        else:
            folder = pathlib.Path(location)
            if not (folder / "dataset_info.json").is_file():
                found = [info.parent for depth in ("*", "*/*") for info in folder.glob(f"{depth}/dataset_info.json")]
                found += folder.glob("*.jsonl*")
                raise ValueError(
                    f"{location} holds no dataset_info.json, as a prepared TFDS data set does, and no Parquet files; "
                    f"what can be read below it: {', '.join(sorted(map(str, found))) or 'nothing'}"
                )
            if (folder / "features.json").is_file():
                _check_features(folder / "features.json")
            builder = tfds.builder_from_directory(folder)
        splits = list(builder.info.splits or ())
        if split.partition("[")[0] not in splits:
            raise ValueError(
                f"{location} has no split {split!r}, only: {', '.join(splits) or 'none'}; choose one with #split, or "
                "prepare the data set with download_and_prepare(), file_format='array_record'"
            )
        _check_inside(builder.info.splits[split.partition("[")[0]], pathlib.Path(builder.data_dir))
        self.name = f"{builder.info.full_name}#{split}"
        try:
            # tfds wraps this function in a way that hides its arguments from pyright.
            self._rows = builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]
        except (ValueError, AssertionError) as error:  # a part in brackets that it cannot cut
            about = str(error).partition("\n")[0]
            raise ValueError(f"{location} has no part {split!r}: {about}; cut as in #train[:80%]") from error
        except NotImplementedError as error:
            raise ValueError(
                f"{location} is not stored as array_record, which is what can be read at random access; "
                "prepare it again, in another data_dir, with file_format='array_record'"
            ) from error
        _check_shards(builder.info.splits[split.partition("[")[0]], location)

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, index: int) -> str:
        return f"{self.name}:{index}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return {name: plain(value) for name, value in self._rows[index].items()}
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.place(index)}: text that is not UTF-8: {error}; prepare it as UTF-8") from error


def _check_features(file: pathlib.Path) -> None:
    """TFDS imports the module of every class that the file names, which runs what is in it.

    Raises:
        ValueError: no JSON, nested too deeply, or a class that is not TFDS's own.
    """

    def check(value: Any, depth: int) -> None:
        if depth > MOST_NESTED:
            raise ValueError(f"{file} is nested in more than {MOST_NESTED} levels; prepare the data set again")
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            # Proto's two spellings, and what came before it.
            named = key in ("pythonClassName", "python_class_name", "type") and isinstance(inner, str)
            if named and not inner.startswith(FEATURES):
                raise ValueError(
                    f"{file} asks for the class {inner!r}, whose module would be run; allowed: {FEATURES}... Write "
                    "the rows as JSON lines or Parquet, or prepare them with TFDS's own features"
                )
            if key == "json" and isinstance(inner, str):  # JSON in JSON
                inner = _json(inner, file)
            if isinstance(inner, dict | list):
                check(inner, depth + 1)

    check([_json(file.read_bytes(), file)], 0)


def _json(text: str | bytes, file: pathlib.Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not a readable JSON file: {error}; prepare the data set again") from error


def _check_inside(split: Any, folder: pathlib.Path) -> None:
    """
    Raises:
        ValueError: dataset_info.json names a file that is not the folder's own.
    """
    for path in map(pathlib.Path, split.filepaths):
        if path.parent != folder:
            raise ValueError(f"{folder / 'dataset_info.json'} names {str(path)!r}; allowed: files of its own folder")


def _check_shards(split: Any, location: str) -> None:
    """
    Raises:
        ValueError: a file that is missing, cut short or damaged.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    for path, expected in zip(split.filepaths, split.shard_lengths, strict=True):
        try:
            found = ArrayRecordReader(str(path)).num_records() if pathlib.Path(path).exists() else 0
        except RuntimeError:  # the reader's only one: no footer
            found = 0
        if found != expected:
            raise ValueError(
                f"{location} is half-written or damaged: {pathlib.Path(path).name} has {found} of its {expected} rows; "
                "prepare it again"
            )
