"""Reward-augmented DPO: pairs relabelled with goals, and asked for more, on the 0.85M-parameter model.

    python -m experiments.goals_glass

VADER scores the model's own continuations of film reviews, on a scale of 1 to 10; a pair is the best one of an opening
against another. Relabelled, each pair becomes two, whose prompts ask for the score of the one or of the other (Zhang et
al. 2024, section 4). Beside DPO on the pairs as they are, in as many updates. Expect some minutes on a CPU core.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np

from experiments.study import bench, study
from pjpo import optim, relabel
from pjpo.data.examples import Example
from pjpo.methods import dpo

NOTHING = np.zeros(0, np.int32)
SCALE = relabel.Scale(text="{goal} of {high}")  # few tokens, as a small model reads few


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(study.Study):
    paper: ClassVar = "Reward-Augmented Data, Zhang et al. 2024"
    setting: ClassVar = (
        "glassllm continues openings of film reviews, scored 1 to 10 by VADER; best of 4 samples against another one; "
        "DPO on the pairs, and on the same pairs relabelled with goals, in as many updates."
    )
    goals: tuple[int, ...] = (1, 4, 7, 10)  # that the trained policy is asked for, rising; the last is the best score
    good: int = 7  # a rejected completion with at least this score is worth keeping
    beta: float = 0.1
    num_openings: int = 2048  # a pair of each whose scores differ
    num_completions: int = 4  # samples of an opening

    def measure(self, start: bench.Bench, seed: int, record: study.Record) -> dict[str, float]:
        rows = self.rows(start, seed)
        plain = [example_of(row) for row in rows]
        asked = [example_of(row, ask(start, float(row["goal"]))) for row in relabel.relabel(rows, SCALE)]
        kept = [row for row in rows if row["score_rejected"] >= self.good]
        goals = {f"asked for {goal}": ask(start, goal) for goal in self.goals}
        found = {}
        for examples, prefixes in ((plain, {"DPO": NOTHING}), (asked, goals)):
            ((params, _),) = start.fit(dpo.loss, dpo.Config(beta=self.beta), examples, self.training, seed=seed)
            for name, prefix in prefixes.items():
                found[f"{name}: reward"] = reward(start, params, prefix)
                change = start.of_pairs(params, [example_of(row, prefix) for row in kept])["logps/rejected_change"]
                found[f"{name}: change of good rejected"] = change
        return found | {"start: reward": start.of_samples(start.params)["reward"]}

    def rows(self, start: bench.Bench, seed: int) -> list[dict[str, Any]]:
        """Scored pairs of token ids, those of equal scores left out."""
        openings = start.openings("train", self.num_openings, seed)
        samples = start.sample(start.params, openings, jax.random.key(seed), self.num_completions)
        scores = np.rint(SCALE.low + (start.rewards(samples) + 1) / 2 * (SCALE.high - SCALE.low))  # VADER: -1 to 1
        others = np.random.default_rng(seed).integers(1, self.num_completions, len(openings))
        rows = []
        for row, (opening, other) in enumerate(zip(openings, others, strict=True)):
            best = int(scores[row].argmax())
            places = {"chosen": best, "rejected": (best + int(other)) % self.num_completions}
            tokens = {
                name: samples.completion_tokens[row, n][samples.completion_mask[row, n]] for name, n in places.items()
            }
            rows.append(
                {"opening": opening} | tokens | {f"score_{name}": float(scores[row, n]) for name, n in places.items()}
            )
        return [row for row in rows if row["score_chosen"] > row["score_rejected"]]

    def claims(self) -> study.Claims:
        best = f"asked for {self.goals[-1]}"
        return {
            "asked for the best score, the conditioned policy has more reward than DPO's": (
                study.Above(f"{best}: reward", "DPO: reward"),
            ),
            "its reward follows the goal": tuple(
                study.Above(f"asked for {more}: reward", f"asked for {less}: reward")
                for less, more in zip(self.goals, self.goals[1:], strict=False)
            ),
            f"rejected completions with a score of {self.good} or more lose less likelihood than under DPO": (
                study.Above(f"{best}: change of good rejected", "DPO: change of good rejected"),
            ),
        }

    def panels(self) -> list[study.Panel]:
        ends = self.goals[0], self.goals[-1]
        return [
            study.Panel(
                title="Reward by goal",
                xlabel="score that is asked for",
                ylabel="VADER, held-out openings",
                curves={
                    "relabelled": [(goal, f"asked for {goal}: reward") for goal in self.goals],
                    "DPO, no goal": [(goal, "DPO: reward") for goal in ends],
                    "start, no goal": [(goal, "start: reward") for goal in ends],
                },
            )
        ]


def ask(start: bench.Bench, goal: float) -> np.ndarray:
    """Tokens that ask for a score, in front of an opening."""
    return np.array(start.tokenizer.encode(SCALE.ask("", goal)), np.int32)


def example_of(row: dict[str, Any], prefix: np.ndarray = NOTHING) -> Example:
    opening = row["opening"]
    prompt = np.concatenate([prefix, opening.prompt])
    return Example(prompt, (row["chosen"], row["rejected"]), {}, opening.id)


def reward(start: bench.Bench, params: dict, prefix: np.ndarray) -> float:
    """On held-out openings after `prefix`, which the score does not read."""
    openings = start.openings("held_out", start.config.num_held_out)
    asked = [dataclasses.replace(opening, prompt=np.concatenate([prefix, opening.prompt])) for opening in openings]
    samples = start.sample(params, asked, jax.random.key(0), start.config.num_completions)
    prompts = np.stack([opening.prompt for opening in openings])
    read = dataclasses.replace(samples, prompt_tokens=prompts, prompt_mask=np.ones(prompts.shape, bool))
    return float(start.rewards(read).mean())


EXPERIMENT = Study(
    start=bench.Config(),
    training=bench.Training(num_steps=192, optimizer=optim.Config(learning_rate=5e-4, warmup_steps=5)),
    smoke={
        "goals": (1, 10),
        "good": 4,
        "num_openings": 64,
        "num_seeds": 2,
        "start.num_held_out": 8,
        "start.max_completion_tokens": 8,
        "training.batch_size": 4,
        "training.num_steps": 2,
        "training.optimizer.warmup_steps": 1,
    },
)
if __name__ == "__main__":
    study.launch(EXPERIMENT)
