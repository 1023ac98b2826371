"""Problems of reasoning-gym as prompts, with the columns that its scorers read (see `pjpo.rewards.reasoning_gym`).

No problem is both trained on and held out: they are told apart by their expression, where the generator names one, or
else by their text, in either case without spaces. So "What is 2 + 3?" and "Calculate 2 + 3." are one problem.

Where SmolLM2-135M-Instruct starts on sums and differences of two digits: right answers, greedily and at temperature 1,
and mixed groups, those of 8 samples that are neither all right nor all wrong (standard errors over 64 problems in plain
text, 32 in chats; JAX 0.10.2, float32, seed 0). Chats are read by the last number in them, plain texts by the first.
The generator's settings are {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}.

| task             | form  | shots | template                       | tokens | greedy    | sampled   | mixed |
| ---------------- | ----- | ----- | ------------------------------ | ------ | --------- | --------- | ----- |
| chain_sum        | plain | 4     | {expression} =                 | 4      | .45 ± .06 | .39 ± .04 | .66   |
| the same, seed 1000                                               |        | .55 ± .06 | .36 ± .04 | .67   |
| chain_sum        | plain | 2     | {expression} =                 | 4      | .48 ± .06 | .39 ± .05 | .56   |
| chain_sum        | plain | 8     | {expression} =                 | 4      | .45 ± .06 | .38 ± .05 | .58   |
| chain_sum        | chat  | 2     | {expression} =                 | 8      | .06 ± .04 | .06 ± .02 | .38   |
| chain_sum        | chat  | 0     | as it comes                    | 16     | .25 ± .08 | .10 ± .02 | .59   |
| chain_sum        | chat  | 0     | What is {expression}? Reply... | 16     | .62 ± .09 | .16 ± .03 | .72   |
| basic_arithmetic | chat  | 0     | as it comes; + and - alone     | 16     | .31 ± .08 | .20 ± .04 | .62   |
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from typing import Any, Literal

from pjpo import checks
from pjpo.data.encode import Limits, encode
from pjpo.data.examples import Data, Examples, Shape, Tally
from pjpo.data.plain import plain
from pjpo.data.rows import Row
from pjpo.rewards.reasoning_gym import package, scorer

Form = Literal["chat", "plain"]
DRAWS = 100  # problems that are generated for each different one that is wanted, before giving up


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Prompts alone; their columns are `task`, `entry` (the problem as its scorer wants it) and `answer`."""

    task: str  # a name in reasoning-gym, such as chain_sum
    settings: str = "{}"  # of its generator, a JSON object: '{"min_terms": 2, "max_terms": 2}'
    num_train: int  # different problems
    num_held_out: int = 64
    form: Form = "chat"  # messages in the model's template, or plain text, one problem a line
    template: str = "{question} Reply with the answer only."  # with {question}, and what its metadata names
    num_shots: int = 0  # solved problems in front of each, earlier turns of a chat; used nowhere else
    seed: int = 0  # which problems

    def __post_init__(self):
        checks.kinds(self)
        for name, least in (("num_train", 1), ("num_held_out", 0), ("num_shots", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"tasks: {name} must be >= {least}, got {getattr(self, name)}")
        _ = self._settings  # refuses bad ones

    @property
    def shape(self) -> Shape:
        return Shape(num_completions=0)

    def build(self, context: Any) -> Data:
        """Generates, and encodes with `context.tokenizer`.

        Raises:
            ImportError: reasoning-gym is not installed.
            ValueError: an unknown task or setting, a template with a place that nothing fills, or fewer different
                problems than wanted.
        """
        entries = list(self.draw().items())
        shots, held_out, train = (
            entries[: self.num_shots],
            entries[self.num_shots : self.num_shots + self.num_held_out],
            entries[self.num_shots + self.num_held_out :],
        )
        tally = Tally()

        def encoded(problems) -> Examples:
            return Examples(
                encode(self.row(entry, [shot for _, shot in shots]), place, context.tokenizer, Limits(), tally)
                for place, entry in problems
            )

        data = Data(
            train=encoded(train),
            held_out=encoded(held_out),
            counts={"problems": len(entries), **tally.counts},
            about="",
        )
        first = context.tokenizer.decode(data.train[0].prompt)
        about = (
            f"{len(train)} problems of {self.task} to train on, {len(held_out)} others held out; the first:\n{first}"
        )
        return dataclasses.replace(data, about=about)

    def draw(self) -> dict[str, dict[str, Any]]:
        """Different problems by where they come from: those of the shots, those held out, those to train on.

        Raises:
            ImportError, ValueError: as `build`.
        """
        num_wanted = self.num_shots + self.num_held_out + self.num_train
        dataset, seen, found = self._dataset(DRAWS * num_wanted), set(), {}
        for index in range(DRAWS * num_wanted):
            entry = dataset[index]
            problem = _problem(entry)
            if problem not in seen:
                seen.add(problem)
                if not found:
                    self._check_scorer(entry)
                found[f"{self.task}:{index}"] = plain(entry)
            if len(found) == num_wanted:
                return found
        raise ValueError(
            f"tasks: {self.task} with {self.settings} has only {len(found)} different problems in {DRAWS * num_wanted} "
            f"draws, but num_shots + num_held_out + num_train is {num_wanted}; lower these, or widen settings"
        )

    def _check_scorer(self, entry: dict[str, Any]) -> None:
        """Some scorers want tuples, and examples are kept as JSON, which has none."""
        score, kept = scorer(self.task), json.loads(json.dumps(plain(entry)))
        if score(kept["answer"], kept) != score(entry["answer"], entry):
            raise ValueError(
                f"tasks: the scorer of {self.task} does not understand its problems any more once they were kept as "
                "JSON; choose another task"
            )

    def row(self, entry: dict[str, Any], shots: list[dict[str, Any]]) -> Row:
        """The problem as a prompt behind `shots`."""
        columns = {"task": self.task, "entry": entry, "answer": entry["answer"]}
        if self.form == "plain":
            lines = [f"{self._ask(shot)} {shot['answer']}\n" for shot in shots]
            return Row("".join(lines) + self._ask(entry), (), columns)
        turns = [
            {"role": role, "content": content}
            for shot in shots
            for role, content in (("user", self._ask(shot)), ("assistant", shot["answer"]))
        ]
        return Row([*turns, {"role": "user", "content": self._ask(entry)}], (), columns)

    @property
    def _settings(self) -> dict[str, Any]:
        try:
            settings = json.loads(self.settings)
        except ValueError as error:
            raise ValueError(f"tasks: settings must be a JSON object, got {self.settings!r}: {error}") from error
        if not isinstance(settings, dict) or {"seed", "size"} & settings.keys():
            raise ValueError(
                f"tasks: settings must be a JSON object without seed and size, which follow from seed and num_..., "
                f"got {self.settings!r}"
            )
        return settings

    def _dataset(self, size: int):
        reasoning_gym = package()
        known = reasoning_gym.factory.DATASETS
        if self.task not in known:
            near = ", ".join(difflib.get_close_matches(self.task, known)) or "none"
            raise ValueError(f"tasks: reasoning-gym has no task {self.task!r}; near: {near}")
        try:
            return reasoning_gym.create_dataset(self.task, seed=self.seed, size=size, **self._settings)
        except (TypeError, ValueError, AssertionError) as error:
            fields = ", ".join(field.name for field in dataclasses.fields(known[self.task][1]))
            raise ValueError(f"tasks: {self.task} refuses {self.settings}: {error}; its settings: {fields}") from error

    def _ask(self, entry: dict[str, Any]) -> str:
        places = {**entry["metadata"], "question": entry["question"]}
        try:
            return self.template.format(**places)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"tasks: template {self.template!r} cannot be filled: {error!r}; its places: {', '.join(places)}"
            ) from error


def _problem(entry: dict[str, Any]) -> str:
    return "".join(str(entry["metadata"].get("expression", entry["question"])).split())
