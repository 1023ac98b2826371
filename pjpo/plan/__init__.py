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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pjpo import checks, layout, optim, sampling, sharding, step
from pjpo.methods import dpo
from pjpo.models import Policy, decoder
from pjpo.plan.chips import Chip
from pjpo.plan.program import Program
from pjpo.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be compiled."""

    model: decoder.Config
    batch_size: int  # prompts in an update, and in a generation step, over all devices
    prompt_tokens: int = 512
    completion_tokens: int = 512
    num_completions: int = 2  # of each prompt
    loss: Callable = dpo.loss
    method: Any = dataclasses.field(default_factory=dpo.Config)
    reference: step.Reference = "online"
    optimizer: optim.Config = dataclasses.field(default_factory=lambda: optim.Config(learning_rate=1e-6))
    num_microbatches: int = 1

    def __post_init__(self):
        sizes = ("num_microbatches", "batch_size", "prompt_tokens", "completion_tokens", "num_completions")
        checks.at_least(self, 1, *sizes)
        if self.reference == "adapter" and self.model.lora is None:
            raise ValueError("plan: reference 'adapter' is the model without adapters; set lora.rank, or use 'online'")


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
        ValueError: a batch or a parameter that the mesh does not divide.
    """
    sharding.check_batch(mesh, work.batch_size, work.num_microbatches)
    policy = Policy(work.model)
    schedule = optim.make_schedule(work.optimizer, work.optimizer.warmup_steps + 1)
    optimizer = optim.make_optimizer(work.optimizer, schedule)
    options = {"reference": work.reference, "schedule": schedule, "num_microbatches": work.num_microbatches}
    update = step.make_update(work.loss, work.method, policy, optimizer, mesh, **options)
    params = abstract_params(policy, mesh)
    trainable, _ = policy.trainable(params)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = step.State(params, jax.eval_shape(optimizer.init, trainable), jax.ShapeDtypeStruct((), jnp.int32), key)
    state = _on(mesh, state)
    ref_params = params if work.reference == "online" else None
    batch = jax.eval_shape(lambda: _batch(work))
    if work.reference == "stored":
        logps = jax.ShapeDtypeStruct(batch.completion_tokens.shape, jnp.float32)
        batch = dataclasses.replace(batch, ref_logps=logps)
    held = {"parameters": params, "optimizer": state.opt_state, "reference": ref_params}
    return _cost(update.jitted.lower(state, ref_params, _cut(mesh, batch)), held, chip)


def of_generation(work: Work, mesh: Mesh, chip: Chip | None) -> Cost:
    """The cost of `policy.generate`, as if no completion ended early."""
    policy = Policy(work.model)
    params = abstract_params(policy, mesh)
    settings = sampling.Sampling(
        max_completion_tokens=work.completion_tokens, num_completions=work.num_completions, temperature=1.0
    )
    tokens = jax.ShapeDtypeStruct((work.batch_size, work.prompt_tokens), jnp.int32)
    mask = jax.ShapeDtypeStruct(tokens.shape, bool)
    keys = jax.eval_shape(lambda: sampling.sequence_keys(jax.random.key(0), work.batch_size, work.num_completions))
    prompts, keys = _cut(mesh, (sampling.Prompts(tokens, mask), keys))

    def generate(params: dict, prompts: sampling.Prompts, keys: jax.Array) -> sampling.Completions:
        with layout.on(mesh):
            return policy.generate(params, prompts, keys, settings)

    return _cost(jax.jit(generate).lower(params, prompts, keys), {"parameters": params}, chip)


def abstract_params(policy: Policy, mesh: Mesh) -> dict:
    """Shapes, dtypes and places of the parameters, without their numbers."""
    return _on(mesh, jax.eval_shape(policy.init, jax.random.key(0)))


def _batch(work: Work) -> Batch:
    shape = work.batch_size, work.num_completions, work.completion_tokens
    prompts = jnp.zeros((work.batch_size, work.prompt_tokens), jnp.int32)
    mask = jnp.ones(shape, bool)
    return Batch.of(
        prompt_tokens=prompts,
        prompt_mask=jnp.ones(prompts.shape, bool),
        completion_tokens=jnp.zeros(shape, jnp.int32),
        completion_mask=mask,
        loss_mask=mask,
    )


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


def _cost(lowered, held: dict, chip: Chip | None) -> Cost:
    held = {name: _bytes(tree) for name, tree in held.items() if tree is not None}
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        temporary = overflow(str(error), sum(held.values()))
        if temporary is None:
            raise
        return Cost(held=held, temporary=temporary, fits=False, flops=0, traffic=0, program=None)
    memory, program = compiled.memory_analysis(), Program(compiled.as_text())
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporary = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return Cost(
        held=held | {"batch and padding": arguments - sum(held.values())},
        temporary=temporary,
        fits=None if chip is None else arguments + temporary <= chip.hbm,
        flops=program.flops,
        traffic=program.bytes,
        program=program,
    )
