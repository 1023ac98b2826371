"""Online DPO: a second round on the policy's own pairs, beside three ways to spend as many steps on other pairs."""

import jax
import jax.numpy as jnp

from experiments.claims import environments as env
from experiments.claims.claim import Above, Claim

PAPER = "Direct Language Model Alignment from Online AI Feedback, Guo et al. 2024"
OTHERS = "old pairs", "old pairs, new reference", "new pairs of the reference"
NUM_PAIRS, MORE = 1500, 60  # pairs of a round, steps of a further round


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
    tuned, spent = jax.vmap(jax.vmap(lambda policy: env.expectations(chain, policy)))(
        jax.vmap(lambda beta: env.fit_dpo(chain.ref, chain.ref, old, 300, beta)[24::25])(jnp.array([0.03, 0.1, 0.3]))
    )
    best = jnp.where(spent <= found["own pairs"][1], tuned, -jnp.inf).max()
    return (
        {name: gold for name, (gold, _) in found.items()}
        | {f"KL, {name}": kl for name, (_, kl) in found.items()}
        | {"best offline at no more KL": best}
    )


measure = env.by_seed(rounds)
CLAIMS = (
    Claim(
        paper=PAPER,
        text="a round on the policy's own pairs, ranked by a reward model, beats as many steps on any other pairs",
        setting="chain of 24 tokens out of 8, reward model and DPO from the same 1,500 pairs, then 60 steps more; "
        "expected gold return and KL to the reference, exactly",
        measure=measure,
        checks=tuple(Above("own pairs", other) for other in OTHERS),
    ),
    Claim(
        paper=PAPER,
        text="it beats the best of 36 offline policies (3 betas, 12 checkpoints, chosen by gold) that went no further",
        setting="the same",
        measure=env.picked(measure, "own pairs", "own pairs twice", "best offline at no more KL", "KL, own pairs"),
        checks=(Above("own pairs", "best offline at no more KL"),),
    ),
)
