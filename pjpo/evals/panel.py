"""What every preference run is asked on held-out examples: rewards, rankings, where likelihood went, what length does.

Pairs are sums of log-probs over completions [n, 2], (chosen, rejected); of more completions than two the first two
count. Where data is not paired (KTO's), they are [n], with a label each. Nats; metric names carry their unit or are
shares. What nothing was counted for is left out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pjpo import distributed
from pjpo.data.batches import in_order
from pjpo.data.examples import Example
from pjpo.evals import ranking
from pjpo.evals.preferences import Kind, implicit_rewards, kind_of
from pjpo.evals.token_rewards import largest_share
from pjpo.types import CHOSEN, REJECTED, Batch

Sums = Float[np.ndarray, "n 2"]
Lengths = Int[np.ndarray, "n 2"]
Rows = dict[str, Any]  # of `rows_of`: arrays with an entry for each example
ROUNDING = 1e-5  # nats a token; in float32 two shapes of batch differ by up to 2e-6 (the 0.85M model)


def build(context, examples: Sequence[Example], batch_size: int) -> Callable:
    """A function (params, ref_params) -> (metrics, sentences) of token ids, `batch_size` examples scored together.

    The reference is taken to stay as it is in the first call.
    """
    kind = kind_of(examples, context.method)
    assert kind, "the panel is of preferences"
    batches = [context.prepare(batch) for batch in in_order(examples, batch_size, context.buckets)]
    found: list[Array] = []  # of the reference

    def evaluate(params: dict, ref_params: dict) -> tuple[dict[str, float], dict[str, str]]:
        if not found:
            found.extend(context.policy.logps(ref_params, batch) for batch in batches)
        rows = [
            _rows_of(kind, batch, context.policy.logps(params, batch), ref_logps)
            for batch, ref_logps in zip(batches, found, strict=True)
        ]
        return of_rows(kind, context.method, distributed.fetch(rows), len(examples))

    return evaluate


def rows_of(
    kind: Kind, batch: Batch, logps: Float[Array, "B N T"], ref_logps: Float[Array, "B N T"]
) -> dict[str, Array]:
    """What the panel needs of each row of a batch; for jit. Log-probs of tokens, to be summed in float64: `of_rows`."""
    num = 2 if kind == "pairs" else 1  # beside a labelled completion KTO has one of another prompt
    logps, ref_logps, mask = logps[:, :num], ref_logps[:, :num], batch.loss_mask[:, :num]
    rows = {
        "logps": jnp.where(mask, logps, 0),
        "ref_logps": jnp.where(mask, ref_logps, 0),
        "lengths": mask.sum(-1),
        "largest_shares": largest_share(logps - ref_logps, mask, ROUNDING),
    }
    if kind == "labelled":
        assert batch.labels is not None, "labelled examples make labelled batches"
        rows = {name: x if x.ndim == 1 else x[:, 0] for name, x in rows.items()} | {"labels": batch.labels[:, 0]}
    return rows


_rows_of = functools.partial(jax.jit, static_argnums=0)(rows_of)


def of_rows(
    kind: Kind, method: Any, parts: Sequence[Rows], num_examples: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics and sentences from the rows of all batches, the last of which may end with empty ones.

    What two runs' margins differ by decides correlations; float32 sums would add 4e-7 to it for eight tokens.
    """
    parts = [part | {name: part[name].sum(-1, dtype=np.float64) for name in ("logps", "ref_logps")} for part in parts]
    rows = {name: np.concatenate([part[name] for part in parts])[:num_examples] for name in parts[0]}
    shares = rows.pop("largest_shares")
    name, scale = implicit_rewards(method)
    if kind == "pairs":
        metrics = of_pairs(scale, **rows, name=name)
        words = displacement(**rows)
    else:
        metrics = of_labelled(scale, **rows, name=name)
        words = displacement_of_labelled(**rows)
    if not np.isnan(shares).all():
        metrics["token_rewards/largest_share"] = float(np.nanmean(shares))
    return metrics, {"displacement": words}


def of_pairs(
    beta: float | int, logps: Sums, ref_logps: Sums, lengths: Lengths, *, name: str = "rewards"
) -> dict[str, float]:
    """Metrics of the pairs by name.

    `rewards/...` (or another `name`) are implicit rewards, beta times log-ratios; a tie is no success for them.
    `ranking/...` compare likelihoods, a tie is a success, beside what the optimum of DPO's objective would reach over a
    range of beta if 999 of 1000 raters agreed; `_per_token`: of mean log-probs. `ranking/difficulty` is by how many
    nats the reference has pairs wrong on average, and `ranking/theorem_4_1_violations` counts pairs whose DPO loss at
    this beta lies on the wrong side of the threshold that the reference sets: none, unless numbers are broken.
    `logps/..._change` is the policy less the reference. `length/...`: how often, of two unequal completions, the longer
    was chosen and how often it has the higher reward, and the correlation of reward margins with differences in length,
    in tokens. Log-ratios that differ by no more than `ROUNDING` for each token of the pair are alike there, so that a
    policy that is its reference rewards nothing for its length.
    """
    logps, ref_logps = np.asarray(logps, np.float64), np.asarray(ref_logps, np.float64)
    rewards, changes = beta * (logps - ref_logps), (logps - ref_logps).mean(0)
    margins, longer = rewards[:, CHOSEN] - rewards[:, REJECTED], lengths[:, CHOSEN] - lengths[:, REJECTED]
    real_margins = np.where(np.abs(margins) > beta * ROUNDING * lengths.sum(1), margins, 0)
    return {
        f"{name}/chosen": float(rewards[:, CHOSEN].mean()),
        f"{name}/rejected": float(rewards[:, REJECTED].mean()),
        f"{name}/margins": float(margins.mean()),
        f"{name}/accuracies": ranking.reward_accuracy(logps, ref_logps),
        "ranking/flipped": ranking.flipped(logps, ref_logps),
        **_rankings(logps, ref_logps),
        **{f"{metric}_per_token": value for metric, value in _rankings(logps, ref_logps, lengths).items()},
        "ranking/difficulty": float(ranking.difficulty(ref_logps).mean()),
        "ranking/theorem_4_1_violations": ranking.threshold_violations(
            logps, ref_logps, beta, within=ROUNDING * lengths.sum(1)
        ),
        "logps/chosen": float(logps[:, CHOSEN].mean()),
        "logps/rejected": float(logps[:, REJECTED].mean()),
        "logps/chosen_change": float(changes[CHOSEN]),
        "logps/rejected_change": float(changes[REJECTED]),
        "length/longer_chosen": _share(longer > 0, longer != 0),
        "length/longer_rewarded": _share(real_margins * longer > 0, longer != 0),
        "length/margin_correlation": _correlation(real_margins, longer),
    }


def of_labelled(
    beta: float | int,
    logps: Float[np.ndarray, " n"],
    ref_logps: Float[np.ndarray, " n"],
    lengths: Int[np.ndarray, " n"],
    labels: Bool[np.ndarray, " n"],
    *,
    name: str = "rewards",
) -> dict[str, float]:
    """Metrics of single completions, "chosen" where the label is true (desirable) and "rejected" elsewhere.

    As `of_pairs` has them, as far as they need no pairs: `rewards/margins` is the difference of the two means, and
    `length/...` the mean tokens of each kind, and the correlation of rewards with length over all.
    """
    logps, ref_logps = np.asarray(logps, np.float64), np.asarray(ref_logps, np.float64)
    changes, metrics = logps - ref_logps, {}
    for which, rows in (("chosen", labels), ("rejected", ~labels)):
        if rows.any():
            metrics[f"{name}/{which}"] = float(beta * changes[rows].mean())
            metrics[f"logps/{which}"] = float(logps[rows].mean())
            metrics[f"logps/{which}_change"] = float(changes[rows].mean())
            metrics[f"length/{which}"] = float(lengths[rows].mean())
    if labels.any() and not labels.all():
        metrics[f"{name}/margins"] = metrics[f"{name}/chosen"] - metrics[f"{name}/rejected"]
    real_changes = np.where(np.abs(changes) > ROUNDING * lengths, changes, 0)
    return metrics | {"length/reward_correlation": _correlation(real_changes, lengths)}


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


def displacement(logps: Sums, ref_logps: Sums, lengths: Lengths | None = None) -> str:
    """A sentence that says where likelihood went, held against the standard errors of both changes.

    With `lengths`, a change within `ROUNDING` for each token is none.
    """
    changes = np.asarray(logps, np.float64) - ref_logps
    return _regime(list(changes.T), [0.0, 0.0] if lengths is None else lengths.mean(0))


def displacement_of_labelled(logps, ref_logps, lengths, labels) -> str:
    """The same of single completions, desirable and undesirable."""
    changes = np.asarray(logps, np.float64) - ref_logps
    groups = [labels, ~labels]
    if not all(rows.any() for rows in groups):
        return f"All held-out completions have one label, {'desirable' if labels.all() else 'undesirable'}."
    return _regime([changes[rows] for rows in groups], [lengths[rows].mean() for rows in groups])


def _regime(changes: Sequence[np.ndarray], lengths: Sequence[float] | np.ndarray) -> str:
    means = np.array([x.mean() for x in changes])
    errors = np.array([x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else 0 for x in changes])
    moved = np.abs(means) > np.maximum(2 * errors, ROUNDING * np.asarray(lengths))
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
    # What moved by less than a hundredth is not printed as nought.
    said = [f"{x:+.1g}" if real and abs(x) < 0.005 else f"{x:+.2f}" for x, real in zip(means, moved, strict=True)]
    return f"{regime} (chosen {said[CHOSEN]}, rejected {said[REJECTED]} nats a completion)."


def _rankings(logps: Sums, ref_logps: Sums, lengths: Lengths | None = None) -> Mapping[str, float]:
    certain = np.ones(len(logps))
    idealised = ranking.idealised_range(ref_logps, certain, lengths)
    return {
        "ranking/accuracy": ranking.accuracy(logps, lengths),
        **{f"ranking/idealised_{which}": value for which, value in idealised.items()},
        "ranking/alignment_gap": ranking.alignment_gap(logps, ref_logps, certain, lengths),
    }


def _share(found: np.ndarray, among: np.ndarray) -> float:
    """0 where there is nothing to count."""
    return float(found[among].mean()) if among.any() else 0.0


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's; 0 where one of the two is constant."""
    return float(np.corrcoef(x, y)[0, 1]) if x.std() * y.std() > 0 else 0.0
