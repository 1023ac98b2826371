"""What online trainings begin from, made of one model: an SFT policy, a DPO policy, and a reward model.

VADER ranks what the SFT policy samples. DPO learns from the best against the worst of each opening, Bradley-Terry from
all pairs of the same samples.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np
from scipy import stats

from experiments.study import bench
from pjpo import checks, online, rollouts
from pjpo.data import reviews
from pjpo.data.examples import Example
from pjpo.methods import dpo, reward_model, sft
from pjpo.rewards import judge
from pjpo.rewards.learned import Normalisation, RewardModel
from pjpo.rewards.protocol import Rewards
from pjpo.types import Batch


@dataclasses.dataclass(frozen=True)
class Stages(bench.Bench):
    """The policies, and what measures all that comes after them."""

    sft: dict
    pairs: list[Example]  # all that VADER tells apart of the samples of an opening; what the reward model learned from
    reward_model: RewardModel
    normalisation: Normalisation  # over all samples that VADER ranked
    dpo: dict | None = None  # where the config asks for it

    def score(self, batch: Batch) -> np.ndarray:
        """[B, N], by the reward model."""
        scores = self.reward_model.scores(batch, self.tokenizer)
        return (scores - self.normalisation.mean) / self.normalisation.std

    def prompts(self, number: int) -> list[Example]:
        """Openings for rollouts, other ones than those that were ranked."""
        assert isinstance(self.config, Config), "its own config made it"
        ranked = self.config.num_pair_openings
        return self.openings("train", ranked + number)[ranked:]

    def rewarded(self, *, normalised: bool = True, **settings: Any) -> online.Config:
        """Rollouts, rewarded by the reward model on the very tokens that were sampled.

        Args:
            normalised: rewards are `score`; or else the reward model's own, as a critic that starts as it has them.
            settings: of the rollouts.
        """
        width = self.config.max_completion_tokens

        def learned(completions: list[str], *, prompt_ids: list, completion_ids: list) -> list[float]:
            (prompts, prompt_mask), (tokens, mask) = rollouts.pad(prompt_ids), rollouts.pad(completion_ids, width)
            batch = Batch.of(
                prompt_tokens=prompts,
                prompt_mask=prompt_mask,
                completion_tokens=tokens[:, None],
                completion_mask=mask[:, None],
            )
            scores = self.score(batch) if normalised else self.reward_model.scores(batch, self.tokenizer)
            return scores[:, 0].tolist()

        return online.Config(
            rewards=Rewards(functions=(learned,), weights=(1.0,), timeout_seconds=600.0),  # compiled in its first call
            max_completion_tokens=width,
            stop=self.config.stop,
            halvings=0,  # completions are few and short: another size would have to be compiled for little
            **settings,
        )

    def measured(self, params: dict) -> dict[str, float]:
        """On held-out openings."""
        return self.described(self.held_out(params))

    def described(self, batch: Batch) -> dict[str, float]:
        """Numbers of a policy's samples; KL to the SFT model."""
        texts = list(itertools.chain(*rollouts.texts(batch, self.tokenizer)))
        scores, gold = self.score(batch), self.rewards(batch)
        return {
            "judge": float(judge.of_reviews().reward(texts).mean()),
            "reward model": float(scores.mean()),
            "VADER": float(gold.mean()),
            "rank correlation of these two": float(stats.spearmanr(scores.ravel(), gold.ravel()).statistic),
            "kl": self.kl(batch, self.sft),
            "cut off": float(rollouts.truncated(batch, self.stop_tokens).mean()),
        }

    @functools.cached_property
    def before(self) -> dict[str, float]:
        """The numbers of the stages, by name: the same for all seeds."""
        stages = {"SFT": self.sft} | ({"DPO": self.dpo} if self.dpo else {})
        return {f"{name}: {key}": value for name in stages for key, value in self.measured(stages[name]).items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(bench.Config):
    """How they are made."""

    texts: reviews.Texts  # for SFT
    sft: bench.Training
    num_pair_openings: int = 128  # whose samples VADER ranks
    num_ranked: int = 4  # samples of each: best against worst
    dpo: bench.Training | None = None  # None where a study trains such policies itself
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
        trained = None
        if self.dpo:
            pairs = bench.best_and_worst(openings, samples, rewards)
            ((trained, _),) = begin.fit(dpo.loss, dpo.Config(beta=self.beta), pairs, self.dpo, seed=0, params=tuned)
        pairs = bench.select(openings, samples, bench.games(rewards))
        ((ranks, _),) = begin.fit(
            reward_model.loss, reward_model.Config(), pairs, self.ranking, seed=0, params=tuned, reference="none"
        )
        ranker = RewardModel(begin.policy, ranks, begin.tokenizer)
        scores = Normalisation.of(ranker.scores(samples, begin.tokenizer))
        return Stages(**vars(begin), sft=tuned, pairs=pairs, reward_model=ranker, normalisation=scores, dpo=trained)
