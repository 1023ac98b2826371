"""Rewards by a trained reward model: a policy with a scalar head, see `pjpo.methods.reward_model`.

Scores of a Bradley-Terry model have no zero and no unit. The mean and standard deviation over a data set, kept in the
model's folder, give them both; they never follow the policy, so a reward means the same in every step.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float, Float32

from pjpo import checks, models
from pjpo.rollouts import pad
from pjpo.tokenizer import read_json
from pjpo.types import Batch

NORMALISATION = "reward_normalisation.json"  # in a model's folder
WIDTH = 32  # tokens; widths are rounded up to multiples of it, so that few shapes are compiled


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
                "from it (experiments/reward_pairs.py), or give a ...ForSequenceClassification folder"
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
        return self.scores(self.encoded(prompts, completions), self.tokenizer)

    def encoded(self, prompts: Sequence[str], completions: Sequence[Sequence[str]]) -> Batch:
        """Texts in this model's own tokens, padded to one of few widths."""
        numbers = {len(row) for row in completions}
        if len(prompts) != len(completions) or len(numbers) != 1:
            raise ValueError(
                f"reward model: {len(prompts)} prompts with {len(completions)} rows of {sorted(numbers)} completions; "
                "give every prompt the same number of completions"
            )
        end = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        encode = self.tokenizer.encode
        return self.padded(list(map(encode, prompts)), [[[*encode(text), *end] for text in row] for row in completions])

    def padded(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]) -> Batch:
        """Token ids of B prompts, and of N completions of each, padded to one of few widths that the model takes."""
        flat, room = [ids for row in completions for ids in row], self.policy.config.max_positions
        prompt_tokens, prompt_mask = _pad(prompts, room - max(map(len, flat), default=0))
        tokens, mask = (x.reshape(len(completions), -1, x.shape[-1]) for x in _pad(flat, room - prompt_tokens.shape[1]))
        return Batch.of(
            prompt_tokens=prompt_tokens, prompt_mask=prompt_mask, completion_tokens=tokens, completion_mask=mask
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normalisation:
    """What makes scores of a fixed set of texts have mean 0 and standard deviation 1."""

    mean: float
    std: float
    num_scores: int  # over how many they were taken

    def __post_init__(self):
        checks.kinds(self)
        if not math.isfinite(self.mean) or not 0 < self.std < math.inf or not self.num_scores >= 2:
            raise ValueError(
                f"normalisation: needs a finite mean, a std > 0 and 2 or more scores, got mean {self.mean}, std "
                f"{self.std} of {self.num_scores} scores; take it over more texts, which differ"
            )

    @classmethod
    def of(cls, scores: Float[np.ndarray, "..."]) -> Normalisation:
        """Of the scores, any shape, that a model gave to the data set it is to be normalised on; std with n - 1."""
        scores = np.asarray(scores, np.float64)
        std = float(scores.std(ddof=1)) if scores.size > 1 else 0.0
        return cls(mean=float(scores.mean()), std=std, num_scores=scores.size)

    def save(self, folder: str | Path) -> None:
        """Beside the model, which must be there."""
        text = json.dumps(dataclasses.asdict(self), indent=2)
        (Path(folder) / NORMALISATION).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Normalisation:
        """
        Raises:
            FileNotFoundError: the folder has none; says how to make it.
        """
        path = Path(folder) / NORMALISATION
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing; make it from the model's scores of pairs with python -m pjpo.rewards.normalise "
                f"{folder} --data.path FILE, or set normalise=False"
            )
        return cls(**read_json(path))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The score of a completion after its prompt, normalised and then clipped.

    It is of the very tokens that were sampled where the reward model has the policy's tokenizer. Another one is given
    the texts: without a chat's marks, and with an end token after a completion that was cut off, too.
    """

    source: str  # folder of the reward model
    normalise: bool  # by the mean and standard deviation that are kept in the folder
    clip: float = 10.0  # scores are cut to [-clip, clip]; inf cuts nothing
    batch_size: int = 16  # completions scored together
    param_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        checks.kinds(self)
        checks.at_least(self, 1, "batch_size")
        if not self.clip > 0:
            raise ValueError(f"learned: clip must be > 0, or inf for none, got {self.clip}")

    def __call__(self, completions: list[str], **given) -> list[float]:
        """
        Raises:
            FileNotFoundError: no normalisation in the folder.
            ValueError: what `RewardModel.load` refuses.
        """
        model, normalisation = self.prepare()
        parts = [model.scores(batch, model.tokenizer) for batch in self._batches(completions, **given)]
        scores = np.concatenate(parts)[: len(completions), 0].astype(np.float64)
        if normalisation:
            scores = (scores - normalisation.mean) / normalisation.std
        return np.clip(scores, -self.clip, self.clip).tolist()

    def warm_up(self, completions: list[str], **given) -> None:
        """Compiles what a call with these texts needs."""
        for batch in self._batches(completions, **given):
            shapes = batch.prompt_tokens.shape, batch.completion_tokens.shape
            _compiled(self.source, self.normalise, self.param_dtype, *shapes)

    def _batches(
        self,
        completions: list[str],
        *,
        prompts: list[str],
        prompt_ids: list[list[int]] | None = None,
        completion_ids: list[list[int]] | None = None,
        tokenizer: list[str] | None = None,
        **columns,
    ) -> list[Batch]:
        model, _ = self.prepare()
        places = np.arange(-(-len(completions) // self.batch_size) * self.batch_size).clip(max=len(completions) - 1)
        make, starts, ends = model.encoded, prompts, completions
        if prompt_ids and completion_ids and tokenizer and set(tokenizer) == {model.tokenizer.fingerprint}:
            make, starts, ends = model.padded, prompt_ids, completion_ids
        return [
            make([starts[i] for i in part], [[ends[i]] for i in part])
            for part in places.reshape(-1, self.batch_size)  # the last one filled up with copies: one shape
        ]

    def prepare(self) -> tuple[RewardModel, Normalisation | None]:
        """Loads the model, once."""
        return _loaded(self.source, self.normalise, self.param_dtype)


@functools.cache
def _loaded(source: str, normalise: bool, param_dtype: str) -> tuple[RewardModel, Normalisation | None]:
    model = RewardModel.load(source, param_dtype=param_dtype)
    return model, Normalisation.load(source) if normalise else None


@functools.cache
def _compiled(source: str, normalise: bool, param_dtype: str, prompts: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Scores a batch of these shapes, once."""
    model, _ = _loaded(source, normalise, param_dtype)
    batch = Batch.of(prompt_tokens=np.zeros(prompts, np.int32), completion_tokens=np.zeros(shape, np.int32))
    model.scores(batch, model.tokenizer)


def _pad(rows: Sequence[Sequence[int]], room: int) -> tuple[np.ndarray, np.ndarray]:
    tokens, mask = pad(rows)
    more = [(0, 0), (0, max(0, min(-tokens.shape[1] % WIDTH, room - tokens.shape[1])))]
    return np.pad(tokens, more), np.pad(mask, more)
