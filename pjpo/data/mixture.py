"""Several sources as one, drawn from by weight; what is logged is logged of each source too (see `pjpo.per_source`)."""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any

from pjpo import checks
from pjpo.data.examples import Data, Example, Examples, Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    name: str  # in metrics: source/<name>/loss
    data: Any  # a data config
    weight: float = 1.0  # of the rows that training sees, relative to the other parts'; > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Rows come in the proportions of the weights all along, each part shuffled and repeated on its own."""

    parts: tuple[Part, ...]

    def __post_init__(self):
        checks.kinds(self)
        names = [part.name for part in self.parts]
        if not names or not all(names) or len(set(names)) < len(names):
            raise ValueError(f"mixture: parts need names of their own, got {', '.join(map(repr, names)) or 'no parts'}")
        for part in self.parts:
            if not 0 < part.weight < math.inf:  # this way round, nan is refused too
                raise ValueError(
                    f"mixture: weight of {part.name!r} must be > 0 and finite, got {part.weight}; "
                    "leave out a part that is not wanted"
                )

    @property
    def shape(self) -> Shape:
        """Of all parts, where each of them knows."""
        shapes = [dataclasses.astuple(getattr(part.data, "shape", Shape())) for part in self.parts]
        most = [None if None in known else max(known) for known in zip(*shapes, strict=True)]
        return Shape(**dict(zip((field.name for field in dataclasses.fields(Shape)), most, strict=True)))

    def build(self, context: Any) -> Data:
        """Builds every part. A prompt that one part holds out is not trained on in another.

        Raises:
            ValueError: a part of which nothing is left to train on, or what its own config raises; names the part.
        """
        built = []
        for part in self.parts:
            try:
                built.append(part.data.build(context))
            except ValueError as error:
                raise ValueError(f"mixture, part {part.name!r}: {error}") from error
        held_out = Examples(
            _of_source(number, example) for number, data in enumerate(built) for example in data.held_out
        )
        taken = collections.defaultdict(set)
        for example in held_out:
            taken[_prompt(example)].add(example.source)
        train, counts, about = Examples(), collections.Counter(), []
        for number, (part, data) in enumerate(zip(self.parts, built, strict=True)):
            before = len(train)
            for example in data.train:
                if taken.get(_prompt(example), set()) - {number}:
                    counts[f"{part.name}/skipped, prompt held out in another part"] += 1
                else:
                    train.append(_of_source(number, example))
            if len(train) == before:
                raise ValueError(f"mixture: nothing of {part.name!r} is left to train on:\n{data.about}")
            counts.update({f"{part.name}/{what}": count for what, count in data.counts.items()})
            about.append(f"{part.name}, weight {part.weight:g}: {data.about}")
        about.append(f"together {len(train)} examples to train on, {len(held_out)} held out")
        total = sum(part.weight for part in self.parts)
        return Data(
            train=train,
            held_out=held_out,
            counts=dict(counts),
            about="\n".join(about),
            sources=tuple(part.name for part in self.parts),
            weights=tuple(part.weight / total for part in self.parts),
            sampled=any(data.sampled for data in built),
        )


def _of_source(number: int, example: Example) -> Example:
    return dataclasses.replace(example, source=number)


def _prompt(example: Example) -> bytes:
    """What must not be on both sides; plain text, whose prompt is one token, is itself as a whole."""
    whole = example.completions if len(example.prompt) == 1 else ()
    return b"|".join(ids.tobytes() for ids in (example.prompt, *whole))
