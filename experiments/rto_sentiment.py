"""RTO against PPO from one DPO model: SmolLM2 continues film reviews for a reward that was learned from pairs.

    python -m experiments.rto_sentiment

SFT on reviews; VADER ranks what that model samples. DPO trains a policy on the best against the worst of each opening,
and Bradley-Terry a reward model on all pairs of the same samples. PPO and RTO both start at the DPO policy, are pulled
to the SFT model, and earn the reward model's score; RTO adds the DPO policy's token rewards (Zhong et al. 2024), so
both know the same preferences. The critic is the policy's own scalar head. On held-out openings: the reward model,
VADER, a classifier that no policy learned from, KL. Expect some 25 minutes on a CPU core.
"""

import dataclasses
import functools
import itertools
from typing import ClassVar

import jax
import numpy as np
from scipy import stats

from experiments.study import bench, study
from pjpo import checks, online, optim, rollouts
from pjpo.data import reviews
from pjpo.experiment import Model
from pjpo.methods import dpo, reward_model, rto, sft
from pjpo.models import lora
from pjpo.rewards import judge
from pjpo.rewards.learned import Normalisation, RewardModel
from pjpo.rewards.protocol import Rewards
from pjpo.types import Batch

PARTS = 4  # that the reward along a run is given in
LEARNING = "reward model, while learning"


@dataclasses.dataclass(frozen=True)
class Stages(bench.Bench):
    """What PPO and RTO begin from."""

    sft: dict
    dpo: dict
    reward_model: RewardModel
    normalisation: Normalisation  # over all samples that VADER ranked

    def score(self, batch: Batch) -> np.ndarray:
        """[B, N], by the reward model."""
        scores = self.reward_model.scores(batch, self.tokenizer)
        return (scores - self.normalisation.mean) / self.normalisation.std

    def learned(self) -> Rewards:
        """`score` as a reward of rollouts, on the very tokens that were sampled; `prompt_ids` is a column."""
        width = self.config.max_completion_tokens

        def learned(completions: list[str], *, prompt_ids: list, completion_ids: list) -> list[float]:
            (prompts, prompt_mask), (tokens, mask) = rollouts.pad(prompt_ids), rollouts.pad(completion_ids, width)
            batch = Batch.of(
                prompt_tokens=prompts,
                prompt_mask=prompt_mask,
                completion_tokens=tokens[:, None],
                completion_mask=mask[:, None],
            )
            return self.score(batch)[:, 0].tolist()

        return Rewards(functions=(learned,), weights=(1.0,), timeout_seconds=600.0)  # it is compiled in the first call

    def measured(self, params: dict) -> dict[str, float]:
        """On held-out openings; KL to the SFT model."""
        batch = self.held_out(params)
        texts = list(itertools.chain(*rollouts.texts(batch, self.tokenizer)))
        scores, gold = self.score(batch), self.rewards(batch)
        return {
            "judge": float(judge.of_reviews().reward(texts).mean()),
            "reward model": float(scores.mean()),
            "VADER": float(gold.mean()),
            "rank correlation of these two": float(stats.spearmanr(scores.ravel(), gold.ravel()).statistic),
            "kl": self.kl(batch, self.sft),
        }

    @functools.cached_property
    def before(self) -> dict[str, float]:
        """The numbers of the stages, by name: the same for all seeds."""
        stages = {"SFT": self.sft, "DPO": self.dpo}
        return {f"{name}: {key}": value for name in stages for key, value in self.measured(stages[name]).items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start(bench.Config):
    texts: reviews.Texts  # for SFT
    sft: bench.Training
    num_pair_openings: int = 128  # whose samples VADER ranks
    num_ranked: int = 4  # samples of each: best against worst
    dpo: bench.Training
    beta: float = 0.1  # of DPO
    ranking: bench.Training  # of the reward model

    def __post_init__(self):
        super().__post_init__()
        checks.at_least(self, 1, "num_pair_openings")
        checks.at_least(self, 2, "num_ranked")

    def load(self) -> Stages:
        begin = super().load()
        texts = self.texts.build(begin).train
        ((tuned, _),) = begin.fit(sft.loss, sft.Config(), texts, self.sft, seed=0, reference="none")
        openings = begin.openings("train", self.num_pair_openings)
        samples = begin.sample(tuned, openings, jax.random.key(1), self.num_ranked)
        rewards = begin.rewards(samples)
        pairs = bench.best_and_worst(openings, samples, rewards)
        ((trained, _),) = begin.fit(dpo.loss, dpo.Config(beta=self.beta), pairs, self.dpo, seed=0, params=tuned)
        pairs = bench.select(openings, samples, bench.games(rewards))
        ((ranks, _),) = begin.fit(
            reward_model.loss, reward_model.Config(), pairs, self.ranking, seed=0, params=tuned, reference="none"
        )
        ranker = RewardModel(begin.policy, ranks, begin.tokenizer)
        scores = Normalisation.of(ranker.scores(samples, begin.tokenizer))
        return Stages(**vars(begin), sft=tuned, dpo=trained, reward_model=ranker, normalisation=scores)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(study.Study):
    paper: ClassVar = "RTO, Zhong et al. 2024"
    start: Start
    method: rto.Config  # PPO is its variant "ppo"
    num_openings: int = 64  # for rollouts, other ones than those of the pairs
    prompts_per_rollout: int = 8
    num_completions: int = 4  # of each

    def __post_init__(self):
        super().__post_init__()
        if self.prompts_per_rollout % self.training.batch_size:
            raise ValueError(
                f"study: prompts_per_rollout {self.prompts_per_rollout} is not divisible by training.batch_size "
                f"{self.training.batch_size}"
            )
        if self.num_rollouts < PARTS:
            raise ValueError(
                f"study: training.num_steps {self.training.num_steps} make {self.num_rollouts} rollouts, of which the "
                f"reward is given in {PARTS} parts; use {PARTS * self.prompts_per_rollout // self.training.batch_size}"
            )

    @property
    def num_rollouts(self) -> int:
        return self.training.num_steps * self.training.batch_size // self.prompts_per_rollout

    def measure(self, start: Stages, seed: int) -> dict[str, float]:
        openings = start.openings("train", self.start.num_pair_openings + self.num_openings)
        asked = [
            dataclasses.replace(opening, columns={"prompt_ids": opening.prompt.tolist()})
            for opening in openings[self.start.num_pair_openings :]
        ]
        config = online.Config(
            rewards=start.learned(),
            prompts_per_rollout=self.prompts_per_rollout,
            num_completions=self.num_completions,
            max_completion_tokens=start.config.max_completion_tokens,
            halvings=0,  # few completions, most of them cut: another size would have to be compiled for little
        )
        found = dict(start.before)
        for name, method in (("PPO", dataclasses.replace(self.method, variant="ppo")), ("RTO", self.method)):
            run = start.learn(
                rto.loss,
                method,
                config,
                asked,
                self.training,
                seed=seed,
                params=start.dpo,
                ref_params=start.sft,
                dpo_params=start.dpo,
                at=range(1, self.training.num_steps),
            )
            *_, (params, _) = points = list(run)
            log = [metrics for _, metrics in points]
            by_rollout = log[:: len(log) // self.num_rollouts]  # whose numbers are the same in each of its updates
            rewards = [metrics["reward"] for metrics in by_rollout]
            found |= {f"{name}: {key}": value for key, value in start.measured(params).items()}
            found[f"{name}: {LEARNING}"] = float(np.mean(rewards))
            for part, values in enumerate(np.array_split(rewards, PARTS), 1):
                found[f"{quarter(name, part)}: {LEARNING}"] = float(values.mean())
            for key in ("dpo_logratios/mean", "dpo_logratios/clipped_ratio") if method.needs_dpo else ():
                found[f"{name}: {key}"] = float(np.mean([metrics[key] for metrics in log]))
        return found

    @property
    def setting(self) -> str:
        each = self.prompts_per_rollout * self.num_completions
        return (
            f"{self.start.model.source} continues openings of film reviews by up to "
            f"{self.start.max_completion_tokens} tokens; SFT; of {self.start.num_ranked} samples ranked by VADER, "
            "DPO on best against worst and a reward model on all pairs, the same for all seeds. From that DPO policy "
            f"PPO and RTO, {self.num_rollouts} rollouts of {each} completions, rewarded by the reward model; seeds are "
            "of their rollouts and updates, and the judge is a classifier of reviews that taught nobody."
        )

    def claims(self) -> study.Claims:
        return {
            "from the same DPO policy, RTO ends with more reward than PPO, by the judge": (
                study.Above("RTO: judge", "PPO: judge"),
            ),
            "and by the reward model that both learn from": (study.Above("RTO: reward model", "PPO: reward model"),),
            "it learns faster: more reward over all rollouts": (study.Above(f"RTO: {LEARNING}", f"PPO: {LEARNING}"),),
            "(not in the paper) both have more of the learned reward than the DPO policy that they begin from": tuple(
                study.Above(f"{name}: reward model", "DPO: reward model") for name in ("PPO", "RTO")
            ),
        }

    def panels(self) -> list[study.Panel]:
        by_model = {
            "judge": "probability of a favourable review",
            "reward model": "its score, normalised",
            "kl": "KL to SFT, nats a completion",
        }
        return [
            study.Panel(
                title="While learning",
                xlabel="quarter of the run",
                ylabel="reward model, rollouts",
                curves={
                    name: [(str(part), f"{quarter(name, part)}: {LEARNING}") for part in range(1, PARTS + 1)]
                    for name in ("PPO", "RTO")
                },
            ),
            *(
                study.Panel(
                    title=f"Held-out openings: {key}",
                    xlabel="policy",
                    ylabel=ylabel,
                    curves={
                        f"then {name}": [
                            (x, f"{at}: {key}") for x, at in (("SFT", "SFT"), ("DPO", "DPO"), ("then", name))
                        ]
                        for name in ("PPO", "RTO")
                    },
                )
                for key, ylabel in by_model.items()
            ),
        ]


def quarter(name: str, part: int) -> str:
    return f"{name}, quarter {part}"


STEPS = optim.Config(learning_rate=5e-4, warmup_steps=4, schedule="linear")
EXPERIMENT = Study(
    start=Start(
        # The published weights are bfloat16, so nothing is lost by keeping them so.
        model=Model(source="smollm2-135m-instruct", param_dtype="bfloat16", lora=lora.Config(rank=8), scalar_head=True),
        num_held_out=48,
        max_completion_tokens=16,
        num_completions=2,
        texts=reviews.Texts(num_reviews=288, num_held_out=0, max_completion_tokens=16),
        sft=bench.Training(num_steps=24, batch_size=12, optimizer=STEPS),
        dpo=bench.Training(num_steps=28, batch_size=8, optimizer=STEPS),
        ranking=bench.Training(
            num_steps=56, batch_size=8, optimizer=dataclasses.replace(STEPS, critic_learning_rate=2e-3)
        ),
    ),
    method=rto.Config(),
    num_seeds=3,
    training=bench.Training(num_steps=18, batch_size=4, optimizer=optim.Config(learning_rate=5e-4, warmup_steps=2)),
    smoke={
        "start": Start(
            model=Model(source="glassllm-en", scalar_head=True),
            num_held_out=8,
            max_completion_tokens=8,
            num_completions=2,
            num_pair_openings=16,
            texts=reviews.Texts(num_reviews=16, num_held_out=0, max_completion_tokens=8),
            sft=bench.Training(num_steps=2, batch_size=8),
            dpo=bench.Training(num_steps=2, batch_size=4),
            ranking=bench.Training(num_steps=2, batch_size=4, optimizer=optim.Config(learning_rate=1e-3)),
        ),
        "num_openings": 16,
        "num_seeds": 2,
        "training": bench.Training(num_steps=4, batch_size=8),
    },
)
if __name__ == "__main__":
    study.launch(EXPERIMENT)
