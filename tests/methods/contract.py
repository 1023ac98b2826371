"""What `test_contract.py` asks every method with: read off the signature of its loss, and what its test file adds.

A loss annotates `ref_logps: None` where it has no reference, and the first output that it reads of the policy, mostly
`logps`, as `[B 2 ...]` where a row is a pair. Batches have every optional field filled. A method that needs more sets
`CONTRACT = Contract(...)` in its own `tests/methods/test_<name>.py`.
"""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pjpo import methods
from pjpo.types import Batch

NAMES = [module.name for module in pkgutil.iter_modules(methods.__path__) if not module.name.startswith("_")]
SHAPE = 8, 3, 5  # B, N and T; N is the method's where that is fixed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contract:
    """What neither signature nor types of a method say."""

    configs: tuple = ()  # settings to check beside the defaults, one for each branch of the loss
    start: Any = None  # the settings whose fields are nudged, where the defaults leave some of them unread
    fields: Callable = lambda rng, shape: {}  # fields of the batch that differ from those of `Method.example`
    arguments: Callable = lambda rng, shape: {}  # further arguments of the loss, prompts on axis 0
    rollout: Callable = lambda rng, shape: {}  # further arguments of `Config.advantages`, prompts on axis 0
    also: Callable = lambda config: ()  # numbers that a config computes beside the loss and the advantages
    nudged: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # another legal value of a field
    bad: Mapping[str, tuple] = dataclasses.field(default_factory=dict)  # refused values; default: nan, infinite, < 0


@dataclasses.dataclass(frozen=True)
class Example:
    """The arguments of a loss after its config: a batch, `logps`, `ref_logps` or None, and what else it takes."""

    batch: Batch
    logps: np.ndarray | None
    ref_logps: np.ndarray | None
    others: dict


class Method:
    def __init__(self, name: str):
        module = importlib.import_module(f"pjpo.methods.{name}")
        self.name, self.loss, self.Config = name, module.loss, module.Config
        try:
            tests = importlib.import_module(f"tests.methods.test_{name}")
        except ModuleNotFoundError as error:
            raise AssertionError(f"pjpo/methods/{name}.py has no tests/methods/test_{name}.py") from error
        self.contract = getattr(tests, "CONTRACT", Contract())
        annotations = {name: p.annotation for name, p in inspect.signature(self.loss).parameters.items()}
        self.arguments, self.outputs = list(annotations), getattr(self.start, "outputs", ("logps",))
        self.reads_logps, self.has_reference = "logps" in self.outputs, annotations["ref_logps"] is not None
        axis = annotations[self.outputs[0]].dim_str.split()[1]
        self.has_fixed_rows = axis.isdigit()
        self.shape = SHAPE[0], int(axis) if self.has_fixed_rows else SHAPE[1], SHAPE[2]

    @property
    def start(self):
        return self.contract.start or self.Config()

    def rollout(self, seed: int = 0) -> dict:
        """What `Config.advantages` takes beside the batch."""
        return self.contract.rollout(np.random.default_rng(seed), self.shape)

    @property
    def configs(self) -> list:
        return [self.Config(), *self.contract.configs]

    def example(self, seed: int = 0, num_completions: int | None = None) -> Example:
        """Ragged completions, one of them and one whole row empty, prompts' tokens unscored in places."""
        rng, shape = np.random.default_rng(seed), (self.shape[0], num_completions or self.shape[1], self.shape[2])
        lengths = rng.integers(1, shape[2] + 1, shape[:2])
        lengths[1, 0], lengths[2] = 0, 0
        mask = np.arange(shape[2])[None, None] < lengths[:, :, None]

        def normal(*size):
            return rng.normal(size=size).astype(np.float32)

        logps = np.where(mask, -np.exp(normal(*shape)), 0)
        near = {name: np.where(mask, logps + 0.3 * normal(*shape), 0) for name in ("old_logps", "ref_logps")}
        fields = {
            "completion_tokens": rng.integers(0, 50, shape).astype(np.int32),
            "completion_mask": mask,
            "loss_mask": mask & (rng.random(shape) < 0.8),
            "rewards": normal(*shape[:2]),
            "advantages": normal(*shape[:2]),
            "labels": rng.random(shape[:2]) < 0.5,
            "values": normal(*shape),
            **near,
        }
        batch = Batch.of(**fields | self.contract.fields(rng, shape))
        ref_logps = batch.ref_logps if self.has_reference else None
        return Example(batch, logps if self.reads_logps else None, ref_logps, self.contract.arguments(rng, shape))

    def no_numbers(self) -> list[tuple[str, Any]]:
        """(field, value of another type) for every field that must be a number."""
        return [
            (field.name, value)
            for field in dataclasses.fields(self.Config)
            if isinstance(number := getattr(self.Config(), field.name), int | float) and not isinstance(number, bool)
            for value in ([number], str(number), *(() if "None" in str(field.type) else (None,)))
        ]

    def bad_values(self) -> list[tuple[str, Any]]:
        """(field, value) for every numeric field."""
        values = []
        for field in dataclasses.fields(self.Config):
            number = getattr(self.start, field.name)
            if isinstance(number, int | float) and not isinstance(number, bool):
                default = (float("nan"), float("inf"), float("-inf"), -1.0) if isinstance(number, float) else (-1,)
                values += [(field.name, value) for value in self.contract.bad.get(field.name, default)]
            else:
                values += [(field.name, value) for value in self.contract.bad.get(field.name, ())]
        return values

    def nudged(self) -> list:
        """(field, config in which this field alone differs) for every field."""
        return [
            (f.name, dataclasses.replace(self.start, **{f.name: self._other(f)}))
            for f in dataclasses.fields(self.Config)
        ]

    def _other(self, field):
        value = getattr(self.start, field.name)
        if field.name in self.contract.nudged:
            return self.contract.nudged[field.name]
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return value + 1
        if isinstance(value, float):
            return value * 1.3 if value else 0.1
        raise AssertionError(
            f"say in tests/methods/test_{self.name}.py which other {field.name} to try: Contract(nudged=...)"
        )
