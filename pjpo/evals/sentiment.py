"""The controlled-sentiment study: reward, an independent judge and KL on held-out openings. After arXiv:2305.18290.

Used so:
    evaluation = Config().build(context, data)  # trains the judge, once
    before = evaluation(ref_params, ref_params)  # before.metrics, before.samples, and before.best_of to compare with
    after = evaluation(params, ref_params)  # the same openings with the same keys
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float

from pjpo import checks, distributed, rollouts, sharding
from pjpo.best_of import kl_bound, weights
from pjpo.data import reviews
from pjpo.evals import panel
from pjpo.evals.preferences import kind_of
from pjpo.evals.result import Result
from pjpo.rewards import vader
from pjpo.rewards.judge import SHORT, Judge
from pjpo.sampling import Sampling
from pjpo.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How much to sample. The temperature is 1: the KL is between the distributions that log-probs describe."""

    num_completions: int = 4  # of each held-out opening
    max_completion_tokens: int = 32
    batch_size: int = 32  # openings sampled and scored together
    pairs_batch_size: int = 8  # held-out preferences scored together; training's own needs no further compilation

    def __post_init__(self):
        checks.kinds(self)
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"sentiment: {name} must be >= 1, got {value}")

    def build(self, context, data) -> Evaluation:
        """Trains the judge on the reviews that are kept for it, in seconds, and says how good it is."""
        if not data.held_out:
            raise ValueError("sentiment: the data holds no openings to evaluate on; set its num_held_out to 1 or more")
        known = [review for review in reviews.read() if review.use == "judge"]
        judge = Judge.train([review.text for review in known], [review.label for review in known])
        rates = f"{judge.accuracy:.0%} of held-out reviews, {judge.short_accuracy:.0%} by their first {SHORT} words"
        context.say(f"judge: right on {rates}")
        with_completions = [opening for opening in data.held_out if opening.completions]
        on_pairs = None
        if with_completions and kind_of(with_completions, context.method):
            sharding.check_batch(context.mesh, self.pairs_batch_size, name="evaluation.pairs_batch_size")
            on_pairs = panel.build(context, with_completions, self.pairs_batch_size)
        return Evaluation(self, context, [opening.prompt for opening in data.held_out], judge.reward, on_pairs)


class Evaluation:
    """Samples, scores, measures. Openings and keys stay the same, so a difference between calls is the policy's."""

    reads_reference = True  # a run keeps its start's weights for it, whatever its method reads

    def __init__(
        self, config: Config, context, prompts: Sequence[np.ndarray], judge: Callable, on_pairs: Callable | None = None
    ):
        self.config, self.policy, self.tokenizer = config, context.policy, context.tokenizer
        self.prompts, self.judge = prompts, judge  # judge: texts to scores
        self.on_pairs = on_pairs  # from `panel.build`
        self.key = jax.random.fold_in(context.key, zlib.crc32(b"sentiment"))  # the key itself may have sampled the data

    def __call__(self, params, ref_params, *, title: str = "evaluating") -> Result:
        """Rewards as their scorers give them, KL in nats per completion, lengths in tokens; `_stderr` is over openings.

        `kl` is the mean over samples of the log-ratio of the whole completion, an unbiased estimate of the sequence KL;
        `entropy` is in nats per token. Where pairs are held out, their panel is among the metrics, see `panel`.

        Raises:
            ValueError: no reference to measure the KL to.
        """
        if ref_params is None:
            raise ValueError("sentiment: KL needs a reference; pass ref_params, such as the parameters of the start")
        sampling = Sampling(
            num_completions=self.config.num_completions,
            max_completion_tokens=self.config.max_completion_tokens,
            stop_tokens=self.tokenizer.stop_ids,
        )
        batch = rollouts.rollouts(
            self.policy, params, self.prompts, self.key, sampling, batch_size=self.config.batch_size, title=title
        )
        texts = rollouts.texts(batch, self.tokenizer)
        flat, shape = list(itertools.chain(*texts)), batch.completion_tokens.shape[:2]
        rewards = {
            "reward_vader": vader.reward(flat).reshape(shape),
            "reward_judge": self.judge(flat).reshape(shape),
        }
        metrics = {}
        for name, values in rewards.items():
            metrics[name], metrics[f"{name}_stderr"] = mean_and_stderr(values)
        metrics |= panel.of_samples(batch, self._logps(ref_params, batch))
        metrics["distinct_2"] = distinct(batch.completion_tokens, batch.completion_mask)
        metrics["mean_length"] = float(batch.completion_mask.sum(-1).mean())
        samples = [  # for each opening its first completion
            {
                "prompt": self.tokenizer.decode(prompt),
                "text": text[0],
                **{name: round(float(values[row, 0]), 3) for name, values in rewards.items()},
            }
            for row, (prompt, text) in enumerate(zip(self.prompts, texts, strict=True))
        ]
        words = {}
        if self.on_pairs:
            of_pairs, words = self.on_pairs(params, ref_params)
            metrics |= of_pairs
        return Result(metrics=metrics, samples=samples, best_of=best_of(rewards), words=words)

    def _logps(self, params, batch: Batch) -> Float[np.ndarray, "B N T"]:
        """As many rows at a time as were sampled together, the last ones filled up with copies: one shape."""
        num_rows = len(batch.prompt_tokens)
        size = min(self.config.batch_size, num_rows)
        rows = np.arange(-(-num_rows // size) * size).clip(max=num_rows - 1).reshape(-1, size)
        parts = [self.policy.logps(params, jax.tree.map(lambda x, part=part: x[part], batch)) for part in rows]
        return np.concatenate(distributed.fetch(parts))[:num_rows]


def best_of(rewards: Mapping[str, Float[np.ndarray, "B N"]], nums: Sequence[int] = (1, 2, 4)) -> dict[str, float]:
    """Best-of-n by VADER from the samples that got `rewards`, in place of n fresh ones: `best_of/<n>/reward_vader`, ...

    The expectation over all subsets of n of an opening's N samples; `kl` is from above. An n beyond N is left out.
    """
    order = rewards["reward_vader"].argsort(axis=1)
    num_samples = order.shape[1]
    metrics = {}
    for n in (n for n in nums if n <= num_samples):
        shares = weights(num_samples, n)
        for name, values in rewards.items():
            metrics[f"best_of/{n}/{name}"] = float((np.take_along_axis(values, order, axis=1) @ shares).mean())
        metrics[f"best_of/{n}/kl"] = kl_bound(n)
    return metrics


def mean_and_stderr(values: Float[np.ndarray, "B N"]) -> tuple[float, float]:
    """The mean, and its standard error over rows: samples of one opening are alike, openings are independent."""
    rows = values.mean(1, dtype=np.float64)
    return float(rows.mean()), float(rows.std(ddof=1) / math.sqrt(len(rows))) if len(rows) > 1 else math.nan


def distinct(tokens: np.ndarray, mask: np.ndarray, n: int = 2) -> float:
    """Different n-grams of tokens over all n-grams, within completions, pooled over samples; 0 where there are none."""
    rows = [
        completion[kept].tolist()
        for completion, kept in zip(tokens.reshape(-1, tokens.shape[-1]), mask.reshape(-1, mask.shape[-1]), strict=True)
    ]
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)
