"""Optax optimizers by name, with schedule, clipping and weight-decay mask."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import optax

from pjpo import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    learning_rate: float  # at its peak
    critic_learning_rate: float | None = None  # of what estimates values: a critic, a scalar head; None for the same
    name: Literal["adamw", "rmsprop", "adafactor", "sgd"] = "adamw"  # the rule, as Optax has it
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after warm-up; the last two fall to zero
    warmup_steps: int = 0  # linear; the first update takes 1 / warmup_steps of the peak
    weight_decay: float = 0.0  # adamw only; norm scales are spared
    max_grad_norm: float = 1.0  # gradients are scaled down to this global norm; inf never clips
    beta1: float = 0.9  # adamw's, and sgd's momentum; adafactor reads none of these three
    beta2: float = 0.999  # adamw's, and rmsprop's decay
    epsilon: float = 1e-8  # adamw's and rmsprop's

    def __post_init__(self):
        checks.kinds(self)
        bounds = {
            "learning_rate": (0 < self.learning_rate < math.inf, "> 0 and finite"),
            "warmup_steps": (self.warmup_steps >= 0, ">= 0"),
            "weight_decay": (0 <= self.weight_decay < math.inf, ">= 0 and finite"),
            "max_grad_norm": (self.max_grad_norm > 0, "> 0"),
            "beta1": (0 <= self.beta1 < 1, "in [0, 1)"),
            "beta2": (0 <= self.beta2 < 1, "in [0, 1)"),
            "epsilon": (0 < self.epsilon < math.inf, "> 0 and finite"),
        }
        if self.critic_learning_rate is not None:
            bounds["critic_learning_rate"] = (0 < self.critic_learning_rate < math.inf, "> 0 and finite, or None")
        for name, (good, allowed) in bounds.items():
            if not good:
                raise ValueError(f"optimizer: {name} must be {allowed}, got {getattr(self, name)!r}")
        if self.weight_decay and self.name != "adamw":
            raise ValueError(f"optimizer: weight_decay is adamw's, {self.name} has none; set it to 0")


def make_schedule(config: Config, num_steps: int) -> optax.Schedule:
    """Learning rate of each update, the first being number 0.

    Raises:
        ValueError: a warm-up that outlasts the run.
    """
    if config.warmup_steps >= num_steps and config.warmup_steps:
        raise ValueError(f"optimizer: warmup_steps {config.warmup_steps} must be below num_steps {num_steps}")
    peak, rest = config.learning_rate, max(num_steps - config.warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]
    if not config.warmup_steps:
        return after
    warmup = optax.linear_schedule(peak / config.warmup_steps, peak, config.warmup_steps - 1)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clip to the global norm, then the named optimizer under `schedule`.

    Where the critic has a learning rate of its own, it is clipped apart, and follows the schedule at that scale.
    """
    if config.critic_learning_rate is not None:
        scale = config.critic_learning_rate / config.learning_rate
        same = dataclasses.replace(config, critic_learning_rate=None)
        rules = {
            "critic": make_optimizer(same, lambda at: scale * schedule(at)),
            "rest": make_optimizer(same, schedule),
        }
        return optax.partition(rules, whose)
    rule = {
        "adamw": lambda: optax.adamw(
            schedule, config.beta1, config.beta2, config.epsilon, weight_decay=config.weight_decay, mask=decays
        ),
        "rmsprop": lambda: optax.rmsprop(schedule, decay=config.beta2, eps=config.epsilon),
        "adafactor": lambda: optax.adafactor(schedule),
        "sgd": lambda: optax.sgd(schedule, momentum=config.beta1),
    }[config.name]()
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), rule)


def decays(params):
    """Which leaves weight decay acts on: all but the norms' scales, and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)


def whose(params):
    """Of each leaf whether it estimates values, as a critic and a scalar head do, or is the "rest"."""

    def of(path, _):
        return "critic" if {"critic", "scalar_head"} & {entry.key for entry in path} else "rest"

    return jax.tree_util.tree_map_with_path(of, params)
