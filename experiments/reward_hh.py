"""DPO's implicit reward against an explicit reward model: the same pairs, in and out of their distribution.

    python -m experiments.reward_hh --data.path pairs.jsonl --shifted other.jsonl more.jsonl

Rows as `dpo_hh` reads them. Both start from one model and see the same pairs in the same order: one trains by DPO, the
other a scalar head by the Bradley-Terry loss (Lin et al. 2024). Then each tells chosen from rejected, among pairs that
it has seen, others of the same file, and those of the shifted files: other prompts, or responses of other origin. With
SmolLM2, as it stands, hours on a CPU core; with `--model.source=glassllm-en --data.max-prompt-tokens=64
--data.max-completion-tokens=63`, as it reads 128 tokens, minutes.
"""

import dataclasses
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import jax
import numpy as np
import tyro

from experiments.study import bench, study
from pjpo import models, optim, pairs
from pjpo.data import preference
from pjpo.data.batches import in_order
from pjpo.data.buckets import collate
from pjpo.data.examples import Example, Examples, hold_out
from pjpo.experiment import Model
from pjpo.logps import sum_completion
from pjpo.methods import dpo, reward_model
from pjpo.types import CHOSEN, REJECTED, Batch

EXPLICIT, IMPLICIT, LENGTH = "explicit", "implicit", "length alone"
SEEN, HELD_OUT, SHIFTED = "training pairs", "held-out pairs", "shifted, mean"


@dataclasses.dataclass(frozen=True)
class Pairs(bench.Bench):
    """The start of both, and what they are trained and asked on."""

    pairs: Examples
    shifted: dict[str, Sequence[Example]]  # by the file's name

    def margins(self, name: str, params: dict, rows: Sequence[Example]) -> np.ndarray:
        """By how much the reward prefers chosen [n]."""

        def rewards(batch: Batch):
            if name == EXPLICIT:
                return self.policy.scores(params, batch)
            ratios = self.policy.logps(params, batch) - self.policy.logps(self.params, batch)
            return sum_completion(ratios, batch.loss_mask)

        batches = in_order(rows, 8, bench.buckets_of(rows))
        return np.concatenate([pairs.margins(rewards(batch)) for batch in batches])[: len(rows)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    model: Model  # with a scalar head
    data: preference.Config  # num_held_out of its pairs are drawn anew by every seed
    shifted: tuple[str, ...] = ()  # files of pairs from elsewhere

    def load(self) -> Pairs:
        reader = types.SimpleNamespace(tokenizer=models.tokenizer(self.model.source))
        everything = dataclasses.replace(self.data, num_held_out=0)
        files = {path: dataclasses.replace(everything, path=path) for path in (self.data.path, *self.shifted)}
        found = {path: config.build(reader) for path, config in files.items()}
        print(*(data.about for data in found.values()), sep="\n")
        rows, *shifted = ((Path(path).name, data.train) for path, data in found.items())
        start = bench.Config(model=self.model).load()
        every = [example for _, rows in (rows, *shifted) for example in rows]
        # What is too long for the model is refused here, before any training.
        jax.eval_shape(start.policy.logps, start.params, collate(every[:1], bench.buckets_of(every)))
        return Pairs(start.config, start.policy, start.params, start.tokenizer, rows[1], dict(shifted))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(study.Study):
    paper: ClassVar = "Limited Generalization of the Implicit Reward, Lin et al. 2024"
    start: Annotated[Start, tyro.conf.arg(name="")]
    beta: float = 0.1  # of DPO
    num_asked: int = 256  # pairs of each kind, at most

    @property
    def setting(self) -> str:
        source, name = self.start.model.source, Path(self.start.data.path).name
        return f"Pairs told rightly by DPO's implicit reward and by a reward model, both of {source} and `{name}`."

    def measure(self, start: Pairs, seed: int) -> dict[str, float]:
        prompts = [example.prompt.tobytes() for example in start.pairs]
        train, held_out = hold_out(start.pairs, prompts, self.start.data.num_held_out, seed)
        sets = {SEEN: train, HELD_OUT: held_out, **start.shifted}
        sets = {name: rows[: self.num_asked] for name, rows in sets.items()}
        found = {}
        for name, loss, config, reference in (
            (EXPLICIT, reward_model.loss, reward_model.Config(), "none"),
            (IMPLICIT, dpo.loss, dpo.Config(beta=self.beta), "online"),
        ):
            ((params, _),) = start.fit(loss, config, train, self.training, seed=seed, reference=reference)
            found |= {f"{name}: {of}": accuracy(start.margins(name, params, rows)) for of, rows in sets.items()}
        rule = np.sign(longer(train).mean())  # what length says of the pairs that are learned from
        found |= {f"{LENGTH}: {of}": accuracy(rule * longer(rows)) for of, rows in sets.items()}
        for name in (EXPLICIT, IMPLICIT, LENGTH) if start.shifted else ():
            found[f"{name}: {SHIFTED}"] = float(np.mean([found[f"{name}: {of}"] for of in start.shifted]))
        return found

    def claims(self) -> study.Claims:
        explicit, implicit = (f"{name}: {HELD_OUT}" for name in (EXPLICIT, IMPLICIT))
        alike = (study.Above(explicit, implicit, by=-0.05), study.Above(implicit, explicit, by=-0.05))
        claims = {"in distribution the two tell pairs alike, to 5 points": alike}
        if self.start.shifted:
            more = study.Above(f"{EXPLICIT}: {SHIFTED}", f"{IMPLICIT}: {SHIFTED}")
            claims["out of distribution the explicit reward model tells more pairs"] = (more,)
        return claims

    def panels(self) -> list[study.Panel]:
        sets = [SEEN, HELD_OUT, *(Path(path).name for path in self.start.shifted)]
        curves = {name: [(of, f"{name}: {of}") for of in sets] for name in (EXPLICIT, IMPLICIT, LENGTH)}
        return [study.Panel(title="Pairs told rightly", xlabel="pairs", ylabel="share", curves=curves)]


def accuracy(margins: np.ndarray) -> float:
    return float((np.sign(margins) + 1).mean() / 2)  # half of the ties


def longer(rows: Sequence[Example]) -> np.ndarray:
    """By how many tokens chosen is longer [n]."""
    return np.array([len(row.completions[CHOSEN]) - len(row.completions[REJECTED]) for row in rows], np.float32)


EXPERIMENT = Study(
    start=Start(
        model=Model(source="smollm2-135m-instruct", scalar_head=True),
        data=preference.Config(path="", num_held_out=256, max_prompt_tokens=192, max_completion_tokens=64),
    ),
    training=bench.Training(num_steps=100, batch_size=8, optimizer=optim.Config(learning_rate=1e-5, warmup_steps=10)),
    smoke={
        "start.model.source": "glassllm-en",
        "start.data.num_rows": 400,
        "start.data.num_held_out": 8,
        "start.data.max_prompt_tokens": 80,
        "start.data.max_completion_tokens": 40,
        "training.num_steps": 2,
        "training.optimizer": optim.Config(learning_rate=1e-3, warmup_steps=1),
        "num_seeds": 2,
    },
)
if __name__ == "__main__":
    study.launch(EXPERIMENT)
