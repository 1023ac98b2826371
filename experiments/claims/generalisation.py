"""Limited generalisation of DPO's implicit reward (arXiv:2409.03650), with frozen features and one-word answers."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims.claim import Above, Claim, Within
from pjpo.methods import dpo, reward_model
from pjpo.types import Batch

PAPER = "Limited Generalization of the Implicit Reward, Lin et al. 2024"
NUM_WORDS, WIDTH, NUM_PROMPTS = 4, 16, 200  # good words, as many bad ones; half of each are seen in training


def accuracy(margins) -> float:
    return float(reward_model.accuracies(jnp.asarray(margins)).mean())


def transfer(seed: int, num_steps: int = 300, rate: float = 1.0) -> dict[str, float]:
    """Pairwise accuracy of the explicit and the implicit reward model, on training words and on words never seen."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=WIDTH)
    direction /= np.linalg.norm(direction)
    signs = np.repeat([1, -1], NUM_WORDS)[:, None]
    embed = signs * direction + 0.1 * rng.normal(size=(2 * NUM_WORDS, WIDTH))  # words 0..3 are good, 4..7 bad
    hidden = rng.normal(size=WIDTH) + 0.3 * rng.normal(size=(NUM_PROMPTS, WIDTH))  # of prompts: alike
    half = NUM_WORDS // 2
    seen = rng.integers(0, half, (NUM_PROMPTS, 2)) + np.array([0, NUM_WORDS])
    unseen = rng.integers(half, NUM_WORDS, (NUM_PROMPTS, 2)) + np.array([0, NUM_WORDS])
    batch = Batch.of(completion_tokens=seen[:, :, None].astype(np.int32))

    def scores(head, words):  # read after the answer
        return jnp.asarray(embed)[words] @ head

    def explicit(head):
        return reward_model.loss(reward_model.Config(), batch, None, None, scores(head, seen))[0].value()

    start = jnp.asarray(0.1 * rng.normal(size=embed.shape))

    def logps(rows, words):  # read before the answer: only the rows of the words in the pair differ within it
        return jnp.take_along_axis(jax.nn.log_softmax(jnp.asarray(hidden) @ rows.T), words, axis=1)

    def implicit(rows):
        return dpo.loss(dpo.Config(beta=0.1), batch, logps(rows, seen)[:, :, None], logps(start, seen)[:, :, None])[
            0
        ].value()

    def descend(objective, x):
        return jax.lax.fori_loop(0, num_steps, lambda _, x: x - rate * jax.grad(objective)(x), x)

    with jax.enable_x64(True):
        start = start.astype(jnp.float64)
        head, rows = jax.jit(descend, static_argnums=0)(explicit, jnp.zeros(WIDTH)), None
        rows = jax.jit(descend, static_argnums=0)(implicit, start)
        found = {}
        for name, words in (("seen", seen), ("unseen", unseen)):
            found[f"explicit, {name} words"] = accuracy(scores(head, words) @ jnp.array([1.0, -1.0]))
            ratios = logps(rows, words) - logps(start, words)
            # The normaliser is one number for both answers: what is left of it in the difference is rounding.
            margins = ratios @ jnp.array([1.0, -1.0])
            found[f"implicit, {name} words"] = accuracy(jnp.where(jnp.abs(margins) < 1e-12, 0, margins))
        return found


CLAIMS = (
    Claim(
        paper=PAPER,
        text="the implicit reward fits as well as an explicit reward model and transfers worse",
        setting="one-word answers, frozen features, 200 prompts, 300 full-batch steps; pairs of words never seen",
        measure=transfer,
        checks=(
            Within("explicit, seen words", 0.99, 1),
            Within("implicit, seen words", 0.95, 1),
            Above("explicit, unseen words", "implicit, unseen words"),
        ),
    ),
)
