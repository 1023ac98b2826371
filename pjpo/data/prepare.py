"""A large JSON-lines file to a folder that opens at once: python -m pjpo.data.prepare pairs.jsonl.gz pairs

The folder is a source like any other: --data.path=pairs. It is written whole or not at all; a file with lines that are
no JSON objects is refused, with their numbers.
"""

from __future__ import annotations

import codecs
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tqdm
import tyro

from pjpo import outputs
from pjpo.data import prepared
from pjpo.data.json_lines import parse, read_lines
from pjpo.data.sources import check_file

MOST_NAMED = 10  # bad lines


@dataclasses.dataclass(frozen=True)
class Options:
    # .jsonl or .jsonl.gz, an object a line.
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    # The folder to write; it must not exist.
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]


def prepare(file: Path, out: Path) -> int:
    """Write the rows of a file into a folder; see `pjpo.data.prepared`. Returns their number.

    Raises:
        FileNotFoundError, FileExistsError: no such file; a folder that exists.
        ValueError: another kind of file, lines that cannot be read, or none at all; a place that cannot be written.
    """
    if not file.is_dir():
        check_file(str(file))
    if file.is_dir() or not str(file).endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{file} is no .jsonl or .jsonl.gz file; only these are prepared")
    outputs.check_folder(out.parent, "rows", "choose another place")
    return prepared.write(out, _rows(file), source=file.name)


def _rows(file: Path) -> Iterator[bytes]:
    bad, number_of_bad, empty = [], 0, True
    with tqdm.tqdm(total=file.stat().st_size, desc=f"reading {file}", unit="B", unit_scale=True, disable=None) as bar:
        for number, line in enumerate(read_lines(str(file), bar.update), 1):
            line = line.removeprefix(codecs.BOM_UTF8).strip()
            if not line:
                continue
            empty = False
            try:
                parse(line, f"{file.name}:{number}")
            except ValueError as error:
                number_of_bad += 1
                bad += [str(error)] * (len(bad) < MOST_NAMED)
            if not bad:
                yield line
    if bad:
        bad += [f"... and {number_of_bad - len(bad)} more"] * (number_of_bad > len(bad))
        raise ValueError(f"{file} has {number_of_bad} bad lines, so nothing is written:\n" + "\n".join(bad))
    if empty:
        raise ValueError(f"{file} has no rows; nothing is written")


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv, prog="python -m pjpo.data.prepare", description=__doc__)
    try:
        number = prepare(options.file.expanduser(), options.out.expanduser())
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; nothing is written") from None
    print(f"{number} rows in {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
