"""Limited generalisation of DPO's implicit reward (arXiv:2409.03650): one-word answers, features frozen or trained."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims import sequences
from experiments.claims.claim import Above, Claim, Within
from pjpo.methods import dpo, reward_model, sft
from pjpo.models import Policy
from pjpo.models.decoder import Config
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


# Second stage, everything is trained. A language model reads prompts (template, topic) with answers (word, mood); the
# mood follows from the word, so that words of one kind come to be alike. Then rewards learn from pairs of words, with
# half of the words and the last topics kept from them.
TEMPLATES, TOPICS, GOOD, BAD, MOODS = np.split(np.arange(34), [4, 16, 24, 32])
KEPT_TOPICS = 4
MODEL = Policy(
    Config(
        vocab_size=34,
        num_layers=2,
        model_dim=32,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=64,
        rope_theta=100.0,
        norm_eps=1e-5,
        tied_head=True,
        max_positions=8,
        scalar_head=True,
    )
)


def prompts(rng: np.random.Generator, topics: np.ndarray, count: int) -> dict[str, np.ndarray]:
    tokens = np.stack([rng.choice(TEMPLATES, count), rng.choice(topics, count)], axis=1).astype(np.int32)
    return {"prompt_tokens": tokens, "prompt_mask": np.ones(tokens.shape, bool)}


def word_pairs(rng: np.random.Generator, topics: np.ndarray, words: slice, count: int = 256) -> Batch:
    answers = np.stack([rng.choice(kind[words], count) for kind in (GOOD, BAD)], axis=1)
    return Batch.of(completion_tokens=answers[:, :, None].astype(np.int32), **prompts(rng, topics, count))


def pretrained(rng: np.random.Generator, seed: int) -> dict:
    words = rng.integers(0, 16, 1024)  # of either kind
    answers = np.stack([np.concatenate([GOOD, BAD])[words], MOODS[words // 8]], axis=1).astype(np.int32)
    texts = Batch.of(completion_tokens=answers[:, None], **prompts(rng, TOPICS, len(words)))
    start = MODEL.init(jax.random.key(seed))
    return sequences.train(MODEL, sft.loss, sft.Config(), start, texts, num_steps=200, learning_rate=1e-2)


def trained_transfer(seed: int) -> dict[str, float]:
    """Pairwise accuracy of both rewards, trained for as long from one language model."""
    rng = np.random.default_rng(seed)
    start, seen, unseen = pretrained(rng, seed), slice(0, 4), slice(4, 8)
    known, kept = TOPICS[:-KEPT_TOPICS], TOPICS[-KEPT_TOPICS:]
    pairs = word_pairs(rng, known, seen)
    sets = {
        "training pairs": pairs,
        "new topics": word_pairs(rng, kept, seen),
        "unseen words": word_pairs(rng, known, unseen),
        "both": word_pairs(rng, kept, unseen),
    }
    settings = {"num_steps": 50, "learning_rate": 1e-3}
    explicit = sequences.train(MODEL, reward_model.loss, reward_model.Config(), start, pairs, **settings)
    implicit = sequences.train(MODEL, dpo.loss, dpo.Config(beta=0.1), start, pairs, **settings)
    found = {}
    for of, batch in sets.items():
        ratios = (MODEL.logps(implicit, batch) - MODEL.logps(start, batch))[:, :, 0]
        found[f"explicit, {of}"] = accuracy(MODEL.scores(explicit, batch) @ jnp.array([1.0, -1.0]))
        found[f"implicit, {of}"] = accuracy(ratios @ jnp.array([1.0, -1.0]))
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
    Claim(
        paper=PAPER,
        text="so too where everything is trained: alike in distribution to 5 points, worse on words it has not seen",
        setting="transformer of 2 layers, first a language model of words and the moods that follow them; 256 pairs of "
        "4 good and 4 bad words, 50 full-batch steps each; held-out topics, the other 8 words, and both",
        measure=trained_transfer,
        checks=(
            Within("explicit, training pairs", 0.95, 1),
            Within("implicit, training pairs", 0.95, 1),
            Above("explicit, new topics", "implicit, new topics", by=-0.05),
            Above("implicit, new topics", "explicit, new topics", by=-0.05),
            Above("explicit, unseen words", "implicit, unseen words"),
            Above("explicit, both", "implicit, both"),
        ),
    ),
)
