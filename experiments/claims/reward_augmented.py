"""Reward-augmented data (arXiv:2410.08067): a goal in the prompt, and what becomes of good rejected answers."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims.claim import Above, Claim, Within
from experiments.claims.tabular import losses, minimise, ordered_pairs
from pjpo import relabel
from pjpo.methods import dpo

PAPER = "Reward-Augmented Data, Zhang et al. 2024"
SCORES = np.array([1.0, 3.0, 5.0, 7.0, 8.0, 10.0])
REF = np.array([0.25, 0.25, 0.2, 0.15, 0.1, 0.05])
BETA, RIDGE = 0.1, 1e-4


def rows(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What relabelling makes of all pairs of answers: (goals [n], pairs of answers [n, 2])."""
    scored = [
        {"chosen": i, "rejected": j, "score_chosen": scores[i], "score_rejected": scores[j]}
        for i, j in ordered_pairs(len(scores))
        if scores[i] > scores[j]
    ]
    found = relabel.relabel(scored)
    return np.array([float(row["goal"]) for row in found]), np.array(
        [[row["chosen"], row["rejected"]] for row in found]
    )


def conditioned(ref: np.ndarray = REF, scores: np.ndarray = SCORES):
    """Goal to distribution: the policy ref * exp(-lam (goal - u_y)^2) with lam and u learned from relabelled pairs."""
    goals, pairs = rows(scores)
    weights = ref[pairs].prod(1)

    def logps(free, goals):
        lam, u = jnp.exp(free[0]), free[1:]
        return jax.nn.log_softmax(jnp.log(ref)[None] - lam * (goals[:, None] - u[None]) ** 2)

    def objective(free):
        each = losses(
            dpo, dpo.Config(beta=BETA), jnp.take_along_axis(logps(free, goals), pairs, 1), jnp.log(ref)[pairs]
        )
        return (
            jnp.sum(weights * each) / weights.sum()
            + RIDGE * jnp.sum((free[1:] - scores.mean()) ** 2)
            + RIDGE * free[0] ** 2
        )

    with jax.enable_x64(True):
        free = minimise(objective, np.concatenate([[0.0], np.full(len(scores), scores.mean()) + 0.01 * scores]))
        return lambda goal: np.exp(np.asarray(logps(free, jnp.array([goal])))[0])


def blind(ref: np.ndarray = REF, scores: np.ndarray = SCORES) -> np.ndarray:
    """Tabular DPO on the pairs themselves, under the same ridge."""
    pairs = np.array([(i, j) for i, j in ordered_pairs(len(scores)) if scores[i] > scores[j]])
    weights = ref[pairs].prod(1)

    def objective(shifts):
        logps = jax.nn.log_softmax(jnp.log(ref) + shifts)
        each = losses(dpo, dpo.Config(beta=BETA), logps[pairs], jnp.log(ref)[pairs])
        return jnp.sum(weights * each) / weights.sum() + RIDGE * jnp.sum(shifts**2)

    with jax.enable_x64(True):
        shifts = minimise(objective, np.zeros(len(scores)))
    p = ref * np.exp(shifts - shifts.max())
    return p / p.sum()


def extrapolation(seed: int) -> dict[str, float]:
    """Expected score when the top of the scale is asked for, with a random reference that has little of it."""
    rng = np.random.default_rng(seed)
    ref = REF * np.exp(0.3 * rng.normal(size=6))
    ref /= ref.sum()
    asked, ignorant = conditioned(ref), blind(ref)
    good = SCORES == 8  # an answer that is often rejected, and still good
    return {
        "asked for 10": float(asked(10.0) @ SCORES),
        "asked for 3": float(asked(3.0) @ SCORES),
        "asked for 8": float(asked(8.0) @ SCORES),
        "dpo": float(ignorant @ SCORES),
        "log-ratio of the 8, asked for 8": float(np.log(asked(8.0)[good] / ref[good])[0]),
        "log-ratio of the 8, dpo": float(np.log(ignorant[good] / ref[good])[0]),
    }


def cancellation(seed: int) -> dict[str, float]:
    """Without the goal in the prompt the two copies of a pair are one another's opposite."""
    margin = np.random.default_rng(seed).normal() * 10

    def both(z):
        pairs = jnp.stack([jnp.array([z, 0.0]), jnp.array([0.0, z])])
        return losses(dpo, dpo.Config(beta=1.0), pairs, jnp.zeros((2, 2))).sum()

    with jax.enable_x64(True):
        return {
            "least loss - 2 log 2": float(both(0.0) - 2 * np.log(2)),
            "slope at 0": float(jax.grad(both)(0.0)),
            "loss elsewhere - 2 log 2": float(both(margin) - 2 * np.log(2)),
        }


CLAIMS = (
    Claim(
        paper=PAPER,
        text="asked for a score the conditioned policy gives it, the best one too; DPO without scores falls short",
        setting="6 answers scored 1 to 10, random references with little of the best, all pairs relabelled, population "
        "loss, beta 0.1; expected score",
        measure=extrapolation,
        checks=(
            Within("asked for 10", 9.8, 10),
            Within("asked for 8", 7.7, 8.3),
            Within("asked for 3", 2.7, 3.3),
            Above("asked for 10", "dpo"),
        ),
    ),
    Claim(
        paper=PAPER,
        text="without the goal text the two copies of a pair cancel (the paper's ablation)",
        setting="one pair and its swapped copy under the same prompt",
        measure=cancellation,
        checks=(
            Within("least loss - 2 log 2", -1e-12, 1e-12),
            Within("slope at 0", -1e-12, 1e-12),
            Within("loss elsewhere - 2 log 2", 1e-6, np.inf),
        ),
    ),
)
