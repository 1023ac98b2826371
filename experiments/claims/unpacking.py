"""Unpacking DPO and PPO (arXiv:2406.09279): data against algorithm, both tuned over as many runs and checkpoints."""

import jax
import jax.numpy as jnp

from experiments.claims import environments as env
from experiments.claims.claim import Above, Claim
from pjpo.methods import ppo

PAPER = "Unpacking DPO and PPO, Ivison et al. 2024"
NUM_PAIRS, FLIPS = 1500, (0.0, 0.2, 0.4)
BETAS = {"DPO": jnp.array([0.03, 0.1, 0.3]), "PPO": jnp.array([0.0125, 0.05, 0.2])}  # the middle one is the default
EVERY = 25  # steps, or iterations, between the 12 checkpoints of a run


def compared(key) -> dict[str, jax.Array]:
    """Expected gold return of the best checkpoint by gold, of the last at the default, and of the best within a KL."""
    keys, found = jax.random.split(key, 3), {}
    chain = env.token_chain(keys[0], 8, 24)
    start, _ = env.expectations(chain, chain.ref)
    settings = env.Settings(num_completions=64, num_iterations=12 * EVERY)
    for flips in FLIPS:
        pairs = env.preferences(chain, chain.ref, keys[1], NUM_PAIRS, flips)
        rewards = env.fit_rewards(chain, pairs)

        def by_dpo(beta, pairs=pairs):
            policies = env.fit_dpo(chain.ref, chain.ref, pairs, 12 * EVERY, beta)[EVERY - 1 :: EVERY]
            return jax.vmap(lambda policy: env.expectations(chain, policy))(policies)

        def by_ppo(beta, rewards=rewards):
            curves = env.learn(ppo.loss, ppo.Config(), settings, chain, chain.ref, keys[2], rewards=rewards, beta=beta)
            return jax.tree.map(lambda curve: curve[EVERY - 1 :: EVERY], curves)

        for name, run in (("DPO", by_dpo), ("PPO", by_ppo)):
            gold, kl = jax.vmap(run)(BETAS[name])
            where = f"{name}, {flips:.0%} flipped"
            found |= {
                f"{where}, tuned": gold.max(),
                f"{where}, default": gold[1, -1],
                f"{where}, within KL 10": jnp.where(kl <= 10, gold, start).max(),
            }
    for name in BETAS:
        found[f"drop of {name}"] = found[f"{name}, 0% flipped, tuned"] - found[f"{name}, 40% flipped, tuned"]
    gaps = [found[f"PPO, {flips:.0%} flipped, tuned"] - found[f"DPO, {flips:.0%} flipped, tuned"] for flips in FLIPS]
    return found | {"PPO - DPO, mean": jnp.stack(gaps).mean()}


def of(which: str) -> tuple[str, ...]:
    """What is measured of these checkpoints."""
    return tuple(f"{name}, {flips:.0%} flipped, {which}" for flips in FLIPS for name in BETAS)


SETTING = "chain of 24 tokens out of 8, 1,500 pairs of the reference, 0 to 40 % of them flipped, reward model and DPO "
SETTING += "from the same pairs; 3 strengths x 12 checkpoints for each, best by gold; expected gold return"
measure = env.by_seed(compared)
CLAIMS = (
    Claim(
        paper=PAPER,
        text="data counts for more than the algorithm: flipped labels cost both more than PPO gains over DPO",
        setting=SETTING,
        measure=measure,
        checks=(
            *(Above(f"{name}, 0% flipped, tuned", f"{name}, 40% flipped, tuned", by=3.0) for name in BETAS),
            Above("drop of DPO", "PPO - DPO, mean"),
            Above("drop of PPO", "PPO - DPO, mean"),
        ),
    ),
    Claim(
        paper=PAPER,
        text="PPO beats DPO, at equal tuning",
        setting="the same",
        measure=env.picked(measure, *of("tuned")),
        checks=tuple(Above(f"PPO, {flips:.0%} flipped, tuned", f"DPO, {flips:.0%} flipped, tuned") for flips in FLIPS),
    ),
    Claim(
        paper=PAPER,
        text="(not in the paper) it does so within a KL of 10 nats too, and not only because it moves further",
        setting="the same",
        measure=env.picked(measure, *of("within KL 10")),
        checks=tuple(
            Above(f"PPO, {flips:.0%} flipped, within KL 10", f"DPO, {flips:.0%} flipped, within KL 10")
            for flips in FLIPS
        ),
    ),
)
