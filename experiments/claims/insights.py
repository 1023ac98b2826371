"""Insights into alignment (arXiv:2404.14723): where losses converge, and what each start costs them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims import sequences
from experiments.claims.claim import Above, Claim, Within
from pjpo.methods import cdpo, cpo, dpo, ipo, kto, rso
from pjpo.types import Batch

PAPER = "Insights into Alignment, Saeidi et al. 2024"
FIXED = {  # method, config and learning rate of the two-response descent
    "dpo": (dpo, dpo.Config(beta=0.1), 5.0),
    "cdpo": (cdpo, cdpo.Config(beta=0.1, flip_rate=0.1), 5.0),
    "ipo": (ipo, ipo.Config(beta=0.5), 0.1),
    "kto": (kto, kto.Config(beta=0.1), 10.0),  # its loss is a mean over the pair's two completions
    "hinge_norm": (rso, rso.Config(gamma=0.1, form="hinge_norm"), 0.01),
    "cpo": (cpo, cpo.Config(beta=0.1), 0.1),
}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _descend(method, config, rate, num_steps, logits):
    reference = jax.nn.log_softmax(logits)
    if method is kto:  # each response is the other's mismatched completion
        rows, labels = np.array([[0, 1], [1, 0]]), np.array([[True] * 2, [False] * 2])
    else:
        rows, labels = np.array([[0, 1]]), None
    batch = Batch.of(completion_tokens=np.zeros((*rows.shape, 1), np.int32), labels=labels)

    def objective(logits):
        logps, ref_logps = (x[rows][:, :, None] for x in (jax.nn.log_softmax(logits), reference))
        return method.loss(config, batch, logps, None if method is cpo else ref_logps)[0].value()

    return jax.lax.fori_loop(0, num_steps, lambda _, x: x - rate * jax.grad(objective)(x), logits)


def margin(name: str, num_steps: int, start=(0.0, 0.0)) -> float:
    """log pi(chosen) - log pi(rejected), relative to where it started, after gradient descent on two logits."""
    method, config, rate = FIXED[name]
    with jax.enable_x64(True):
        found = _descend(method, config, rate, num_steps, jnp.array(start))
        return float(found[0] - found[1] - (start[0] - start[1]))


def margins(seed: int) -> dict[str, float]:
    start = tuple(np.random.default_rng(seed).normal(size=2))
    found = {f"{name} after 10000": margin(name, 10_000, start) for name in FIXED}
    return found | {f"{name} after 1000": margin(name, 1000, start) for name in ("dpo", "kto", "cpo")}


# Sequences of 6 tokens out of 8; the gold reward counts token 0. A base policy has seen everything, SFT good
# sequences, and the instruct start is SFT with some preference training of its own.
POLICY = sequences.Table(6, 8)
SIZES = (100, 1000, 10_000)  # pairs
STARTS = ("base", "sft", "instruct")
METHODS = {
    "dpo": (dpo, dpo.Config(beta=0.1)),
    "ipo": (ipo, ipo.Config(beta=0.1)),
    "kto": (kto, kto.Config(beta=0.1)),
    "cpo": (cpo, cpo.Config(beta=0.1)),
}


def gold(tokens: np.ndarray) -> np.ndarray:
    return (tokens == 0).sum(-1).astype(float)


def good_sequences(count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.choice(8, p=[0.3, 0.3, 0.2, 0.1, 0.025, 0.025, 0.025, 0.025], size=(count, 6)).astype(np.int32)


def starts(rng: np.random.Generator) -> dict[str, jax.Array]:
    everything = rng.integers(0, 8, (4000, 6)).astype(np.int32)
    base = POLICY.fit(np.concatenate([everything, good_sequences(400, rng)]))
    sft = POLICY.fit(good_sequences(2000, rng))
    batch = preferences(200, rng)
    instruct = sequences.train(POLICY, dpo.loss, dpo.Config(beta=0.5), sft, batch, num_steps=50, learning_rate=0.03)
    return {"base": base, "sft": sft, "instruct": instruct}


def preferences(count: int, rng: np.random.Generator) -> Batch:
    first, second = good_sequences(count, rng), good_sequences(count, rng)
    wins = rng.random(count) < 1 / (1 + np.exp(2 * (gold(second) - gold(first))))
    return sequences.pairs(first, second, wins)


@functools.cache  # several claims are about it
def start_points(num_pairs: int, seed: int) -> dict[str, float]:
    """Gold reward of samples after 100 updates, by start and method."""
    rng = np.random.default_rng(seed)
    begins, batch, found = starts(rng), preferences(num_pairs, rng), {}
    for start in STARTS:
        for name, (method, config) in METHODS.items():
            rows = sequences.unpaired(batch) if method is kto else batch
            params = sequences.train(
                POLICY, method.loss, config, begins[start], rows, num_steps=100, learning_rate=0.03
            )
            samples = POLICY.sample(params, 4000, np.random.default_rng(seed))
            found[f"{name} from {start}"] = float(gold(samples).mean())
    for name in METHODS:
        found[f"cost of no SFT for {name}"] = found[f"{name} from sft"] - found[f"{name} from base"]
    return found


def sizes(seed: int) -> dict[str, float]:
    """Gold reward from the SFT start, by method and number of pairs."""
    found = {num_pairs: start_points(num_pairs, seed) for num_pairs in SIZES}
    return {
        f"{name}, {num_pairs} pairs": found[num_pairs][f"{name} from sft"] for name in METHODS for num_pairs in SIZES
    }


CLAIMS = (
    Claim(
        paper=PAPER,
        text="(theory) on a pair that always agrees IPO, cDPO and the hinge stop at a margin, DPO, KTO and CPO do not",
        setting="two responses, random reference, gradient descent on logits; margin in nats; IPO asks 1 / (2 tau) = 1,"
        " cDPO log 9 / beta = 21.97, the hinge 1 / gamma = 10",
        measure=margins,
        checks=(
            Within("ipo after 10000", 0.999, 1.001),
            Within("cdpo after 10000", 21.96, 21.98),
            Within("hinge_norm after 10000", 9.99, 10.02),
            *(Above(f"{name} after 10000", f"{name} after 1000", by=5) for name in ("dpo", "kto", "cpo")),
        ),
    ),
    *(
        claim
        for num_pairs in SIZES
        for claim in (
            Claim(
                paper=PAPER,
                text="without SFT, CPO loses less than DPO and IPO do, as its likelihood term makes up for it "
                f"({num_pairs:,} pairs)",
                setting=f"sequences of 6 tokens out of 8, table policy, {num_pairs:,} pairs, 100 updates; gold reward "
                "0 to 6",
                measure=functools.partial(start_points, num_pairs),
                checks=(
                    Above("cost of no SFT for dpo", "cost of no SFT for cpo"),
                    Above("cost of no SFT for ipo", "cost of no SFT for cpo"),
                ),
            ),
            Claim(
                paper=PAPER,
                text=f"KTO does as well without SFT as with it, DPO does not ({num_pairs:,} pairs)",
                setting="the same",
                measure=functools.partial(start_points, num_pairs),
                checks=(
                    Above("cost of no SFT for dpo", "cost of no SFT for kto"),
                    Within("cost of no SFT for kto", -6, 0.1),
                ),
            ),
        )
    ),
    Claim(
        paper=PAPER,
        text="from the SFT start 1,000 to 10,000 pairs give more reward than fewer, whatever the method (the paper's: "
        "MT-Bench is best with so many)",
        setting="the same, from the SFT start, 100 full-batch updates whatever the number of pairs",
        measure=sizes,
        checks=tuple(
            Above(f"{name}, {more} pairs", f"{name}, {SIZES[0]} pairs") for name in METHODS for more in SIZES[1:]
        ),
    ),
)
