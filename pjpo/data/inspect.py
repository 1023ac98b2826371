"""What training would make of a data set: python -m pjpo.data.inspect pairs.jsonl --rows 3

Prints rows as a model gets them, and tables of all rows: lengths, what would be skipped and why, and what else to know.
Tokens that count in the loss stand between « and » (green on a terminal), the prompt and what does not count between
[ and ] (blue and grey). There is no colour where the output is no terminal, or NO_COLOR is set.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import rich.console
import rich.table
import rich.text
import tqdm
import tyro

from pjpo import models
from pjpo.data import files, preference, prompts, supervised, unpaired
from pjpo.data.encode import CutCompletion, CutPrompt, encode
from pjpo.data.examples import Example, Tally
from pjpo.data.rows import Skip
from pjpo.data.sources import Source, open_source

Kind = Literal["preference", "unpaired", "supervised", "prompts"]
COLUMNS: tuple[tuple[set[str], Kind], ...] = (  # that say what a row is; the first that it has
    ({"chosen", "rejected"}, "preference"),
    ({"prompt", "completion", "label"}, "unpaired"),
    ({"prompt", "completion"}, "supervised"),
    ({"messages"}, "supervised"),
    ({"text"}, "supervised"),
    ({"prompt"}, "prompts"),
)
CONFIGS = {"preference": preference, "unpaired": unpaired, "supervised": supervised, "prompts": prompts}
QUANTILES = {"shortest": 0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1}
NEAR_TIE = 0.9  # the share of a pair's longer completion that both begin and end with
CAPTION = "examples are lines of a JSON-lines file, counted from 1, or rows of another source, from 0"
STYLES = {"prompt": "blue", "counts": "green", "does not count": "bright_black"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    # A file, a folder or tfds:name, as --data.path of an experiment.
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    tokenizer: str = "smollm2-135m-instruct"  # of this model: a packaged name, a folder, or a .gguf file
    rows: int = 3  # to print
    kind: Kind | None = None  # what the rows are; None tells by the columns of the first one
    num_rows: int | None = None  # look at only the first so many
    turns: Literal["last", "all"] = "last"  # of chat messages, which turns of the assistant are learned
    max_prompt_tokens: int | None = None
    max_completion_tokens: int | None = None
    cut_prompt: CutPrompt = "never"
    cut_completion: CutCompletion = "never"


@dataclasses.dataclass(frozen=True, eq=False)
class Findings:
    """All rows of a source, counted."""

    lengths: dict[str, array.array]  # tokens of each used row's prompt, chosen, ...
    tally: Tally
    shown: list[Example]  # the first usable rows


def kind_of(row: dict[str, Any]) -> Kind:
    """What a row with these columns is.

    Raises:
        ValueError: nothing that is known.
    """
    found = {name for name, value in row.items() if value is not None}
    for needed, kind in COLUMNS:
        if needed <= found:
            return kind
    raise ValueError(
        f"columns found: {', '.join(row) or 'none'}; needed: chosen and rejected; or prompt, completion, label; or "
        "prompt and completion; or messages; or text; or prompt. Rename or add columns"
    )


def inspect(source: Source, config: files.Prompts, tokenizer: Any, num_shown: int) -> Findings:
    """Reads all rows, as `config.build` does, and counts duplicates and near-ties besides.

    Raises:
        ValueError: a row that training would refuse; names it.
    """
    tally, lengths, shown = Tally(), collections.defaultdict(lambda: array.array("Q")), []
    seen: dict[str, set[bytes]] = {"row": set(), "prompt": set()}
    number = min(len(source), config.num_rows or len(source))
    tally.counts["rows"] = number
    for index in tqdm.tqdm(range(number), desc="reading", unit="row", disable=None, leave=False):
        place = source.place(index)
        row = source[index]
        try:
            example = encode(config.read_row(row), place, tokenizer, config.limits, tally)
        except Skip as reason:
            tally.add(f"skipped, {reason}", place)
            continue
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        tally.counts["used"] += 1
        for name, ids in zip(("prompt", *_names(example)), (example.prompt, *example.completions), strict=True):
            lengths[name].append(len(ids))
        for note in _notes(example, seen):
            tally.add(note, place)
        if len(shown) < num_shown:
            shown.append(example)
    return Findings(dict(lengths), tally, shown)


def _notes(example: Example, seen: dict[str, set[bytes]]) -> Iterator[str]:
    def digest(*parts: np.ndarray) -> bytes:
        return hashlib.sha256(b"|".join(part.tobytes() for part in parts)).digest()[:16]

    prompt, completions = example.prompt, example.completions
    if completions and len(prompt) > 1 and digest(prompt) in seen["prompt"]:  # plain text has a prompt of one token
        yield "prompt of an earlier row"
    if digest(prompt, *completions) in seen["row"]:
        yield "duplicate of an earlier row"
    elif len(completions) == 2 and digest(prompt, *completions[::-1]) in seen["row"]:
        yield "an earlier row's pair, preferred the other way round"
    seen["prompt"].add(digest(prompt))
    seen["row"].add(digest(prompt, *completions))
    if len(completions) == 2:
        longer = max(map(len, completions))
        if _alike(*completions) + _alike(*(ids[::-1] for ids in completions)) >= NEAR_TIE * longer:
            yield f"near-tie: {NEAR_TIE:.0%} of the longer completion is in both, at the beginning and the end"


def _alike(a: np.ndarray, b: np.ndarray) -> int:
    """How many first tokens are the same."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if different.size else size


def _names(example: Example) -> Sequence[str]:
    if len(example.completions) == 2:
        return "chosen", "rejected"
    return ("completion",) * len(example.completions)


def rows_as_text(examples: Sequence[Example], tokenizer: Any) -> Iterator[rich.text.Text]:
    """Each example for people: every run of tokens that counts, or does not, in its brackets and colour."""

    def run(ids: np.ndarray, kind: str) -> rich.text.Text:
        text = tokenizer.decode(ids, skip_special=False)
        text = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
        return rich.text.Text(f"«{text}»" if kind == "counts" else f"[{text}]", style=STYLES[kind])

    for example in examples:
        yield rich.text.Text(f"{example.id}  {example.columns or ''}".rstrip(), style="bold")
        yield rich.text.Text(f"prompt, {len(example.prompt)} tokens: ") + run(example.prompt, "prompt")
        for n, (name, ids) in enumerate(zip(_names(example), example.completions, strict=True)):
            mask = np.ones(len(ids), bool) if example.loss_masks is None else example.loss_masks[n]
            label = "" if example.labels is None else f" ({'' if example.labels[n] else 'un'}desirable)"
            text = rich.text.Text(f"{name}{label}, {len(ids)} tokens, {int(mask.sum())} in the loss: ")
            places = np.flatnonzero(np.diff(mask)) + 1
            for part, counts in zip(np.split(ids, places), mask[[0, *places]], strict=True):
                text += run(part, "counts" if counts else "does not count")
            yield text
        yield rich.text.Text()


def tables(findings: Findings) -> Iterator[rich.table.Table]:
    """Lengths, and what happened to rows."""
    table = rich.table.Table("tokens", *QUANTILES, "mean", title="lengths of the rows that are used")
    for name, lengths in findings.lengths.items():
        values = np.frombuffer(lengths, np.uint64)
        numbers = [f"{x:.0f}" for x in np.quantile(values, list(QUANTILES.values()), method="nearest")]
        table.add_row(name, *numbers, f"{values.mean():.1f}")
    yield table
    table = rich.table.Table("what", "rows", "share", "for example", title="all rows", caption=CAPTION)
    tally = findings.tally
    for what, count in sorted(tally.counts.items(), key=lambda item: item[0].startswith("skipped")):
        share = f"{count / max(tally.counts['rows'], 1):.1%}"
        places = ", ".join(place.rpartition(":")[2] for place in tally.places(what))
        table.add_row(rich.text.Text(what), str(count), share, places)
    yield table


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv, prog="python -m pjpo.data.inspect", description=__doc__)
    console = rich.console.Console(highlight=False)
    try:
        if options.rows < 0:
            raise ValueError(f"rows must be >= 0, got {options.rows}")
        source = open_source(options.source)
        if not len(source):
            raise ValueError(f"{options.source} has no rows")
        module = CONFIGS[options.kind or kind_of(source[0])]
        names = {field.name for field in dataclasses.fields(module.Config)}
        given = {name: value for name, value in vars(options).items() if name in names}
        config = module.Config(path=options.source, **given)
        tokenizer = models.tokenizer(options.tokenizer)
        console.print(
            f"{len(source)} rows, read as {module.__name__.rpartition('.')[2]}, in tokens of {options.tokenizer}\n"
        )
        findings = inspect(source, config, tokenizer, options.rows)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(str(error)) from None
    for item in itertools.chain(rows_as_text(findings.shown, tokenizer), tables(findings)):
        console.print(item, soft_wrap=isinstance(item, rich.text.Text))


if __name__ == "__main__":
    main()
