"""Learning curves of the online methods' claims at one seed, in smaller settings than the claims' own."""

import jax
import numpy as np

from experiments.claims import environments as env
from experiments.claims import grpo, online_dpo, rto


def test_every_preset_of_grpo_learns(monkeypatch):
    monkeypatch.setattr(grpo, "SETTINGS", env.Settings(num_completions=16, num_iterations=100, policy_rate=0.04))
    found = jax.jit(grpo.learning)(jax.random.key(0))
    for name in grpo.PRESETS:
        assert found[f"{name} after 100"] > found["start"] + 0.3, name


def test_token_rewards_learn_faster_over_long_completions():
    runs = {name: rto.RUNS[name] for name in ("PPO", "RTO")}
    found = jax.jit(lambda key: rto.curves(key, 64, 8, 30, runs))(jax.random.key(0))
    assert found["RTO"][-1] > 1.3 * found["PPO"][-1]
    assert found["PPO"][-1] > found["reference"]


def test_a_lock_that_token_rewards_open_one_by_one():
    found = jax.jit(rto.locked)(jax.random.key(0))
    np.testing.assert_allclose(found["chance"], 4.0**-8, rtol=1e-5)
    assert found["RTO, gamma 0"] > 0.5
    assert found["PPO, gamma 0"] < 0.1


def test_own_pairs_beat_others():
    found = jax.jit(online_dpo.rounds)(jax.random.key(0))
    assert all(found["own pairs"] > found[other] for other in online_dpo.OTHERS)
    # Of normal returns the best of 16 is 1.77 standard deviations above the mean, 3 or so here.
    assert found["reference"] + 1 < found[online_dpo.BY_MODEL] <= found[online_dpo.BY_GOLD] < found["offline"]
