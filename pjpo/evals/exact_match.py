"""How many held-out problems are solved: greedily, by one sample, and by one of k samples.

pass@k is the unbiased estimate of Chen et al. 2021, arXiv:2107.03374, Eq. 1.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool

from pjpo import checks, rollouts
from pjpo.data.examples import Example
from pjpo.evals.result import Result
from pjpo.rewards.protocol import Rewards
from pjpo.sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    rewards: Rewards  # the first one is the verifier: 1 or more is right
    num_completions: int = 8  # samples of each problem, at temperature 1
    pass_at: tuple[int, ...] = (1, 8)  # k of pass@k, up to num_completions
    max_completion_tokens: int
    stop: tuple[str, ...] = ()  # tokens that end a completion, beside the tokenizer's own: those of the rollouts
    batch_size: int = 32  # problems decoded together

    def __post_init__(self):
        checks.kinds(self)
        for name in ("num_completions", "max_completion_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"exact match: {name} must be >= 1, got {getattr(self, name)}")
        if not all(1 <= k <= self.num_completions for k in self.pass_at):
            raise ValueError(
                f"exact match: pass_at must be within 1 and num_completions {self.num_completions}, got {self.pass_at}"
            )

    def build(self, context, data) -> Evaluation:
        """
        Raises:
            ValueError: nothing is held out, its columns are not those that the rewards read, or a text to stop at is
                not one token.
        """
        if not data.held_out:
            raise ValueError("exact match: the data holds nothing out; set num_held_out to 1 or more")
        examples = list(data.held_out)
        self.rewards.check({name for example in examples for name in example.columns})
        return Evaluation(self, context, examples)


class Evaluation:
    """Samples and scores. Problems and keys stay the same, so a difference between calls is the policy's."""

    def __init__(self, config: Config, context, examples: Sequence[Example]):
        self.config, self.policy, self.tokenizer = config, context.policy, context.tokenizer
        self.examples, self.say = examples, context.say
        self.stop_tokens = rollouts.stop_tokens(config.stop, context.tokenizer)
        self.key = jax.random.fold_in(context.key, zlib.crc32(b"exact match"))

    def __call__(self, params, ref_params=None, *, title: str = "evaluating") -> Result:
        """`accuracy` is greedy; `pass@k` and `reward/<name>`, means, are of samples. `_stderr` is over problems.

        `frac_reward_zero_std` is the share of problems whose samples are all right or all wrong, from which a method
        with groups learns nothing; `mean_length` is of samples, in tokens. A completion that the verifier could not
        score counts as wrong, and among `failures`.
        """
        right, _, _, num_failures = self._sampled(params, f"{title}, greedy", num_completions=1, temperature=0.0)
        metrics = dict(zip(("accuracy", "accuracy_stderr"), _mean_and_stderr(right[:, 0]), strict=True))
        samples, batch, scores, more = self._sampled(params, title, num_completions=self.config.num_completions)
        for k in self.config.pass_at:
            passed = pass_at(k, samples)
            metrics[f"pass@{k}"], metrics[f"pass@{k}_stderr"] = _mean_and_stderr(passed)
        for name, values in scores.rewards.items():
            known = values[np.isfinite(values)]
            metrics[f"reward/{name}"] = float(known.mean(dtype=np.float64)) if known.size else math.nan
        metrics["frac_reward_zero_std"] = float((samples.all(1) | ~samples.any(1)).mean())
        metrics["mean_length"] = float(batch.completion_mask.sum(-1).mean())
        metrics["failures"] = float(num_failures + more)
        rows = []
        for example, tokens, masks, row in zip(
            self.examples, batch.completion_tokens, batch.completion_mask, range(len(samples)), strict=True
        ):
            prompt = self.tokenizer.decode(example.prompt)
            text = self.tokenizer.decode([*example.prompt, *tokens[0][masks[0]]])  # of each problem its first sample
            found = {f"reward_{name}": round(float(values[row, 0]), 3) for name, values in scores.rewards.items()}
            rows.append({"prompt": prompt, "text": text, **found})
        return Result(metrics=metrics, samples=rows)

    def _sampled(self, params, title: str, **settings):
        """Whether each completion [B, N] is right, the completions, their scores, and how many could not be scored."""
        sampling = Sampling(
            max_completion_tokens=self.config.max_completion_tokens, stop_tokens=self.stop_tokens, **settings
        )
        prompts = [example.prompt for example in self.examples]
        options = {"batch_size": self.config.batch_size, "title": title}
        batch = rollouts.rollouts(self.policy, params, prompts, self.key, sampling, **options)
        scores = self.config.rewards.of_samples(batch, self.examples, self.tokenizer)
        for failure in scores.failures[:3]:
            self.say(str(failure))
        verdicts = next(iter(scores.rewards.values()))
        return verdicts >= 1, batch, scores, len(scores.failures)  # nan is not >= 1


def pass_at(k: int, right: Bool[np.ndarray, "B N"]) -> np.ndarray:
    """Of each problem the probability that k of its N samples, drawn without replacement, hold a right one."""
    num_samples, num_right = right.shape[1], right.sum(1)
    return np.array([1 - math.comb(num_samples - int(c), k) / math.comb(num_samples, k) for c in num_right])


def _mean_and_stderr(values: np.ndarray) -> tuple[float, float]:
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)
