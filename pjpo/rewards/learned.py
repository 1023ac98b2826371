"""Rewards by a trained reward model: a policy with a scalar head, see `pjpo.methods.reward_model`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from pjpo import models
from pjpo.rollouts import pad
from pjpo.types import Batch


@dataclasses.dataclass(frozen=True)
class RewardModel:
    policy: Any  # with `scores(params, batch)`
    params: dict
    tokenizer: Any  # its own

    @classmethod
    def load(cls, source: str | Path, **settings: Any) -> RewardModel:
        """From a folder that `pjpo.models.save` or `transformers` wrote; settings as in `pjpo.models.load`.

        Raises:
            ValueError: a language model, or what `pjpo.models.load` refuses.
        """
        if models.config(source, **settings).language_head:
            raise ValueError(
                f"{source} is a language model where a reward model is expected: it has no score.weight. Train one "
                "from it (experiments/reward_hh.py), or give a ...ForSequenceClassification folder"
            )
        return cls(*models.load(source, **settings))

    def scores(self, batch: Batch, tokenizer: Any) -> Float32[np.ndarray, "B N"]:
        """Rewards of completions given as token ids.

        Args:
            batch: prompts and completions, the end tokens included.
            tokenizer: whose ids they are.

        Raises:
            ValueError: the ids are another tokenizer's, and would mean other texts to this model.
        """
        if tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise ValueError(
                "the reward model's tokenizer differs from the one these ids belong to "
                f"({self.tokenizer.vocab_size} and {tokenizer.vocab_size} ids): they would be read as another text; "
                "pass texts to `reward` instead"
            )
        return np.asarray(jax.device_get(self.policy.scores(self.params, batch)), np.float32)

    def reward(self, prompts: Sequence[str], completions: Sequence[Sequence[str]]) -> Float32[np.ndarray, "B N"]:
        """Rewards of texts, in this model's own tokens: N completions of each of B prompts."""
        numbers = {len(row) for row in completions}
        if len(prompts) != len(completions) or len(numbers) != 1:
            raise ValueError(
                f"reward model: {len(prompts)} prompts with {len(completions)} rows of {sorted(numbers)} completions; "
                "give every prompt the same number of completions"
            )
        end = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        prompt_tokens, prompt_mask = pad([self.tokenizer.encode(text) for text in prompts])
        ids = [[*self.tokenizer.encode(text), *end] for row in completions for text in row]
        tokens, mask = (rows.reshape(*np.shape(completions)[:2], -1) for rows in pad(ids))
        batch = Batch.of(
            prompt_tokens=prompt_tokens, prompt_mask=prompt_mask, completion_tokens=tokens, completion_mask=mask
        )
        return self.scores(batch, self.tokenizer)
