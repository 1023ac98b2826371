"""Rewards: plain functions from texts to numbers; several with weights, each kept apart.

    def reward(completions: list[str], *, prompts: list[str], **columns: list) -> list[float | None]

is TRL's habit: one call for all completions of a rollout, everything by keyword. Each list has one entry a completion.
A function gets what it names, or all there is if it has `**columns`: `prompts`, the columns of the data's rows, and of
samples `prompt_ids` and `completion_ids` (also those that texts do not show: a chat's marks, the end token) with
`tokenizer`, the fingerprint of the one whose ids they are. It may be called again with a part of the completions, to
find out which one makes it fail. A frozen config with such a `__call__` is a reward with settings. Its `prepare()`, if
there is one, is called before a run, and its `warm_up`, of the same arguments, before each call: that compiles on no
clock.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64

from pjpo import checks
from pjpo.data.examples import Example
from pjpo.rewards.time_limit import limited
from pjpo.types import Batch

GIVEN = ("prompts", "completions", "prompt_ids", "completion_ids", "tokenizer")  # keywords that are no columns
OnError = Literal["nan", "raise"]


@dataclasses.dataclass(frozen=True)
class Failure:
    """A completion that a reward could not score."""

    reward: str
    row: str  # the row's id
    completion: int  # which of the row's, from 0
    cause: str

    def __str__(self) -> str:
        return f"reward {self.reward!r}, row {self.row}, completion {self.completion}: {self.cause}"


class Unscored(RuntimeError):
    """A reward failed at a completion, where that stops the run."""


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """N completions of each of B prompts."""

    total: Float32[np.ndarray, "B N"]  # weighted sum of the rewards that there are; nan where there is none
    rewards: dict[str, Float32[np.ndarray, "B N"]]  # by name, not weighted; nan where one failed
    failures: list[Failure]

    @property
    def scored(self) -> Bool[np.ndarray, "B N"]:
        """Where at least one reward with a weight could score; the rest must not be learned from."""
        return np.isfinite(self.total)

    def metrics(self) -> dict[str, float]:
        """`rewards/<name>/mean` and `/std` (with n - 1) over what could be scored, and `rewards/failures`, a count.

        nan where too little could be scored.
        """
        metrics = {}
        for name, values in self.rewards.items():
            values = values[np.isfinite(values)].astype(np.float64)
            metrics[f"rewards/{name}/mean"] = float(values.mean()) if values.size else math.nan
            metrics[f"rewards/{name}/std"] = float(values.std(ddof=1)) if values.size > 1 else math.nan
        return metrics | {"rewards/failures": float(len(self.failures))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewards:
    """Functions, each with its weight.

    A completion that a function raises at, is late with, or gives None or a number that is not finite, is left out
    there and counted: its total is of the other functions. A package that is missing always stops the run.
    """

    functions: tuple[Any, ...]  # functions, configs, or names: of a module in this folder, or "module:function"
    weights: tuple[float, ...]  # one for each; 0 measures only
    names: tuple[str, ...] = ()  # under which they are logged; () takes their own
    on_error: OnError = "nan"  # leave out what fails, or raise
    # Of a call for all completions, but for its `warm_up`; then as much again, to find those that it fails for.
    timeout_seconds: float = 60.0

    def __post_init__(self):
        checks.kinds(self)
        if not self.functions or len(self.weights) != len(self.functions):
            raise ValueError(
                f"rewards: {len(self.functions)} functions with {len(self.weights)} weights; give one weight for each"
            )
        if not all(map(math.isfinite, self.weights)) or not any(self.weights):
            raise ValueError(f"rewards: weights must be finite and not all 0, got {self.weights}")
        if self.names and len(self.names) != len(self.functions):
            raise ValueError(
                f"rewards: {len(self.functions)} functions with {len(self.names)} names; name all, or none"
            )
        if not 0 < self.timeout_seconds < math.inf:
            raise ValueError(f"rewards: timeout_seconds must be > 0 and finite, got {self.timeout_seconds}")
        names = list(self.names) or [_name(function) for function in self.functions]
        if len(self.by_name) < len(names):
            raise ValueError(f"rewards: two rewards have one name among {', '.join(names)}; set `names`")

    @functools.cached_property
    def by_name(self) -> dict[str, Callable]:
        names = self.names or map(_name, self.functions)
        return dict(zip(names, map(_function, self.functions), strict=True))

    def check(self, columns: Collection[str], *, given: Collection[str] = GIVEN) -> None:
        """Whether rows with these columns can be scored; rewards that need a package, a model, ... get it now.

        Args:
            columns: that the data's rows have.
            given: what else there is to read.

        Raises:
            ValueError: a reward reads a column that is not there, or a column has a name that means something else.
            ImportError, OSError, ValueError: a reward cannot be had; what its `prepare` raises.
        """
        if hidden := set(GIVEN).intersection(columns):
            raise ValueError(f"rewards: columns cannot be named {', '.join(sorted(hidden))}; rename them in the data")
        for name, function in self.by_name.items():
            read, _ = _parameters(function)
            missing = [column for column, required in read.items() if required and column not in {*given, *columns}]
            if missing:
                raise ValueError(
                    f"reward {name!r} reads {', '.join(missing)}, but the rows have only the columns "
                    f"{', '.join(sorted(columns)) or '(none)'}; add it to the data, or leave out this reward"
                )
            if hasattr(function, "prepare"):
                function.prepare()

    def of_samples(self, batch: Batch, examples: Sequence[Example], tokenizer: Any) -> Scores:
        """Of completions as token ids; prompt and completion are together the text that they decode to.

        Args:
            batch: NumPy arrays; a row for each example.
            examples: where the prompts came from, with their columns.
            tokenizer: whose ids they are.
        """
        prompts, completions, sampled = [], [], []
        for example, rows, masks in zip(examples, batch.completion_tokens, batch.completion_mask, strict=True):
            prompts.append(tokenizer.decode(example.prompt))
            sampled.append([row[mask].tolist() for row, mask in zip(rows, masks, strict=True)])
            completions.append([_rest(tokenizer, prompts[-1], example.prompt, tokens) for tokens in sampled[-1]])
        columns, places = zip(*((example.columns, example.id) for example in examples), strict=True)
        return self.score(
            prompts,
            completions,
            columns=columns,
            ids=places,
            prompt_ids=[example.prompt.tolist() for example in examples],
            completion_ids=sampled,
            tokenizer=getattr(tokenizer, "fingerprint", None),  # a stand-in may have none
        )

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[Sequence[str]],
        *,
        columns: Sequence[Mapping[str, Any]] | None = None,
        ids: Sequence[str] | None = None,
        prompt_ids: Sequence[Sequence[int]] | None = None,
        completion_ids: Sequence[Sequence[Sequence[int]]] | None = None,
        tokenizer: str | None = None,
    ) -> Scores:
        """
        Args:
            prompts: B texts.
            completions: N texts for each.
            columns: of each row; one that only other rows have is None there.
            ids: of each row, to name it by; numbers if left out.
            prompt_ids: the prompts' tokens.
            completion_ids: the completions' tokens.
            tokenizer: the fingerprint of the one whose ids these are.

        Raises:
            ValueError: rows that do not fit each other, or a column that a reward reads and no row has.
            Unscored: a failure, where `on_error` is "raise"; names it.
            ImportError: a package that a reward needs is missing.
        """
        num_prompts, columns = len(prompts), columns or [{}] * len(prompts)
        ids = list(map(str, range(num_prompts))) if ids is None else ids
        numbers = {len(row) for row in completions}
        if {len(completions), len(columns), len(ids)} != {num_prompts} or len(numbers) != 1 or numbers == {0}:
            raise ValueError(
                f"rewards: {num_prompts} prompts with {len(completions)} rows of {sorted(numbers)} completions, "
                f"{len(columns)} rows of columns and {len(ids)} ids; give every prompt one of each, and the same "
                "number of completions"
            )
        (num_completions,) = numbers

        def for_each(rows: Sequence) -> list:
            return [row for row in rows for _ in range(num_completions)]

        keywords = {"prompts": for_each(prompts), "completions": [text for row in completions for text in row]}
        if prompt_ids is not None:
            keywords["prompt_ids"] = for_each(prompt_ids)
        if completion_ids is not None:
            keywords["completion_ids"] = [list(tokens) for row in completion_ids for tokens in row]
        if tokenizer is not None:
            keywords["tokenizer"] = for_each([tokenizer] * num_prompts)
        known = dict.fromkeys(name for row in columns for name in row)
        self.check(known, given=keywords)
        for name in known:
            keywords[name] = for_each([row.get(name) for row in columns])

        rewards, failures = {}, []
        for name, function in self.by_name.items():

            def failure(place: int, cause: str, name=name) -> Failure:
                return Failure(name, ids[place // num_completions], place % num_completions, cause)

            values, failed = self._call(function, keywords, num_prompts * num_completions, failure)
            rewards[name] = values.reshape(num_prompts, num_completions)
            failures += failed
        # What has no weight is measured only: its values are no ground to learn from.
        weighing = [(rewards[name], weight) for name, weight in zip(rewards, self.weights, strict=True) if weight]
        weighted = np.array([weight * values for values, weight in weighing])
        total = np.where(np.isfinite(weighted).any(0), np.nansum(weighted, axis=0), np.nan)
        total = np.where(np.abs(total) <= np.finfo(np.float32).max, total, np.nan)  # by a weight without bounds
        return Scores(
            total.astype(np.float32), {name: values.astype(np.float32) for name, values in rewards.items()}, failures
        )

    def _call(
        self, function: Callable, keywords: dict[str, list], num: int, failure: Callable[[int, str], Failure]
    ) -> tuple[Float64[np.ndarray, " n"], list[Failure]]:
        """Values, and failures where they are nan.

        A call that raises is halved until the completions are found. After one that is late each completion is asked
        for by itself, and may take its share of the time that is left. So all calls together take twice
        `timeout_seconds` at most, however many completions hang, and those that are quick get their values.
        """
        values, failures, todo, ends = np.full(num, np.nan), [], [range(num)], math.inf

        def fail(place: int, cause: str, error: Exception | None = None) -> None:
            failures.append(failure(place, cause))
            if self.on_error == "raise":
                raise Unscored(str(failures[-1])) from error

        while todo:
            part = todo.pop()
            share = len(part) / (len(part) + sum(map(len, todo))) / min(len(part), 2)  # half is for asking again
            seconds = min(self.timeout_seconds, (ends - time.monotonic()) * share)
            try:
                own = {key: column[part.start : part.stop] for key, column in keywords.items()}
                if hasattr(function, "warm_up"):
                    call(function.warm_up, own)
                found = limited(lambda own=own: call(function, own), max(seconds, 1e-3))  # 0 would be no limit
                if len(found) != len(part):
                    raise ValueError(f"gave {len(found)} values for {len(part)} completions")
                numbers = [math.nan if value is None else float(np.float32(value)) for value in found]
            except ImportError:
                raise
            except Exception as error:  # whatever it is, it belongs to the completions and is told with them
                ends = min(ends, time.monotonic() + self.timeout_seconds)
                if len(part) == 1:
                    fail(part.start, f"{type(error).__name__}: {error}", error)
                else:
                    size = 1 if isinstance(error, TimeoutError) else -(-len(part) // 2)
                    todo += [part[start : start + size] for start in range(0, len(part), size)][::-1]
                continue
            for place, value, number in zip(part, found, numbers, strict=True):
                if math.isfinite(number):
                    values[place] = number
                else:
                    fail(place, f"gave {value}")
        return values, failures


def known() -> list[str]:
    """Names of the rewards in this folder."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(file.stem for file in files if "\nclass Config:" in file.read_text(encoding="utf-8"))


def find(name: str) -> Callable:
    """The reward of that name, with its defaults: a module in this folder, or `module:function`.

    Raises:
        ValueError: there is none, or one that has no defaults.
    """
    module, _, attribute = name.partition(":")
    if not attribute and module not in known():
        raise ValueError(f"unknown reward {name!r}; known: {', '.join(known())}; or your own as module:function")
    try:
        found = importlib.import_module(module if attribute else f"pjpo.rewards.{module}")
        return getattr(found, attribute) if attribute else found.Config()
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(
            f"reward {name!r} is not there: {error}; give module:function, importable from here"
        ) from error
    except TypeError as error:
        raise ValueError(f"reward {name!r} has settings without a default: {error}; give it as a value") from error


def call(function: Callable, keywords: Mapping[str, list]) -> Any:
    """The function of what it reads."""
    read, takes_all = _parameters(function)
    return function(**{name: values for name, values in keywords.items() if takes_all or name in read})


def _function(reward: Any) -> Callable:
    function = find(reward) if isinstance(reward, str) else reward
    if not callable(function):
        raise ValueError(f"rewards: {reward!r} cannot be called; give a function, a config of pjpo.rewards, or a name")
    return function


def _name(reward: Any) -> str:
    """A function's own name; of a `Config` its module's."""
    if isinstance(reward, str):
        return reward.rpartition(":")[2]
    kind = type(reward)
    return getattr(
        reward, "__name__", kind.__module__.rpartition(".")[2] if kind.__name__ == "Config" else kind.__name__
    )


def _parameters(function: Callable) -> tuple[dict[str, bool], bool]:
    """The keywords it reads, with whether each is required; and whether it takes all there are.

    A reward that asks another one, its `verifier`, reads what that one reads.
    """
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    inner = _parameters(function.verifier)[0] if hasattr(function, "verifier") else {}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return inner | {p.name: p.default is p.empty for p in named}, takes_all


def _rest(tokenizer: Any, start: str, prompt: np.ndarray, completion: Sequence[int]) -> str:
    """The completion as it reads after its prompt: some tokenizers decode a text's first space away."""
    whole = tokenizer.decode([*prompt, *completion])
    return whole[len(start) :] if whole.startswith(start) else tokenizer.decode(completion)
