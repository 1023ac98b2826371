"""RSO: three sources of pairs, ranked by a trained model, under each loss, on the 0.85M-parameter model.

    python -m experiments.rso_glass

A ranking model learns from pairs that VADER ordered. It then ranks samples of the start: the first ones (sft), the last
games of a tournament of all (best-of-n), or those that rejection sampling accepts (rso), the same number of pairs each
(Liu et al. 2023, sections 2, 3 and 5). Reward on held-out openings is VADER's, which nobody was trained on there.
Twenty minutes on a CPU core.
"""

import dataclasses
from typing import ClassVar

import jax
import numpy as np

from experiments.study import bench, study
from pjpo import optim, rejection
from pjpo.experiment import Model
from pjpo.methods import dpo, reward_model, rso, slic
from pjpo.rewards.learned import RewardModel

LOSSES = {
    "sigmoid-norm": (rso.loss, rso.Config(form="sigmoid_norm"), "online"),
    "hinge-norm": (rso.loss, rso.Config(form="hinge_norm"), "online"),
    "hinge": (rso.loss, rso.Config(form="hinge"), "none"),
    "SLiC-HF": (slic.loss, slic.Config(), "none"),
    "DPO": (dpo.loss, dpo.Config(), "online"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(study.Study):
    paper: ClassVar = "RSO, Liu et al. 2023"
    setting: ClassVar = (
        "glassllm continues openings of film reviews; a Bradley-Terry ranking model learned from pairs that VADER "
        "ordered labels all pairs; the same number of pairs and updates for each source."
    )
    num_ranking_openings: int = 1024  # whose samples, 4 each, VADER orders for the ranking model
    ranking: bench.Training
    num_openings: int = 128
    num_candidates: int = 32  # samples of an opening
    num_kept: int = 8  # by rejection sampling; half as many pairs
    sampler_beta: float = 0.5  # temperature of the tilt, in nats of the ranking model

    def measure(self, start: bench.Bench, seed: int, record: study.Record) -> dict[str, float]:
        ranker, accuracy = self.ranking_model(start, seed)
        openings = start.openings("train", self.num_openings, seed)
        candidates = start.sample(start.params, openings, jax.random.key(2 * seed + 1), self.num_candidates)
        scores, rewards = ranker.scores(candidates, start.tokenizer), start.rewards(candidates)
        repeated = rejection.num_identical(candidates.completion_tokens, candidates.completion_mask) / scores.size
        found = {"ranking model: held-out accuracy": accuracy, "pools: identical candidates": repeated}
        for source, games in self.sources(scores, seed).items():
            chosen = float(np.mean([rewards[row, winner] for row, winner, _ in games]))
            for name, (loss, method, reference) in LOSSES.items():
                # SLiC's target is a sample of the start: there is no better one to imitate.
                places = [(*game, 0) for game in games] if name == "SLiC-HF" else games
                rows = bench.select(openings, candidates, places)
                ((params, _),) = start.fit(loss, method, rows, self.training, seed=seed, reference=reference)
                numbers = start.of_samples(params) | {"reward of chosen": chosen}
                found |= {f"{name}, {source}: {key}": value for key, value in numbers.items()}
        return found

    def ranking_model(self, start: bench.Bench, seed: int) -> tuple[RewardModel, float]:
        """Trained on one epoch or less of all pairs that differ, and its accuracy on pairs of openings kept from it."""
        openings = start.openings("train", self.num_openings + self.num_ranking_openings, seed)[self.num_openings :]
        samples = start.sample(start.params, openings, jax.random.key(2 * seed), 4)
        games, num_test = bench.games(start.rewards(samples)), len(openings) // 10
        test = bench.select(openings, samples, [game for game in games if game[0] < num_test])
        train = bench.select(openings, samples, [game for game in games if game[0] >= num_test])
        fitted = start.fit(reward_model.loss, reward_model.Config(), train, self.ranking, seed=seed, reference="none")
        ((params, _),) = fitted
        ranker = RewardModel(start.policy, params, start.tokenizer)
        margins = -np.diff(ranker.scores(bench.batch_of(test), start.tokenizer))
        return ranker, float(np.mean((margins > 0) + 0.5 * (margins == 0)))

    def sources(self, scores: np.ndarray, seed: int) -> dict[str, list[tuple[int, int, int]]]:
        """(row, winner, loser) of each pair; a row's baseline would shift all its scores and change nothing."""
        first = np.tile(np.arange(self.num_kept), (len(scores), 1))
        accepted = rejection.select(scores, self.num_kept, self.sampler_beta, seed)
        found = {"sft": [], "best-of-n": [], "rso": []}
        for row, values in enumerate(scores):
            for source, kept in (("sft", first[row]), ("rso", accepted[row])):
                found[source] += [(row, kept[a], kept[b]) for a, b in rejection.first_round(values[kept])]
            found["best-of-n"] += [(row, *game) for game in rejection.tournament(values)[-(self.num_kept // 2) :]]
        return found

    def claims(self) -> study.Claims:
        return (
            {
                "the ranking model tells held-out pairs, 60 % or more (70 % in the paper)": (
                    study.Within("ranking model: held-out accuracy", 0.6, 1),
                )
            }
            | {
                f"{name}: pairs accepted by rejection sampling beat pairs of plain samples": (
                    study.Above(f"{name}, rso: reward", f"{name}, sft: reward"),
                )
                for name in LOSSES
            }
            | {
                "first-round pairs of accepted samples do as well as the tournament of all, to 0.02 (sigmoid-norm)": (
                    study.Above("sigmoid-norm, rso: reward", "sigmoid-norm, best-of-n: reward", by=-0.02),
                )
            }
        )

    def panels(self) -> list[study.Panel]:
        return [
            study.Panel(
                title=title,
                xlabel="source of pairs",
                ylabel=ylabel,
                curves={n: [(s, f"{n}, {s}: {key}") for s in ("sft", "best-of-n", "rso")] for n in LOSSES},
            )
            for title, key, ylabel in (
                ("Reward", "reward", "VADER, held-out openings"),
                ("KL to the start", "kl", "nats a completion"),
            )
        ]


EXPERIMENT = Study(
    start=bench.Config(model=Model(source="glassllm-en", scalar_head=True)),
    ranking=bench.Training(
        num_steps=256, optimizer=optim.Config(learning_rate=1e-3, warmup_steps=10, schedule="linear")
    ),
    training=bench.Training(num_steps=32, optimizer=optim.Config(learning_rate=1e-3, warmup_steps=5)),
    smoke={
        "num_ranking_openings": 40,
        "ranking": bench.Training(num_steps=2, batch_size=8),
        "num_openings": 8,
        "num_candidates": 8,
        "num_kept": 4,
        "num_seeds": 2,
        "start.num_held_out": 8,
        "start.max_completion_tokens": 8,
        "training": bench.Training(num_steps=2, batch_size=8),
    },
)
if __name__ == "__main__":
    study.launch(EXPERIMENT)
