"""What a rollout says of itself: metrics under TRL's names, and texts to read."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pjpo import rollouts
from pjpo.data.examples import Example
from pjpo.metrics import Mean
from pjpo.rewards.protocol import Failure
from pjpo.types import Batch


@dataclasses.dataclass(frozen=True)
class Scored:
    """Prompts with their completions, and what these are worth; NumPy arrays, prompts first."""

    examples: list[Example]
    batch: Batch  # `old_logps` are the sampler's; `rewards` are nan where there is none
    truncated: np.ndarray  # [B, N] bool: no end token
    rewards: dict[str, np.ndarray]  # by each function, [B, N]; nan where it failed
    failures: list[Failure]

    @property
    def equal(self) -> np.ndarray:
        """Groups [B] whose rewards are all the same, or missing."""
        rewards = np.asarray(self.batch.rewards)
        known = np.isfinite(rewards)
        return ~(np.where(known, rewards, -np.inf).max(1) > np.where(known, rewards, np.inf).min(1))

    @property
    def instructive(self) -> np.ndarray:
        """Groups [B] from which something is learned: their rewards differ, and a completion counts in the loss."""
        return ~self.equal & np.asarray(self.batch.loss_mask).any((1, 2))

    def take(self, chosen: np.ndarray) -> Scored:
        """The groups where `chosen` [B] is true."""
        rows = np.flatnonzero(chosen)
        batch, truncated, rewards = jax.tree.map(lambda x: x[rows], (self.batch, self.truncated, self.rewards))
        return Scored([self.examples[row] for row in rows], batch, truncated, rewards, self.failures)

    def best_and_worst(self) -> Scored:
        """Of each group its first best and its first worst completion, in the places of CHOSEN and REJECTED."""
        rewards = np.asarray(self.batch.rewards)
        known = np.isfinite(rewards)
        best, worst = np.where(known, rewards, -np.inf).argmax(1), np.where(known, rewards, np.inf).argmin(1)
        places = np.stack([best, worst], axis=1)  # [B, 2]

        def of(x: np.ndarray) -> np.ndarray:
            return np.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), axis=1)

        names = ("completion_tokens", "completion_mask", "loss_mask", "rewards", "old_logps")
        batch = dataclasses.replace(self.batch, **{name: of(getattr(self.batch, name)) for name in names})
        truncated, rewards = jax.tree.map(of, (self.truncated, self.rewards))
        return Scored(self.examples, batch, truncated, rewards, self.failures)

    @classmethod
    def join(cls, parts: Sequence[Scored]) -> Scored:
        arrays = [(part.batch, part.truncated, part.rewards) for part in parts]
        chain = itertools.chain.from_iterable
        examples, failures = (list(chain(getattr(p, name) for p in parts)) for name in ("examples", "failures"))
        batch, truncated, rewards = jax.tree.map(lambda *x: np.concatenate(x), *arrays)
        return cls(examples, batch, truncated, rewards, failures)


def numbers(scored: Scored, batch: Batch, differences: np.ndarray, *, chosen: bool) -> dict[str, Mean]:
    """Metrics of a rollout, named as in TRL's GRPO trainer.

    Args:
        scored: all that was sampled, groups that were left out included.
        batch: what is trained on, with `old_logps` and, if there is a reference, `ref_logps`.
        differences: log-probs of the trainer less those of the sampler, [B, N, T]; nats.
        chosen: whether the batch was chosen by reward, so that it is no sample of the policy.
    """
    totals = np.asarray(scored.batch.rewards, np.float64)
    lengths = np.asarray(scored.batch.completion_mask).sum(-1)
    ended = ~scored.truncated
    found = {
        "reward": _mean(totals, np.isfinite(totals)),
        "reward_std": _std(totals),
        "reward_group_std": _mean(_stds(totals)),
        "frac_reward_zero_std": _mean(scored.equal),
        "completions/mean_length": _mean(lengths),
        "completions/min_length": _extreme(lengths, np.min),
        "completions/max_length": _extreme(lengths, np.max),
        "completions/clipped_ratio": _mean(scored.truncated),
        "completions/mean_terminated_length": _mean(lengths, ended),
        "completions/min_terminated_length": _extreme(lengths[ended], np.min),
        "completions/max_terminated_length": _extreme(lengths[ended], np.max),
    }
    for name, values in scored.rewards.items():
        found[f"rewards/{name}/mean"] = _mean(values, np.isfinite(values))
        found[f"rewards/{name}/std"] = _std(values)
    found["rewards/failures"] = _mean([len(scored.failures)])
    mask = np.asarray(batch.completion_mask)
    apart, ratios = np.abs(differences[mask]), np.exp(differences[mask])
    found["sampling/sampling_logp_difference/mean"] = _mean(apart)
    found["sampling/sampling_logp_difference/max"] = _extreme(apart, np.max)
    found["sampling/importance_sampling_ratio/min"] = _extreme(ratios, np.min)
    found["sampling/importance_sampling_ratio/mean"] = _mean(ratios)
    found["sampling/importance_sampling_ratio/max"] = _extreme(ratios, np.max)
    # Of samples from what it is the entropy of: an estimate without bias.
    found["entropy"] = _mean(-np.asarray(scored.batch.old_logps), np.asarray(scored.batch.completion_mask))
    if batch.ref_logps is not None and not chosen:
        found["kl_k1"] = _mean(np.asarray(batch.old_logps) - batch.ref_logps, mask)  # of the KL; "kl" is the loss's
    return found


def rows(scored: Scored, batch: Batch, tokenizer: Any, rollout: int, num_prompts: int | None) -> list[dict[str, Any]]:
    """The completions of the first prompts (None: of all), one row each, for samples.jsonl.

    Advantages of tokens are given as their mean.
    """
    found = []
    for b, (example, group) in enumerate(
        zip(scored.examples[:num_prompts], rollouts.completions(scored.batch, tokenizer), strict=False)
    ):
        for n, text in enumerate(group):
            found.append(
                {
                    "kind": "rollout",
                    "rollout": rollout,
                    "id": example.id,
                    "prompt": tokenizer.decode(example.prompt),
                    "completion": text,
                    "reward": float(np.asarray(scored.batch.rewards)[b, n]),
                    "rewards": {name: float(values[b, n]) for name, values in scored.rewards.items()},
                    "num_tokens": int(np.asarray(scored.batch.completion_mask)[b, n].sum()),
                    "truncated": bool(scored.truncated[b, n]),
                }
            )
            if batch.advantages is not None:
                advantages = np.asarray(batch.advantages)[b, n]
                counted = np.asarray(batch.loss_mask)[b, n] if advantages.ndim else np.array(True)
                found[-1]["advantage"] = float(_mean(advantages, counted).value())
    return found


def _std(values: np.ndarray) -> Mean:
    """Of all that there are, with n - 1; of fewer than two there is none."""
    values = values[np.isfinite(values)]
    return _mean([values.std(ddof=1)] if len(values) > 1 else [])


def _stds(rewards: np.ndarray) -> list[float]:
    """Of each group that has two rewards or more."""
    groups = (group[np.isfinite(group)] for group in rewards)
    return [float(group.std(ddof=1)) for group in groups if len(group) > 1]


def _extreme(values: np.ndarray, which: Callable) -> Mean:
    return _mean([which(values)] if values.size else [])


def _mean(values: Any, mask: np.ndarray | None = None) -> Mean:
    values = np.asarray(values, np.float64)
    if mask is not None:
        values = values[mask]
    return Mean(values.sum(), np.float64(values.size))
