"""Differential information (arXiv:2505.23761): which reward leads to the target, and what its entropy says."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims.claim import Above, Claim, Within
from experiments.claims.tabular import minimise, ordered_pairs, population_minimiser
from pjpo import differential_information as did
from pjpo.methods import dpo, dpo_attenuated, orpo

PAPER = "Differential Information, Won et al. 2025"
REWARDS = ("log-ratio", "half reference", "reference-free", "log-odds")


def problem(seed: int, beta: float, num_responses: int = 32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(reference, target, weights of "chosen from the reference, rejected from its distribution")."""
    rng = np.random.default_rng(seed)
    ref, target = (np.asarray(jax.nn.softmax(scale * rng.normal(size=num_responses))) for scale in (1.0, 2.0))
    ref, target = (p.astype(np.float64) / p.astype(np.float64).sum() for p in (ref, target))
    return ref, target, np.outer(ref, did.rejected_distribution(ref, target, beta))


def minimiser(reward: str, ref: np.ndarray, weights: np.ndarray, beta: float) -> np.ndarray:
    if reward == "log-ratio":
        return population_minimiser(dpo, dpo.Config(beta=beta), ref, weights)
    if reward in ("half reference", "reference-free"):
        gamma = 0.5 if reward == "half reference" else 0.0
        return population_minimiser(dpo_attenuated, dpo_attenuated.Config(beta=beta, gamma=gamma), ref, weights)
    pairs = ordered_pairs(len(ref))
    each = weights[pairs[:, 0], pairs[:, 1]]

    def objective(free):
        odds = orpo.log_odds(jax.nn.log_softmax(jnp.concatenate([jnp.zeros(1), free])))[pairs]
        return -jnp.sum(each * jax.nn.log_sigmoid(odds[:, 0] - odds[:, 1])) / each.sum()  # ORPO's term has no beta

    free = minimise(objective, np.log(ref[1:] / ref[0]))
    return np.asarray(jax.nn.softmax(np.concatenate([[0.0], free])))


def recovery(seed: int, beta: float = 0.5) -> dict[str, float]:
    """Jensen-Shannon divergence of each reward's population minimiser to the target."""
    with jax.enable_x64(True):
        ref, target, weights = problem(seed, beta)
        found = {reward: did.jensen_shannon(minimiser(reward, ref, weights, beta), target) for reward in REWARDS}
    return found | {"reference": did.jensen_shannon(ref, target)}


def power_law(exponent: float, num_responses: int = 10_000) -> np.ndarray:
    p = np.arange(1, num_responses + 1.0) ** -exponent
    return p / p.sum()


def regime(power: float, exponent: float = 1.5) -> dict[str, float]:
    """H(information) / log K, H(target) / log K and the mode's change of log-prob when the target is ref^power."""
    ref = power_law(exponent)
    target = ref**power / (ref**power).sum()
    size = np.log(len(ref))
    return {
        "information": did.entropy(did.information(target, ref)) / size,
        "target": did.entropy(target) / size,
        "mode": float(np.log(target[0] / ref[0])),
    }


def displacement(seed: int) -> dict[str, float]:
    """Sharper and smoother targets than a reference whose skew is drawn."""
    exponent = 1.5 + 0.1 * np.random.default_rng(seed).uniform(-1, 1)
    sharp, smooth = regime(2.0, exponent), regime(0.5, exponent)
    return {
        "information, sharper target": sharp["information"],
        "information, smoother target": smooth["information"],
        "change of the mode, sharper target": sharp["mode"],
        "change of the mode, smoother target": smooth["mode"],
    }


def estimation(seed: int) -> dict[str, float]:
    """Entropy estimates from samples of the reference, against the truth."""
    ref, rng = power_law(1.5), np.random.default_rng(seed)
    target = ref**1.5 / (ref**1.5).sum()
    found = {"exact": did.entropy(did.information(target, ref))}
    for count in (32, 1000, 100_000):
        draws = rng.choice(len(ref), p=ref, size=count)
        logs = np.log(ref)[draws]
        found[f"{count} samples"], found[f"error, {count} samples"] = did.estimate_entropy(
            np.log(target)[draws], logs, logs
        )
    return found


CLAIMS = (
    Claim(
        paper=PAPER,
        text="the log-ratio reward alone has the target as its population minimiser",
        setting="32 responses, random reference and target, rejected ones from the closed form, beta 0.5; "
        "Jensen-Shannon divergence to the target",
        measure=recovery,
        checks=(
            Within("log-ratio", -1e-12, 1e-7),
            *(Above(reward, "log-ratio", by=1e-3) for reward in REWARDS[1:]),
        ),
    ),
    Claim(
        paper=PAPER,
        text="information of low entropy reinforces the mode; of high entropy it smooths, and likelihood is displaced",
        setting="10,000 responses, power-law references; targets ref^2 and ref^0.5; entropy over log K",
        measure=displacement,
        checks=(
            Above("information, smoother target", "information, sharper target"),
            Within("change of the mode, sharper target", 0, 5),
            Within("change of the mode, smoother target", -5, 0),
        ),
    ),
    Claim(
        paper=PAPER,
        text="(as used by the paper) 32 samples estimate the entropy of the information",
        setting="target ref^1.5 of a power law over 10,000 responses, samples of the reference; good is within 10 %",
        measure=estimation,
        checks=(Within("32 samples", 7.38, 9.02), Within("100000 samples", 7.38, 9.02)),
    ),
)
