"""What an update and a generation step will take of each device, read off the compiled program; nothing is run.

`python -m pjpo.plan Llama-3.1-8B --topology v5p:2x2x4` compiles the real programs from abstract parameters.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pjpo import checks, experiment, layout, online, optim, packing, sampling, sharding, step
from pjpo.methods import dpo
from pjpo.models import Policy, decoder
from pjpo.models.actor_critic import ActorCritic
from pjpo.plan.chips import Chip
from pjpo.plan.program import Program
from pjpo.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be compiled."""

    model: decoder.Config
    batch_size: int  # prompts in an update, over all devices
    prompt_tokens: int = 512
    completion_tokens: int = 512
    num_completions: int = 2  # of each prompt; of rollouts that give pairs, those that are sampled
    loss: Callable = dpo.loss
    method: Any = dataclasses.field(default_factory=dpo.Config)
    reference: step.Reference = "online"
    optimizer: optim.Config = dataclasses.field(default_factory=lambda: optim.Config(learning_rate=1e-6))
    num_microbatches: int = 1
    pack: bool = False
    critic: decoder.Config | None = None  # beside the policy, with a scalar head
    rollouts: online.Config | None = None  # for methods that learn from them; lengths and counts are the ones above
    sampling_batch_size: int | None = None  # prompts decoded together; None for batch_size

    def __post_init__(self):
        checks.kinds(self)
        sizes = ("num_microbatches", "batch_size", "prompt_tokens", "completion_tokens", "num_completions")
        checks.at_least(self, 1, *sizes, *["sampling_batch_size"] * (self.sampling_batch_size is not None))
        if self.reference == "adapter" and self.model.lora is None:
            raise ValueError("plan: reference 'adapter' is the model without adapters; set lora.rank, or use 'online'")
        if hasattr(self.method, "advantages") and not self.rollouts:
            name = type(self.method).__module__
            raise ValueError(f"plan: {name} learns from rollouts, got None; give rollouts, a pjpo.online.Config")

    @property
    def num_trained(self) -> int:
        """Completions of a prompt in an update."""
        return 2 if self.rollouts and self.rollouts.pairs else self.num_completions

    @property
    def num_sampled_prompts(self) -> int:
        """Prompts in a generation step."""
        return self.sampling_batch_size or self.batch_size

    @property
    def policy(self) -> Policy | ActorCritic:
        """At the temperature of the rollouts, with its critic."""
        actor = Policy(self.model).at(self.rollouts.temperature) if self.rollouts else Policy(self.model)
        return ActorCritic(actor, Policy(self.critic)) if self.critic else actor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one program, on each device; bytes, but for `flops`."""

    held: dict[str, int]  # what lives on from step to step, by name
    temporary: int  # activations and whatever else the program needs while it runs
    fits: bool | None  # None where the device's memory is not known
    flops: int
    traffic: int  # with the device's memory
    program: Program | None  # None where the compiler refused, as it does not fit

    def seconds(self, chip: Chip) -> dict[str, float]:
        """The least time that each resource allows by itself."""
        assert self.program is not None, "a program that was refused takes no time"
        return {
            "compute": self.flops / chip.flops,
            "memory": self.traffic / chip.hbm_bandwidth,
            "network": sum(x.sent for x in self.program.collectives) / chip.axis_bandwidth,
        }


def of_update(work: Work, mesh: Mesh, chip: Chip | None) -> Cost:
    """The cost of `pjpo.step.make_update`'s update.

    Raises:
        ValueError: a batch or a parameter that the mesh does not divide, or a batch that the loss does not take.
    """
    sharding.check_batch(mesh, work.batch_size, work.num_microbatches)
    kind = work.reference
    if work.rollouts:
        kind = work.rollouts.reference_in_updates(kind, work.method)
    optimizer, schedule = _optimizer(work)
    options = {"reference": kind, "schedule": schedule, "num_microbatches": work.num_microbatches}
    update = step.make_update(work.loss, work.method, work.policy, optimizer, mesh, **options)
    state = _state(work, mesh)
    beside = _beside(work, state.params)
    ref_params = beside.pop("reference") if kind == "online" else None
    held = {"parameters": state.params, "optimizer": state.opt_state, "reference": ref_params}
    return _cost(update.jitted.lower(state, ref_params, _cut(mesh, _batch(work, mesh))), held, beside, chip)


def of_generation(work: Work, mesh: Mesh, chip: Chip | None) -> Cost:
    """The cost of `policy.generate`, as if no completion ended early; what a run with rollouts keeps lies beside it.

    Raises:
        ValueError: prompts that the mesh does not divide, or more tokens than the model has positions for.
    """
    num_prompts = work.num_sampled_prompts
    sharding.check_batch(mesh, num_prompts, name="sampling_batch_size" if work.sampling_batch_size else "batch_size")
    policy, state = work.policy, _state(work, mesh)
    settings = work.rollouts.sampling(()) if work.rollouts else sampling.Sampling(max_completion_tokens=1)
    lengths = {"max_completion_tokens": work.completion_tokens, "num_completions": work.num_completions}
    settings = dataclasses.replace(settings, **lengths)
    tokens = jax.ShapeDtypeStruct((num_prompts, work.prompt_tokens), jnp.int32)
    mask = jax.ShapeDtypeStruct(tokens.shape, bool)
    keys = jax.eval_shape(lambda: sampling.sequence_keys(jax.random.key(0), num_prompts, work.num_completions))
    prompts, keys = _cut(mesh, (sampling.Prompts(tokens, mask), keys))

    def generate(params: dict, prompts: sampling.Prompts, keys: jax.Array) -> sampling.Completions:
        with layout.on(mesh):
            return policy.generate(params, prompts, keys, settings)

    # A critic's weights are no argument of the program, as it does not read them.
    params, critic = state.params, None
    if work.critic:
        params, critic = {"actor": params["actor"]}, params["critic"]
    beside = {"critic": critic, "optimizer": state.opt_state, **_beside(work, state.params)} if work.rollouts else {}
    return _cost(jax.jit(generate).lower(params, prompts, keys), {"parameters": params}, beside, chip)


def abstract_params(policy: Policy | ActorCritic, mesh: Mesh) -> dict:
    """Shapes, dtypes and places of the parameters, without their numbers."""
    if isinstance(policy, ActorCritic):
        return {name: abstract_params(getattr(policy, name), mesh) for name in ("actor", "critic")}
    return _on(mesh, jax.eval_shape(policy.init, jax.random.key(0)))


def _optimizer(work: Work) -> tuple[optax.GradientTransformation, optax.Schedule]:
    schedule = optim.make_schedule(work.optimizer, work.optimizer.warmup_steps + 1)
    return optim.make_optimizer(work.optimizer, schedule), schedule


def _state(work: Work, mesh: Mesh) -> step.State:
    params = abstract_params(work.policy, mesh)
    trainable, _ = work.policy.trainable(params)
    opt_state = jax.eval_shape(_optimizer(work)[0].init, trainable)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return _on(mesh, step.State(params, opt_state, jax.ShapeDtypeStruct((), jnp.int32), key))


def _beside(work: Work, params: dict) -> dict:
    """Weights that a run keeps on the devices beside its state, whichever program reads them."""
    kept = {}
    if work.reference in ("online", "stored"):
        kept["reference"] = params
    if getattr(work.method, "needs_dpo", False):
        kept["DPO policy"] = work.policy.without_adapters(params)
    return kept


def _batch(work: Work, mesh: Mesh) -> Batch:
    """Full rows, with what a run's batches hold of them; arrays on the host, or their shapes and dtypes."""
    shape = work.batch_size, work.num_trained, work.completion_tokens
    batch = Batch.of(
        prompt_tokens=np.zeros((work.batch_size, work.prompt_tokens), np.int32),
        completion_tokens=np.zeros(shape, np.int32),
    )
    if work.rollouts:
        return online.trained_on(work.rollouts, work.method, batch, reference=work.reference)
    # Labels as labelled data has them; a loss that does not read them leaves them out of the program.
    batch = experiment.completed(work.method, dataclasses.replace(batch, labels=np.ones(shape[:2], bool)))
    if work.reference == "stored":
        batch = dataclasses.replace(batch, ref_logps=np.zeros(batch.completion_tokens.shape, np.float32))
    if work.pack:
        batch = packing.pack(batch, num_groups=sharding.num_batch_parts(mesh) * work.num_microbatches)
    return batch


def _on(mesh: Mesh, tree):
    """Abstract parameters or state, each leaf with its place on the mesh."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, sharding.shardings(tree, mesh)
    )


def _cut(mesh: Mesh, tree):
    """The same of a batch, cut by rows."""
    where = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def _bytes(tree) -> int:
    """On one device."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, np.number)]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def overflow(message: str, held: int) -> int | None:
    """Bytes of temporaries that a TPU's compiler says do not fit beside the `held`; None if it says something else.

    It tells what everything takes, or, where temporaries alone are too many, what these do.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern, others in ((r"Used ([\d.]+)([KMGT]) of", held), (r"HLO temporaries \(([\d.]+)([KMGT])\) exceeds", 0)):
        if found := re.search(pattern, message):
            return int(float(found[1]) * 2 ** (10 * (1 + "KMGT".index(found[2])))) - others
    return None


def _cost(lowered, held: dict, beside: dict, chip: Chip | None) -> Cost:
    """Of a program that takes what is `held`, while the other weights lie `beside` it."""
    held, beside = ({n: _bytes(tree) for n, tree in trees.items() if tree is not None} for trees in (held, beside))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        temporary = overflow(str(error), sum(held.values()))
        if temporary is None:
            raise
        return Cost(held=held | beside, temporary=temporary, fits=False, flops=0, traffic=0, program=None)
    memory, program = compiled.memory_analysis(), Program(compiled.as_text())
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporary = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return Cost(
        held=held | beside | {"batch and padding": arguments - sum(held.values())},
        temporary=temporary,
        fits=None if chip is None else arguments + sum(beside.values()) + temporary <= chip.hbm,
        flops=program.flops,
        traffic=program.bytes,
        program=program,
    )
