"""From r to Q* (arXiv:2404.12358): DPO's token rewards as advantages, search as reward search, and falling rewards."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims import sequences
from experiments.claims.claim import Above, Claim, Within
from experiments.claims.tabular import losses
from pjpo import token_mdp
from pjpo.evals.token_rewards import token_rewards
from pjpo.methods import dpo

PAPER = "From r to Q*, Rafailov et al. 2024"
CHOSEN, REJECTED = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])


def random_mdp(vocab_size: int, num_tokens: int, seed: int):
    """Random rewards and reference in every state: (rewards, reference)."""
    rng = np.random.default_rng(seed)
    states = [state for t in range(num_tokens) for state in itertools.product(range(vocab_size), repeat=t)]
    rewards = {state: rng.normal(size=vocab_size) for state in states}
    return rewards, {state: rng.dirichlet(np.ones(vocab_size)) for state in states}


def identities(seed: int, beta: float = 0.5) -> dict[str, float]:
    rewards, ref = random_mdp(3, 3, seed)
    solution = token_mdp.solve(rewards, ref, beta)
    sequences_ = list(itertools.product(range(3), repeat=3))
    returns = np.array([token_mdp.sequence_return(rewards, s) for s in sequences_])
    tilted = np.exp([token_mdp.sequence_logp(ref, s) for s in sequences_] + returns / beta)
    policy = np.exp([token_mdp.sequence_logp(solution.policy, s) for s in sequences_])
    summed = np.array([sum(solution.advantages[s[:t]][s[t]] for t in range(3)) for s in sequences_])
    return {
        "error of the policy": float(np.abs(policy - tilted / tilted.sum()).max()),
        "error of the sum": float(np.abs(summed - (returns - solution.v[()])).max()),
    }


def search(seed: int, num_mdps: int = 50) -> dict[str, float]:
    """Mean of return + beta log ref of what beams find, over random MDPs: what Eq. 13 says a search maximises."""
    found: dict[str, float] = dict.fromkeys(("1 beam", "2 beams", "5 beams", "best"), 0.0)
    for number in range(num_mdps):
        rewards, ref = random_mdp(4, 4, seed * num_mdps + number)
        solution = token_mdp.solve(rewards, ref, 0.5)
        for name, num_beams in (("1 beam", 1), ("2 beams", 2), ("5 beams", 5), ("best", 4**4)):
            sequence, _ = token_mdp.beam_search(lambda state: np.log(solution.policy[state]), 4, num_beams)  # noqa: B023
            total = token_mdp.sequence_return(rewards, sequence) + 0.5 * token_mdp.sequence_logp(ref, sequence)
            found[name] += total / num_mdps
    return found


def decline(reference: np.ndarray, num_steps: int, beta: float = 2.0, rate: float = 1.0) -> tuple[float, float]:
    """Mean implicit rewards of chosen and rejected, after gradient descent on the population loss."""
    pairs = np.array(list(itertools.product(range(4), repeat=2)))
    weights = np.outer(CHOSEN, REJECTED)[pairs[:, 0], pairs[:, 1]]
    with jax.enable_x64(True):
        log_ref = jnp.log(reference)

        def objective(logits):
            logps = jax.nn.log_softmax(logits)
            return jnp.sum(weights * losses(dpo, dpo.Config(beta=beta), logps[pairs], log_ref[pairs]))

        descend = jax.jit(lambda x: jax.lax.fori_loop(0, num_steps, lambda _, x: x - rate * jax.grad(objective)(x), x))
        rewards = beta * (jax.nn.log_softmax(descend(log_ref)) - log_ref)
        return float(CHOSEN @ rewards), float(REJECTED @ rewards)


def declines(seed: int) -> dict[str, float]:
    """References near the chosen distribution, as SFT leaves them, and near uniform."""
    rng = np.random.default_rng(seed)

    def near(p):
        p = p * np.exp(0.05 * rng.normal(size=4))
        return p / p.sum()

    fitted, other = decline(near(CHOSEN), 2000), decline(near(np.full(4, 0.25)), 2000)
    return {
        "chosen reward, fitted reference": fitted[0],
        "rejected reward, fitted reference": fitted[1],
        "chosen reward, uniform reference": other[0],
        "rejected reward, uniform reference": other[1],
    }


POLICY, PLACE = sequences.Table(6, 8), 3


def credit(seed: int) -> dict[str, float]:
    """Gold reward of one token at one place; on held-out pairs, where do DPO's token rewards see the difference?"""
    rng = np.random.default_rng(seed)
    reference = POLICY.init()

    def draw(count):
        first, second = (POLICY.sample(reference, count, rng) for _ in range(2))
        unequal = (first[:, PLACE] == 0) != (second[:, PLACE] == 0)
        return sequences.pairs(first[unequal], second[unequal], first[unequal, PLACE] == 0)

    batch = sequences.train(POLICY, dpo.loss, dpo.Config(), reference, draw(4000), num_steps=100, learning_rate=0.03)
    held_out = draw(2000)
    rewards = token_rewards(0.1, POLICY.logps(batch, held_out), POLICY.logps(reference, held_out))[:, 0]
    others = np.delete(rewards, PLACE, axis=1).mean(1)
    return {
        "share where the decisive token stands out": float(np.mean(rewards[:, PLACE] > others)),
        "token reward there": float(rewards[:, PLACE].mean()),
        "token reward elsewhere": float(others.mean()),
    }


CLAIMS = (
    Claim(
        paper=PAPER,
        text="token rewards are advantages that sum to the return less V(s_0), and the policy is the tilted reference",
        setting="random token MDPs, 3 tokens out of 3, every sequence",
        measure=identities,
        checks=(Within("error of the policy", 0, 1e-10), Within("error of the sum", 0, 1e-10)),
    ),
    Claim(
        paper=PAPER,
        text="beam search over the policy is a search for reward: several beams find more than one",
        setting="50 random token MDPs, 4 tokens out of 4, beta 0.5; return + beta log ref of the sequence found",
        measure=search,
        checks=(Above("2 beams", "1 beam"), Above("5 beams", "1 beam")),
    ),
    Claim(
        paper=PAPER,
        text="chosen rewards fall when the reference was fitted to chosen responses, and rise when it was not",
        setting="4 responses, beta 2, references near the chosen distribution and near uniform, 2,000 steps",
        measure=declines,
        checks=(
            Within("chosen reward, fitted reference", -10, 0),
            Within("chosen reward, uniform reference", 0, 10),
            Above("chosen reward, fitted reference", "rejected reward, fitted reference"),
        ),
    ),
    Claim(
        paper=PAPER,
        text="a DPO policy learns which token earned the reward, from feedback on whole sequences",
        setting="6 tokens out of 8, the one at place 4 decides, table policy, 4,000 drawn pairs; held-out pairs",
        measure=credit,
        checks=(Within("share where the decisive token stands out", 0.9, 1),),
    ),
)
