"""DPO (arXiv:2305.18290): the optimum of its population loss, its gradient, and its frontier of reward and KL."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims import sequences
from experiments.claims.claim import Above, Claim, Within
from experiments.claims.tabular import bradley_terry, losses, population_minimiser
from pjpo.methods import dpo, sft, unlikelihood
from pjpo.types import CHOSEN, Batch

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


# Sequences of 6 tokens out of 8; the gold reward counts token 0.
POLICY, GOLD = sequences.Table(6, 8), np.eye(8)[0]
NUM_SETS, NUM_COMPLETIONS, NUM_PAIRS = 256, 4, 600
BUDGETS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of KL to the reference, nats a sequence
SETTINGS = {  # what is tried of each method: loss, configs
    "DPO": (dpo.loss, [dpo.Config(beta=beta) for beta in (0.05, 0.1, 1.0, 5.0)]),
    "SFT on chosen": (sft.loss, [sft.Config()]),
    "unlikelihood": (unlikelihood.loss, [unlikelihood.Config(weight=weight) for weight in (0.05, 0.1, 0.5, 1.0)]),
}


def all_pairs(reference: jax.Array, rng: np.random.Generator) -> Batch:
    """Every two samples of a set, the better one chosen; of the pairs that differ, as many as are asked for."""
    samples = POLICY.sample(reference, NUM_SETS * NUM_COMPLETIONS, rng).reshape(NUM_SETS, NUM_COMPLETIONS, -1)
    first, second = np.triu_indices(NUM_COMPLETIONS, 1)
    first, second = (samples[:, side].reshape(-1, samples.shape[-1]) for side in (first, second))
    gains = (GOLD[first] - GOLD[second]).sum(-1)
    unequal = np.flatnonzero(gains)[:NUM_PAIRS]
    assert len(unequal) == NUM_PAIRS, "one shape at every seed, so that each method is compiled once"
    return sequences.pairs(first[unequal], second[unequal], gains[unequal] > 0)


@functools.cache  # two claims are about it
def frontier(seed: int, num_steps: int = 200, learning_rate: float = 0.03) -> dict[str, float]:
    """Best exact reward within each budget of KL, over all settings of a method and all of its updates."""
    rng = np.random.default_rng(seed)
    reference = jnp.asarray(0.5 * rng.normal(size=POLICY.shape), jnp.float32)
    pairs = all_pairs(reference, rng)
    chosen = Batch.of(completion_tokens=pairs.completion_tokens[:, [CHOSEN]])
    measure = jax.jit(jax.vmap(lambda params: POLICY.expectations(params, reference, jnp.asarray(GOLD))))
    found = {}
    for name, (loss, configs) in SETTINGS.items():
        batch = chosen if loss is sft.loss else pairs
        points = [reference[None]]
        for config in configs:
            points.append(
                sequences.path(POLICY, loss, config, reference, batch, num_steps=num_steps, learning_rate=learning_rate)
            )
        rewards, kls = measure(jnp.concatenate(points))
        found |= {within(name, budget): float(rewards[kls <= budget].max()) for budget in BUDGETS}
    return found


def within(name: str, budget: float) -> str:
    return f"{name} within {budget:g} nats"


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
    *(
        Claim(
            paper=PAPER,
            text=f"DPO's frontier of reward and KL lies above that of {other} (section 6.1)",
            setting="sequences of 6 tokens out of 8, table policy, reward counts one token; all pairs of each "
            f"{NUM_COMPLETIONS} samples, {NUM_PAIRS} that differ; the paper's betas and weights, 200 updates; best "
            "exact reward within a budget of KL",
            measure=frontier,
            checks=tuple(Above(within("DPO", budget), within(other, budget)) for budget in BUDGETS),
        )
        for other in ("SFT on chosen", "unlikelihood")
    ),
)
