"""rDPO against DPO and cDPO under flipped labels, on the 0.85M-parameter model's own samples.

    python -m experiments.rdpo_glass

VADER ranks the samples of each opening; best against worst are the pairs; some change places, once (Chowdhury et al.
2024, section 6). On held-out openings, whose labels stay clean: reward, KL and pairs told, early, when each pair was
seen about once, and late. Ten minutes on a CPU core.
"""

import dataclasses
from typing import ClassVar

import jax

from experiments.study import bench, study
from pjpo import optim
from pjpo.data import flips
from pjpo.methods import cdpo, dpo, rdpo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(study.Study):
    paper: ClassVar = "rDPO, Chowdhury et al. 2024"
    setting: ClassVar = (
        "glassllm continues openings of film reviews, best against worst of 4 samples by VADER, flipped labels in "
        "training alone; all three methods know the flip rate."
    )
    flip_rates: tuple[float, ...] = (0.0, 0.2, 0.4)
    beta: float = 0.1  # of all three
    num_openings: int = 640  # a training pair of each whose samples differ
    num_test_openings: int = 128  # the same, to rank with clean labels
    num_completions: int = 4  # samples of an opening

    def methods(self, rate: float) -> dict:
        return {
            "DPO": (dpo.loss, dpo.Config(beta=self.beta)),
            "cDPO": (cdpo.loss, cdpo.Config(beta=self.beta, flip_rate=rate)),
            "rDPO": (rdpo.loss, rdpo.Config(beta=self.beta, flip_rate=rate)),
        }

    def measure(self, start: bench.Bench, seed: int, record: study.Record) -> dict[str, float]:
        train, test = self.pairs(start, seed)
        found = {}
        for rate in self.flip_rates:
            noisy = flips.flip(train, rate, seed)
            for name, (loss, method) in self.methods(rate).items():
                if rate > 0 or name == "DPO":  # without flips the three are one
                    looks = start.fit(loss, method, noisy, self.training, seed=seed)
                    numbers = {}
                    for when, (params, last) in zip(("early", "late"), looks, strict=True):
                        told = start.of_pairs(params, test)["rewards/accuracies"]
                        seen = start.of_samples(params) | {"clean pairs told": told, "training loss": last["loss"]}
                        numbers |= {f"{key}, {when}": value for key, value in seen.items()}
                found |= {f"{at(name, rate)}: {key}": value for key, value in numbers.items()}
        return found

    def pairs(self, start: bench.Bench, seed: int):
        """Clean ones, (to train on, to test on), of different openings."""
        openings = start.openings("train", self.num_openings + self.num_test_openings, seed)
        samples = start.sample(start.params, openings, jax.random.key(seed), self.num_completions)
        rewards = start.rewards(samples)
        test = {opening.id for opening in openings[self.num_openings :]}
        ranked = bench.best_and_worst(openings, samples, rewards)
        return [pair for pair in ranked if pair.id not in test], [pair for pair in ranked if pair.id in test]

    def claims(self) -> study.Claims:
        worst = self.flip_rates[-1]
        dpo, cdpo, rdpo = (at(name, worst) for name in ("DPO", "cDPO", "rDPO"))
        return {
            f"at {worst:.0%} flips rDPO's policy has more reward than DPO's and cDPO's, early": (
                study.Above(f"{rdpo}: reward, early", f"{dpo}: reward, early"),
                study.Above(f"{rdpo}: reward, early", f"{cdpo}: reward, early"),
            ),
            "(not in the paper) rDPO has no minimum to stop at: late, its loss is below zero and its policy leaves the "
            "reference further behind than DPO's": (
                study.Within(f"{rdpo}: training loss, late", -float("inf"), 0),
                study.Above(f"{rdpo}: kl, late", f"{dpo}: kl, late"),
            ),
            "(not in the paper) so it has to be stopped: late, its policy has less reward than DPO's": (
                study.Above(f"{dpo}: reward, late", f"{rdpo}: reward, late"),
            ),
        }

    def panels(self) -> list[study.Panel]:
        return [
            study.Panel(
                title=title,
                xlabel="flipped training labels",
                ylabel=ylabel,
                curves={name: [(r, f"{at(name, r)}: {key}") for r in self.flip_rates] for name in self.methods(0.0)},
            )
            for title, key, ylabel in (
                ("Early", "reward, early", "VADER, held-out openings"),
                ("Late", "reward, late", "VADER, held-out openings"),
                ("Late", "kl, late", "KL to the reference, nats a completion"),
            )
        ]


def at(name: str, rate: float) -> str:
    return f"{name}, {rate:.0%} flips"


EXPERIMENT = Study(
    start=bench.Config(),
    training=bench.Training(num_steps=96, looks=(32,), optimizer=optim.Config(learning_rate=1e-3, warmup_steps=5)),
    smoke={
        "flip_rates": (0.0, 0.4),
        "num_openings": 32,
        "num_test_openings": 8,
        "num_seeds": 2,
        "start.num_held_out": 8,
        "start.max_completion_tokens": 8,
        "training": bench.Training(num_steps=2, looks=(1,), batch_size=8),
    },
)
if __name__ == "__main__":
    study.launch(EXPERIMENT)
