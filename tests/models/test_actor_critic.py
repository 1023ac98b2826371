import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import registry
from pjpo import experiment, optim, run_models, runs, sharding, step
from pjpo.experiment import Model
from pjpo.methods import dpo, ppo, rto
from pjpo.models import lora
from pjpo.models.actor_critic import ActorCritic
from pjpo.models.policy import joined
from pjpo.sampling import Prompts, Sampling
from tests import tiny_online
from tests.models import tiny_llama
from tests.tiny import make_params, make_policy, ragged

ACTOR, CRITIC = make_policy(lora=lora.Config(rank=2)), make_policy(scalar_head=True, num_layers=1)
PAIR = ActorCritic(ACTOR, CRITIC)


def make():
    head = np.random.default_rng(1).normal(size=12).astype(np.float32)
    return {"actor": make_params(ACTOR), "critic": CRITIC.init(jax.random.key(4)) | {"scalar_head": {"kernel": head}}}


def rollout():
    rng = np.random.default_rng(3)
    batch = ragged(rng)
    extra = {name: rng.normal(size=batch.loss_mask.shape).astype(np.float32) for name in ("advantages", "labels")}
    return dataclasses.replace(batch, **extra, old_logps=np.asarray(PAIR.logps(make(), batch)))


def test_each_has_its_part():
    params, batch = make(), rollout()
    np.testing.assert_array_equal(PAIR.logps(params, batch), ACTOR.logps(params["actor"], batch))
    np.testing.assert_array_equal(PAIR.values(params, batch), CRITIC.values(params["critic"], batch))
    prompts, sampling = Prompts(batch.prompt_tokens, batch.prompt_mask), Sampling(max_completion_tokens=3)
    for one, other in zip(
        PAIR.generate(params, prompts, jax.random.key(1), sampling),
        ACTOR.generate(params["actor"], prompts, jax.random.key(1), sampling),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    trainable, frozen = PAIR.trainable(params)
    assert {name: set(tree) for name, tree in trainable.items()} == {
        "actor": {"lora"},
        "critic": {"params", "scalar_head"},
    }
    assert {name: set(tree) for name, tree in frozen.items()} == {"actor": {"params"}}
    jax.tree.map(np.testing.assert_array_equal, joined(trainable, frozen), params)
    reference = PAIR.without_adapters(params)
    np.testing.assert_array_equal(
        PAIR.logps(reference, batch), ACTOR.logps({"params": params["actor"]["params"]}, batch)
    )


@pytest.mark.parametrize("moves", ["actor", "critic"])
def test_an_update_moves_the_one_that_has_a_loss(moves):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    config = optim.Config(learning_rate=1e-2, critic_learning_rate=1e-1, name="sgd", beta1=0.0, max_grad_norm=1e9)
    optimizer = optim.make_optimizer(config, optax.constant_schedule(1e-2))
    method = ppo.Config(value_weight=0.0 if moves == "actor" else 1.0)
    batch = rollout()
    if moves == "critic":
        batch = dataclasses.replace(batch, advantages=np.zeros_like(batch.advantages))
    state = step.init_state(PAIR, make(), optimizer, jax.random.key(0), mesh)
    update = step.make_update(ppo.loss, method, PAIR, optimizer, mesh, reference="none")
    state, _ = update(state, None, sharding.place_batch(batch, mesh))
    change = jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, make())
    for name, tree in change.items():
        assert any(np.any(leaf) for leaf in jax.tree.leaves(tree)) == (name == moves)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(change["actor"]["params"]))  # adapters alone are trained
    if moves == "critic":  # half the squared error, a step of ten times the actor's rate

        def error(critic):
            errors = jnp.where(batch.loss_mask, CRITIC.values(critic, batch) - batch.labels, 0)
            return 0.5 * (errors**2).sum() / batch.loss_mask.sum()

        expected = jax.grad(error)(make()["critic"])
        jax.tree.map(lambda x, g: np.testing.assert_allclose(x, -0.1 * g, atol=1e-5), change["critic"], expected)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama.write_folder(tmp_path_factory.mktemp("llama"), tiny_llama.CONFIG | {"num_hidden_layers": 1})


def changed(model, **changes):
    settings = {"model.source": str(model), "loss": ppo.loss, "method": ppo.Config(kl_target=0.5), "batch_size": 8}
    settings |= {"rollouts.prompts_per_rollout": 8, "rollouts.num_completions": 2, "loop.num_steps": 4}
    settings |= {
        "rollouts.sampling_batch_size": 8,
        "critic": Model(source=str(model)),
        "loop.checkpoint_every_steps": 0,
    }
    settings |= {"optimizer.warmup_steps": 0, "optimizer.critic_learning_rate": 1e-2}
    return registry.override(tiny_online.EXPERIMENT, settings | changes)


def test_ppo_with_a_critic_runs_and_goes_on(model, tmp_path):
    said = []
    folder = experiment.run("tiny", changed(model), root=tmp_path, say=said.append)
    metrics = runs.read(folder).metrics
    assert {"loss/value_avg", "val/clipfrac_avg", "kl", "kl_k1", "reward", "returns/mean"} <= metrics.keys()
    first, *_, last = metrics["beta"][1]
    assert first == pytest.approx(0.05, rel=1e-6) != last  # it adapts
    assert np.isfinite(metrics["loss/value_avg"][1]).all()
    experiment.run("tiny", changed(model), root=tmp_path, resume=folder, say=said.append)
    assert "going on from step 4 of 4" in said
    assert metrics["time/generate"][1][0] > 0


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Other weights of the same architecture."""
    config = tiny_llama.CONFIG | {"num_hidden_layers": 1}
    return tiny_llama.write_folder(tmp_path_factory.mktemp("other"), config, tiny_llama.tensors(config, seed=1))


@pytest.mark.slow
def test_rto_s_dpo_policy_and_its_reference_may_each_be_another_model(model, other, tmp_path):
    """The start as reference, and another model as the DPO policy; and the other way round, which starts at DPO's."""
    of_rto = {"loss": rto.loss, "method": rto.Config(dpo_clip=None), "critic": Model(source=str(model))}
    from_reference = {"dpo_model": Model(source=str(other))}
    from_dpo = {"model.source": str(other), "reference_source": str(model)}
    found = []
    for changes in (from_reference, from_dpo):
        value = changed(model, **of_rto | changes)
        run = runs.read(experiment.run("tiny", value, root=tmp_path, say=lambda _: None))
        found.append({name: values[0] for name, (_, values) in run.metrics.items()})
        assert {"returns/mean", "loss/value_avg"} <= found[-1].keys()
    # Samples of the reference are likelier under it, those of the DPO policy likelier under that one.
    assert found[0]["dpo_logratios/mean"] < -0.1
    assert found[0]["kl_k1"] == 0
    assert found[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert found[1]["dpo_logratios/mean"] == pytest.approx(found[1]["kl_k1"], abs=1e-5)
    assert found[1]["kl_k1"] > 0.1
    assert found[1]["kl"] > 0.1


def test_sources_that_do_not_fit_are_refused(model, other, tmp_path):
    for name in ("larger", "reader"):
        (tmp_path / name).mkdir()
    larger = tiny_llama.write_folder(tmp_path / "larger")
    reader = tiny_llama.write_folder(tmp_path / "reader", tiny_llama.CONFIG | {"num_hidden_layers": 1})
    tiny_llama.write_tokenizer(reader, [*tiny_llama.vocabulary()[:-1], "ha"], [("h", "a")], num_special=2)
    of_rto = {"loss": rto.loss, "method": rto.Config()}
    for message, changes in (
        (r"rto: dpo_model None, the run's start, is the reference too .* the SFT model as reference_source", of_rto),
        ("rto: dpo_model is the reference too", of_rto | {"dpo_model": Model(source=str(model))}),
        ("rto: dpo_model None", of_rto | {"reference_source": str(model)}),
        (r"dpo_model is given, but .*ppo does not read it", {"dpo_model": Model(source=str(other))}),
        ("given, but reference is 'adapter'", {"reference_source": str(other), "reference": "adapter"}),
        ("given, but rollouts.reference is", {"reference_source": str(other), "rollouts.reference": "rollout"}),
        ("reference_source: .*larger has weights of another shape", {"reference_source": str(larger)}),
        ("reference_source: the tokenizer of .*reader differs", {"reference_source": str(reader)}),
    ):
        with pytest.raises(ValueError, match=message):
            experiment.run("tiny", changed(model, **changes), root=tmp_path / "runs", say=lambda _: None)
    assert not (tmp_path / "runs").exists()
    run_models.check(changed(model, **of_rto | {"method": rto.Config(variant="ppo")}))  # asks for no DPO policy


def test_a_critic_that_reads_otherwise_is_refused(model, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    tiny_llama.write_folder(folder)
    tiny_llama.write_tokenizer(folder, [*tiny_llama.vocabulary()[:-1], "ha"], [("h", "a")], num_special=2)

    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            experiment.run("tiny", changed(model, **changes), root=tmp_path / "runs")
        assert not (tmp_path / "runs").exists()

    refused(r"critic: the tokenizer of .*other differs from the policy's", critic=Model(source=str(folder)))
    refused("pjpo.methods.ppo reads values; give a critic, or set model.scalar_head", critic=None)
    refused(
        "critic is given, but .*grpo reads no values",
        loss=tiny_online.EXPERIMENT.loss,
        method=tiny_online.EXPERIMENT.method,
    )
    refused("makes no advantages", loss=dpo.loss, method=dpo.Config())
