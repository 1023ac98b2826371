"""Short trainings from one start, and what all of them are measured on: reward, KL, and how held-out pairs are told."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from pjpo import checks, models, online, optim, rollouts, sharding, step
from pjpo.data import reviews
from pjpo.data.batches import Batches, in_order
from pjpo.data.buckets import Buckets, collate
from pjpo.data.examples import Example
from pjpo.evals import panel
from pjpo.experiment import Model, completed
from pjpo.logps import sum_completion
from pjpo.metrics import Mean
from pjpo.models.actor_critic import ActorCritic
from pjpo.rewards import vader
from pjpo.rewards.learned import RewardModel
from pjpo.sampling import Sampling
from pjpo.types import CHOSEN, Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How every policy of a study is trained, full weights."""

    num_steps: int
    looks: tuple[int, ...] = ()  # numbers of updates after which to measure, beside the last
    batch_size: int = 16  # examples in an update
    optimizer: optim.Config = dataclasses.field(default_factory=lambda: optim.Config(learning_rate=3e-4))

    def __post_init__(self):
        checks.kinds(self)
        checks.at_least(self, 1, "num_steps", "batch_size")
        if list(self.looks) != sorted({n for n in self.looks if 0 < n < self.num_steps}):
            raise ValueError(f"training: looks must ascend within 1 and {self.num_steps - 1}, got {self.looks}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which model, and the held-out film reviews whose openings it continues."""

    model: Model = dataclasses.field(default_factory=lambda: Model(source="glassllm-en"))
    num_held_out: int = 64  # openings
    opening_tokens: int = 8
    max_completion_tokens: int = 24
    num_completions: int = 8  # of each held-out opening
    stop: tuple[str, ...] = ()  # tokens that end a completion, beside the tokenizer's own

    def __post_init__(self):
        checks.kinds(self)
        checks.at_least(self, 1, "num_held_out", "opening_tokens", "max_completion_tokens", "num_completions")

    def load(self) -> Bench:
        return Bench(self, *models.load(**self.model.settings))


@dataclasses.dataclass(frozen=True)
class Bench:
    """The reward is known and exact: VADER's score of opening and continuation as one text."""

    config: Config
    policy: models.Policy
    params: dict  # the start
    tokenizer: Any

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        return rollouts.stop_tokens(self.config.stop, self.tokenizer)

    def openings(self, use: reviews.Use, number: int, seed: int = 0) -> list[Example]:
        encode, num_tokens = self.tokenizer.encode, self.config.opening_tokens
        return reviews.openings(reviews.read(), use, number, num_tokens, encode, seed=seed)

    def sample(self, params: dict, openings: Sequence[Example], key: jax.Array, num_completions: int) -> Batch:
        sampling = Sampling(
            num_completions=num_completions,
            max_completion_tokens=self.config.max_completion_tokens,
            stop_tokens=self.stop_tokens,
        )
        prompts = [opening.prompt for opening in openings]
        return rollouts.rollouts(self.policy, params, prompts, key, sampling, batch_size=64)

    def rewards(self, batch: Batch) -> np.ndarray:
        """[B, N]"""
        texts = rollouts.texts(batch, self.tokenizer)
        return vader.reward(list(itertools.chain(*texts))).reshape(len(texts), -1)

    def held_out(self, params: dict) -> Batch:
        """Samples on held-out openings; these and the keys stay the same, so that a difference is the policy's."""
        openings = self.openings("held_out", self.config.num_held_out)
        return self.sample(params, openings, jax.random.key(0), self.config.num_completions)

    def kl(self, batch: Batch, ref_params: dict) -> float:
        """From a reference, of samples, in nats a completion."""
        return panel.of_samples(batch, np.asarray(self.policy.logps(ref_params, batch)))["kl"]

    def of_samples(self, params: dict, ref_params: dict | None = None) -> dict[str, float]:
        """`reward`, and `kl` to the reference (the start, unless given) in nats a completion, on held-out openings."""
        batch = self.held_out(params)
        return {"reward": float(self.rewards(batch).mean()), "kl": self.kl(batch, ref_params or self.params)}

    def of_pairs(self, params: dict, pairs: Sequence[Example], ref_params: dict | None = None) -> dict[str, float]:
        """The panel of diagnostics, see `pjpo.evals.panel`; implicit rewards are at beta 1."""
        rows = []
        for batch in in_order(pairs, 64, buckets_of(pairs)):
            logps, ref_logps = (self.policy.logps(p, batch) for p in (params, ref_params or self.params))
            sums = [np.asarray(sum_completion(x, batch.loss_mask)) for x in (logps, ref_logps)]
            rows.append([*sums, batch.loss_mask.sum(-1)])
        return panel.of_pairs(1.0, *(np.concatenate(parts)[: len(pairs)] for parts in zip(*rows, strict=True)))

    def fit(
        self,
        loss: Callable,
        method: Any,
        examples: Sequence[Example],
        training: Training,
        *,
        seed: int,
        params: dict | None = None,
        reference: step.Reference = "online",
        at: Sequence[int] = (),
    ) -> Iterator[tuple[dict, dict[str, float]]]:
        """Trains from `params` (the start, unless given), which are the reference too.

        Yields:
            At each of the training's looks, those in `at`, and after the last update: the parameters, which the next
            update uses up, and the update's metrics.
        """
        mesh, params = sharding.make_mesh(), self.params if params is None else params
        update, optimizer = _update(loss, method, self.policy, training, reference)
        state = step.init_state(self.policy, params, optimizer, jax.random.key(seed), mesh)
        ref_params = sharding.place(params, mesh) if reference == "online" else None
        batches = Batches(examples, batch_size=training.batch_size, seed=seed, buckets=buckets_of(examples))

        def updated(state: step.State):
            return update(state, ref_params, sharding.place_batch(completed(method, next(batches)), mesh))

        yield from _looks(state, updated, training, at)

    def learn(
        self,
        loss: Callable,
        method: Any,
        config: online.Config,
        openings: Sequence[Example],
        training: Training,
        *,
        seed: int,
        params: dict,
        ref_params: dict,
        dpo_params: dict | None = None,
        critic: RewardModel | None = None,
        at: Sequence[int] = (),
        record: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
    ) -> Iterator[tuple[dict, dict[str, float]]]:
        """Trains online from `params`, on rollouts of the openings; `batch_size` of the training is of openings.

        The reference stays `ref_params`, whatever the start; `dpo_params` are of the policy that RTO's rewards are by.
        Values are those of a critic that starts as the reward model given, or else of the policy's own scalar head.
        `record` gets rows of rollouts, as `online.Config` says how many, and one of each update's metrics.

        Yields:
            As `fit` does; the metrics are the rollout's too.
        """
        mesh, policy = sharding.make_mesh(), self.policy
        if critic:
            policy = ActorCritic(policy, critic.policy)
            params, ref_params = {"actor": params, "critic": critic.params}, {"actor": ref_params}
        batches = online.Rollouts(
            config,
            method,
            policy,
            self.tokenizer,
            openings,
            batch_size=training.batch_size,
            seed=seed,
            scored_together=config.prompts_per_rollout,
        )
        policy = batches.policy  # at the temperature
        kind = "stored" if config.reads_reference(method) else "none"
        update, optimizer = _update(loss, method, policy, training, kind)
        state = step.init_state(policy, params, optimizer, jax.random.key(seed), mesh)
        batches.start(
            lambda state: ref_params,
            lambda batch: sharding.place_batch(batch, mesh),
            lambda number, rows: record([{"update": number, **row} for row in rows]),
            functools.partial(policy.logps, dpo_params),
        )
        update = batches.timed(update)

        def updated(state: step.State):
            state, metrics = update(state, None, batches.next(state))
            record([{"kind": "update", "update": int(state.step), **_floats(metrics)}])
            return state, metrics

        for trained, metrics in _looks(state, updated, training, at):
            yield trained["actor"] if critic else trained, metrics


def buckets_of(examples: Sequence[Example]) -> Buckets:
    return Buckets.of(examples, num_sizes=1)  # one shape: short trainings should not compile often


def batch_of(examples: Sequence[Example]) -> Batch:
    return collate(examples, buckets_of(examples))


def select(openings: Sequence[Example], samples: Batch, places: Iterable[Sequence[int]]) -> list[Example]:
    """An example of each (row, n, n, ...): the row's opening with these of its samples as completions, in order."""
    return [
        dataclasses.replace(
            openings[row],
            completions=tuple(samples.completion_tokens[row, n][samples.completion_mask[row, n]] for n in numbers),
        )
        for row, *numbers in places
    ]


def games(rewards: np.ndarray) -> list[tuple[int, int, int]]:
    """(row, winner, loser) of all samples of a row of `rewards` [B, N] that differ."""
    return [
        (row, a, b)
        for row, values in enumerate(rewards)
        for a, b in itertools.permutations(range(len(values)), 2)
        if values[a] > values[b]
    ]


def unpaired(pairs: Sequence[Example]) -> list[Example]:
    """Each completion as a row of its own, labelled: what KTO takes."""
    return [
        dataclasses.replace(pair, completions=(completion,), labels=(place == CHOSEN,))
        for pair in pairs
        for place, completion in enumerate(pair.completions)
    ]


def best_and_worst(openings: Sequence[Example], samples: Batch, rewards: np.ndarray) -> list[Example]:
    """A pair of each opening whose samples differ in reward."""
    return reviews.SampledPairs().rank(openings, samples, rewards)[0]


def _looks(
    state: step.State, updated: Callable[[step.State], tuple], training: Training, at: Sequence[int]
) -> Iterator[tuple[dict, dict[str, float]]]:
    for number in range(1, training.num_steps + 1):
        state, metrics = updated(state)
        if number in (*training.looks, *at, training.num_steps):
            yield state.params, _floats(metrics)


def _floats(metrics: dict[str, Mean]) -> dict[str, float]:
    return {name: float(mean.value()) for name, mean in metrics.items()}


@functools.cache
def _update(loss: Callable, method: Any, policy: models.Policy, training: Training, reference: step.Reference):
    """Made, and so compiled, once for all seeds."""
    optimizer = optim.make_optimizer(training.optimizer, optim.make_schedule(training.optimizer, training.num_steps))
    return step.make_update(loss, method, policy, optimizer, sharding.make_mesh(), reference=reference), optimizer
