"""What a policy's completions of held-out prompts are worth, by the rewards of its training or by others."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax
import numpy as np

from pjpo import checks, online, rollouts
from pjpo.evals.result import Result
from pjpo.evals.sentiment import mean_and_stderr
from pjpo.sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    rewards: Any  # see `pjpo.rewards`
    num_completions: int = 1  # of each held-out prompt
    max_completion_tokens: int = 256
    temperature: float = 0.0  # 0 is greedy
    stop: tuple[str, ...] = ()  # tokens that end a completion, beside the tokenizer's own
    batch_size: int = 32  # prompts decoded together

    def __post_init__(self):
        checks.at_least(self, 1, "num_completions", "max_completion_tokens", "batch_size")
        checks.not_negative(self, "temperature")

    def build(self, context, data):
        """A function (params, ref_params) -> Result over `data.held_out`: the same prompts and keys each time.

        Raises:
            ValueError: nothing is held out, or a stop text that is no token.
        """
        if not data.held_out:
            raise ValueError("rewarded: the data holds no prompts to evaluate on; set its num_held_out to 1 or more")
        rewards, tokenizer = self.rewards.build(), context.tokenizer
        sampling = Sampling(
            num_completions=self.num_completions,
            max_completion_tokens=self.max_completion_tokens,
            temperature=self.temperature,
            stop_tokens=online.stop_tokens(self.stop, tokenizer),
        )
        prompts = [example.prompt for example in data.held_out]
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        key = jax.random.fold_in(context.key, zlib.crc32(b"rewarded"))

        def evaluate(params, ref_params, *, title: str = "evaluating") -> Result:
            """Mean reward and that of each function, `_stderr` over prompts; a completion without one counts 0."""
            batch = rollouts.rollouts(
                context.policy, params, prompts, key, sampling, batch_size=self.batch_size, title=title
            )
            completions = rollouts.completions(batch, tokenizer)
            totals, parts = online.judge(rewards, data.held_out, texts, completions)
            metrics = {}
            for name, values in {"reward": totals, **{f"rewards/{name}": part for name, part in parts.items()}}.items():
                metrics[name], metrics[f"{name}_stderr"] = mean_and_stderr(np.nan_to_num(values))
            metrics["mean_length"] = float(batch.completion_mask.sum(-1).mean())
            samples = [
                {"prompt": text, "text": text + group[0], "reward": round(float(reward[0]), 3)}
                for text, group, reward in zip(texts, completions, totals, strict=True)
            ]
            return Result(metrics=metrics, samples=samples)

        return evaluate
