"""DPO's optimum and gradient, and what its frontier is made of."""

import itertools

import jax
import numpy as np

from experiments.claims import dpo, sequences
from experiments.claims.claim import run


def test_the_claims_hold():
    for claim in dpo.CLAIMS[:2]:  # those with a known answer
        assert run(claim, 2).holds, claim.text


def test_expectations_are_sums_over_all_sequences():
    table, rng = sequences.Table(3, 2), np.random.default_rng(0)
    policy, reference = (np.log(rng.dirichlet(np.ones(2), size=(3, 3))) for _ in range(2))
    values = np.array([1.0, -0.5])
    reward = kl = 0.0
    for tokens in itertools.product(range(2), repeat=3):
        places = list(zip(range(3), (2, *tokens), tokens, strict=False))  # (place, token before, token)
        logp, ref_logp = (sum(logits[place] for place in places) for logits in (policy, reference))
        reward += np.exp(logp) * values[list(tokens)].sum()
        kl += np.exp(logp) * (logp - ref_logp)
    found = table.expectations(*(jax.numpy.asarray(x, np.float32) for x in (policy, reference, values)))
    np.testing.assert_allclose(found, [reward, kl], rtol=1e-5)


def test_the_frontier_s_pairs_are_samples_of_one_set_and_differ_in_reward():
    rng = np.random.default_rng(0)
    reference = jax.numpy.asarray(rng.normal(size=dpo.POLICY.shape), np.float32)
    state = rng.bit_generator.state
    batch = dpo.all_pairs(reference, rng)
    counts = (np.asarray(batch.completion_tokens) == 0).sum(-1)
    assert counts.shape == (dpo.NUM_PAIRS, 2)
    assert np.all(counts[:, 0] > counts[:, 1])
    rng.bit_generator.state = state
    samples = dpo.POLICY.sample(reference, dpo.NUM_SETS * 4, rng).reshape(dpo.NUM_SETS, 4, 6)
    expected = [
        sorted(map(tuple, pair))
        for samples_of in samples
        for pair in itertools.combinations(samples_of, 2)
        if (pair[0] == 0).sum() != (pair[1] == 0).sum()
    ]
    found = [sorted(map(tuple, pair)) for pair in np.asarray(batch.completion_tokens)]
    assert sorted(found) == sorted(expected[: dpo.NUM_PAIRS])


def test_a_frontier_begins_at_the_reference_and_never_falls(monkeypatch):
    monkeypatch.setattr(dpo, "SETTINGS", {name: (loss, configs[:1]) for name, (loss, configs) in dpo.SETTINGS.items()})
    found = dpo.frontier.__wrapped__(0, num_steps=60)
    for name in dpo.SETTINGS:
        rewards = [found[dpo.within(name, budget)] for budget in dpo.BUDGETS]
        assert rewards == sorted(rewards)
        assert name != "DPO" or rewards[0] < rewards[-1]
        assert 0 < rewards[0] < 6
