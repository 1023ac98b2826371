"""RTO (arXiv:2404.18922): token rewards of a DPO policy in PPO, beside the control that has seen the same pairs."""

import collections
import dataclasses
import functools
import itertools
import math

import jax
import numpy as np

from experiments.claims import environments as env
from experiments.claims.claim import Above, Claim, Within
from experiments.claims.token_credit import random_mdp
from pjpo import token_mdp
from pjpo.methods import ppo, rto

PAPER = "RTO, Zhong et al. 2024"
PPO = ppo.Config(beta=0.01, value_weight=0.5)


def config(weight: float, variant: str = "rto") -> rto.Config:
    """Without the clips of the released code: gold returns lie far beyond 10."""
    return rto.Config(dpo_weight=weight, variant=variant, dpo_clip=None, score_clip=None, aggregation="token")


def settings(num_rollouts: int, num_iterations: int) -> env.Settings:
    return env.Settings(num_rollouts, num_iterations, num_epochs=2)


def curves(key, length: int, num_rollouts: int, num_iterations: int, runs: dict) -> dict[str, jax.Array]:
    """Expected return after each iteration, by run: (method's config, whether it starts at the DPO policy)."""
    keys = jax.random.split(key, 3)
    chain = env.token_chain(keys[0], 8, length)
    pairs = env.preferences(chain, chain.ref, keys[1], 2000)
    dpo = env.fit_dpo(chain.ref, chain.ref, pairs, 100)[-1]
    found = {"reference": env.expectations(chain, chain.ref)[0], "DPO": env.expectations(chain, dpo)[0]}
    for name, (method, at_dpo) in runs.items():
        start, how = dpo if at_dpo else chain.ref, settings(num_rollouts, num_iterations)
        found[name] = env.learn(ppo.loss, method, how, chain, start, keys[2], dpo=dpo)[0]
    return found


NUM_TOKENS, LENGTH = 4, 6  # A and H of Proposition 3.2
AT = 25, 50, 100, 200  # iterations
RUNS = {
    "PPO": (PPO, False),
    "RTO": (config(0.2), False),
    "RTO, weight 0.05": (config(0.05), False),
    "RTO, weight 1": (config(1.0), False),
    "shaped (RS-PPO)": (config(0.2, "rs"), False),
    "PPO from DPO": (PPO, True),
    "RTO from DPO": (config(0.2), True),
}


def long_horizon(key) -> dict[str, jax.Array]:
    found = curves(key, 64, 8, AT[-1], RUNS)
    at = {f"{name} at {n}": found[name][n - 1] for name in RUNS for n in AT}
    return {"DPO": found["DPO"]} | at | {"RTO / PPO at 50": at["RTO at 50"] / at["PPO at 50"]}


def of(*names: str) -> tuple[str, ...]:
    """What is measured of these runs."""
    return tuple(f"{name} at {n}" for name in names for n in AT)


def horizons(key) -> dict[str, jax.Array]:
    ratios = {}
    for length, num_rollouts in ((64, 8), (24, 8), (8, 16)):
        found = curves(key, length, num_rollouts, 50, {name: RUNS[name] for name in ("PPO", "RTO")})
        ratios[f"RTO / PPO, {length} tokens"] = found["RTO"][-1] / found["PPO"][-1]
    return ratios


def short_horizon(key) -> dict[str, jax.Array]:
    """How much of what can be gained is, where every completion can be tried: 1 is the best policy's."""
    keys = jax.random.split(key, 5)
    tree = env.token_tree(keys[0], 4, 6, jax.random.normal(keys[1], (1, 4**6)))
    dpo = env.fit_dpo(tree.ref, tree.ref, env.preferences(tree, tree.ref, keys[2], 500), 100)[-1]
    start, best = (env.expectations(tree, policy)[0] for policy in (tree.ref, env.optimum(tree, PPO.beta)))

    def gained(method):
        curve, _ = env.learn(ppo.loss, method, settings(64, 100), tree, tree.ref, keys[3], dpo=dpo)
        return (curve[-1] - start) / (best - start)

    return {"PPO": gained(PPO), "RTO, weight 0.05": gained(config(0.05)), "RTO, weight 1": gained(config(1.0))}


def locked(key) -> dict[str, jax.Array]:
    """The probability of opening the lock in the end, with rewards summed (gamma 1) and one by one (gamma 0)."""
    keys = jax.random.split(key)
    door = env.lock(keys[0], 4, 8)
    dpo, found = env.optimum(door, 0.1), {"chance": env.expectations(door, door.ref)[0]}
    for (name, method), gamma in itertools.product((("PPO", PPO), ("RTO", config(0.1))), (1.0, 0.0)):
        method = dataclasses.replace(method, gamma=gamma)
        curve, _ = env.learn(ppo.loss, method, settings(16, 400), door, door.ref, keys[1], dpo=dpo)
        found[f"{name}, gamma {gamma:.0f}"] = curve[-1]
    return found


def search(policy: token_mdp.PerState, num_beams: int) -> tuple[token_mdp.State, int]:
    """What a beam finds by token rewards log policy, and of how many tokens of one place, at most, it asks for them."""
    asked = collections.Counter()

    def rewards(state):
        asked[len(state)] += len(policy[state])
        return np.log(policy[state])

    found, _ = token_mdp.beam_search(rewards, LENGTH, num_beams)
    return found, max(asked.values())


def searches(seed: int, num_mdps: int = 20) -> dict[str, float]:
    """Over random token MDPs whose best completion has a probability of at least 1/A under the optimal policy.

    That is xi = 1, where xi is read as the least number for which that probability is at least A^-xi. At most A^xi
    beginnings of a length are then as likely as the best completion, so that as many beams cannot lose it, and they ask
    for A^(xi + 1) rewards at each place.
    """
    wins, most, kept, numbers = {1: 0, NUM_TOKENS: 0}, 0, 0, itertools.count(1000 * seed)
    while kept < num_mdps:
        policy = token_mdp.solve(*random_mdp(NUM_TOKENS, LENGTH, next(numbers)), beta=0.5).policy
        every = itertools.product(range(NUM_TOKENS), repeat=LENGTH)
        best = max(every, key=functools.partial(token_mdp.sequence_logp, policy))
        if token_mdp.sequence_logp(policy, best) < -math.log(NUM_TOKENS):
            continue
        kept += 1
        for num_beams in wins:
            found, asked = search(policy, num_beams)
            wins[num_beams] += found == best
            most = max(most, asked)
    return {
        "share found by A beams": wins[NUM_TOKENS] / num_mdps,
        "share found by 1 beam": wins[1] / num_mdps,
        "most token rewards asked for at a place": most,
    }


SETTING = "chain of 64 tokens out of 8, gold rewards of bigrams, 8 rollouts an iteration, DPO on 2,000 pairs of the "
SETTING += "reference; expected return at iterations 25 to 200, exactly; weight 0.2 where none is said"
long, lock = env.by_seed(long_horizon), env.by_seed(locked)
CLAIMS = (
    Claim(
        paper=PAPER,
        text="PPO learns faster with the DPO policy's token rewards than without",
        setting=SETTING,
        measure=env.picked(long, "DPO", *of("PPO", "RTO", "RTO, weight 0.05", "RTO, weight 1"), "RTO / PPO at 50"),
        checks=(
            Within("RTO / PPO at 50", 1.5, 10),
            *(Above(f"RTO at {n}", f"PPO at {n}") for n in (25, 50, 100)),
        ),
    ),
    Claim(
        paper=PAPER,
        text="and ends higher",
        setting="the same runs",
        measure=env.picked(long, "PPO at 200", "RTO at 200"),
        checks=(Above("RTO at 200", "PPO at 200"),),
    ),
    Claim(
        paper=PAPER,
        text="it learns faster when both start from the DPO policy too, and so know the same pairs",
        setting="the same runs",
        measure=env.picked(long, "DPO", *of("PPO from DPO", "RTO from DPO")),
        checks=tuple(Above(f"RTO from DPO at {n}", f"PPO from DPO at {n}") for n in (25, 50)),
    ),
    Claim(
        paper=PAPER,
        text="(not in the paper) yet most of the first gain is the pairs: PPO from the DPO policy is ahead of RTO from "
        "the reference at first",
        setting="the same runs",
        measure=env.picked(long, *of("PPO from DPO", "RTO")),
        checks=(Above("PPO from DPO at 25", "RTO at 25"), Above("PPO from DPO at 50", "RTO at 50")),
    ),
    Claim(
        paper=PAPER,
        text="the shape of the rewards alone helps: with the return of PPO (RS-PPO) it is ahead by iteration 100",
        setting="the same runs",
        measure=env.picked(long, *of("PPO", "shaped (RS-PPO)")),
        checks=(Above("shaped (RS-PPO) at 100", "PPO at 100"),),
    ),
    Claim(
        paper=PAPER,
        text="(not in the paper) the gain is that of long completions",
        setting="the same at iteration 50, with 64, 24 and (16 rollouts) 8 tokens",
        measure=env.by_seed(horizons),
        checks=(Above("RTO / PPO, 64 tokens", "RTO / PPO, 8 tokens"),),
    ),
    Claim(
        paper=PAPER,
        text="(not in the paper) where completions are short, token rewards gain nothing (0.02 at most), and a large "
        "weight holds it to the DPO policy, below PPO",
        setting="tree of 6 tokens out of 4, returns N(0, 1), 64 rollouts, 100 iterations, DPO on 500 pairs; share of "
        "what can be gained",
        measure=env.by_seed(short_horizon),
        checks=(Above("PPO", "RTO, weight 0.05", by=-0.02), Above("PPO", "RTO, weight 1")),
    ),
    Claim(
        paper=PAPER,
        text="each by itself, token rewards lead where the reward of a completion is never met by chance",
        setting="lock of 8 tokens out of 4, 16 rollouts, 400 iterations, token rewards of the optimal policy; "
        "probability of opening it",
        measure=lock,
        checks=(Above("RTO, gamma 0", "PPO, gamma 0", by=0.5),),
    ),
    Claim(
        paper=PAPER,
        text="so they do when they are summed, as the method has it (their sum is the return less V*, a shaping that a "
        "critic takes away)",
        setting="the same runs",
        measure=lock,
        checks=(Above("RTO, gamma 1", "PPO, gamma 1"),),
    ),
    Claim(
        paper=PAPER,
        text="with token rewards the best of A^H completions is found with A^min(xi + 1, H) queries, here 16, where "
        "sentence rewards need A^H, here 4,096 (Proposition 3.2, as it is read here)",
        setting="20 random token MDPs, 6 tokens out of 4, beta 0.5, whose best completion has a probability of 1/4 or "
        "more under the optimal policy (xi = 1); beam search by its log-probs; queries are counted at each place",
        measure=searches,
        checks=(
            Within("share found by A beams", 1, 1),
            Within("most token rewards asked for at a place", 1, 16),
            Above("share found by A beams", "share found by 1 beam"),
        ),
    ),
)
