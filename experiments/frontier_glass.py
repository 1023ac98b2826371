"""DPO's reward-KL frontier beside SFT on the chosen, unlikelihood and best-of-n, on the 0.85M-parameter model.

    python -m experiments.frontier_glass

The model continues openings of film reviews; VADER ranks the samples of each; best against worst are the pairs. Every
method starts from the model itself, trains with each of its settings, and stops several times on the way (Rafailov et
al. 2023, section 6.1). What counts is the best reward that it reached within a budget of KL to the start. Expect some
20 minutes on a CPU core.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import ClassVar

import jax
import numpy as np

from experiments.study import bench, study
from pjpo import optim
from pjpo.data.examples import Example
from pjpo.evals import sentiment
from pjpo.methods import dpo, sft, unlikelihood

DPO, SFT, UNLIKELIHOOD, BEST_OF = "DPO", "SFT on chosen", "unlikelihood", "best of n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(study.Study):
    paper: ClassVar = "DPO, Rafailov et al. 2023"
    setting: ClassVar = (
        "glassllm continues openings of film reviews, best against worst of 4 samples by VADER; every setting of a "
        "method and every stop on the way is a point, and the best one within a budget of KL counts."
    )
    optional: ClassVar = ("stops",)
    betas: tuple[float, ...] = (0.05, 0.1, 1.0, 5.0)  # of DPO, the paper's
    weights: tuple[float, ...] = (0.05, 0.1, 0.5, 1.0)  # of unlikelihood's second term
    stops: tuple[int, ...] = (12, 24, 48)  # updates, beside the last
    budgets: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # of KL, nats a completion
    num_openings: int = 1024  # a training pair of each whose samples differ
    num_completions: int = 4  # samples of an opening

    def __post_init__(self):
        super().__post_init__()
        if not all(budget > 0 for budget in self.budgets):
            raise ValueError(f"study: budgets must be > 0 nats, got {self.budgets}")

    def measure(self, start: bench.Bench, seed: int, record: study.Record) -> dict[str, float]:
        openings = start.openings("train", self.num_openings, seed)
        samples = start.sample(start.params, openings, jax.random.key(seed), self.num_completions)
        pairs = bench.best_and_worst(openings, samples, start.rewards(samples))
        found, points = {}, {BEST_OF: best_of(start)}
        untrained = start.of_samples(start.params)
        for method, label, loss, config in self.policies():
            reference = "online" if method == DPO else "none"
            examples = chosen(pairs) if method == SFT else pairs
            path = [untrained]
            for params, _ in start.fit(
                loss, config, examples, self.training, seed=seed, reference=reference, at=self.stops
            ):
                path.append(start.of_samples(params))
            points.setdefault(method, []).extend(path)
            found |= {f"{label}: {name} at the end": value for name, value in path[-1].items()}
        within = {
            f"{method}: {at_most(budget)}": max(point["reward"] for point in path if point["kl"] <= budget)
            for method, path in points.items()
            for budget in self.budgets
        }
        return within | found

    def policies(self) -> list[tuple]:
        """(method, label, loss, config) of everything that is trained."""
        return [
            *((DPO, f"DPO, beta {beta:g}", dpo.loss, dpo.Config(beta=beta)) for beta in self.betas),
            (SFT, SFT, sft.loss, sft.Config()),
            *(
                (UNLIKELIHOOD, f"unlikelihood, weight {w:g}", unlikelihood.loss, unlikelihood.Config(weight=w))
                for w in self.weights
            ),
        ]

    def claims(self) -> study.Claims:
        def higher(a: str, b: str, budgets: Sequence[float]) -> tuple[study.Above, ...]:
            return tuple(study.Above(f"{a}: {at_most(k)}", f"{b}: {at_most(k)}") for k in budgets)

        return {
            "DPO has more reward than SFT on the chosen at every budget of KL": higher(DPO, SFT, self.budgets),
            "DPO has more reward than unlikelihood at every budget of KL": higher(DPO, UNLIKELIHOOD, self.budgets),
            "(not in the paper) best-of-n has more reward than DPO at the smallest budgets": higher(
                BEST_OF, DPO, self.budgets[:2]
            ),
        }

    def panels(self) -> list[study.Panel]:
        methods = (DPO, SFT, UNLIKELIHOOD, BEST_OF)
        return [
            study.Panel(
                title="Reward against KL",
                xlabel="budget of KL to the start, nats a completion",
                ylabel="best VADER, held-out openings",
                curves={method: [(k, f"{method}: {at_most(k)}") for k in self.budgets] for method in methods},
            )
        ]


def chosen(pairs: Sequence[Example]) -> list[Example]:
    return [dataclasses.replace(pair, completions=pair.completions[:1]) for pair in pairs]


def best_of(start: bench.Bench) -> list[dict[str, float]]:
    """Points of best-of-n from the start; the KL is the bound log n - (n - 1)/n."""
    openings = start.openings("held_out", start.config.num_held_out)
    num = start.config.num_completions
    rewards = start.rewards(start.sample(start.params, openings, jax.random.key(0), num))
    nums = list(itertools.takewhile(lambda n: n <= num, (2**i for i in range(num))))
    found = sentiment.best_of({"reward_vader": rewards.astype(np.float64)}, nums)
    return [{"reward": found[f"best_of/{n}/reward_vader"], "kl": found[f"best_of/{n}/kl"]} for n in nums]


def at_most(budget: float) -> str:
    return f"reward within {budget:g} nats"


EXPERIMENT = Study(
    start=bench.Config(),
    # Slow enough for the stops to lie within the budgets: at 1e-3 DPO is beyond 4 nats at the first of them.
    training=bench.Training(num_steps=96, optimizer=optim.Config(learning_rate=2e-4, warmup_steps=5)),
    smoke={
        "betas": (0.1,),
        "weights": (0.5,),
        "stops": (1,),
        "num_openings": 32,
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
