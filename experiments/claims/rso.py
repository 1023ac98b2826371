"""RSO (arXiv:2309.06657): where pairs come from decides what a policy that cannot be everything becomes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from experiments.claims.claim import Above, Claim, Within
from experiments.claims.tabular import bradley_terry, losses, ordered_pairs
from pjpo import rejection
from pjpo.methods import rso

PAPER = "RSO, Liu et al. 2023"
BETA = 0.5  # of the sampler
GRID = np.linspace(-3, 3, 61)  # the responses
REWARDS = np.maximum(0, GRID - 0.5)


def _bell(mean: float, width: float) -> np.ndarray:
    p = np.exp(-(((GRID - mean) / width) ** 2) / 2)
    return p / p.sum()


SFT = _bell(0, 1)
TILTED = SFT * np.exp(REWARDS / BETA) / (SFT * np.exp(REWARDS / BETA)).sum()
SOURCES = {"direct": _bell(-1.2, 0.6), "sft-sample-rank": SFT, "rso-sample-rank": TILTED}


def policy(a):
    """The class: the SFT policy tilted by one number, which cannot express the optimum."""
    return jax.nn.softmax(jnp.log(SFT) + a * GRID)


@functools.partial(jax.jit, static_argnums=0)
def _loss(form, a, weights):
    pairs = ordered_pairs(len(GRID))
    logps = jnp.log(policy(a))
    each = losses(rso, rso.Config(gamma=BETA, form=form), logps[pairs], jnp.log(SFT)[pairs])
    return jnp.sum(weights[pairs[:, 0], pairs[:, 1]] * each)


def fit(form: str, weights: np.ndarray) -> tuple[float, float]:
    """(expected reward, a) of the policy that minimises the loss, for weights of "i is preferred to j"."""
    with jax.enable_x64(True):
        found = optimize.minimize_scalar(
            lambda a: float(_loss(form, a, weights / weights.sum())),
            bounds=(-3, 6),
            method="bounded",
            options={"xatol": 1e-7},
        )
        return float(policy(found.x) @ REWARDS), float(found.x)


def population(form: str, source: str) -> tuple[float, float]:
    p = SOURCES[source]
    return fit(form, np.outer(p, p) * bradley_terry(REWARDS))


def sampled(form: str, source: str, seed: int, num_prompts: int = 64) -> float:
    """Expected reward when each prompt gives four pairs; rejection sampling keeps 8 of a pool of 64."""
    rng = np.random.default_rng((seed, list(SOURCES).index(source)))
    p = SFT if source == "rso-sample-rank" else SOURCES[source]
    pools = rng.choice(len(GRID), p=p, size=(num_prompts, 64))
    if source == "rso-sample-rank":
        kept = np.take_along_axis(pools, rejection.select(REWARDS[pools], 8, BETA, seed), axis=1)
    else:
        kept = pools[:, :8]
    weights, prefers = np.zeros((len(GRID),) * 2), bradley_terry(REWARDS)
    for row in kept:
        for i, j in zip(row[::2], row[1::2], strict=True):  # first round; the ranking model's label is drawn
            winner, loser = (i, j) if rng.random() < prefers[i, j] else (j, i)
            weights[winner, loser] += 1
    np.fill_diagonal(weights, 0)
    return fit(form, weights)[0]


def sources(form: str, seed: int) -> dict[str, float]:
    return {source: sampled(form, source, seed) for source in SOURCES}


def sampler(seed: int, num_trials: int = 20_000) -> dict[str, float]:
    rewards, rng = np.array([0, 0.25, 0.5, 0.75, 1.0]), np.random.default_rng(seed)
    accepted = rng.random((num_trials, 5)) < rejection.acceptance(rewards, BETA)
    exact = np.exp((rewards - 1) / BETA)
    pools = rng.choice(4, p=[0.4, 0.3, 0.2, 0.1], size=(300, 64)).astype(float)
    kept = np.take_along_axis(pools, rejection.select(pools, 8, BETA, seed), axis=1)
    return {
        "largest error of acceptance": float(np.abs(accepted.mean(0) - exact).max()),
        "mean reward kept": float(kept.mean()),
    }


CLAIMS = (
    Claim(
        paper=PAPER,
        text="rejection sampling accepts with probability exp((r - max) / beta), so draws follow the tilted policy",
        setting="5 rewards, 20,000 passes; 8 kept of pools of 64 over 4 levels (exact tilt: 2.69)",
        measure=sampler,
        checks=(Within("largest error of acceptance", 0, 0.015), Within("mean reward kept", 2.5, 2.69)),
    ),
    *(
        Claim(
            paper=PAPER,
            text=f"pairs from the rejection-sampled policy beat SFT samples, which beat given pairs ({form})",
            setting="61 responses, one-parameter policy, 64 prompts with 4 sampled pairs each, gamma = beta = 0.5; the "
            "gold reward tilts, and its Bradley-Terry odds label, in place of a trained ranking; expected gold reward",
            measure=functools.partial(sources, form),
            checks=(
                Above("rso-sample-rank", "sft-sample-rank"),
                Above("sft-sample-rank", "direct"),
            ),
        )
        for form in rso.FORMS
    ),
)
