"""Rollouts of a tiny policy against their parts, one by one; and whole runs that are killed within them."""

import dataclasses
import functools
import json
import re
import signal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from experiments import registry
from pjpo import experiment, online, runs, train
from pjpo.data.batches import order
from pjpo.data.examples import Example
from pjpo.methods import dpo, grpo, ppo
from pjpo.metrics import Mean
from pjpo.rewards.protocol import Rewards, Unscored
from pjpo.sampling import Prompts, Sampling, sequence_keys
from pjpo.step import State
from pjpo.types import Batch
from tests import test_distributed, tiny_online
from tests.models import plain_llama
from tests.test_experiment import Program
from tests.test_rollouts import POLICY, params

EXAMPLES = [Example(np.arange(4, 5 + row % 3, dtype=np.int32), (), {"row": row}, f"row {row}") for row in range(7)]
METHOD = dataclasses.replace(grpo.GRPO, beta=0.1)


class Alphabet:
    stop_ids = (0, 1, 2, 3)

    def decode(self, ids, skip_special=True):
        return "".join(chr(97 + i) for i in ids)

    def encode(self, text, special=False):
        return [ord(letter) - 97 for letter in text]


def long_with_h(text, row):
    return len(text) + 0.5 * text.count("h")


def make(of=long_with_h, method=METHOD, batch_size=2, examples=EXAMPLES, **settings):
    settings = {"prompts_per_rollout": 4, "num_completions": 3, "max_completion_tokens": 6} | settings

    def made_up(completions, *, row):
        return [of(text, number) for text, number in zip(completions, row, strict=True)]

    config = online.Config(rewards=Rewards(functions=(made_up,), weights=(1.0,)), **settings)
    made = online.Rollouts(config, method, POLICY, Alphabet(), examples, batch_size=batch_size, seed=5)
    made.rows = []
    return made.start(lambda state: reference(), lambda batch: batch, lambda step, rows: made.rows.append((step, rows)))


@functools.cache
def reference():
    return jax.tree.map(lambda x: 1.1 * x, params())


def state(step=0):
    return State(params(), None, jnp.int32(step), jax.random.key(7))


def whole(made, at=None, minibatches=None):
    """The minibatches of a rollout as one."""
    parts = [made.next(at or state()) for _ in range(minibatches or made.period)]
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def by_prompt(batch):
    """Rows in an order of their own: minibatches shuffle them."""
    return jax.tree.map(lambda x: x[np.lexsort((batch.old_logps[:, 0, 0], batch.prompt_mask.sum(1)))], batch)


def alike(one, other, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), one, other)


def test_a_rollout_is_what_its_parts_make_one_by_one():
    made = make()
    found = by_prompt(whole(made))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 0), 0)  # of the first rollout, before any refill
    keys, texts, rows = sequence_keys(key, 4, 3), [], []
    for place, row in enumerate(order(EXAMPLES, 5)[at] for at in range(4)):
        prompt = EXAMPLES[row].prompt[None]
        alone = POLICY.generate(
            params(),
            Prompts(prompt, prompt > -1),
            keys[place : place + 1],
            online.Config.sampling(made.config, (0, 1, 2, 3)),
        )
        tokens, mask = np.asarray(alone.tokens), np.asarray(alone.mask)
        texts.append([Alphabet().decode(t[m]) for t, m in zip(tokens[0], mask[0], strict=True)])
        batch = Batch.of(prompt_tokens=prompt, completion_tokens=tokens, completion_mask=mask)
        rewards = np.array([[long_with_h(text, row) for text in texts[-1]]], np.float32)
        centred = rewards - rewards.mean()
        rows.append(
            dataclasses.replace(
                batch,
                prompt_tokens=np.pad(prompt, [(0, 0), (0, 3 - prompt.shape[1])]),
                prompt_mask=np.arange(3)[None] < prompt.shape[1],
                rewards=rewards,
                advantages=centred / (rewards.std(ddof=1) + 1e-4),
                old_logps=np.asarray(POLICY.logps(params(), batch)),
                ref_logps=np.asarray(POLICY.logps(reference(), batch)),
            )
        )
    expected = by_prompt(jax.tree.map(lambda *x: np.concatenate(x), *rows))
    assert len({tuple(group) for group in texts}) == 4
    assert np.ptp(expected.rewards, axis=1).all()
    alike(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "settings"), [(METHOD, {}), (grpo.DAPO, {}), (dpo.Config(), {"pairs": True, "num_completions": 4})]
)
def test_updates_get_what_trained_on_says(method, settings):
    found = make(method=method, **settings).next(state())
    bare = {name: getattr(found, name) for name in ("prompt_tokens", "prompt_mask", "completion_tokens")}
    config = make(method=method, **settings).config
    told = online.trained_on(config, method, Batch.of(**bare), reference="online")
    kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), batch) for batch in (found, told)]
    assert kinds[0] == kinds[1]


def test_minibatches_hold_whole_groups_each_once_an_epoch():
    made = make(num_epochs=3)
    assert made.period == 6
    epochs = [whole(made, minibatches=2) for _ in range(3)]
    for epoch in epochs[1:]:
        alike(by_prompt(epoch), by_prompt(epochs[0]))
    assert len({epoch.old_logps[:, 0, 0].tobytes() for epoch in epochs}) > 1  # in orders of their own
    another = whole(made)
    assert not np.isin(another.old_logps[:, 0, 0], epochs[0].old_logps[:, 0, 0]).all()


def test_samples_do_not_depend_on_how_many_are_decoded_or_scored_together():
    one, other = make(), make(sampling_batch_size=3)
    other._scored_together = 1
    alike(by_prompt(whole(one)), by_prompt(whole(other)), atol=1e-5)


def test_it_goes_on_where_it_was_saved():
    undisturbed = make(num_epochs=2, dynamic_sampling=True)
    first, second = whole(undisturbed), whole(undisturbed, state(4))
    stopped = make(num_epochs=2, dynamic_sampling=True)
    alike(whole(stopped), first)
    position = json.loads(json.dumps(stopped.get_state()))
    resumed = make(num_epochs=2, dynamic_sampling=True)
    resumed.set_state(position)
    jax.tree.map(np.testing.assert_array_equal, whole(resumed, state(4)), second)
    with pytest.raises(ValueError, match="position is one in other prompts"):
        make(examples=EXAMPLES[1:]).set_state(position)
    changed = [dataclasses.replace(example, columns={"row": 9}) for example in EXAMPLES]
    with pytest.raises(ValueError, match="position is one in other prompts"):
        make(examples=changed).set_state(position)


def test_groups_of_equal_rewards_are_left_out_and_replaced():
    def useless(text, row):
        return 1.0 if row in (0, 2, 3, 6) else long_with_h(text, row)

    rows = [order(EXAMPLES, 5)[at] for at in range(14)]
    made = make(useless, dynamic_sampling=True, max_refills=9)
    found = whole(made)
    assert found.completion_mask[:, 0, 0].all()
    assert (np.ptp(found.rewards, axis=1) > 0).all()
    asked = next(n for n in range(14) if sum(row not in (0, 2, 3, 6) for row in rows[:n]) == 4)
    assert made.get_state()["prompts"] == asked  # no prompt is sampled without need
    few = make(useless, dynamic_sampling=True, max_refills=0)
    found, useful = whole(few), sum(row not in (0, 2, 3, 6) for row in rows[:4])
    assert 0 < useful < 4
    assert found.loss_mask.any((1, 2)).sum() == found.prompt_mask.any(1).sum() == useful
    assert few._numbers["frac_reward_zero_std"].value() == 1 - useful / 4
    none = make(lambda text, row: 1.0, dynamic_sampling=True)
    found = whole(none)
    assert none.get_state()["prompts"] == 12  # refilled twice
    assert not found.loss_mask.any()
    assert np.isfinite(found.advantages).all()
    kept = whole(make(lambda text, row: 1.0))
    assert kept.loss_mask[:, :, 0].all()
    assert not kept.advantages.any()


def test_groups_that_are_masked_whole_are_left_out_and_replaced():
    def cut(batch):
        last = np.take_along_axis(batch.completion_tokens, batch.completion_mask.sum(-1, keepdims=True) - 1, -1)[..., 0]
        return (last > 3) & batch.completion_mask.any(-1)

    settings = {"of": lambda text, row: float(ord(text[-1])), "num_completions": 2, "max_completion_tokens": 2}
    settings |= {"truncated": "mask"}
    there = whole(make(**settings))
    masked_whole = cut(there).all(1)
    assert 0 < masked_whole.sum() < 4
    assert (np.ptp(there.rewards, axis=1)[masked_whole] > 0).any()  # rewards that differ, and no token that counts
    made = make(**settings, dynamic_sampling=True, max_refills=0)
    found = whole(made)
    kept = ~masked_whole & (np.ptp(there.rewards, axis=1) > 0)
    assert found.loss_mask.any((1, 2)).sum() == found.completion_mask.any((1, 2)).sum() == kept.sum()
    equal = np.ptp(there.rewards, axis=1) == 0
    assert made._numbers["frac_reward_zero_std"].value() == equal.mean()  # TRL's, whatever is masked


def test_a_completion_without_a_reward_does_not_count():
    def fails(text, row):
        return np.nan if len(text) == 6 else long_with_h(text, row)

    made = make(fails)
    found = whole(made)
    failed = np.isnan(found.rewards)
    assert 0 < failed.sum() < failed.size
    np.testing.assert_array_equal(failed, found.completion_mask.all(-1))
    assert not found.loss_mask[failed].any()
    assert found.loss_mask[~failed][:, 0].all()
    assert np.isfinite(found.advantages).all()
    assert made._numbers["reward"].value() == pytest.approx(np.nanmean(found.rewards))
    assert made._numbers["rewards/failures"].value() == failed.sum()


def test_truncated_completions_are_kept_masked_penalised_or_get_a_fixed_reward():
    settings = {"truncation_penalty": 3.0, "truncated_reward": -7.0}
    kept, masked, penalised, replaced = (
        by_prompt(whole(make(truncated=what, **settings))) for what in ("keep", "mask", "penalise", "replace")
    )
    last = np.take_along_axis(kept.completion_tokens, kept.completion_mask.sum(-1, keepdims=True) - 1, -1)[..., 0]
    truncated = last > 3
    assert 0 < truncated.sum() < truncated.size
    assert (kept.completion_mask[truncated].sum(-1) == 6).all()
    np.testing.assert_array_equal(kept.loss_mask, kept.completion_mask)
    np.testing.assert_array_equal(masked.loss_mask, kept.completion_mask & ~truncated[..., None])
    np.testing.assert_array_equal(masked.advantages, kept.advantages)  # it is compared with, all the same
    np.testing.assert_allclose(penalised.rewards, kept.rewards - 3 * truncated)
    np.testing.assert_array_equal(replaced.rewards, np.where(truncated, -7, kept.rewards))
    np.testing.assert_array_equal(replaced.loss_mask, kept.loss_mask)
    assert make().config.truncated_reward == -10  # as in the papers


@pytest.mark.parametrize("reference_of", ["run", "rollout"])
def test_pairs_are_a_group_s_best_and_worst_and_a_tie_gives_none(reference_of):
    def tied(text, row):
        return np.nan if text.startswith("z") else 1.0 if row in (0, 2, 3, 6) else long_with_h(text, row)

    groups = whole(make(tied, num_completions=4))
    made = make(tied, method=dpo.Config(), num_completions=4, pairs=True, reference=reference_of)
    found = whole(made)
    assert np.isnan(groups.rewards).any()
    assert found.completion_tokens.shape[:2] == (4, 2)
    expected = {}
    for b, rewards in enumerate(groups.rewards):
        known = [(reward, -n) for n, reward in enumerate(rewards) if not np.isnan(reward)]
        if known and max(known)[0] > min(known)[0]:
            best = -max(known)[1]
            worst = next(n for n, reward in enumerate(rewards) if reward == min(known)[0])
            expected[groups.prompt_tokens[b].tobytes(), best, worst] = b, [best, worst]
    counted = np.flatnonzero(found.loss_mask.any((1, 2)))
    assert 0 < len(counted) == len(expected) < 4
    for b, pair in expected.values():
        (row,) = [r for r in counted if np.allclose(found.rewards[r], groups.rewards[b, pair])]
        np.testing.assert_array_equal(found.completion_tokens[row], groups.completion_tokens[b, pair])
        np.testing.assert_allclose(found.old_logps[row], groups.old_logps[b, pair], atol=1e-5)
        ref_logps = groups.ref_logps if reference_of == "run" else groups.old_logps
        np.testing.assert_allclose(found.ref_logps[row], ref_logps[b, pair], atol=1e-5)
    assert "kl_k1" not in made._numbers  # of the best and the worst it would be another
    of_two = make(tied, method=dpo.Config(), num_completions=2, pairs=True, reference=reference_of)
    of_kept = make(tied, dynamic_sampling=True)
    for chosen in (of_two, of_kept):
        whole(chosen)
        assert "kl_k1" not in chosen._numbers
    entropy = -groups.old_logps[groups.completion_mask].mean()  # but this is of all four
    assert float(made._numbers["entropy"].value()) == pytest.approx(entropy, abs=1e-5)


def test_a_rollout_may_have_no_row_with_a_column_that_others_have():
    some = [
        dataclasses.replace(row, columns=row.columns | {"answer": 1} if n == 0 else row.columns)
        for n, row in enumerate(EXAMPLES)
    ]
    seen = []

    def reads(completions, *, answer):
        seen.extend(answer)
        return [0.0] * len(completions)

    config = online.Config(
        rewards=Rewards(functions=(reads,), weights=(1.0,)),
        prompts_per_rollout=2,
        num_completions=2,
        max_completion_tokens=2,
    )
    made = online.Rollouts(config, METHOD, POLICY, Alphabet(), some, batch_size=2, seed=5)
    made.start(lambda state: reference(), lambda batch: batch, lambda step, rows: None)
    for _ in range(4):
        whole(made)
    assert {None, 1} == set(seen)


def test_numbers_have_trl_s_names_and_the_values_of_a_loop():
    made = make(num_completions=4)
    update = made.timed(lambda state, ref_params, batch: (state, {"loss": Mean.of(jnp.float32(2.0))}))
    parts = [made.next(state()) for _ in range(2)]
    _, metrics = update(state(), None, parts[0])
    batch = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    found = {name: float(mean.value()) for name, mean in metrics.items()}
    lengths = batch.completion_mask.sum(-1)
    ended = batch.completion_tokens[..., -1] * (lengths == 6) <= 3
    mask, gaps = batch.completion_mask, batch.old_logps - batch.ref_logps
    expected = {
        "loss": 2.0,
        "reward": batch.rewards.mean(),
        "reward_std": batch.rewards.std(ddof=1),
        "reward_group_std": np.mean([group.std(ddof=1) for group in batch.rewards]),
        "rewards/made_up/mean": batch.rewards.mean(),
        "rewards/made_up/std": batch.rewards.std(ddof=1),
        "rewards/failures": 0.0,
        "frac_reward_zero_std": np.mean([len(set(group)) == 1 for group in batch.rewards]),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - ended.mean(),
        "completions/mean_terminated_length": lengths[ended].mean(),
        "completions/min_terminated_length": lengths[ended].min(),
        "completions/max_terminated_length": lengths[ended].max(),
        "entropy": -batch.old_logps[mask].mean(),
        "kl_k1": gaps[mask].mean(),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert 0 < found["sampling/sampling_logp_difference/mean"] <= found["sampling/sampling_logp_difference/max"] < 1e-4
    times = {f"time/{what}" for what in ("generate", "reward", "score", "update")}
    times |= {f"speed/{what}_tokens_per_second" for what in ("generate", "update")}
    assert all(found[name] > 0 for name in times)
    ratios = [found.pop(f"sampling/importance_sampling_ratio/{what}") for what in ("min", "mean", "max")]
    assert ratios == sorted(ratios) == pytest.approx([1, 1, 1], abs=1e-4)
    assert np.log([ratios[2], 1 / ratios[0]]).max() == pytest.approx(
        found["sampling/sampling_logp_difference/max"], abs=1e-7
    )
    others = {"sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"}
    assert found.keys() == expected.keys() | times | others
    tokens = float(metrics["speed/update_tokens_per_second"].sum)
    assert tokens == parts[-1].prompt_mask.sum() + parts[-1].completion_mask.sum()  # of the batch asked for last


def test_a_reference_that_nobody_reads_is_not_scored(monkeypatch):
    scored, logps = [], type(POLICY).logps

    def counted(self, params, batch):
        scored.append(params is reference())
        return logps(self, params, batch)

    monkeypatch.setattr(type(POLICY), "logps", counted)
    method, found = dataclasses.replace(METHOD, beta=0.0), {}
    for name, made in (("unread", make(method=method)), ("logged", make(method=method, log_kl=True))):
        found[name] = whole(made), made._numbers, sum(scored)
        scored.clear()
    batch, metrics, times = found["unread"]
    assert (batch.ref_logps, "kl_k1" in metrics, times) == (None, False, 0)
    batch, metrics, times = found["logged"]
    mask = batch.completion_mask
    assert metrics["kl_k1"].value() == pytest.approx((batch.old_logps - batch.ref_logps)[mask].mean(), abs=1e-6)
    assert times > 0


def test_completions_are_written_with_rewards_and_advantages():
    made = make(log_every_rollouts=2, num_logged_prompts=2)
    batches = [whole(made, state(2 * number)) for number in range(3)]
    assert [(step, [row["rollout"] for row in rows]) for step, rows in made.rows] == [(1, [0] * 6), (5, [2] * 6)]
    first = by_prompt(batches[0])
    for row in made.rows[0][1]:
        (b, n), *others = np.argwhere(np.isclose(first.advantages, row["advantage"], atol=1e-4)).tolist()
        assert row["reward"] == pytest.approx(first.rewards[b, n]) == row["rewards"]["made_up"]
        assert row["reward"] == long_with_h(row["completion"], None)
        assert row["num_tokens"] == len(row["completion"])
        assert row["truncated"] == (row["completion"][-1] > "d")
        assert row["kind"] == "rollout"
    made = make(of=lambda text, row: len(text) + 1 / 3, log_every_rollouts=1, num_logged_prompts=None)
    found = whole(made)
    ((_, every),) = made.rows
    assert len(every) == 4 * 3
    assert sorted(row["reward"] for row in every) == sorted(found.rewards.reshape(-1).tolist())  # and not rounded


def test_the_pull_adapts_to_the_completions_that_count_and_goes_on_where_it_was_saved():
    method = ppo.Config(beta=0.1, kl_target=0.5, kl_horizon=20)

    def rolled_out(made, policy):
        with mock.patch.object(
            type(POLICY), "values", lambda self, params, batch: np.float32(0) * batch.completion_mask
        ):
            batch = whole(made, policy)
        return batch, made._numbers["beta"].value()

    made = make(method=method, truncated="mask", max_completion_tokens=4)
    found, betas = zip(*(rolled_out(made, state(2 * number)) for number in range(2)), strict=True)
    kls = []
    for batch in found:
        counted = batch.loss_mask.any(-1)
        assert 0 < counted.sum() < counted.size
        drift = np.where(batch.loss_mask, batch.old_logps - batch.ref_logps, 0).sum(-1)
        kls.append((drift[counted].mean(), counted.sum()))
    expected = [0.1]
    for kl, number in kls:
        expected.append(expected[-1] * (1 + np.clip(kl / 0.5 - 1, -0.2, 0.2) * number / 20))
    np.testing.assert_allclose([*betas, made.get_state()["beta"]], expected, rtol=1e-5)
    assert len(set(expected)) == 3
    resumed = make(method=method, truncated="mask", max_completion_tokens=4)
    resumed.set_state(json.loads(json.dumps(made.get_state())))
    again, beta = rolled_out(resumed, state(4))
    assert beta == made.get_state()["beta"]
    following, _ = rolled_out(made, state(4))
    jax.tree.map(np.testing.assert_array_equal, again, following)


def test_filters_that_log_probs_do_not_know_are_told():
    for settings, told in (({}, False), ({"top_k": 5}, True), ({"top_p": 0.9}, True)):
        said = []
        make(**settings).start(lambda state: None, lambda batch: batch, lambda *_: None, say=said.append)
        assert [message.startswith("rollouts: top_k") for message in said] == [True] * told


def test_at_a_temperature_everything_is_of_the_distribution_that_is_sampled_from():
    made = make(temperature=0.6)
    found = whole(made)
    assert made._numbers["sampling/sampling_logp_difference/max"].value() < 1e-5
    for weights, logps in ((params(), found.old_logps), (reference(), found.ref_logps)):
        for prompt, size, tokens, counted, row in zip(
            found.prompt_tokens,
            found.prompt_mask.sum(1),
            found.completion_tokens,
            found.completion_mask,
            logps,
            strict=True,
        ):
            rows = np.concatenate([np.repeat(prompt[None, :size], 3, axis=0), tokens], axis=1)
            logits = plain_llama.logits(POLICY.config, weights, rows)[:, size - 1 : -1]
            of_tokens = np.take_along_axis(jax.nn.log_softmax(logits / 0.6), tokens[..., None], -1)[..., 0]
            np.testing.assert_allclose(row, np.where(counted, of_tokens, 0), atol=1e-5)


def test_at_a_temperature_the_gradient_is_that_of_the_reward_that_samples_get():
    """Every completion of one token, each as often as it is drawn; so nothing is left to chance."""
    policy, prompt, rewards = make(temperature=0.6).policy, np.array([[4, 5]], np.int32), np.cos(np.arange(32.0))
    tokens, start = np.arange(32, dtype=np.int32)[None, :, None], jax.tree.map(lambda x: 3 * x, params())  # not uniform

    def probabilities(weights):
        return jax.nn.softmax(plain_llama.logits(POLICY.config, weights, prompt)[0, -1] / 0.6)

    drawn = np.asarray(probabilities(start))
    batch = Batch.of(prompt_tokens=prompt, completion_tokens=tokens, advantages=(32 * drawn * rewards)[None])
    batch = dataclasses.replace(batch, old_logps=policy.logps(start, batch))

    def loss(weights):
        return grpo.loss(grpo.Config(beta=0.0), batch, policy.logps(weights, batch), None)[0].value()

    np.testing.assert_allclose(loss(start), -drawn @ rewards, rtol=1e-5)
    expected = jax.jit(jax.grad(lambda weights: -probabilities(weights) @ rewards))(start)
    alike(jax.jit(jax.grad(loss))(start), expected, rtol=1e-4, atol=1e-6)
    sampling = Sampling(max_completion_tokens=1, num_completions=4000)
    samples = policy.generate(start, Prompts(prompt, prompt > -1), jax.random.key(0), sampling).tokens
    counts = np.bincount(np.asarray(samples).reshape(-1), minlength=32)
    assert stats.chisquare(counts, 4000 * drawn.astype(np.float64) / drawn.sum(dtype=np.float64)).pvalue > 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "online: temperature must be > 0 and finite, got 0.0"),
        ({"prompts_per_rollout": 0}, "online: prompts_per_rollout must be >= 1, got 0"),
        ({"truncated": "cut"}, "online: truncated must be one of keep, mask, penalise, replace, got 'cut'"),
        ({"truncated_reward": float("nan")}, "online: truncated_reward must be finite, got nan"),
        ({"num_logged_prompts": -1}, "online: num_logged_prompts must be >= 0, got -1"),
        ({"pairs": True, "truncated": "mask"}, "pairs need .* got 3 and truncated 'mask'"),
        (
            {"num_completions": 1, "dynamic_sampling": True},
            "dynamic_sampling leaves out .* num_completions 1; sample",
        ),
        ({"pairs": True, "log_kl": True}, "log_kl measures samples, but pairs are a choice"),
        ({"top_p": 0.0}, r"sampling: top_p must be in \(0, 1\], got 0.0"),
        ({"stop": ("ab",)}, "stop 'ab' must be one token of the tokenizer, got 2; choose another text"),
        ({"max_completion_tokens": 31}, r"the prompt of row 2 has 3 tokens, but the model's 32 positions .* leave 1"),
        ({"prompts_per_rollout": 5}, "prompts_per_rollout 5 is not divisible by batch_size 2; use 4 or 6"),
    ],
)
def test_what_cannot_be_sampled_is_refused(settings, message, unchecked):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_prompts_that_are_none_are_refused():
    pair = dataclasses.replace(EXAMPLES[0], completions=(np.array([5]),))
    with pytest.raises(ValueError, match="row 0 has completions; they need prompts alone"):
        make(examples=[pair])
    with pytest.raises(ValueError, match="row 0 has no prompt"):
        make(examples=[dataclasses.replace(EXAMPLES[0], prompt=np.array([], np.int32))])


def test_truncation_without_any_end_is_refused(monkeypatch):
    monkeypatch.setattr(Alphabet, "stop_ids", ())
    with pytest.raises(ValueError, match="truncated is 'mask', but the tokenizer has no end token"):
        make(truncated="mask")
    assert make(truncated="mask", stop=("e",)).sampling.stop_tokens == (4,)


ROLLOUTS = tiny_online.EXPERIMENT.rollouts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loop.checkpoint_every_steps": 6},
            "loop.checkpoint_every_steps 6 would end within a rollout.* 4 updates.* 4 or 8",
        ),
        ({"loop.num_steps": 3}, "loop.num_steps 3 would end within a rollout, which makes 4 updates; use 4"),
        ({"rollouts.prompts_per_rollout": 5}, "prompts_per_rollout 5 is not divisible by batch_size 2"),
        ({"rollouts.num_completions": 1}, "needs 2 or more of each, got 1"),
        ({"reference": "stored"}, "reference 'stored' is for data that is there before the run; use 'adapter'"),
        ({"rollouts.pairs": True}, "pjpo.methods.grpo makes advantages of rewards; set rollouts.pairs to False"),
        ({"reference": "none", "rollouts.reference": "rollout"}, "rollouts.reference is 'rollout', but reference is"),
        ({"reference": "none", "method": grpo.DAPO, "rollouts.log_kl": True}, "log_kl measures the KL to a reference"),
        ({"pack": True}, "pack is for data that is there before the run"),
        (
            {"loss": dpo.loss, "method": dpo.Config()},
            "pjpo.methods.dpo makes no advantages of rewards; set rollouts.pairs to True",
        ),
        ({"reference": "none", "method": grpo.RLOO}, "needs the rollout's old_logps and ref_logps"),
    ],
)
def test_settings_that_do_not_fit_are_refused_first(changes, message, tmp_path):
    value = registry.override(
        tiny_online.EXPERIMENT, {"mesh.data": 1, "mesh.model": 8, "optimizer.warmup_steps": 0} | changes
    )
    with pytest.raises(ValueError, match=message):
        experiment.run("tiny", value, root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_reward_that_may_not_fail_says_how_to_go_on(model, tmp_path):
    scored = []

    def fails(completions):
        scored.append(len(completions))
        if len(scored) > 1:
            raise KeyError("bad")
        return [float(len(text)) for text in completions]

    settings = {"model.source": str(model), "batch_size": 8, "optimizer.warmup_steps": 0}
    settings |= {"rollouts.prompts_per_rollout": 8, "rollouts.num_completions": 2, "rollouts.sampling_batch_size": 8}
    settings |= {"rollouts.rewards": Rewards(functions=(fails,), weights=(1.0,), on_error="raise")}
    settings |= {"loop": train.Loop(num_steps=4, checkpoint_every_steps=2)}
    value = registry.override(tiny_online.EXPERIMENT, settings)
    with pytest.raises(Unscored) as stopped:
        experiment.run("tiny", value, root=tmp_path)
    (folder,) = tmp_path.glob("tiny/*")
    why, how = str(stopped.value).splitlines()
    assert re.fullmatch(r"reward 'fails', row made up:\d+, completion 0: KeyError: 'bad'", why)
    assert how == f"Go on with: python -m experiments.tiny --resume {folder}"
    said, scored[:] = [], []  # mended
    experiment.run("tiny", value, resume=folder, say=said.append)
    assert "going on from step 2 of 4" in said


class Online(Program):
    module = "tests.tiny_online"

    @property
    def lines(self):
        return [
            {name: value for name, value in row.items() if not name.startswith(("time/", "speed/"))}
            for row in super().lines
        ]

    @property
    def samples(self):
        return (self.folder / "samples.jsonl").read_text()


LAST = tiny_online.EXPERIMENT.loop.num_steps


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, model, cache):
    """A run that nobody disturbs."""
    program = Online(tmp_path_factory.mktemp("alone"), model, cache)
    program.finish("--model.source", model)
    return program


def same(one, other):
    assert one.lines == other.lines
    assert one.samples == other.samples
    assert one.bits(LAST) == other.bits(LAST)


def test_the_reward_rises(alone):
    rewards = runs.read(alone.folder).metrics["reward"][1]
    assert rewards[-8:].mean() > rewards[:8].mean() + 0.2


def test_a_rollout_s_first_update_clips_nothing(alone):
    """Its ratios are 1, if the update knows the temperature of the samples."""
    steps, ratios = runs.read(alone.folder).metrics["clip_ratio/region_mean"]
    first = np.asarray(steps) % 4 == 1
    assert not ratios[first].any()
    assert ratios[~first].any()


def test_killed_within_rollouts_it_ends_with_the_same_bits(tmp_path, model, cache, alone):
    program = Online(tmp_path, model, cache)
    process, killed = program.begin(), None
    for step in (27, 62):  # in the midst of a rollout's four updates
        program.wait_for(step, process, other_than=killed)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed = program.file
        process = program.start("--resume", program.folder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert re.search(rf"going on from step (48|56|64) of {LAST}", out)
    same(program, alone)


@pytest.mark.slow
def test_ctrl_c_ends_the_rollout_first(tmp_path, model, cache, alone):
    program = Online(tmp_path, model, cache)
    process = program.begin()
    program.wait_for(9, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stopping after the updates of this rollout" in err
    step = int(re.search(rf"stopped after step (\d+) of {LAST}", err)[1])
    assert step % 4 == 0
    program.finish("--resume", program.folder)
    same(program, alone)


@pytest.mark.slow
def test_two_processes_sample_score_and_write_as_one(tmp_path, model, alone):
    class Hosts(test_distributed.Hosts):
        module = "tests.tiny_online"

    two = Hosts(tmp_path, model)
    two.begin_run(2, "--loop.num-steps=8")
    rows = [json.loads(line) for line in (two.folder / "samples.jsonl").read_text().splitlines()]
    expected = [row for row in map(json.loads, alone.samples.splitlines()) if row["step"] <= 1]
    assert [row["completion"] for row in rows] == [row["completion"] for row in expected]
    (first, *_), (expected, *_) = two.lines, alone.lines
    names = {"loss", "reward", "reward_std", "grad_norm", "completions/mean_length", "rewards/early_letters/mean"}
    assert {name: first[name] for name in names} == pytest.approx({name: expected[name] for name in names}, abs=1e-4)
