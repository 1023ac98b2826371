"""Where a method's loss, the policy, an Optax optimizer and the mesh meet: one jitted update.

A method's config says what its loss asks for beyond `logps`. `outputs` names the functions of the policy that it reads,
("logps",) unless given; each but `logps`, which is None where it is not named, is an argument of that name.
`whole_batch` is true where rows depend on each other through the batch (a reference point, a mean over its tokens).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from pjpo import layout, sharding
from pjpo.metrics import Mean
from pjpo.models.policy import joined
from pjpo.types import Batch

Reference = Literal["none", "online", "stored", "adapter"]
REFERENCES = ("none", "online", "stored", "adapter")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that training changes, and the seed of everything random."""

    params: dict
    opt_state: Any  # for `policy.trainable(params)` alone
    step: Int[Array, ""]  # updates done
    key: Array  # folded with the step where it is used, never replaced


def init_state(
    policy, params: dict, optimizer: optax.GradientTransformation, key: Array, mesh: Mesh, *, keep_params: bool = True
) -> State:
    """A state on the mesh with fresh optimizer moments, cut like the parameters they belong to.

    Updates donate it, so it holds copies, and `params` stay the caller's, to be the reference; with `keep_params=False`
    it takes them over, and the first update deletes them.
    """
    params, key = sharding.place(params, mesh), jnp.copy(key)
    if keep_params:
        params = jax.tree.map(jnp.copy, params)
    trainable, _ = policy.trainable(params)
    abstract = jax.eval_shape(optimizer.init, trainable)
    opt_state = jax.jit(optimizer.init, out_shardings=sharding.shardings(abstract, mesh))(trainable)
    return sharding.place(State(params, opt_state, jnp.int32(0), key), mesh)


def reference_logps(policy, reference: Reference, params: dict, ref_params: dict | None, batch: Batch):
    """Log-probs [B, N, T] under the reference, or None where the method has none; no gradient.

    Args:
        policy: the policy.
        reference: "online" reads `ref_params`; "stored" the batch's own `ref_logps`; "adapter" `params` less adapters.
        params: the policy's parameters.
        ref_params: the reference's parameters, for "online".
        batch: the batch.
    """
    if reference == "none":
        return None
    if reference == "stored":
        return batch.ref_logps
    return jax.lax.stop_gradient(
        policy.logps(policy.without_adapters(params) if reference == "adapter" else ref_params, batch)
    )


def outputs_of(method: Any, policy, params: dict, batch: Batch) -> dict[str, Array]:
    """What the method's loss reads of the policy, by name; each is the policy's function of that name."""
    return {name: getattr(policy, name)(params, batch) for name in getattr(method, "outputs", ("logps",))}


def apply(loss: Callable, method: Any, batch: Batch, outputs: dict[str, Array], ref_logps: Array | None):
    """The loss of what `outputs_of` computed: (Mean, metrics)."""
    others = {name: value for name, value in outputs.items() if name != "logps"}
    return loss(method, batch, outputs.get("logps"), ref_logps, **others)


def make_update(
    loss: Callable,
    method: Any,
    policy,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    reference: Reference,
    schedule: optax.Schedule | None = None,
    num_microbatches: int = 1,
) -> Callable[[State, dict | None, Batch], tuple[State, dict[str, Mean]]]:
    """The jitted `update(state, ref_params, batch) -> (state, metrics)`; it donates `state`, never `ref_params`.

    A batch in which nothing counts moves neither parameters nor the optimizer's moments, nor does one of a rollout
    whose gradient is exactly 0, as its rewards are all equal; the step is counted.

    Args:
        loss: `loss(method, batch, logps, ref_logps) -> (Mean, metrics)`, as in `pjpo.methods`.
        method: its `Config`, static.
        policy: whose `logps` are differentiated.
        optimizer: from `pjpo.optim` or any Optax transformation.
        mesh: from `pjpo.sharding`; state and batch must lie on it.
        reference: where reference log-probs come from, see `reference_logps`; `ref_params` is None but for "online".
        schedule: to log the learning rate.
        num_microbatches: parts the batch is cut into; their gradients add up in a scan to those of the whole. Where
            rows depend on each other, another forward pass over all parts comes first.

    Raises:
        ValueError: an unknown reference, fewer than one microbatch; from `update`, a batch without what it needs.
    """
    if reference not in REFERENCES:
        raise ValueError(f"reference must be one of {', '.join(REFERENCES)}, got {reference!r}")
    if num_microbatches < 1:
        raise ValueError(f"num_microbatches must be at least 1, got {num_microbatches}")

    def score(outputs, ref_logps, batch):  # a sum, with what to divide by
        mean, metrics = apply(loss, method, batch, outputs, ref_logps)
        return mean.sum, (mean, metrics)

    def update(state: State, ref_params: dict | None, batch: Batch) -> tuple[State, dict[str, Mean]]:
        trainable, frozen = policy.trainable(state.params)

        def forward(trainable, part):
            return outputs_of(method, policy, joined(trainable, frozen), part)

        def reference_of(part):
            return reference_logps(policy, reference, state.params, ref_params, part)

        def gradient(part):
            with layout.on(mesh):
                grads, about = jax.grad(lambda x: score(forward(x, part), reference_of(part), part), has_aux=True)(
                    trainable
                )
            return sharding.constrain(grads, mesh), about

        def gradient_of_whole(parts):
            """The chain rule cut in two: what the loss reads of all parts, then each part's share of the gradient."""
            with layout.on(mesh):
                computed = jax.lax.map(lambda part: (forward(trainable, part), reference_of(part)), parts)
            whole = _merge((*computed, dataclasses.replace(parts, packing=None)))
            cotangents, about = jax.grad(score, has_aux=True)(*whole)

            def pull_back(part_and_cotangents):
                part, cotangents = part_and_cotangents
                with layout.on(mesh):
                    grads = jax.vjp(lambda x: forward(x, part), trainable)[1](cotangents)[0]
                return sharding.constrain(grads, mesh)

            return _add_up(pull_back, (parts, _cut(cotangents, num_microbatches))), about

        if num_microbatches == 1:
            grads, (mean, metrics) = gradient(batch)
        elif getattr(method, "whole_batch", False):
            grads, (mean, metrics) = gradient_of_whole(_split(batch, num_microbatches))
        else:
            grads, (mean, metrics) = _add_up(gradient, _split(batch, num_microbatches))
        grads = jax.tree.map(lambda g, p: (g / jnp.maximum(mean.count, 1)).astype(p.dtype), grads, trainable)
        updates, opt_state = optimizer.update(grads, state.opt_state, trainable)
        # Of nothing there is nothing to learn, yet momentum and weight decay would go on.
        counted = (mean.count > 0) & jnp.any(batch.loss_mask)  # a constant to divide by counts what is masked too
        norm = optax.tree.norm(grads)
        if batch.advantages is not None:  # all rewards are equal, and nothing else pulls
            counted &= norm != 0
        new = optax.apply_updates(trainable, updates), opt_state
        moved, opt_state = _new_where(counted, new, (trainable, state.opt_state))
        params = joined(moved, frozen)
        metrics = {"loss": mean, **metrics, "grad_norm": Mean.of(norm, counted)}
        if schedule is not None:
            metrics["learning_rate"] = Mean.of(jnp.asarray(schedule(state.step), jnp.float32))
        return sharding.constrain(State(params, opt_state, state.step + 1, state.key), mesh), metrics

    jitted = jax.jit(update, donate_argnums=0)

    def checked(state: State, ref_params: dict | None, batch: Batch) -> tuple[State, dict[str, Mean]]:
        if reference == "stored" and batch.ref_logps is None:
            raise ValueError("reference is 'stored', but the batch holds no ref_logps; attach them or choose 'online'")
        if (reference == "online") != (ref_params is not None):
            raise ValueError(
                f"reference is {reference!r}, so ref_params must be {'given' if reference == 'online' else 'None'}"
            )
        if reference == "adapter" and "lora" not in state.params:
            raise ValueError(
                "reference is 'adapter', but there are no adapters; set model.lora.rank or choose 'online'"
            )
        return jitted(state, ref_params, batch)

    checked.jitted = jitted  # for reading the compiled program
    return checked


def _new_where(condition: Array, new: Any, old: Any) -> Any:
    """The new tree or the old one, but for the place in the learning rate's schedule, which is that of the step."""

    def is_place(part: Any) -> bool:
        return isinstance(part, optax.ScaleByScheduleState)

    def choose(new: Any, old: Any) -> Any:
        return new if is_place(new) else jnp.where(condition, new, old)

    return jax.tree.map(choose, new, old, is_leaf=is_place)


def _add_up(function: Callable, parts: Any) -> Any:
    """The sum of `function` over parts on axis 0, in float32 or wider; metrics add up as they say."""

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(operator.add, total, function(part), is_leaf=lambda x: isinstance(x, Mean)), None

    first = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), first)
    return jax.lax.scan(add, zeros, parts)[0]


def _merge(parts: Any) -> Any:
    """[parts, B/parts, ...] -> [B, ...], one part after the other."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), parts)


def _cut(whole: Any, parts: int) -> Any:
    """The inverse of `_merge`."""
    return jax.tree.map(lambda x: x.reshape(parts, len(x) // parts, *x.shape[1:]), whole)


def _split(batch: Batch, parts: int) -> Batch:
    """[B, ...] -> [parts, B/parts, ...], every parts-th group of prompts together, so that devices keep their rows."""
    groups = len(batch.packing.slots if batch.packing else batch.prompt_tokens)
    if groups % parts:
        raise ValueError(
            f"{groups} {'packed groups' if batch.packing else 'prompts'} cannot be cut into {parts} microbatches"
        )

    def cut(x: Array) -> Array:
        rows = x.reshape(groups // parts, parts, len(x) // groups, *x.shape[1:])
        return jnp.moveaxis(rows, 1, 0).reshape(parts, len(x) // parts, *x.shape[1:])

    return jax.tree.map(cut, batch)
