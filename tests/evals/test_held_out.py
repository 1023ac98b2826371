"""The panel on held-out examples of every kind, for methods with a reference and without, and a whole run."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from experiments import registry
from pjpo import experiment, runs, sharding
from pjpo.data.buckets import Buckets, collate
from pjpo.data.examples import Data, Example
from pjpo.evals import held_out, panel, token_rewards
from pjpo.methods import cpo, dpo, kto, orpo, reward_model, rso, sft, simpo, slic
from tests import tiny, tiny_run

POLICY = tiny.make_policy(num_layers=1)
START, TRAINED = tiny.make_params(POLICY), tiny.make_params(POLICY, seed=1)
MESH = sharding.make_mesh(devices=jax.devices()[:1])
SOME = {"num_sampled": 4, "max_completion_tokens": 3, "batch_size": 4}
FROM_PAIRS = {"ranking/accuracy", "ranking/difficulty", "ranking/alignment_gap_per_token", "length/longer_rewarded"}
OF_SAMPLES = {"kl", "kl_stderr", "entropy"}


def examples(num_completions, labelled=False, count=6):
    rng = np.random.default_rng(0)

    def tokens(most):
        return rng.integers(1, 37, rng.integers(2, most)).astype(np.int32)

    return [
        Example(
            tokens(5),
            tuple(tokens(7) for _ in range(num_completions)),
            {},
            str(row),
            labels=(row % 2 == 0,) if labelled else None,
        )
        for row in range(count)
    ]


def context_of(module, method, rows, reference):
    said = []
    context = experiment.Context(
        policy=POLICY,
        params=START,
        tokenizer=types.SimpleNamespace(stop_ids=(0,), decode=lambda ids, skip_special=True: " ".join(map(str, ids))),
        loss=module.loss,
        method=method,
        key=jax.random.key(0),
        mesh=MESH,
        say=said.append,
        prepare=lambda batch: sharding.place_batch(experiment.completed(method, batch), MESH),
        reference=reference,
        buckets=Buckets.of(examples(3), num_sizes=1),
    )
    return context, said


def evaluated(module, method, rows, reference, **settings):
    context, said = context_of(module, method, rows, reference)
    evaluation = held_out.Config(**SOME | settings).build(context, Data([], rows, {}, ""))
    start = START if evaluation.reads_reference or reference != "none" else None  # as a run keeps it
    return evaluation(TRAINED, start), said


def shown(context, data, batch_size, params):
    show = token_rewards.build(context, data, batch_size)
    assert show is not None
    return show(params)


def sums(params, rows):
    """Of each completion [n, N]."""
    batch = collate(rows, Buckets.of(examples(3), num_sizes=1))
    return np.asarray(POLICY.logps(params, batch), np.float64).sum(-1, where=batch.loss_mask)


@pytest.mark.parametrize(
    ("module", "method", "num_completions", "reference"),
    [
        (dpo, dpo.Config(), 2, "online"),
        (simpo, simpo.Config(), 2, "none"),
        (cpo, cpo.Config(), 2, "none"),
        (orpo, orpo.Config(), 2, "none"),
        (rso, rso.Config(form="hinge"), 2, "none"),
        (slic, slic.Config(), 3, "none"),
    ],
)
def test_every_method_on_pairs_has_the_whole_panel(module, method, num_completions, reference):
    rows = examples(num_completions)
    found, _ = evaluated(module, method, rows, reference)
    logps, ref_logps = (sums(params, rows)[:, :2] for params in (TRAINED, START))
    lengths = np.array([[len(completion) for completion in row.completions[:2]] for row in rows])
    name, scale = ("rewards", 0.1) if module is dpo else ("implicit", 1.0)
    expected = panel.of_pairs(scale, logps, ref_logps, lengths, name=name)
    assert FROM_PAIRS | OF_SAMPLES | {"token_rewards/largest_share", "loss"} <= found.metrics.keys()
    for metric, value in expected.items():
        assert found.metrics[metric] == pytest.approx(value, abs=1e-4), metric
    assert found.words == {"displacement": panel.displacement(logps, ref_logps, lengths)}
    own = found.metrics["rewards/margins"]  # on another scale than the panel's, but for DPO
    assert (own == pytest.approx(found.metrics[f"{name}/margins"], abs=1e-4)) == (module is dpo)


def test_completions_with_labels_have_what_needs_no_pairs():
    rows = examples(1, labelled=True)
    found, said = evaluated(kto, kto.Config(), rows, "online")
    assert said == ["held-out evaluation: no rankings, no reward accuracy: these compare two completions of a prompt"]
    changes = (sums(TRAINED, rows) - sums(START, rows))[:, 0]
    assert found.metrics["rewards/chosen"] == pytest.approx(0.1 * changes[::2].mean(), abs=1e-4)
    assert found.metrics["rewards/rejected"] == pytest.approx(0.1 * changes[1::2].mean(), abs=1e-4)
    assert found.metrics["logps/chosen_change"] == pytest.approx(changes[::2].mean(), abs=1e-4)
    assert not FROM_PAIRS & found.metrics.keys()
    assert {"sequence_kl", "sequence_kl_stderr", "entropy", "length/chosen"} <= found.metrics.keys()
    assert found.metrics["kl"] != found.metrics["sequence_kl"]  # KTO's is its reference point
    assert "nats a completion" in found.words["displacement"]


def test_one_label_alone_is_no_measurement_of_the_other():
    rows = [dataclasses.replace(row, labels=(True,)) for row in examples(1, labelled=True)]
    found, _ = evaluated(kto, kto.Config(), rows, "online", num_sampled=0)
    assert "rewards/chosen" in found.metrics
    assert not {"rewards/rejected", "rewards/margins", "logps/rejected"} & found.metrics.keys()
    assert found.words["displacement"] == "All held-out completions have one label, desirable."


def test_without_samples_it_says_what_is_not_measured_and_needs_no_weights_of_the_start():
    found, said = evaluated(simpo, simpo.Config(), examples(2), "none", num_sampled=0)
    assert found.metrics.keys() >= FROM_PAIRS
    assert not OF_SAMPLES & found.metrics.keys()
    assert said == ["held-out evaluation: no KL, no entropy; evaluation.num_sampled=16 samples to measure them"]


def test_what_holds_no_preferences_has_no_panel():
    found, said = evaluated(sft, sft.Config(), examples(1), "none")
    assert set(found.metrics) == {"loss", "logps/completion"}
    assert not said
    context, _ = context_of(reward_model, reward_model.Config(), examples(2), "none")
    evaluation = held_out.Config(**SOME).build(context, Data([], examples(2), {}, ""))
    assert not evaluation.reads_reference  # it reads scores, and no log-probs
    assert token_rewards.build(context, Data([], examples(2), {}, ""), 8) is None


def test_token_rewards_are_of_held_out_completions():
    rows = examples(2)
    context, _ = context_of(rso, rso.Config(gamma=0.5), rows, "online")
    found = shown(context, Data(examples(2, count=1), rows, {}, ""), 8, TRAINED)
    assert [row["label"] for row in found] == ["chosen", "rejected"] * 4
    expected = 0.5 * (sums(TRAINED, rows) - sums(START, rows))[:4].reshape(-1)
    np.testing.assert_allclose([sum(row["token_rewards"]) for row in found], expected, atol=1e-3)
    assert [row["tokens"] for row in found[:2]] == [[str(t) for t in ids] for ids in rows[0].completions]


def test_token_rewards_of_labelled_completions_and_of_training_pairs_say_what_they_are():
    rows = examples(1, labelled=True, count=3)
    context, _ = context_of(kto, kto.Config(), rows, "online")
    found = shown(context, Data([], rows, {}, ""), 2, START)  # as many as a batch holds
    assert [row["label"] for row in found] == ["desirable", "undesirable"]
    context, _ = context_of(simpo, simpo.Config(), examples(2), "none")
    found = shown(context, Data(examples(2, count=1), [], {}, ""), 2, TRAINED)
    assert [row["label"] for row in found] == ["chosen (training)", "rejected (training)"]
    changes = sums(TRAINED, examples(2, count=1)) - sums(START, examples(2, count=1))
    assert sum(found[0]["token_rewards"]) == pytest.approx(changes[0, 0], abs=1e-3)  # at scale 1
    assert token_rewards.build(context, Data(examples(0), [], {}, ""), 2) is None


def test_a_run_without_a_reference_is_held_against_its_start(tmp_path, model):
    """All weights are trained: those of the start are kept for the KL."""
    value = dataclasses.replace(tiny_run.EXPERIMENT, loss=simpo.loss, method=simpo.Config(), reference="none")
    changes = {"batch_size": 16, "loop.num_steps": 2, "optimizer.warmup_steps": 0, "num_microbatches": 1, "pack": False}
    changes |= {"model.source": str(model), "evaluation": held_out.Config(max_completion_tokens=4)}
    said = []
    run = runs.read(experiment.run("tiny", registry.override(value, changes), root=tmp_path, say=said.append))
    assert "the start's weights are kept beside the policy's, for the evaluation to measure the KL to them" in said
    for name in ("kl", "implicit/margins", "logps/chosen_change"):
        assert run.summary[f"start/{name}"] == pytest.approx(0, abs=1e-4)
        assert abs(run.summary[f"eval/{name}"]) > 1e-3
    assert run.summary["eval/ranking/theorem_4_1_violations"] == 0
    assert "start/token_rewards/largest_share" not in run.summary
    assert 0 < run.summary["eval/token_rewards/largest_share"] < 1
    rows = [row for row in run.samples if row["kind"] == "token_rewards"]
    assert len(rows) == 8
    assert sum(map(abs, rows[0]["token_rewards"])) > 1e-3
