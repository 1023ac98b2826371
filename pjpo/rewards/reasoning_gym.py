"""The own scorer of a reasoning-gym task, on the part of a completion that is the answer.

The scorers want the bare answer: a sentence that holds it gets a few hundredths. What counts as right is a score of 1.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, get_args

from pjpo import checks
from pjpo.rewards.answers import Extract, extract


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """From 0 to 1, as the task has it; 0 without an answer. Reads the columns `task`, a name, and `entry`, its problem.

    `pjpo.data.tasks` makes these columns.
    """

    extract: Extract = "last number"  # what of a completion is the answer

    def __post_init__(self):
        checks.one_of(self, "extract", get_args(Extract))

    def __call__(self, completions: list[str], *, task: list[str], entry: list[dict], **columns) -> list[float]:
        """
        Raises:
            ImportError: reasoning-gym is not installed.
        """
        rows = zip(completions, task, entry, strict=True)
        return [float(scorer(name)(extract(text, self.extract), problem)) for text, name, problem in rows]

    def prepare(self) -> None:
        package()


@functools.cache
def scorer(task: str) -> Any:
    """Of an answer, or None, and a problem: from 0 to 1."""
    return package().get_score_answer_fn(task)


def package():
    """The package, which takes seconds to import.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(
            "tasks of reasoning-gym need that package; install it with pip install 'pjpo[rewards]'"
        ) from error
    return reasoning_gym
