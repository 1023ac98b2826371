"""Reward-augmented pairs: a prompt that asks for a score, twice. Zhang et al. 2024, arXiv:2410.08067, section 4.

Asked for the chosen completion's score, that one is the better answer; asked for the rejected completion's score, the
rejected one is. So each scored pair becomes two, the second with its completions swapped, as the paper has it. At
test time ask for the top of the scale, `Scale.high`.
"""

from __future__ import annotations

import dataclasses
import numbers
import string
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

Score = float | int | np.floating | np.integer
TEXT = (
    "You are an assistant that replies at a requested level of quality. The level wanted, from {low} to {high}: {goal}"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """What scores mean, and how a prompt asks for one."""

    low: float = 1.0
    high: float = 10.0
    text: str = TEXT  # with places for {goal}, {low} and {high}
    has_system_role: bool = True  # of the chat template; without it the text goes in front of the first message

    def __post_init__(self):
        if not self.low < self.high:
            raise ValueError(f"relabel: the scale must rise, got {self.low} to {self.high}")
        places = {name for _, name, _, _ in string.Formatter().parse(self.text) if name is not None}
        if not {"goal"} <= places <= {"goal", "low", "high"}:
            raise ValueError(
                f"relabel: text must have the place {{goal}}, and may have {{low}} and {{high}}, got {self.text!r}; "
                "write other braces twice"
            )

    def check(self, goal: Any, where: str = "") -> None:
        """
        Raises:
            ValueError: what is no number, or outside the scale; `where` says whose it is.
        """
        if not isinstance(goal, numbers.Real) or isinstance(goal, bool):
            raise ValueError(f"relabel: {where}a goal must be a number, got {goal!r}; convert it")
        if not self.low <= float(goal) <= self.high:  # nan is not
            raise ValueError(
                f"relabel: {where}a goal must be within {spell(self.low)} and {spell(self.high)}, got {goal}; set the "
                "scale that the scores have"
            )

    def ask(self, prompt: str | list[dict[str, str]], goal: Score) -> str | list[dict[str, str]]:
        """The prompt, text or chat messages, with the goal in it.

        Raises:
            ValueError: a goal outside the scale.
        """
        self.check(goal)
        text = self.text.format(goal=spell(goal), low=spell(self.low), high=spell(self.high))
        if isinstance(prompt, str):
            return f"{text}\n\n{prompt}"
        first, *rest = prompt
        if first["role"] == "system" or not self.has_system_role:
            return [first | {"content": f"{text}\n\n{first['content']}"}, *rest]
        return [{"role": "system", "content": text}, *prompt]


def spell(score: Score) -> str:
    """Whole numbers without decimals: "9", "7.5"; of others as many as tell them apart, up to 12 digits."""
    if float(score).is_integer():
        return str(int(score))
    return f"{float(str(score)) if isinstance(score, np.floating) else float(score):.12g}"  # 7.1, of float32 too


def reward(score: Score, goal: Score) -> float:
    """How well a completion of that score meets the goal: -(goal - score)^2."""
    return float(-((goal - score) ** 2))


def relabel(
    rows: Iterable[dict[str, Any]], scale: Scale = Scale(), *, ties: Literal["drop", "keep"] = "drop"
) -> list[dict[str, Any]]:
    """Two rows for each: columns `goal`, `chosen_reward`, `rejected_reward` and `tie` beside those that were there.

    Args:
        rows: `prompt` (optional), `chosen`, `rejected`, `score_chosen`, `score_rejected`.
        scale: of the scores.
        ties: scores that are spelled alike give two rows that contradict each other and pull the margin to zero;
            dropped unless "keep".

    Raises:
        ValueError: missing columns, a score that is no number or outside the scale, in a tie too.
    """
    if ties not in ("drop", "keep"):
        raise ValueError(f"relabel: ties must be 'drop' or 'keep', got {ties!r}")
    relabelled = []
    for number, row in enumerate(rows):
        missing = {"chosen", "rejected", "score_chosen", "score_rejected"} - row.keys()
        if missing:
            raise ValueError(f"relabel: row {number} lacks {', '.join(sorted(missing))}; found {', '.join(row)}")
        for column in ("score_chosen", "score_rejected"):
            scale.check(row[column], f"row {number}, {column}: ")
        high, low = row["score_chosen"], row["score_rejected"]
        is_tie = spell(high) == spell(low)
        if is_tie and ties == "drop":
            continue
        for goal, swapped in ((high, False), (low, True)):
            first, second = ("rejected", "chosen") if swapped else ("chosen", "rejected")
            asked = {"prompt": scale.ask(row["prompt"], goal)} if "prompt" in row else {}
            relabelled.append(
                row
                | asked
                | {
                    "goal": spell(goal),
                    "chosen": row[first],
                    "rejected": row[second],
                    "score_chosen": row[f"score_{first}"],
                    "score_rejected": row[f"score_{second}"],
                    "chosen_reward": reward(row[f"score_{first}"], goal),
                    "rejected_reward": reward(row[f"score_{second}"], goal),
                    "tie": is_tie,
                }
            )
    return relabelled
