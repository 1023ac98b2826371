"""What the configs of data in files share: where the rows are, what is held out, how long a row may be."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, ClassVar

import tqdm

from pjpo import checks, distributed
from pjpo.data.encode import CutCompletion, CutPrompt, Limits, encode
from pjpo.data.examples import Data, Examples, Shape, Tally, hold_out
from pjpo.data.rows import Row, Skip
from pjpo.data.sources import open_source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """Rows of any source that `pjpo.data.sources` opens."""

    path: str  # a .jsonl, .jsonl.gz or .parquet file, or a folder; see pjpo/data/sources.py
    held_out_path: str | None = None  # rows to evaluate on
    num_held_out: int = 0  # or so many of the rows under `path`, whole prompts, drawn by `seed`
    num_rows: int | None = None  # read only the first so many
    seed: int = 0
    max_prompt_tokens: int | None = None
    cut_prompt: CutPrompt = "never"  # side to cut a longer prompt at; "never" skips the row

    read_row: ClassVar[Callable[..., Row]]
    num_completions: ClassVar[int | None] = None  # of a row that was read

    def __post_init__(self):
        checks.kinds(self)
        for name, least in (("num_held_out", 0), ("num_rows", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"data: {name} must be >= {least}, got {value}")
        if self.held_out_path and self.num_held_out:
            raise ValueError("data: held_out_path and num_held_out exclude each other; give one of them")
        _ = self.limits  # refuses bad ones

    @property
    def limits(self) -> Limits:
        names = [field.name for field in dataclasses.fields(Limits) if hasattr(self, field.name)]
        return Limits(**{name: getattr(self, name) for name in names})

    @property
    def shape(self) -> Shape:
        limits = self.limits
        return Shape(
            num_completions=self.num_completions,
            prompt_tokens=limits.max_prompt_tokens,
            completion_tokens=limits.max_completion_tokens,
        )

    def build(self, context: Any) -> Data:
        """Read and encode all rows with `context.tokenizer`, one at a time; the examples are on disk.

        Raises:
            FileNotFoundError: there is no such file; names what is near.
            ValueError: a damaged file, a row without the needed columns, or not one row that can be used.
        """
        train, prompts, tally = self._read(self.path, context.tokenizer)
        about, counts = f"{self.path}\n{tally}", collections.Counter(tally.counts)
        if self.held_out_path:
            held_out, _, tally = self._read(self.held_out_path, context.tokenizer)
            about += f"\n{self.held_out_path}\n{tally}"
            counts.update({f"held_out/{what}": count for what, count in tally.counts.items()})
        else:
            train, held_out = hold_out(train, prompts, self.num_held_out, self.seed)
        about += f"\n{len(train)} examples to train on, {len(held_out)} held out"
        return Data(train=train, held_out=held_out, counts=dict(counts), about=about)

    def _read(self, path: str, tokenizer: Any) -> tuple[Examples, list[bytes], Tally]:
        source, tally, examples, prompts = open_source(path), Tally(), Examples(), []
        limits = self.limits
        tally.counts["rows"] = min(len(source), self.num_rows or len(source))
        for index in tqdm.tqdm(
            range(tally.counts["rows"]), desc=f"reading {path}", unit="row", disable=distributed.quiet(), leave=False
        ):
            row, place = source[index], source.place(index)
            try:
                row = self.read_row(row)
                examples.append(encode(row, place, tokenizer, limits, tally))
                shared = repr(row.prompt or row.completions)  # plain text has no prompt but itself
                prompts.append(hashlib.sha256(shared.encode(errors="surrogatepass")).digest()[:16])
            except Skip as reason:
                tally.add(f"skipped, {reason}", place)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
        if not examples:
            raise ValueError(f"{path} has no row that can be used:\n{tally}")
        tally.counts["used"] = len(examples)
        return examples, prompts, tally


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completions(Prompts):
    """The same, with completions."""

    max_completion_tokens: int | None = None  # the end token counts
    cut_completion: CutCompletion = "never"  # a completion that is cut loses its end token
