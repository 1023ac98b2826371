"""What every preference run is asked on held-out pairs: rewards, rankings, where likelihood went, and what length does.

Sums of log-probs over completions [n, 2], (chosen, rejected), in nats. Metric names carry their unit or are shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from pjpo import distributed
from pjpo.data.batches import in_order
from pjpo.data.examples import Example
from pjpo.evals import ranking
from pjpo.logps import sum_completion
from pjpo.types import CHOSEN, REJECTED, Batch

Sums = Float[np.ndarray, "n 2"]
Lengths = Int[np.ndarray, "n 2"]
ROUNDING = 1e-5  # nats a token; in float32 two shapes of batch differ by up to 2e-6 (the 0.85M model)


def build(context, pairs: Sequence[Example], batch_size: int) -> Callable:
    """A function (params, ref_params) -> (metrics, sentences) of pairs of token ids, `batch_size` scored together.

    The reference is taken to stay as it is in the first call.
    """
    batches = [context.prepare(batch) for batch in in_order(pairs, batch_size, context.buckets)]
    lengths = np.array([[len(completion) for completion in pair.completions] for pair in pairs])
    found: list[np.ndarray] = []  # of the reference

    def sums(params: dict) -> np.ndarray:
        parts = [sum_completion(context.policy.logps(params, batch), batch.loss_mask) for batch in batches]
        return np.concatenate(distributed.fetch(parts))[: len(pairs)]

    def evaluate(params: dict, ref_params: dict) -> tuple[dict[str, float], dict[str, str]]:
        if not found:
            found.append(sums(ref_params))
        logps, (ref_logps,) = sums(params), found
        metrics = of_pairs(getattr(context.method, "beta", 1.0), logps, ref_logps, lengths)
        return metrics, {"displacement": displacement(logps, ref_logps)}

    return evaluate


def of_pairs(beta: float | int, logps: Sums, ref_logps: Sums, lengths: Lengths) -> dict[str, float]:
    """Metrics of the pairs by name.

    `rewards/...` are implicit rewards, beta times log-ratios; a tie is no success for them. `ranking/...` compare
    likelihoods, a tie is a success, beside what the optimum of DPO's objective would reach over a range of beta if
    999 of 1000 raters agreed. `logps/..._change` is the policy less the reference. `length/...`: how often, of two
    unequal completions, the longer was chosen and how often it has the higher reward, and the correlation of reward
    margins with differences in length, in tokens. Log-ratios that differ by no more than `ROUNDING` for each token of
    the pair are alike there, so that a policy that is its reference rewards nothing for its length.
    """
    logps, ref_logps = np.asarray(logps, np.float64), np.asarray(ref_logps, np.float64)
    rewards, changes = beta * (logps - ref_logps), (logps - ref_logps).mean(0)
    margins, longer = rewards[:, CHOSEN] - rewards[:, REJECTED], lengths[:, CHOSEN] - lengths[:, REJECTED]
    real_margins = np.where(np.abs(margins) > beta * ROUNDING * lengths.sum(1), margins, 0)
    certain = np.ones(len(logps))
    idealised = ranking.idealised_range(ref_logps, certain)
    return {
        "rewards/chosen": float(rewards[:, CHOSEN].mean()),
        "rewards/rejected": float(rewards[:, REJECTED].mean()),
        "rewards/margins": float(margins.mean()),
        "rewards/accuracies": ranking.reward_accuracy(logps, ref_logps),
        "ranking/accuracy": ranking.accuracy(logps),
        "ranking/accuracy_per_token": ranking.accuracy(logps, lengths),
        "ranking/flipped": ranking.flipped(logps, ref_logps),
        **{f"ranking/idealised_{name}": value for name, value in idealised.items()},
        "ranking/alignment_gap": idealised["median"] - ranking.accuracy(logps),
        "logps/chosen": float(logps[:, CHOSEN].mean()),
        "logps/rejected": float(logps[:, REJECTED].mean()),
        "logps/chosen_change": float(changes[CHOSEN]),
        "logps/rejected_change": float(changes[REJECTED]),
        "length/longer_chosen": _share(longer > 0, longer != 0),
        "length/longer_rewarded": _share(real_margins * longer > 0, longer != 0),
        "length/margin_correlation": _correlation(real_margins, longer),
    }


def of_samples(batch: Batch, ref_logps: Float[np.ndarray, "B N T"]) -> dict[str, float]:
    """Sequence KL and entropy from completions that the policy sampled at temperature 1, with `old_logps`.

    `kl` is the mean log-ratio of whole completions, nats per completion; `entropy` the mean of -log p over tokens, nats
    per token. Both are unbiased and noisy: `kl_stderr` is over prompts.
    """
    mask, logps = np.asarray(batch.completion_mask), np.asarray(batch.old_logps, np.float64)
    ratios = np.where(mask, logps - ref_logps, 0).sum(-1).mean(1)  # [B]
    error = ratios.std(ddof=1) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
    entropy = -np.where(mask, logps, 0).sum() / max(mask.sum(), 1)
    return {"kl": float(ratios.mean()), "kl_stderr": float(error), "entropy": float(entropy)}


def displacement(logps: Sums, ref_logps: Sums) -> str:
    """A sentence that says where likelihood went, held against the standard errors of both changes."""
    changes = np.asarray(logps, np.float64) - ref_logps
    means, errors = changes.mean(0), changes.std(0, ddof=1) / math.sqrt(len(changes)) if len(changes) > 1 else 0
    moved = np.abs(means) > 2 * errors
    chosen, rejected = np.where(moved, np.sign(means), 0).astype(int)
    regime = {
        (0, 0): "Neither moved beyond chance",
        (1, -1): "Reinforcement: chosen rose and rejected fell",
        (1, 0): "Reinforcement: chosen rose, rejected stayed",
        (0, -1): "Suppression: rejected fell, chosen stayed",
        (1, 1): "Both rose",
        (0, 1): "Rejected rose, chosen stayed: the pairs are being unlearned",
        (-1, -1): "Likelihood displacement: both fell, so the mass went to other completions",
        (-1, 0): "Likelihood displacement: chosen fell, rejected stayed",
        (-1, 1): "Chosen fell and rejected rose: the pairs are being unlearned",
    }[chosen, rejected]
    return f"{regime} (chosen {means[CHOSEN]:+.2f}, rejected {means[REJECTED]:+.2f} nats a completion)."


def _share(found: np.ndarray, among: np.ndarray) -> float:
    """0 where there is nothing to count."""
    return float(found[among].mean()) if among.any() else 0.0


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's; 0 where one of the two is constant."""
    spread = x.std() * y.std()
    return float(((x - x.mean()) * (y - y.mean())).mean() / spread) if spread > 0 else 0.0
