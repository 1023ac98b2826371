"""The models of a run: the policy and its critic, the reference in its forms, and for RTO the policy of DPO."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pjpo import distributed, models, reference, step
from pjpo.models import actor_critic, lora
from pjpo.types import Batch


def check(experiment: Any) -> None:
    """Models of an experiment that do not fit its method, or each other.

    Raises:
        ValueError: naming them.
    """
    method = experiment.method
    about = type(method).__module__
    reads_values = "values" in getattr(method, "outputs", ())
    if experiment.critic and not reads_values:
        raise ValueError(f"critic is given, but {about} reads no values; set it to None")
    if reads_values and not (experiment.critic or experiment.model.scalar_head):
        raise ValueError(
            f"{about} reads values; give a critic, or set model.scalar_head for one that shares the policy's weights"
        )
    _check_sources(experiment, about)
    if experiment.reference == "adapter" and not experiment.model.lora.rank:
        raise ValueError("reference 'adapter' is the model without adapters, but model.lora.rank is 0; use 'online'")
    takes = str(inspect.signature(experiment.loss).parameters["ref_logps"].annotation)  # of a loss without one, None
    needs_reference = "None" not in takes or getattr(method, "needs_reference", False)
    if experiment.reference == "none" and needs_reference:
        name = experiment.loss.__module__.rpartition(".")[2]
        raise ValueError(f"{name} compares with a reference, but reference is 'none'; use online, stored or adapter")


def _check_sources(experiment: Any, about: str) -> None:
    """Where the weights of the DPO policy and of the reference come from.

    Raises:
        ValueError: what nobody reads; a DPO policy that is its own reference.
    """
    needs_dpo, other = getattr(experiment.method, "needs_dpo", False), experiment.reference_source
    if experiment.dpo_model and not needs_dpo:
        raise ValueError(f"dpo_model is given, but {about} does not read it; set None")
    if other and experiment.reference not in ("online", "stored"):
        raise ValueError(
            f"reference_source is given, but reference is {experiment.reference!r}, which does not read it; use "
            "'online' or 'stored', or set None"
        )
    if other and experiment.rollouts and experiment.rollouts.reference == "rollout":
        raise ValueError(
            "reference_source is given, but rollouts.reference is 'rollout', the policy that sampled; use 'run'"
        )
    dpo_source = experiment.dpo_model.source if experiment.dpo_model else experiment.model.source
    if needs_dpo and dpo_source == (other or experiment.model.source):
        name = "dpo_model" if experiment.dpo_model else "dpo_model None, the run's start,"
        raise ValueError(
            f"{about}: {name} is the reference too ({dpo_source}), so every reward of a token would be 0, and the "
            "method PPO; start from the SFT model and give its DPO policy as dpo_model, or start from the DPO policy "
            "and give the SFT model as reference_source"
        )


def load(experiment: Any, mesh: jax.sharding.Mesh, key: jax.Array) -> tuple[Any, dict, Any]:
    """(policy, params, tokenizer), with the critic that the experiment gives it; `key` draws what is new."""
    policy, params, tokenizer = models.load(**experiment.model.settings, mesh=mesh, key=key)
    if experiment.critic:
        key = jax.random.fold_in(key, 1)
        policy, params = actor_critic.beside(
            policy, params, tokenizer, mesh=mesh, key=key, **experiment.critic.settings
        )
    return policy, params, tokenizer


def dpo_logps(
    experiment: Any, policy: Any, params: dict, tokenizer: Any, mesh: jax.sharding.Mesh
) -> Callable[[Batch], Any] | None:
    """Log-probs under the policy that DPO trained, for a method that asks for it; by default the run's start.

    Raises:
        ValueError: one with another tokenizer.
    """
    if not getattr(experiment.method, "needs_dpo", False):
        return None
    if experiment.dpo_model:
        policy, params, other = models.load(**experiment.dpo_model.settings, mesh=mesh)
        if other.fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"dpo_model: the tokenizer of {experiment.dpo_model.source} differs from the policy's; take one that "
                "was trained from the same model"
            )
    policy = policy.at(experiment.rollouts.temperature) if experiment.rollouts else policy
    return lambda batch: policy.logps(params, batch)


def reference_params(experiment: Any, policy: Any, params: dict, tokenizer: Any, mesh: jax.sharding.Mesh) -> dict:
    """The reference's parameters for `policy`: those of the run's start, `params`, or of another model like it.

    Raises:
        ValueError: one with another tokenizer or another architecture.
    """
    source = experiment.reference_source
    if not source:
        return params
    settings = experiment.model.settings | {"source": source, "lora": lora.Config(rank=0), "scalar_head": False}
    _, found, other = models.load(**settings, mesh=mesh)
    if other.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"reference_source: the tokenizer of {source} differs from the policy's; take a model that the policy was "
            "trained from"
        )
    found = {"actor": found} if isinstance(policy, actor_critic.ActorCritic) else found
    wanted, shapes = (jax.tree.map(jnp.shape, tree) for tree in (policy.without_adapters(params), found))
    if wanted != shapes:
        raise ValueError(
            f"reference_source: {source} has weights of another shape than the policy's; take a model that the policy "
            "was trained from"
        )
    return found


class Reference:
    """The reference of a run in whichever of its forms: the start of the run, unless `params` are another model's."""

    def __init__(self, kind: step.Reference, policy: Any, params: dict, stored: Path, *, is_start: bool = True):
        self.kind, self.policy, self.params, self.is_start = kind, policy, params, is_start
        self.is_kept = kind in ("online", "stored")  # its weights stay beside the policy's
        self.store = reference.Store(stored, policy, policy.without_adapters(params)) if kind == "stored" else None

    def of(self, state: step.State) -> dict | None:
        """Its parameters beside a state: with adapters the state's own arrays, which every update donates."""
        if self.kind == "adapter":
            return self.policy.without_adapters(state.params)
        return None if self.kind == "none" else self.params

    def keep(self, say: Callable[[str], None]) -> None:
        """What measures the KL to the start needs its weights, of methods without a reference too."""
        if self.kind == "none" and "lora" not in self.params:
            self.is_kept = True
            say("the start's weights are kept beside the policy's, for the evaluation to measure the KL to them")

    def start(self, state: step.State) -> dict | None:
        """The parameters that the run began with, or its other reference, beside a state; None where they are gone."""
        if self.is_kept:
            return self.params
        return self.policy.without_adapters(state.params) if self.kind == "adapter" or "lora" in self.params else None

    def attach(self, batch: Batch, share_on: jax.sharding.Mesh | None = None) -> Batch:
        return self.store.attach(batch, share_on) if self.store else batch

    def check_start(self, experiment: Any, batch: Batch) -> None:
        """The step-0 gate, on a prepared batch, where the run starts at its reference; see `pjpo.reference`.

        Raises:
            ValueError: policy and reference differ, or what the loss refuses, such as rows that are no pairs.
        """
        if self.kind == "none" or not self.is_start:  # nothing is equal, nor computed to see whether the loss takes it
            jax.eval_shape(functools.partial(self._loss_of, experiment), self.params, batch)
            return
        ref_params = self.policy.without_adapters(self.params) if self.kind == "adapter" else self.params
        ref_logps = batch.ref_logps if self.store else self.policy.logps(ref_params, batch)
        # Stored bfloat16 numbers may come from a batch of another shape, which a GPU rounds otherwise.
        coarse = self.store is not None and self.policy.config.dtype == "bfloat16"
        allowed = {"tolerance": 1e-2, "token_tolerance": 0.25} if coarse else {}
        logps = self.policy.logps(self.params, batch)
        batch, logps, ref_logps = distributed.fetch((batch, logps, ref_logps))
        reference.check_start(experiment.loss, experiment.method, batch, logps, ref_logps, **allowed)

    def _loss_of(self, experiment: Any, params: dict, batch: Batch):
        outputs = step.outputs_of(experiment.method, self.policy, params, batch)
        ref_logps = None if self.kind == "none" else self.policy.logps(params, batch)
        return step.apply(experiment.loss, experiment.method, batch, outputs, ref_logps)
