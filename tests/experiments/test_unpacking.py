"""How PPO and DPO are compared: equally many choices, made on other openings than those that count."""

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip("vaderSentiment", reason="needs the extra 'rewards'")

from experiments import registry
from experiments.study import bench, stages
from experiments.study.dpo_and_ppo import CHOICE, DRIFT, Study
from experiments.unpacking_sentiment import EXPERIMENT
from pjpo.experiment import Model
from pjpo.methods import dpo, ppo
from pjpo.rewards import judge, vader
from pjpo.rewards.learned import Normalisation, RewardModel


def test_each_method_has_as_many_policies_to_choose_from():
    rows = {
        name: [row for betas in EXPERIMENT.betas for row in EXPERIMENT.rows(name, betas)] for name in ("DPO", "PPO")
    }
    assert len(set(rows["DPO"])) == len(set(rows["PPO"])) == len(EXPERIMENT.betas) * EXPERIMENT.num_looks
    changed = dataclasses.replace(EXPERIMENT, dpo=dataclasses.replace(EXPERIMENT.dpo, num_steps=50))
    assert changed.looks("DPO") == [16, 33, 50]
    assert changed.rows("DPO", (0.03, 1.0))[0] == "DPO, beta 0.03, 16 updates"
    assert changed.rows("PPO", (0.03, 1.0))[-1] == f"PPO, beta 1, {EXPERIMENT.training.num_steps} updates"


def test_the_best_by_the_choice_is_reported_and_within_a_budget_of_kl_the_best_of_those(monkeypatch):
    # Of DPO the last policy has the best choice, far away; of PPO the first, near; what counts says otherwise.
    choices = {"DPO": [1, 2, 8, 3, 4, 5, 6, 7, 9], "PPO": [9, 1, 2, 3, 4, 5, 6, 7, 8]}
    drifts = {"DPO": [1, 1, 10, 1, 1, 1, 1, 1, 11], "PPO": [2, 11, 1, 1, 1, 1, 1, 1, 1]}

    def policies(self, name, start, seed, record):
        rows = [row for betas in self.betas for row in self.rows(name, betas)]
        return [(row, (name, place)) for place, row in enumerate(rows)]

    def point(self, start, params):
        if params == "sft":
            return {"judge": 0.5, CHOICE: 0, DRIFT: 0}
        name, place = params
        return {"judge": float(place), CHOICE: choices[name][place], DRIFT: drifts[name][place]}

    monkeypatch.setattr(Study, "policies", policies)
    monkeypatch.setattr(Study, "point", point)
    start = type("Start", (), {"sft": "sft"})()
    found = EXPERIMENT.measure(start, 0, print)
    assert found["SFT: judge"] == 0.5
    assert (found["DPO, tuned: judge"], found["PPO, tuned: judge"]) == (8, 0)
    assert (found["DPO, default: judge"], found["PPO, default: judge"]) == (5, 5)  # the middle beta, at its end
    assert (found["DPO, tuned within 10 nats: judge"], found["PPO, tuned within 10 nats: judge"]) == (2, 0)
    nearer = dataclasses.replace(EXPERIMENT, budget=0.5).measure(start, 0, print)
    assert nearer["DPO, tuned within 0.5 nats: judge"] == 0.5  # nothing else is as near


@pytest.fixture(scope="module")
def start():
    model = Model(source="glassllm-en", scalar_head=True)
    begin = bench.Config(model=model, num_held_out=8, num_completions=2, max_completion_tokens=8).load()
    drawn = np.random.default_rng(0).normal(size=begin.policy.config.model_dim).astype(np.float32)
    params = begin.params | {"scalar_head": {"kernel": jax.numpy.asarray(drawn)}}
    return stages.Stages(
        **vars(begin),
        sft=jax.tree.map(lambda x: 1.02 * x, begin.params),
        pairs=["the pairs"],
        reward_model=RewardModel(begin.policy, params, begin.tokenizer),
        normalisation=Normalisation(mean=1.0, std=2.0, num_scores=9),
    )


def test_one_half_of_the_openings_is_chosen_by_and_the_other_counts(start, monkeypatch):
    monkeypatch.setattr(judge, "of_reviews", lambda: vader)  # which takes no seconds to learn
    config = dataclasses.replace(EXPERIMENT, start=dataclasses.replace(EXPERIMENT.start, num_held_out=8))
    point, batch = config.point(start, start.params), start.held_out(start.params)
    rewards = start.rewards(batch)
    assert point[CHOICE] == pytest.approx(rewards[:4].mean())
    assert point["VADER"] == pytest.approx(rewards[4:].mean())
    drifts = (batch.old_logps - np.asarray(start.policy.logps(start.sft, batch))).sum((1, 2))
    assert point[DRIFT] == pytest.approx(drifts[:4].sum() / 8, abs=1e-3)
    assert point["kl"] == pytest.approx(drifts[4:].sum() / 8, abs=1e-3)
    assert point["cut off"] == 1.0  # nothing ends these


def test_both_begin_as_the_sft_model_and_learn_from_the_same_pairs(start, monkeypatch):
    asked, kept = [], []
    yields = [({}, {})] * EXPERIMENT.num_looks
    for name in ("fit", "learn"):
        monkeypatch.setattr(
            bench.Bench, name, lambda self, *given, **named: asked.append((given, named)) or iter(yields)
        )
    monkeypatch.setattr(stages.Stages, "prompts", lambda self, number: number)
    for name in ("DPO", "PPO"):
        assert len(list(EXPERIMENT.policies(name, start, 7, lambda *row: kept.append(row)))) == 9
    methods = [given[1] for given, _ in asked]
    assert methods[:3] == [dpo.Config(beta=beta) for beta in (0.03, 0.1, 0.3)]
    assert methods[3:] == [ppo.Config(beta=beta, missing_end_score=-10.0) for beta in (0.0125, 0.05, 0.2)]
    for given, named in asked:
        assert named["seed"] == 7
        assert named["params"] is start.sft
        if "critic" in named:
            assert named["critic"] is start.reward_model
            assert named["ref_params"] is start.sft
            assert given[4] is EXPERIMENT.training
            named["record"](["a row"])
            assert given[2].prompts_per_rollout == EXPERIMENT.minibatches * given[4].batch_size == 32
        else:
            assert given[2] is start.pairs
    assert kept == [(f"PPO, beta {beta}", ["a row"]) for beta in (0.0125, 0.05, 0.2)]


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"dpo must have at least num_looks 3 steps, and no looks of its own, got 2 "):
        registry.override(EXPERIMENT, {"dpo.num_steps": 2})
    with pytest.raises(ValueError, match=r"training must have .* no looks of its own, got 16 and \(5,\)"):
        registry.override(EXPERIMENT, {"training.looks": (5,)})
    with pytest.raises(ValueError, match=r"start.num_held_out must be even, to be halved, got 7"):
        registry.override(EXPERIMENT, {"start.num_held_out": 7})
