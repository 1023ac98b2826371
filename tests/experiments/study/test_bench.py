"""Trainings on a bench, on the tiny real model: what is measured at the start is known, and training moves it."""

import jax
import numpy as np
import pytest

from experiments.study import bench
from pjpo import online, optim
from pjpo.data.batches import order as data_order
from pjpo.experiment import Model
from pjpo.methods import dpo, kto, ppo, rto
from pjpo.rewards.learned import RewardModel
from pjpo.rewards.protocol import Rewards

TRAINING = bench.Training(num_steps=6, looks=(1,), batch_size=8, optimizer=optim.Config(learning_rate=1e-3))


@pytest.fixture(scope="module")
def start():
    return bench.Config(num_held_out=8, num_completions=2, max_completion_tokens=8).load()


@pytest.fixture(scope="module")
def pairs(start):
    openings = start.openings("train", 16)
    samples = start.sample(start.params, openings, jax.random.key(1), 4)
    return bench.best_and_worst(openings, samples, start.rewards(samples))


def test_pairs_are_best_against_worst(start):
    openings = start.openings("train", 3)
    samples = start.sample(start.params, openings, jax.random.key(1), 3)
    rewards = np.array([[0.1, 0.9, -0.5], [0.3, 0.3, 0.3], [0.0, -1.0, 1.0]])
    found = bench.best_and_worst(openings, samples, rewards)
    assert [pair.id for pair in found] == [openings[0].id, openings[2].id]
    for pair, row, places in ((found[0], 0, (1, 2)), (found[1], 2, (2, 1))):
        for completion, n in zip(pair.completions, places, strict=True):
            np.testing.assert_array_equal(
                completion, samples.completion_tokens[row, n][samples.completion_mask[row, n]]
            )


def test_games_are_all_pairs_that_differ():
    found = bench.games(np.array([[0.1, 0.9, 0.1], [0.3, 0.3, 0.3], [0.0, -1.0, 1.0]]))
    assert sorted(found) == [(0, 1, 0), (0, 1, 2), (2, 0, 1), (2, 2, 0), (2, 2, 1)]


def test_the_start_has_moved_nowhere(start, pairs):
    assert start.of_samples(start.params)["kl"] == pytest.approx(0, abs=1e-3)
    panel = start.of_pairs(start.params, pairs)
    assert panel["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert -200 < panel["logps/chosen"] < -5


@pytest.mark.slow
def test_training_learns_its_pairs_from_the_start(start, pairs):
    begun, (params, last) = start.fit(dpo.loss, dpo.Config(beta=0.1), pairs, TRAINING, seed=0)
    assert begun[1]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert last["loss"] < 0.6
    assert start.of_pairs(params, pairs)["rewards/accuracies"] > 0.8
    assert start.of_samples(params)["kl"] > 0.01
    assert start.of_samples(start.params)["kl"] == pytest.approx(0, abs=1e-3)  # the start itself is left alone


def test_a_pair_is_two_rows_of_kto(start, pairs):
    rows = bench.unpaired(pairs)
    assert [row.labels for row in rows] == [(True,), (False,)] * len(pairs)
    np.testing.assert_array_equal(rows[1].completions[0], pairs[0].completions[1])
    ((_, last),) = start.fit(
        kto.loss, kto.Config(beta=0.1), rows, bench.Training(num_steps=1, batch_size=8), seed=0, reference="online"
    )
    assert last["loss"] == pytest.approx(0.5, abs=1e-5)  # policy and reference agree


@pytest.mark.slow
def test_rollouts_keep_the_reference_and_the_dpo_policy_that_they_are_given():
    begin = bench.Config(model=Model(source="glassllm-en", scalar_head=True), max_completion_tokens=8).load()
    moved = jax.tree.map(lambda x: 1.05 * x, begin.params)
    config = online.Config(
        rewards=Rewards(functions=(lambda completions: [float(len(text)) for text in completions],), weights=(1.0,)),
        prompts_per_rollout=16,
        num_completions=2,
        max_completion_tokens=8,
        halvings=0,
    )
    training = bench.Training(num_steps=3, batch_size=8, optimizer=optim.Config(learning_rate=1e-3))
    openings = begin.openings("train", 16)

    kept = []

    def learn(**others):
        kept.clear()
        others["record"] = kept.extend
        run = begin.learn(rto.loss, rto.Config(), config, openings, training, seed=0, params=moved, at=(1, 2), **others)
        return [metrics for _, metrics in run]

    one, two, three = learn(ref_params=begin.params, dpo_params=begin.params)
    assert one["dpo_logratios/mean"] == 0
    assert min(one["kl"], two["kl"], three["kl"]) > 0.001
    assert one["reward"] == two["reward"] != three["reward"]  # a rollout is two updates
    texts, updates = ([row for row in kept if row["kind"] == kind] for kind in ("rollout", "update"))
    assert [row["update"] for row in texts] == [1] * 4  # two completions of two prompts, of the first rollout
    assert all(row["reward"] == len(row["completion"]) for row in texts)
    assert [row["update"] for row in updates] == [1, 2, 3]
    assert [row["reward"] for row in updates] == [metrics["reward"] for metrics in (one, two, three)]
    assert learn(ref_params=begin.params, dpo_params=moved)[0]["dpo_logratios/mean"] > 0.001
    assert learn(ref_params=moved, dpo_params=moved)[0]["kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_a_critic_begins_as_the_reward_model_and_learns_apart_from_the_policy():
    begin = bench.Config(
        model=Model(source="glassllm-en", scalar_head=True), max_completion_tokens=8, stop=(".", "!", "?")
    ).load()
    drawn = np.random.default_rng(0).normal(size=begin.policy.config.model_dim).astype(np.float32)
    ranks = RewardModel(
        begin.policy, begin.params | {"scalar_head": {"kernel": jax.numpy.asarray(drawn)}}, begin.tokenizer
    )
    config = online.Config(
        rewards=Rewards(functions=(lambda completions: [0.0] * len(completions),), weights=(1.0,)),
        prompts_per_rollout=8,
        num_completions=1,
        max_completion_tokens=8,
        stop=(".", "!", "?"),
        halvings=0,
    )
    method = ppo.Config(beta=0.0, lam=1.0, value_weight=1.0)  # all that there is to learn is that returns are 0
    training = bench.Training(num_steps=1, batch_size=8, optimizer=optim.Config(learning_rate=1e-3))
    openings = begin.openings("train", 8)
    run = begin.learn(
        ppo.loss, method, config, openings, training, seed=0, params=begin.params, ref_params=begin.params, critic=ranks
    )
    ((params, metrics),) = run
    key = jax.random.fold_in(jax.random.key(0), 0)
    order = data_order(openings, 0)
    rows = [openings[order[place]] for place in range(8)]
    batch = begin.sample(begin.params, rows, jax.random.fold_in(key, 0), 1)
    errors = 0.5 * np.square(begin.policy.values(ranks.params, batch))[batch.completion_mask]
    assert metrics["loss/value_avg"] == pytest.approx(errors.mean(), rel=1e-4)
    assert set(params) == set(begin.params)
    np.testing.assert_array_equal(params["scalar_head"]["kernel"], begin.params["scalar_head"]["kernel"])


def test_samples_end_with_the_tokens_that_are_asked_for(start):
    stopped = bench.Config(max_completion_tokens=24, stop=(".", "?")).load()
    ends = {stopped.tokenizer.encode(text)[0] for text in (".", "?")}
    assert set(stopped.stop_tokens) == ends  # this tokenizer has none of its own
    batch = stopped.sample(stopped.params, stopped.openings("train", 16), jax.random.key(0), 2)
    for tokens, mask in zip(
        batch.completion_tokens.reshape(-1, 24), batch.completion_mask.reshape(-1, 24), strict=True
    ):
        assert not ends & set(tokens[mask][:-1].tolist())
        assert mask.all() or tokens[mask][-1] in ends
    assert not batch.completion_mask.all()


@pytest.mark.parametrize("looks", [(6,), (0,), (3, 2), (2, 2)])
def test_looks_are_within_the_training(looks):
    with pytest.raises(ValueError, match=r"looks must ascend within 1 and 5, got \("):
        bench.Training(num_steps=6, looks=looks)
