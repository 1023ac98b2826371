"""What a policy's completions of held-out prompts are worth, by the rewards of its training or by others."""

from __future__ import annotations

import dataclasses
import zlib

import jax
import numpy as np

from pjpo import checks, online, rollouts
from pjpo.evals.result import Result
from pjpo.evals.sentiment import mean_and_stderr
from pjpo.rewards.protocol import Rewards
from pjpo.sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    rewards: Rewards  # of which the mean is `reward`
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
        self.rewards.check({name for example in data.held_out for name in example.columns})
        tokenizer = context.tokenizer
        sampling = Sampling(
            num_completions=self.num_completions,
            max_completion_tokens=self.max_completion_tokens,
            temperature=self.temperature,
            stop_tokens=online.stop_tokens(self.stop, tokenizer),
        )
        prompts = [example.prompt for example in data.held_out]
        key = jax.random.fold_in(context.key, zlib.crc32(b"rewarded"))

        def evaluate(params, ref_params, *, title: str = "evaluating") -> Result:
            """Mean reward and that of each function, `_stderr` over prompts; a completion without one counts 0."""
            batch = rollouts.rollouts(
                context.policy, params, prompts, key, sampling, batch_size=self.batch_size, title=title
            )
            scores = online.judge(self.rewards, batch, data.held_out, tokenizer)
            metrics = {}
            parts = {f"rewards/{name}": values for name, values in scores.rewards.items()}
            for name, values in {"reward": scores.total, **parts}.items():
                metrics[name], metrics[f"{name}_stderr"] = mean_and_stderr(np.nan_to_num(values))
            metrics["mean_length"] = float(batch.completion_mask.sum(-1).mean())
            texts = rollouts.texts(batch, tokenizer)
            samples = [
                {"prompt": tokenizer.decode(prompt), "text": group[0], "reward": round(float(reward[0]), 3)}
                for prompt, group, reward in zip(prompts, texts, scores.total, strict=True)
            ]
            return Result(metrics=metrics, samples=samples)

        return evaluate
