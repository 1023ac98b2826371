"""DPO, IPO, KTO and CPO from a base, an SFT and an instruct start, over sizes of data, on the 0.85M model.

    python -m experiments.insights_glass

The base model read Lewis Carroll; SFT shows it favourable film reviews; the instruct start is SFT with some DPO of its
own. All train one epoch on the same pairs, which the SFT model wrote and VADER ranked (Saeidi et al. 2024). Reward on
held-out openings along that epoch. 45 minutes on a CPU core.
"""

import dataclasses
from typing import ClassVar

import jax

from experiments.study import bench, study
from pjpo import optim
from pjpo.data import reviews
from pjpo.data.examples import Example
from pjpo.methods import cpo, dpo, ipo, kto, sft

METHODS = {
    "DPO": (dpo.loss, dpo.Config(beta=0.1), "online"),
    "IPO": (ipo.loss, ipo.Config(beta=0.1), "online"),
    "KTO": (kto.loss, kto.Config(beta=0.1), "online"),
    "CPO": (cpo.loss, cpo.Config(beta=0.1), "none"),
}
STARTS = ("base", "SFT", "instruct")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(study.Study):
    paper: ClassVar = "Insights into Alignment, Saeidi et al. 2024"
    setting: ClassVar = (
        "glassllm as it is, after SFT on favourable film reviews, and after some DPO on top of that; one epoch on "
        "pairs of the SFT model's continuations, best against worst of 4 by VADER."
    )
    texts: reviews.Texts
    sft: bench.Training
    instruct: bench.Training  # with DPO, on other pairs than the study's

    @property
    def sizes(self) -> list[int]:
        """Numbers of pairs seen at each look."""
        return [number * self.training.batch_size for number in (*self.training.looks, self.training.num_steps)]

    def measure(self, start: bench.Bench, seed: int, record: study.Record) -> dict[str, float]:
        begins, pairs = self.starts(start, seed)
        found = {}
        for place in STARTS:
            before = start.of_samples(begins[place])["reward"]
            found |= {f"{at(place, 0)}: {name}": before for name in METHODS}
            for name, (loss, method, reference) in METHODS.items():
                # A pair is two rows of KTO, so an update holds twice as many.
                scale = 2 if name == "KTO" else 1
                training = dataclasses.replace(self.training, batch_size=scale * self.training.batch_size)
                trained = start.fit(
                    loss,
                    method,
                    bench.unpaired(pairs) if name == "KTO" else pairs,
                    training,
                    seed=seed,
                    params=begins[place],
                    reference=reference,
                )
                for size, (params, _) in zip(self.sizes, trained, strict=True):
                    found[f"{at(place, size)}: {name}"] = start.of_samples(params)["reward"]
        for size in self.sizes:
            for name in METHODS:
                found[f"{gap(size)}: {name}"] = (
                    found[f"{at('SFT', size)}: {name}"] - found[f"{at('base', size)}: {name}"]
                )
        return found

    def starts(self, start: bench.Bench, seed: int) -> tuple[dict[str, dict], list[Example]]:
        """Parameters of each, and the pairs to train on."""
        texts = dataclasses.replace(self.texts, seed=seed).build(start).train
        ((tuned, _),) = start.fit(sft.loss, sft.Config(), texts, self.sft, seed=seed, reference="none")
        num_own = self.instruct.num_steps * self.instruct.batch_size
        openings = start.openings("train", 2 * (num_own + self.sizes[-1]), seed)  # some give no pair
        samples = start.sample(tuned, openings, jax.random.key(seed), 4)
        pairs = bench.best_and_worst(openings, samples, start.rewards(samples))
        own, others = pairs[:num_own], pairs[num_own : num_own + self.sizes[-1]]
        fitted = start.fit(dpo.loss, dpo.Config(beta=0.1), own, self.instruct, seed=seed, params=tuned)
        ((instructed, _),) = fitted
        return {"base": start.params, "SFT": tuned, "instruct": instructed}, others

    def claims(self) -> study.Claims:
        most = self.sizes[-1]
        return {
            "without SFT, KTO and CPO lose less than DPO and IPO do": tuple(
                study.Above(f"{gap(most)}: {loses}", f"{gap(most)}: {keeps}")
                for loses in ("DPO", "IPO")
                for keeps in ("KTO", "CPO")
            ),
            "KTO has the most reward from the SFT start": tuple(
                study.Above(f"{at('SFT', most)}: KTO", f"{at('SFT', most)}: {name}") for name in ("DPO", "IPO", "CPO")
            ),
            "a start with preference training of its own ends higher than plain SFT, whatever the method": tuple(
                study.Above(f"{at('instruct', most)}: {name}", f"{at('SFT', most)}: {name}") for name in METHODS
            ),
        }

    def panels(self) -> list[study.Panel]:
        return [
            study.Panel(
                title=f"From {place}",
                xlabel="pairs, one epoch",
                ylabel="VADER, held-out openings",
                curves={
                    name: [(str(size), f"{at(place, size)}: {name}") for size in (0, *self.sizes)] for name in METHODS
                },
            )
            for place in STARTS
        ]


def at(place: str, size: int) -> str:
    return f"{place}, {size} pairs"


def gap(size: int) -> str:
    return f"SFT less base, {size} pairs"


EXPERIMENT = Study(
    start=bench.Config(),
    texts=reviews.Texts(num_reviews=1024, num_held_out=0, max_completion_tokens=32, label=1),
    sft=bench.Training(num_steps=96, batch_size=32, optimizer=optim.Config(learning_rate=2e-3, warmup_steps=5)),
    instruct=bench.Training(num_steps=16, batch_size=8, optimizer=optim.Config(learning_rate=1e-3, warmup_steps=5)),
    training=bench.Training(
        num_steps=64, looks=(4, 16), batch_size=8, optimizer=optim.Config(learning_rate=1e-3, warmup_steps=5)
    ),
    smoke={
        "texts.num_reviews": 32,
        "sft": bench.Training(num_steps=2, batch_size=8),
        "instruct": bench.Training(num_steps=2, batch_size=8),
        "num_seeds": 2,
        "start.num_held_out": 8,
        "start.max_completion_tokens": 8,
        "training": bench.Training(num_steps=2, looks=(1,), batch_size=8),
    },
)
if __name__ == "__main__":
    study.launch(EXPERIMENT)
