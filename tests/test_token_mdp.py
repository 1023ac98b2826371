"""The token MDP against golden values, the identities of a random one by enumeration, and beam search."""

import functools
import itertools

import numpy as np
import pytest

from pjpo import token_mdp
from pjpo.evals.token_rewards import token_rewards
from pjpo.types import Batch
from tests import tiny

REWARDS = {(): np.array([0.0, 0.1]), (0,): np.array([0.6, 0.5]), (1,): np.array([-1.0, 0.85])}
REF = {(): np.array([0.5, 0.5]), (0,): np.array([0.5, 0.5]), (1,): np.array([0.7, 0.3])}


def random_mdp(vocab_size, num_tokens, seed):
    rng = np.random.default_rng(seed)
    states = [state for t in range(num_tokens) for state in itertools.product(range(vocab_size), repeat=t)]
    return (
        {state: rng.normal(size=vocab_size) for state in states},
        {state: rng.dirichlet(np.ones(vocab_size)) for state in states},
    )


def test_golden_solution():
    found = token_mdp.solve(REWARDS, REF, 0.5)
    for state, q, v, policy in (
        ((), [0.20592225, 0.02948281], 0.47201879, [0.58731553, 0.41268447]),
        ((0,), [0.25342641, 0.15342641], 0.55249584, [0.54983400, 0.45016600]),
        ((1,), [-1.17833747, 0.24801360], 0.27605640, [0.05454181, 0.94545819]),
    ):
        np.testing.assert_allclose(found.q[state], q, atol=1e-8)
        np.testing.assert_allclose(found.v[state], v, atol=1e-8)
        np.testing.assert_allclose(found.policy[state], policy, atol=1e-8)


@pytest.mark.parametrize(
    ("beams", "sequence", "logp", "total"),
    [(1, (0, 0), -1.13033195, 0.6), (2, (1, 1), -0.94115757, 0.95), (4, (1, 1), -0.94115757, 0.95)],
)
def test_golden_beams(beams, sequence, logp, total):
    policy = token_mdp.solve(REWARDS, REF, 0.5).policy
    found = token_mdp.beam_search(lambda state: np.log(policy[state]), 2, beams)
    assert found[0] == sequence
    np.testing.assert_allclose(found[1], logp, atol=1e-8)
    np.testing.assert_allclose(token_mdp.sequence_return(REWARDS, sequence), total, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_advantages_telescope_and_the_policy_is_the_tilted_reference(seed):
    rewards, ref = random_mdp(3, 3, seed)
    found = token_mdp.solve(rewards, ref, 0.7)
    sequences = list(itertools.product(range(3), repeat=3))
    returns = np.array([token_mdp.sequence_return(rewards, s) for s in sequences])
    tilted = np.exp([token_mdp.sequence_logp(ref, s) for s in sequences] + returns / 0.7)
    policy = np.exp([token_mdp.sequence_logp(found.policy, s) for s in sequences])
    np.testing.assert_allclose(policy, tilted / tilted.sum(), rtol=0, atol=1e-10)
    for sequence, total in zip(sequences, returns, strict=True):
        states = [sequence[:t] for t in range(3)]
        for t, state in enumerate(states):  # Eq. 10
            after = found.v.get(sequence[: t + 1], 0.0)
            expected = rewards[state][sequence[t]] + after - found.v[state]
            np.testing.assert_allclose(found.advantages[state][sequence[t]], expected, atol=1e-10)
        summed = sum(found.advantages[s][token] for s, token in zip(states, sequence, strict=True))
        np.testing.assert_allclose(summed, total - found.v[()], atol=1e-10)
        # Eq. 13: the return, and the log-ratios to the reference that it costs, are V(s_0) + beta log-prob.
        regularised = total + 0.7 * token_mdp.sequence_logp(ref, sequence)
        np.testing.assert_allclose(
            regularised, found.v[()] + 0.7 * token_mdp.sequence_logp(found.policy, sequence), atol=1e-10
        )


def test_a_wide_enough_beam_finds_the_likeliest_sequence():
    _, policy = random_mdp(4, 3, seed=5)
    best = max(itertools.product(range(4), repeat=3), key=lambda s: token_mdp.sequence_logp(policy, s))
    assert token_mdp.beam_search(lambda state: np.log(policy[state]), 3, 16)[0] == best


@pytest.mark.parametrize("seed", range(10))
def test_as_many_beams_as_the_likeliest_sequences_odds_cannot_lose_it(seed):
    """No more beginnings of a length than 1/p can be as likely as a sequence of probability p."""
    _, policy = random_mdp(3, 4, seed)
    logp_of = functools.partial(token_mdp.sequence_logp, policy)
    best = max(itertools.product(range(3), repeat=4), key=logp_of)
    num_beams = int(np.exp(-logp_of(best)))
    found, logp = token_mdp.beam_search(lambda state: np.log(policy[state]), 4, num_beams)
    assert (found, logp) == (best, pytest.approx(logp_of(best)))


def test_a_trained_policy_is_searched_by_its_own_log_probs():
    """A tiny decoder after a prompt: a beam as wide as the vocabulary finds the likeliest of all pairs of tokens."""
    policy = tiny.make_policy(vocab_size=7, num_layers=1)
    params, prompt = tiny.make_params(policy), (3, 1, 4)
    search = token_mdp.next_logps(functools.partial(policy.logps, params), vocab_size=7, num_tokens=2, prompt=prompt)
    every = np.array(list(itertools.product(range(7), repeat=2)), np.int32)
    batch = Batch.of(prompt_tokens=np.array([prompt], np.int32), completion_tokens=every[None])
    logps = np.asarray(policy.logps(params, batch))[0].sum(-1)
    found, logp = token_mdp.beam_search(search, 2, 7)
    assert found == tuple(every[logps.argmax()])
    assert logp == pytest.approx(logps.max(), abs=1e-5)
    np.testing.assert_allclose(np.exp(search((2,))).sum(), 1, rtol=1e-5)
    others = token_mdp.next_logps(functools.partial(policy.logps, params), vocab_size=7, num_tokens=2, prompt=(5,))
    assert np.abs(others(()) - search(())).max() > 0.01


def test_an_end_token_ends_a_beam():
    logps = {(): [0.4, 0.6], (0,): [0.9, 0.1], (0, 0): [0.9, 0.1]}
    found = token_mdp.beam_search(lambda state: np.log(logps[state]), 3, 2, end=1)
    assert found == ((1,), pytest.approx(np.log(0.6)))
    logps = {(): [0.9, 0.1], (0,): [0.1, 0.9], (0, 0): [0.5, 0.5]}  # the end after something else: nothing follows it
    found = token_mdp.beam_search(lambda state: np.log(logps[state]), 3, 1, end=1)
    assert found == ((0, 1), pytest.approx(np.log(0.81)))


def test_the_shortest_search_is_the_likeliest_token():
    assert token_mdp.beam_search(lambda state: np.log([0.3, 0.7]), 1, 1) == ((1,), pytest.approx(np.log(0.7)))


def test_golden_token_rewards():
    rewards = token_rewards(0.1, [-0.5, -2.0, -0.1, -1.25], [-0.75, -1.0, -0.1, -2.0])
    np.testing.assert_allclose(rewards, [0.025, -0.1, 0.0, 0.075], atol=1e-12)
    np.testing.assert_allclose(np.cumsum(rewards), [0.025, -0.075, -0.075, 0], atol=1e-12)
    masked = token_rewards(0.1, [[-0.5, np.nan]], [[-0.75, -1.0]], [[True, False]])
    np.testing.assert_allclose(masked, [[0.025, 0]], atol=1e-12)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_solved_is_refused():
    with pytest.raises(ValueError, match="beta must be > 0, got 0"):
        token_mdp.solve(REWARDS, REF, 0)
    with pytest.raises(ValueError, match=r"differ in states \[\(1,\)\]"):
        token_mdp.solve(REWARDS, {state: p for state, p in REF.items() if state != (1,)}, 0.5)
    with pytest.raises(ValueError, match=r"reference probabilities must be > 0, as they are divided by, .* \(1,\)"):
        token_mdp.solve(REWARDS, REF | {(1,): np.array([1.0, 0.0])}, 0.5)
    with pytest.raises(ValueError, match=r"a state is the tuple of its tokens, \(\) at the start, got '0'"):
        token_mdp.solve({"0": np.zeros(2)}, {"0": np.full(2, 0.5)}, 0.5)
    with pytest.raises(ValueError, match="num_beams and num_tokens must be >= 1, got 0 and 3"):
        token_mdp.beam_search(lambda state: np.zeros(2), 3, 0)
