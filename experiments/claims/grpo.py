"""GRPO and what Dr. GRPO (arXiv:2503.20783) says of it: biases by length and by difficulty; and whether all learn."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims import environments as env
from experiments.claims.claim import Above, Claim, Within
from pjpo.methods import grpo
from pjpo.types import Batch

PAPER = "Understanding R1-Zero-Like Training (Dr. GRPO), Liu et al. 2025"
GRPO = dataclasses.replace(grpo.GRPO, beta=0.0, std_eps=0.0)
DR_GRPO = dataclasses.replace(grpo.DR_GRPO, max_completion_tokens=1)
LONGEST = 60  # tokens; of going on with probability 0.7 a longer one has probability 1e-9


def pull(config: grpo.Config, logits: jax.Array, group: int, lengths: np.ndarray) -> jax.Array:
    """The expected gradient of the objective, exactly; the loss must be a mean over completions.

    A completion answers, rightly or wrongly, and then continues until it stops. The logits are of a right answer, and
    of continuing after a right and after a wrong one.

    Args:
        config: of GRPO.
        logits: [3].
        group: completions of the prompt.
        lengths: tokens that a completion may have; where that is 1 alone, it is the answer.
    """
    right = np.array(list(itertools.product([False, True], repeat=group)))  # every outcome of a group
    right, length = np.repeat(right, len(lengths), 0), np.tile(lengths, len(right))  # with every length
    places = np.arange(lengths.max())
    mask = np.broadcast_to(places < length[:, None, None], (*right.shape, places.size))
    tokens = np.zeros((1, *mask.shape[1:]), np.int32)

    def logps(logits):
        answers = jax.nn.log_sigmoid(jnp.where(right, logits[0], -logits[0]))[..., None]
        goes_on = jnp.where(right, logits[1], logits[2])[..., None]
        stops = places == length[:, None, None] - 1
        return jnp.where(places == 0, answers, jax.nn.log_sigmoid(jnp.where(stops, -goes_on, goes_on)))

    def slope(logps, mask, right):
        rollout = Batch.of(completion_tokens=tokens, completion_mask=mask[None], rewards=right[None].astype(float))
        batch = config.advantages(rollout)
        return jax.grad(lambda x: -grpo.loss(config, batch, x, None)[0].value())(logps[None])[0]

    found, back = jax.vjp(logps, logits)
    # A completion's share does not depend on the others' lengths, so it may be weighed by its own.
    outcome = jnp.exp(found[:, :, 0].sum(1))[:, None]
    ending = jnp.exp(jnp.where(mask & (places > 0), found, 0).sum(-1))
    slopes = jax.vmap(slope)(found, jnp.asarray(mask), jnp.asarray(right))
    return back(slopes * (outcome * ending)[..., None])[0]


def lengths(logits: jax.Array) -> jax.Array:
    """Expected tokens of a right and of a wrong answer."""
    return 2 + jnp.exp(logits[1:])


def length_bias(key) -> dict[str, jax.Array]:
    """From success and continuation rates between 0.3 and 0.7."""
    start = jnp.log(1 / jax.random.uniform(key, (3,), minval=0.3, maxval=0.7) - 1)
    found = {}
    for name, config in (("GRPO", GRPO), ("Dr. GRPO", DR_GRPO)):

        def ascend(logits, _, config=config):
            return logits + pull(config, logits, 4, np.arange(2, LONGEST)), None

        slopes = pull(config, start, 4, np.arange(2, LONGEST))
        found |= {f"{name} on right answers": slopes[1], f"{name} on wrong answers": slopes[2]}
        grown = lengths(jax.lax.scan(ascend, start, length=100)[0]) / lengths(start)
        found |= {f"growth of wrong answers, {name}": grown[1], f"growth of right answers, {name}": grown[0]}
    return found


def difficulty_bias(key) -> dict[str, jax.Array]:
    """How much more the answer's logit is pulled by GRPO than by Dr. GRPO, by success rate."""
    rates = {
        "hard": jax.random.uniform(key, minval=0.02, maxval=0.1),
        "even": jnp.array(0.5),
        "easy": jax.random.uniform(key, minval=0.9, maxval=0.98),
    }
    return {
        f"weight of {name} prompts": weight(GRPO, rate, 8) / weight(DR_GRPO, rate, 8) for name, rate in rates.items()
    }


def weight(config: grpo.Config, rate, group: int) -> jax.Array:
    """The expected pull on the logit of a right answer of one token."""
    return pull(config, jnp.array([jnp.log(rate / (1 - rate)), 0, 0]), group, np.array([1]))[0]


PRESETS = {
    "GRPO": dataclasses.replace(grpo.GRPO, beta=1e-3),
    "Dr. GRPO": dataclasses.replace(grpo.DR_GRPO, max_completion_tokens=4),
    "DAPO": grpo.DAPO,
    "GSPO": grpo.GSPO,
    "RLOO": dataclasses.replace(grpo.RLOO, beta=1e-3),
    "REINFORCE++": dataclasses.replace(grpo.REINFORCE_PP, beta=1e-3),
}
SETTINGS = env.Settings(num_completions=16, num_iterations=200)


def learning(key) -> dict[str, jax.Array]:
    """The probability of the best level, before and after."""
    keys = jax.random.split(key)
    scored = env.levels(keys[0])
    best = scored._replace(rewards=jnp.where(scored.rewards == env.LEVELS[0], 1.0, 0.0))
    found = {"start": env.expectations(best, best.ref)[0]}
    for name, config in PRESETS.items():
        curve, _ = env.learn(grpo.loss, config, SETTINGS, best, best.ref, keys[1], rewards=scored.rewards)
        found |= {f"{name} after 100": curve[99], f"{name} after 200": curve[199]}
    return found


CLAIMS = (
    Claim(
        paper=PAPER,
        text="GRPO's mean over a completion's tokens makes wrong answers longer and right ones shorter; dividing by a "
        "constant does not",
        setting="an answer, then tokens until one stops; groups of 4, exact expected gradients on the logits of going "
        "on, and 100 steps along them (growth of the mean length)",
        measure=env.by_seed(length_bias),
        checks=(
            Within("GRPO on right answers", -1, -0.01),
            Within("GRPO on wrong answers", 0.01, 1),
            Within("Dr. GRPO on right answers", -1e-6, 1e-6),
            Within("Dr. GRPO on wrong answers", -1e-6, 1e-6),
            Above("growth of wrong answers, GRPO", "growth of wrong answers, Dr. GRPO"),
            Above("growth of right answers, Dr. GRPO", "growth of right answers, GRPO"),
        ),
    ),
    Claim(
        paper=PAPER,
        text="dividing by the deviation of a prompt's rewards weighs hard and easy prompts up",
        setting="a right answer or a wrong one, groups of 8, exact expected gradient of GRPO over that of Dr. GRPO",
        measure=env.by_seed(difficulty_bias),
        checks=(
            Above("weight of hard prompts", "weight of even prompts"),
            Above("weight of easy prompts", "weight of even prompts"),
        ),
    ),
    Claim(
        paper="GRPO, Shao et al. 2024",
        text="rewards alone find the one completion in sixteen that is best, behind two ways to fall",
        setting="4 tokens out of 4, 4 prompts, groups of 16, one update a rollout, Adam 0.02; probability of the best "
        "level, exactly",
        measure=env.by_seed(learning),
        checks=(Within("start", 0, 0.1), Within("GRPO after 200", 0.85, 1)),
    ),
)
