"""DPO (arXiv:2305.18290): the optimum of its population loss, and its gradient, on enumerable policies."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims.claim import Claim, Within
from experiments.claims.tabular import bradley_terry, losses, population_minimiser
from pjpo.methods import dpo

PAPER = "DPO, Rafailov et al. 2023"


def tilt(ref, rewards, beta):
    """The policy that KL-regularised reward maximisation leads to (Eq. 4)."""
    p = ref * np.exp((rewards - rewards.max()) / beta)
    return p / p.sum()


def optimum(seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    ref, rewards, beta = rng.dirichlet(np.ones(6) * 2), rng.normal(size=6), rng.choice([0.25, 0.5, 1.0, 2.0])
    with jax.enable_x64(True):
        found = population_minimiser(dpo, dpo.Config(beta=beta), ref, np.outer(ref, ref) * bradley_terry(rewards))
    return {"largest difference": float(np.abs(found - tilt(ref, rewards, beta)).max())}


def gradient(seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    logits, ref, beta = rng.normal(size=(2, 8)), np.log(rng.dirichlet(np.ones(8), size=2)), 0.3
    chosen, rejected = 2, 5

    with jax.enable_x64(True):

        def margin_logps(logits):
            return jax.nn.log_softmax(logits)[:, [chosen, rejected]]

        pairs = ref[:, [chosen, rejected]]
        found = jax.grad(lambda x: losses(dpo, dpo.Config(beta=beta), margin_logps(x), pairs).sum())(logits)
        rewards = beta * (margin_logps(logits) - pairs)
        weight = jax.nn.sigmoid(rewards[:, 1] - rewards[:, 0])
        slopes = jax.vmap(jax.jacobian(lambda x: jax.nn.log_softmax(x)[jnp.array([chosen, rejected])]))(logits)
        expected = -beta * weight[:, None] * (slopes[:, 0] - slopes[:, 1])
        return {"largest difference": float(jnp.abs(found - expected).max())}


CLAIMS = (
    Claim(
        paper=PAPER,
        text="the loss is minimised by the reference tilted by exp(reward / beta) (Eq. 4 to 7)",
        setting="6 responses, random reference and rewards, all pairs with Bradley-Terry labels, population loss",
        measure=optimum,
        checks=(Within("largest difference", 0, 1e-6),),
    ),
    Claim(
        paper=PAPER,
        text="the gradient pulls chosen up and rejected down by beta sigmoid(r_rejected - r_chosen) (section 4)",
        setting="softmax policies over 8 responses, float64, automatic differentiation against the formula",
        measure=gradient,
        checks=(Within("largest difference", 0, 1e-12),),
    ),
)
