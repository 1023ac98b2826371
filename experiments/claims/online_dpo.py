"""Online DPO: a second round on the policy's own pairs, beside three ways to spend as many steps on other pairs."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims import environments as env
from experiments.claims.claim import Above, Claim
from pjpo import best_of

PAPER = "Direct Language Model Alignment from Online AI Feedback, Guo et al. 2024"
OTHERS = "old pairs", "old pairs, new reference", "new pairs of the reference"
NUM_PAIRS, MORE = 1500, 60  # pairs of a round, steps of a further round
BY_MODEL, BY_GOLD = "best of 16 by the reward model", "best of 16 by gold"


def rounds(key) -> dict[str, jax.Array]:
    keys = jax.random.split(key, 6)
    chain = env.token_chain(keys[0], 8, 24)
    old = env.preferences(chain, chain.ref, keys[1], NUM_PAIRS)
    rewards, offline = env.fit_rewards(chain, old), env.fit_dpo(chain.ref, chain.ref, old, 100)[-1]

    def another(policy, key):
        """From this policy, which is also the reference, on its own pairs as the reward model ranks them."""
        return env.fit_dpo(policy, policy, env.ranked(chain, policy, key, NUM_PAIRS, rewards), MORE)[-1]

    second = another(offline, keys[2])
    references = env.ranked(chain, chain.ref, keys[3], NUM_PAIRS, rewards)
    policies = {
        "offline": offline,
        "own pairs": second,
        "old pairs": env.fit_dpo(offline, chain.ref, old, MORE)[-1],
        "old pairs, new reference": env.fit_dpo(offline, offline, old, MORE)[-1],
        "new pairs of the reference": env.fit_dpo(offline, offline, references, MORE)[-1],
        "own pairs twice": another(second, keys[4]),
    }
    found = {name: env.expectations(chain, policy) for name, policy in policies.items()}
    samples = env.sample(chain, chain.ref, keys[5], 4096)
    gold, scores = (env.returns(values, samples)[0] for values in (chain.rewards, rewards))
    weights = jnp.asarray(best_of.weights(gold.size, 16).astype(np.float32))  # of the worst first
    best_of_16 = {name: gold[jnp.argsort(by)] @ weights for name, by in ((BY_MODEL, scores), (BY_GOLD, gold))}
    tuned, spent = jax.vmap(jax.vmap(lambda policy: env.expectations(chain, policy)))(
        jax.vmap(lambda beta: env.fit_dpo(chain.ref, chain.ref, old, 300, beta)[24::25])(jnp.array([0.03, 0.1, 0.3]))
    )
    best = jnp.where(spent <= found["own pairs"][1], tuned, -jnp.inf).max()
    return (
        {name: gold for name, (gold, _) in found.items()}
        | {f"KL, {name}": kl for name, (_, kl) in found.items()}
        | {"best offline at no more KL": best, "reference": env.expectations(chain, chain.ref)[0]}
        | best_of_16
    )


measure = env.by_seed(rounds)
OF_ROUNDS = "offline", "own pairs", *OTHERS, "own pairs twice"
CLAIMS = (
    Claim(
        paper=PAPER,
        text="a round on the policy's own pairs, ranked by a reward model, beats as many steps on any other pairs",
        setting="chain of 24 tokens out of 8, reward model and DPO from the same 1,500 pairs, then 60 steps more; "
        "expected gold return and KL to the reference, exactly",
        measure=env.picked(measure, *OF_ROUNDS, *(f"KL, {name}" for name in OF_ROUNDS)),
        checks=tuple(Above("own pairs", other) for other in OTHERS),
    ),
    Claim(
        paper=PAPER,
        text="it beats the best of 36 offline policies (3 betas, 12 checkpoints, chosen by gold) that went no further",
        setting="the same",
        measure=env.picked(measure, "own pairs", "own pairs twice", "best offline at no more KL", "KL, own pairs"),
        checks=(Above("own pairs", "best offline at no more KL"),),
    ),
    Claim(
        paper=PAPER,
        text="(not in the paper) the reward model ranks well enough: by it the best of 16 samples of the reference are "
        "within 0.5 of the best by gold; DPO on its pairs goes far beyond both",
        setting="the same; gold return of the best of 16, from 4,096 samples without bias",
        measure=env.picked(measure, "reference", BY_MODEL, BY_GOLD, "offline"),
        checks=(Above(BY_MODEL, BY_GOLD, by=-0.5), Above(BY_MODEL, "reference"), Above("offline", BY_GOLD)),
    ),
)
