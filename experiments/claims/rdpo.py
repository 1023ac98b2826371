"""rDPO (arXiv:2403.00409): flipped labels in a population and in samples, and where the loss has no minimum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from experiments.claims.claim import Above, Claim, Within
from experiments.claims.tabular import losses, minimise
from pjpo.methods import cdpo, dpo, rdpo
from pjpo.types import Batch

PAPER = "rDPO, Chowdhury et al. 2024"
MAX_NORM = 50.0  # of weights whose truth has norm 2: beyond it a fit has diverged


def configs(flip_rate: float) -> dict:
    return {
        "dpo": (dpo, dpo.Config(beta=1.0)),
        "cdpo": (cdpo, cdpo.Config(beta=1.0, flip_rate=flip_rate)),
        "rdpo": (rdpo, rdpo.Config(beta=1.0, flip_rate=flip_rate)),
    }


def population_margin(name: str, logit: float, flip_rate: float) -> float:
    """The margin that minimises the expected loss of one pair whose clean label has this logit."""
    clean = 1 / (1 + np.exp(-logit))
    seen = (1 - flip_rate) * clean + flip_rate * (1 - clean)
    method, config = configs(flip_rate)[name]
    with jax.enable_x64(True):

        def objective(z):
            margins = jnp.stack([jnp.concatenate([z, jnp.zeros(1)]), jnp.concatenate([jnp.zeros(1), z])])
            each = losses(method, config, margins, jnp.zeros((2, 2)))
            return seen * each[0] + (1 - seen) * each[1]

        return float(minimise(objective, np.zeros(1))[0])


def data(seed: int, n: int, flip_rate: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(true weights, differences of features with clean labels, the same with flipped ones); [5], [n, 5], [n, 5]."""
    rng = np.random.default_rng((seed, n))
    truth = rng.normal(size=5)
    truth *= 2 / np.linalg.norm(truth)
    x = rng.normal(size=(n, 5))
    clean = x * np.where(rng.random(n) < 1 / (1 + np.exp(-x @ truth)), 1, -1)[:, None]
    return truth, clean, clean * np.where(rng.random(n) < flip_rate, -1, 1)[:, None]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _newton(method, config, x, w):
    batch = Batch.of(completion_tokens=jnp.zeros((len(x), 2, 1), jnp.int32))

    def objective(w):
        logps = jnp.stack([x @ w, jnp.zeros(len(x))], axis=1)[:, :, None]
        return method.loss(config, batch, logps, jnp.zeros_like(logps))[0].value()

    slope, curvature = jax.grad(objective)(w), jax.hessian(objective)(w)
    step = jnp.linalg.solve(curvature + 1e-12 * jnp.eye(len(w)), slope)
    return w - step * jnp.minimum(1, 1 / jnp.linalg.norm(step)), jnp.linalg.norm(slope)


def fit(name: str, x: np.ndarray, flip_rate: float) -> np.ndarray:
    """Weights of a log-linear policy that minimise the loss; infinite where it falls without end."""
    method, config = configs(flip_rate)[name]
    with jax.enable_x64(True):
        w = jnp.zeros(x.shape[1])
        for _ in range(200):
            w, slope = _newton(method, config, x, w)
            if slope < 1e-9:
                return np.asarray(w)
            if jnp.linalg.norm(w) > MAX_NORM:
                break
    return np.full(x.shape[1], np.inf)


def has_minimum(x: np.ndarray, flip_rate: float) -> bool:
    """Whether rDPO's loss has a minimum on these labelled differences of features [n, d].

    It has one exactly if in every direction the margins that disagree with their labels weigh more than
    flip_rate / (1 - flip_rate) times those that agree. Far out in a direction u the loss rises by
    sum (1 - 2 flip_rate) max(0, -u x) - flip_rate u x, convex in u, so a linear program finds its least value.
    """
    n, d = x.shape
    slack = (1 - 2 * flip_rate) * np.ones(n)
    found = optimize.linprog(
        np.concatenate([-flip_rate * x.sum(0), slack]),
        A_ub=np.hstack([-x, -np.eye(n)]),
        b_ub=np.zeros(n),
        bounds=[(-1, 1)] * d + [(0, None)] * n,
    )
    return bool(found.fun > -1e-9 * n)


def estimation(seed: int, sizes=(2000, 8000), flip_rate: float = 0.3) -> dict[str, float]:
    """Distance to the true weights at each number of pairs."""
    distances = {}
    for n in sizes:
        truth, clean, noisy = data(seed, n, flip_rate)
        distances[f"clean dpo {n}"] = float(np.linalg.norm(fit("dpo", clean, flip_rate) - truth))
        for name in ("dpo", "cdpo", "rdpo"):
            distances[f"{name} {n}"] = float(np.linalg.norm(fit(name, noisy, flip_rate) - truth))
    return distances


def divergence(seed: int, n: int = 60, flip_rate: float = 0.3, num_sets: int = 12) -> dict[str, float]:
    """On small sets of pairs, how often the loss falls without end, and whether the condition says so."""
    diverged = agreed = 0
    for number in range(num_sets):
        _, _, noisy = data(1000 * seed + number, n, flip_rate)
        ends = bool(np.isfinite(fit("rdpo", noisy, flip_rate)).all())
        diverged += not ends
        agreed += ends == has_minimum(noisy, flip_rate)
    return {"share diverged": diverged / num_sets, "share where the condition agrees": agreed / num_sets}


def population(seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    logit, flip_rate = rng.uniform(0.3, 3), rng.uniform(0.05, 0.45)
    return {
        f"bias of {name}": abs(population_margin(name, logit, flip_rate) - logit) for name in ("dpo", "cdpo", "rdpo")
    }


CLAIMS = (
    Claim(
        paper=PAPER,
        text="under flips the population minimiser is that of clean labels; DPO's and cDPO's are not",
        setting="one pair, random clean logit (0.3 to 3) and flip rate (5 to 45 %), population loss",
        measure=population,
        checks=(
            Within("bias of rdpo", 0, 1e-6),
            Above("bias of dpo", "bias of rdpo"),
            Above("bias of cdpo", "bias of dpo"),
        ),
    ),
    Claim(
        paper=PAPER,
        text="with flipped labels DPO and cDPO stay biased however many pairs there are; rDPO's error falls",
        setting="log-linear policy, 5 features, 30 % flips, full-batch optimum; distance to the true weights of norm 2",
        measure=estimation,
        checks=(
            Above("dpo 8000", "rdpo 8000"),
            Above("cdpo 8000", "dpo 8000"),
            Above("rdpo 2000", "rdpo 8000"),
            Within("dpo 8000", 1.2, 1.8),
        ),
    ),
    Claim(
        paper=PAPER,
        text="(not in the paper) with few pairs rDPO's loss may have no minimum: exactly where disagreeing margins "
        "weigh too little",
        setting="the same with 60 pairs, 12 sets for each seed; divergence of Newton's method against a linear program",
        measure=divergence,
        checks=(Within("share diverged", 0.05, 1), Within("share where the condition agrees", 1, 1)),
    ),
)
