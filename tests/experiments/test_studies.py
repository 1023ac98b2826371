"""What single studies measure, on the tiny real model: points of best-of-n, goals that are asked for, margins."""

import dataclasses
import json

import jax
import numpy as np
import pytest

pytest.importorskip("vaderSentiment", reason="needs the extra 'rewards'")

from experiments import frontier_glass, goals_glass, registry, reward_hh, rto_sentiment
from experiments.study import bench, pair_files, stages
from pjpo import relabel
from pjpo.data import preference
from pjpo.experiment import Model
from pjpo.rewards import vader
from pjpo.rewards.learned import Normalisation, RewardModel
from pjpo.types import CHOSEN, REJECTED
from tests.experiments.test_smoke import write_pairs


@pytest.fixture(scope="module")
def start():
    return bench.Config(num_held_out=6, num_completions=4, max_completion_tokens=8).load()


def test_best_of_n_is_the_mean_of_the_best_and_of_one_the_mean(start):
    rewards = start.rewards(start.sample(start.params, start.openings("held_out", 6), jax.random.key(0), 4))
    one, _, four = frontier_glass.best_of(start)
    assert one == pytest.approx({"reward": rewards.mean(), "kl": 0})
    assert four == pytest.approx({"reward": rewards.max(1).mean(), "kl": np.log(4) - 3 / 4})


def test_pairs_are_asked_for_the_score_of_the_one_that_is_chosen(start):
    config = goals_glass.EXPERIMENT
    rows = dataclasses.replace(config, num_openings=24).rows(start, 0)
    assert rows
    for row in rows:
        texts = [start.tokenizer.decode([*row["opening"].prompt, *row[name]]) for name in ("chosen", "rejected")]
        expected = np.rint(1 + 4.5 * (vader.reward(texts) + 1))
        assert [row["score_chosen"], row["score_rejected"]] == expected.tolist()
        assert expected[0] > expected[1]
    first, second = relabel.relabel(rows[:1], goals_glass.SCALE)
    assert (float(first["goal"]), float(second["goal"])) == (rows[0]["score_chosen"], rows[0]["score_rejected"])
    example = goals_glass.example_of(second, goals_glass.ask(start, float(second["goal"])))
    assert start.tokenizer.decode(example.prompt).startswith(f"{second['goal']} of 10\n\n")
    np.testing.assert_array_equal(example.completions[CHOSEN], rows[0]["rejected"])
    np.testing.assert_array_equal(example.completions[REJECTED], rows[0]["chosen"])


def test_the_words_of_a_goal_are_not_scored(start, monkeypatch):
    fixed = start.sample(start.params, start.openings("held_out", 6), jax.random.key(0), 4)

    def sample(self, params, openings, key, num_completions):
        prompts = np.stack([opening.prompt for opening in openings])
        return dataclasses.replace(fixed, prompt_tokens=prompts, prompt_mask=np.ones(prompts.shape, bool))

    monkeypatch.setattr(bench.Bench, "sample", sample)
    praise = np.array(start.tokenizer.encode("great, wonderful, perfect "), np.int32)
    assert goals_glass.reward(start, start.params, praise) == pytest.approx(start.rewards(fixed).mean())


@pytest.mark.slow
def test_rollouts_are_rewarded_with_what_held_out_samples_are_measured_by():
    model = Model(source="glassllm-en", scalar_head=True)
    begin = bench.Config(model=model, num_held_out=6, num_completions=2, max_completion_tokens=8).load()
    drawn = np.random.default_rng(0).normal(size=begin.policy.config.model_dim).astype(np.float32)
    params = begin.params | {"scalar_head": {"kernel": jax.numpy.asarray(drawn)}}
    start = stages.Stages(
        **vars(begin),
        sft=begin.params,
        pairs=[],
        dpo=jax.tree.map(lambda x: 1.05 * x, begin.params),
        reward_model=RewardModel(begin.policy, params, begin.tokenizer),
        normalisation=Normalisation(mean=1.0, std=2.0, num_scores=9),
    )
    batch, openings = start.held_out(start.params), start.openings("held_out", 6)
    scores = np.asarray(begin.policy.scores(params, batch))
    for normalised, expected in ((True, (scores - 1) / 2), (False, scores)):
        rewards = start.rewarded(normalised=normalised, prompts_per_rollout=6).rewards
        np.testing.assert_allclose(rewards.of_samples(batch, openings, start.tokenizer).total, expected, atol=1e-4)
    assert start.before["SFT: reward model"] == pytest.approx(np.mean(scores - 1) / 2, abs=1e-4)
    assert start.before["SFT: VADER"] == pytest.approx(start.of_samples(start.params)["reward"])
    assert start.before["SFT: kl"] == pytest.approx(0, abs=1e-4)
    assert abs(start.before["DPO: kl"]) > 0.01  # of a dozen samples, so its sign is open
    with pytest.raises(ValueError, match=r"prompts_per_rollout must be a multiple of training.batch_size 4, got 5"):
        dataclasses.replace(rto_sentiment.EXPERIMENT, prompts_per_rollout=5)
    with pytest.raises(ValueError, match=r"prompts_per_rollout must be a multiple of training.batch_size 4, got 0"):
        dataclasses.replace(rto_sentiment.EXPERIMENT, prompts_per_rollout=0)
    with pytest.raises(ValueError, match=r"start.model.scalar_head must be True, got False"):
        registry.override(rto_sentiment.EXPERIMENT, {"start.model.scalar_head": False})
    with pytest.raises(ValueError, match=r"training.num_steps must be >= 8, 4 rollouts, got 7"):
        registry.override(rto_sentiment.EXPERIMENT, {"training.num_steps": 7})


def test_pairs_that_are_too_long_for_the_model_are_refused(tmp_path):
    row = {"prompt": "word " * 90, "chosen": "good " * 60, "rejected": "bad " * 60}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    data = preference.Config(path=str(path), max_prompt_tokens=200, max_completion_tokens=200)
    with pytest.raises(ValueError, match=r"pairs.jsonl:1 has 93 .* and 121 of completion, .* the model's 128"):
        pair_files.Start(model=Model(source="glassllm-en", scalar_head=True), data=data).load()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Of 40 pairs each: one to learn from, two from elsewhere."""
    root = tmp_path_factory.mktemp("pairs")
    first, *others = (str(write_pairs(root / f"{name}.jsonl", seed)) for seed, name in enumerate(("a", "b", "c")))
    return pair_files.Start(
        model=Model(source="glassllm-en", scalar_head=True),
        data=preference.Config(path=first, num_held_out=8),
        shifted=tuple(others),
    )


def test_files_of_one_name_are_refused(files):
    with pytest.raises(ValueError, match=r"told apart by their names, and \['b.jsonl'\] come twice; rename one"):
        dataclasses.replace(files, shifted=("here/b.jsonl", "there/b.jsonl"))


def test_rewards_of_pairs_from_files(files):
    pairs = files.load()
    assert (len(pairs.pairs), list(pairs.shifted)) == (40, ["b.jsonl", "c.jsonl"])
    assert pairs.score_margins(pairs.params, pairs.pairs).tolist() == [0.0] * 40  # a new head has no opinion
    batch = bench.batch_of(pairs.pairs[:8])
    drawn = np.random.default_rng(0).normal(size=pairs.policy.config.model_dim).astype(np.float32)
    params = pairs.params | {"scalar_head": {"kernel": jax.numpy.asarray(drawn)}}
    scores = pairs.policy.scores(params, batch)
    margins = pairs.score_margins(params, pairs.pairs)
    assert margins.shape == (40,)
    np.testing.assert_allclose(margins[:8], scores[:, CHOSEN] - scores[:, REJECTED], atol=1e-4)
    sums = pairs.policy.logps(pairs.params, batch).sum(-1)
    margins = pairs.logp_margins(pairs.params, pairs.pairs)
    np.testing.assert_allclose(margins[:8], sums[:, CHOSEN] - sums[:, REJECTED], atol=1e-3)


def test_rewards_are_compared_at_the_end_and_where_they_fit_their_pairs_alike(files, monkeypatch):
    """One row of numbers for each; explicit tells 10, 20, 30 % of the training pairs, implicit 25, 40, 90 %."""
    pairs = files.load()
    told = {"score_margins": [0.1, 0.2, 0.3], "logp_margins": [0.25, 0.4, 0.9]}
    looks = [0]

    def fit(self, loss, config, rows, training, *, seed, reference):
        for number in range(3):
            looks[0] = number
            yield ("trained", {})

    def margins(name):
        def of(self, params, rows):
            if params != "trained":
                return np.full(len(rows), 5.0)  # the reference's own, which do not count
            right = np.arange(len(rows)) < np.rint(told[name][looks[0]] * len(rows))
            return np.where(right, 1.0, -1.0) + (5.0 if name == "logp_margins" else 0.0)

        return of

    monkeypatch.setattr(pair_files.Pairs, "fit", fit)
    for name in told:
        monkeypatch.setattr(pair_files.Pairs, name, margins(name))
    study = dataclasses.replace(
        reward_hh.EXPERIMENT, start=files, training=bench.Training(num_steps=9, looks=(3, 6)), num_asked=20
    )
    found = study.measure(pairs, 0, lambda training, rows: None)
    assert found["explicit: training pairs"] == pytest.approx(0.3)
    assert found["implicit: training pairs"] == pytest.approx(0.9)
    assert (found["explicit, matched: updates"], found["implicit, matched: updates"]) == (9, 3)
    assert found["explicit, matched: b.jsonl"] == pytest.approx(0.3)
    assert found["implicit, matched: b.jsonl"] == pytest.approx(0.25)
    assert found["implicit, 6 updates: shifted, mean"] == pytest.approx(0.4)
    assert found["implicit: shifted, mean"] == pytest.approx(0.9)
    for check in (check for checks in study.claims().values() for check in checks):
        check.judge([found, found])
    for panel in study.panels():
        assert all(name in found for points in panel.curves.values() for _, name in points)
