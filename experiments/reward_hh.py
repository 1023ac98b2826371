"""DPO's implicit reward against an explicit reward model: the same pairs, in and out of their distribution.

    python -m experiments.reward_hh --data.path pairs.jsonl --shifted other.jsonl more.jsonl

Rows as `dpo_hh` reads them. Both start from one model and see the same pairs in the same order: one trains by DPO, the
other a scalar head by the Bradley-Terry loss (Lin et al. 2024). Along training each tells chosen from rejected, among
pairs that it learns from, others of the same file, and those of the shifted files: other prompts, or responses of other
origin. They are compared at the end, and where they fit their training pairs alike. With SmolLM2, as it stands, hours
on a CPU core; with `--model.source=glassllm-en --data.max-prompt-tokens=64 --data.max-completion-tokens=63`, as it
reads 128 tokens, 20 minutes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import numpy as np
import tyro

from experiments.registry import SMOKE_PAIRS
from experiments.study import bench, pair_files, study
from experiments.study.pair_files import accuracy, longer
from pjpo import optim
from pjpo.data import preference
from pjpo.data.examples import hold_out
from pjpo.experiment import Model
from pjpo.methods import dpo, reward_model

EXPLICIT, IMPLICIT, LENGTH = "explicit", "implicit", "length alone"
MATCHED = "{}, matched"  # where both fit training pairs alike
SEEN, HELD_OUT, SHIFTED = "training pairs", "held-out pairs", "shifted, mean"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(study.Study):
    paper: ClassVar = "Limited Generalization of the Implicit Reward, Lin et al. 2024"
    start: Annotated[pair_files.Start, tyro.conf.arg(name="")]
    beta: float = 0.1  # of DPO
    num_asked: int = 256  # pairs of each kind, at most

    @property
    def setting(self) -> str:
        source, name = self.start.model.source, self.start.name
        return f"Pairs told rightly by DPO's implicit reward and by a reward model, both of {source} and `{name}`."

    @property
    def updates(self) -> tuple[int, ...]:
        return (*self.training.looks, self.training.num_steps)

    def measure(self, start: pair_files.Pairs, seed: int, record: study.Record) -> dict[str, float]:
        prompts = [example.prompt.tobytes() for example in start.pairs]
        train, held_out = hold_out(start.pairs, prompts, self.start.data.num_held_out, seed)
        sets = {SEEN: train, HELD_OUT: held_out, **start.shifted}
        sets = {name: rows[: self.num_asked] for name, rows in sets.items()}
        start_of = {
            EXPLICIT: dict.fromkeys(sets, 0.0),
            IMPLICIT: {of: start.logp_margins(start.params, rows) for of, rows in sets.items()},
        }
        margins = {EXPLICIT: start.score_margins, IMPLICIT: start.logp_margins}

        def told(name: str, params: dict) -> dict[str, float]:
            return {of: accuracy(margins[name](params, rows) - start_of[name][of]) for of, rows in sets.items()}

        looks = {}
        for name, loss, config, reference in (
            (EXPLICIT, reward_model.loss, reward_model.Config(), "none"),
            (IMPLICIT, dpo.loss, dpo.Config(beta=self.beta), "online"),
        ):
            trained = start.fit(loss, config, train, self.training, seed=seed, reference=reference)
            looks[name] = [told(name, params) for params, _ in trained]
        rule = np.sign(longer(train).mean())  # what length says of the pairs that are learned from
        rows = {name: path[-1] for name, path in looks.items()}
        rows[LENGTH] = {of: accuracy(rule * longer(examples)) for of, examples in sets.items()}
        for name, number in alike(looks).items():
            rows[MATCHED.format(name)] = looks[name][number] | {"updates": self.updates[number]}
        for name, path in looks.items():
            rows |= {along(name, number): shares for number, shares in zip(self.updates[:-1], path, strict=False)}
        for shares in rows.values() if start.shifted else ():
            shares[SHIFTED] = float(np.mean([shares[of] for of in start.shifted]))
        return {f"{row}: {of}": share for row, shares in rows.items() for of, share in shares.items()}

    def claims(self) -> study.Claims:
        claims = {}
        for when, row in (("at the end", "{}"), ("where they fit training pairs alike", MATCHED)):
            explicit, implicit = (row.format(name) for name in (EXPLICIT, IMPLICIT))
            here, there = f"{explicit}: {HELD_OUT}", f"{implicit}: {HELD_OUT}"
            claims[f"{when}, in distribution the two tell pairs alike, to 5 points"] = (
                study.Above(here, there, by=-0.05),
                study.Above(there, here, by=-0.05),
            )
            if self.start.shifted:
                claims[f"{when}, out of distribution the explicit reward model tells more pairs"] = (
                    study.Above(f"{explicit}: {SHIFTED}", f"{implicit}: {SHIFTED}"),
                )
        return claims

    def panels(self) -> list[study.Panel]:
        def panel(title: str, *rows: str) -> study.Panel:
            curves = {row: [(of, f"{row}: {of}") for of in (SEEN, HELD_OUT, *self.start.names)] for row in rows}
            return study.Panel(title=title, xlabel="pairs", ylabel="share told rightly", curves=curves)

        def path(name: str, of: str) -> list[tuple[int, str]]:
            *before, last = self.updates
            return [*((n, f"{along(name, n)}: {of}") for n in before), (last, f"{name}: {of}")]

        both = (EXPLICIT, IMPLICIT)
        curves = {f"{name}: {of}": path(name, of) for name in both for of in (SEEN, HELD_OUT)}
        return [
            panel("At the end", *both, LENGTH),
            panel("Where training pairs are fit alike", *(MATCHED.format(name) for name in both), LENGTH),
            study.Panel(title="Along training", xlabel="updates", ylabel="share told rightly", curves=curves),
        ]


def alike(looks: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, int]:
    """Which look of each to compare: the last of the one that fits its training pairs less, and the other's nearest."""
    least = min(path[-1][SEEN] for path in looks.values())
    return {
        name: min(range(len(path)), key=lambda number: (abs(path[number][SEEN] - least), -number))
        for name, path in looks.items()
    }


def along(name: str, updates: int) -> str:
    return f"{name}, {updates} updates"


EXPERIMENT = Study(
    start=pair_files.Start(
        model=Model(source="smollm2-135m-instruct", scalar_head=True),
        data=preference.Config(path="", num_held_out=256, max_prompt_tokens=192, max_completion_tokens=64),
    ),
    training=bench.Training(
        num_steps=100, looks=(20, 40, 60, 80), batch_size=8, optimizer=optim.Config(learning_rate=1e-5, warmup_steps=10)
    ),
    smoke={
        "start.model.source": "glassllm-en",
        "start.data.path": SMOKE_PAIRS,
        "start.data.num_rows": 400,
        "start.data.num_held_out": 8,
        "start.data.max_prompt_tokens": 80,
        "start.data.max_completion_tokens": 40,
        "training": bench.Training(
            num_steps=2, looks=(1,), batch_size=8, optimizer=optim.Config(learning_rate=1e-3, warmup_steps=1)
        ),
        "num_seeds": 2,
    },
)
if __name__ == "__main__":
    study.launch(EXPERIMENT)
