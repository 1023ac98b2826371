"""DPO and PPO from one SFT model, on the same pairs and equally tuned.

DPO learns from the pairs, PPO from a reward model of the same pairs. Both have as many policies to choose from, every
strength at every look; the choice is made by VADER on one half of the held-out openings, and the other half counts.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import ClassVar

import jax

from experiments.study import bench, stages, study
from pjpo import checks
from pjpo.methods import dpo, ppo

CHOICE = "VADER, to choose by"
DRIFT = "kl, to choose by"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(study.Study):
    paper: ClassVar = "Unpacking DPO and PPO, Ivison et al. 2024"
    start: stages.Config  # half of its held-out openings are to choose by
    dpo: bench.Training  # `training` is PPO's
    minibatches: int = 1  # PPO's updates of one rollout, each on `batch_size` sentences of it
    betas: tuple[tuple[float, float], ...] = ((0.03, 0.0125), (0.1, 0.05), (0.3, 0.2))  # of DPO and PPO, weak to strong
    num_looks: int = 3  # at each run, the last one at its end; so both have as many policies to choose from
    method: ppo.Config = dataclasses.field(default_factory=lambda: ppo.Config(missing_end_score=-10.0))
    num_openings: int = 256  # for rollouts, other ones than those of the pairs
    budget: float = 10.0  # of KL to the SFT model, nats a completion

    def __post_init__(self):
        super().__post_init__()
        checks.at_least(self, 1, "minibatches")
        for name, training in (("dpo", self.dpo), ("training", self.training)):
            if training.num_steps < self.num_looks or training.looks:
                raise ValueError(
                    f"study: {name} must have at least num_looks {self.num_looks} steps, and no looks of its own, got "
                    f"{training.num_steps} and {training.looks}"
                )
        if self.start.num_held_out % 2:
            raise ValueError(f"study: start.num_held_out must be even, to be halved, got {self.start.num_held_out}")

    def measure(self, start: stages.Stages, seed: int, record: study.Record) -> dict[str, float]:
        found = {"SFT": self.point(start, start.sft)}
        for name in ("DPO", "PPO"):
            points = {row: self.point(start, params) for row, params in self.policies(name, start, seed, record)}
            within = [point for point in (found["SFT"], *points.values()) if point[DRIFT] <= self.budget]
            found |= points | {
                f"{name}, default": points[self.rows(name, self.betas[len(self.betas) // 2])[-1]],
                f"{name}, tuned": max(points.values(), key=lambda point: point[CHOICE]),
                f"{name}, {self.near}": max(within, key=lambda point: point[CHOICE]),
            }
        return {f"{row}: {key}": value for row, point in found.items() for key, value in point.items()}

    def point(self, start: stages.Stages, params: dict) -> dict[str, float]:
        """A policy on one half of the held-out openings, and what it is chosen by on the other half."""
        batch, half = start.held_out(params), start.config.num_held_out // 2
        chosen = start.described(jax.tree.map(lambda x: x[:half], batch))
        counted = start.described(jax.tree.map(lambda x: x[half:], batch))
        return counted | {CHOICE: chosen["VADER"], DRIFT: chosen["kl"]}

    def policies(self, name: str, start: stages.Stages, seed: int, record: study.Record) -> Iterator[tuple[str, dict]]:
        """(row, parameters) of every strength at every look; the next one uses the parameters up."""
        config = start.rewarded(prompts_per_rollout=self.rollout, num_completions=1, normalised=False)
        prompts = start.prompts(self.num_openings)
        for betas in self.betas:
            of_dpo, of_ppo = dpo.Config(beta=betas[0]), dataclasses.replace(self.method, beta=betas[1])
            shared = {"seed": seed, "params": start.sft, "at": self.looks(name)}
            if name == "DPO":
                run = start.fit(dpo.loss, of_dpo, start.pairs, self.dpo, **shared)
            else:
                others = {"ref_params": start.sft, "critic": start.reward_model}
                others["record"] = functools.partial(record, f"PPO, beta {betas[1]:g}")
                run = start.learn(ppo.loss, of_ppo, config, prompts, self.training, **shared, **others)
            for row, (params, _) in zip(self.rows(name, betas), run, strict=True):
                yield row, params

    def looks(self, name: str) -> list[int]:
        """Numbers of updates."""
        num_steps = {"DPO": self.dpo, "PPO": self.training}[name].num_steps
        return [look * num_steps // self.num_looks for look in range(1, self.num_looks + 1)]

    def rows(self, name: str, betas: tuple[float, float]) -> list[str]:
        """Of a run, one for each look."""
        beta = dict(zip(("DPO", "PPO"), betas, strict=True))[name]
        return [f"{name}, beta {beta:g}, {count} updates" for count in self.looks(name)]

    @property
    def rollout(self) -> int:
        """Sentences."""
        return self.minibatches * self.training.batch_size

    @property
    def near(self) -> str:
        return f"tuned within {self.budget:g} nats"

    @property
    def setting(self) -> str:
        return (
            f"{self.start.model.source} ends sentences that begin film reviews, in up to "
            f"{self.start.max_completion_tokens} tokens; SFT; all pairs of {self.start.num_ranked} samples ranked by "
            f"VADER teach DPO and a reward model, the same for all seeds; DPO makes {self.dpo.num_steps} updates of "
            f"{self.dpo.batch_size} pairs, PPO {self.training.num_steps} of {self.training.batch_size} sentences, from "
            f"rollouts of {self.rollout}, of which one that does not end scores {self.method.missing_end_score}. Tuned "
            f"is the best of {len(self.betas) * self.num_looks} policies of a method, {len(self.betas)} strengths by "
            f"{self.num_looks} looks, by VADER on openings kept for that; numbers are of other openings, the judge a "
            "classifier of reviews that taught nobody, seeds those of updates and rollouts."
        )

    def claims(self) -> study.Claims:
        def above(row: str, *keys: str) -> tuple[study.Above, ...]:
            return tuple(study.Above(f"PPO, {row}: {key}", f"DPO, {row}: {key}") for key in keys)

        return {
            "PPO beats DPO at equal tuning, by the judge": above("tuned", "judge"),
            "by VADER, which ranked the pairs": above("tuned", "VADER"),
            "and with nothing tuned, by both": above("default", "judge", "VADER"),
            f"(not in the paper) it does so within {self.budget:g} nats of the SFT model, too, by both": above(
                self.near, "judge", "VADER"
            ),
            "(not in the paper) both beat the SFT model, by both": tuple(
                study.Above(f"{name}, tuned: {key}", f"SFT: {key}")
                for name in ("DPO", "PPO")
                for key in ("judge", "VADER")
            ),
        }

    def panels(self) -> list[study.Panel]:
        def compared(title: str, key: str, ylabel: str) -> study.Panel:
            rows = {"SFT": "SFT", **{row: f"{{}}, {row}" for row in ("default", "tuned", self.near)}}
            points = [(x.replace("tuned within", "within"), f"{row}: {key}") for x, row in rows.items()]
            curves = {name: [(x, number.format(name)) for x, number in points] for name in ("DPO", "PPO")}
            return study.Panel(title=title, xlabel="policy", ylabel=ylabel, curves=curves)

        along = {
            rows[0].rpartition(",")[0]: [(look, f"{row}: {CHOICE}") for look, row in enumerate(["SFT", *rows])]
            for rows in (self.rows(name, betas) for name in ("DPO", "PPO") for betas in self.betas)
        }
        return [
            study.Panel(
                title="What is chosen from", xlabel="look at a run", ylabel="VADER, half of them", curves=along
            ),
            compared("The other half: judge", "judge", "probability of a favourable review"),
            compared("VADER", "VADER", "its score, -1 to 1"),
            compared("KL", "kl", "to SFT, nats a completion"),
        ]
