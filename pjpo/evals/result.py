"""What every evaluation gives: numbers, texts to read, and where there is one, the curve to compare with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

NO_SCORES = ("step", "kind", "prompt", "text")  # what a row holds beside its scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Of a policy at one moment."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # rows of prompt, text, scores by name
    best_of: dict[str, float] = dataclasses.field(default_factory=dict)  # best-of-n from it: "best_of/4/kl", ...
    words: dict[str, str] = dataclasses.field(default_factory=dict)  # findings by name, a sentence each


def side_by_side(before: Sequence[Mapping], after: Sequence[Mapping], num_shown: int = 10) -> str:
    """The samples of two results, on the same prompts, with their scores, for reading."""
    lines = []
    for number, (old, new) in enumerate(list(zip(before, after, strict=True))[:num_shown], 1):
        lines.append(f"{number:2d}. {old['prompt']} ...")
        for name, row in (("before", old), ("after", new)):
            scores = {score.removeprefix("reward_"): row[score] for score in row if score not in NO_SCORES}
            shown = "".join(f"{score} {value:+.2f}  " for score, value in scores.items())
            lines.append(f"    {name:6} {shown}{row['text'].removeprefix(old['prompt'])!r}")
    return "\n".join(lines)
