"""Rollouts: what online methods train on, for the same update as offline ones.

Prompts -> completions by the policy as it is -> rewards -> log-probs of trainer and reference, values of a critic ->
the method's advantages over the whole rollout -> minibatches of whole groups, epoch by epoch. Everything is decided by
the run's key and the rollout's number, whatever the devices and the sizes in which prompts are decoded.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from pjpo import checks, distributed, rollouts
from pjpo.data.batches import order
from pjpo.data.buckets import Buckets
from pjpo.data.examples import Example
from pjpo.metrics import Mean
from pjpo.rewards.protocol import Failure, Rewards, Scores
from pjpo.rollout_log import Scored, numbers, rows
from pjpo.sampling import Sampling
from pjpo.step import Reference
from pjpo.types import Batch

# Completions without an end keep their reward, do not count in the loss, lose a penalty, or get a fixed reward instead.
Truncated = Literal["keep", "mask", "penalise", "replace"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a rollout is."""

    rewards: Rewards  # what completions are worth
    prompts_per_rollout: int  # a multiple of batch_size, the prompts in an update
    num_epochs: int = 1  # passes over a rollout
    num_completions: int = 8  # of each prompt: a group
    max_completion_tokens: int = 256
    temperature: float = 1.0  # of sampling, and of every log-prob that training reads: the reference's too
    # Log-probs stay those of the whole distribution with these two, and so do ratios, entropy and KL.
    top_k: int = 0  # sample among the k likeliest tokens; 0 for all
    top_p: float = 1.0  # sample among the likeliest tokens that together reach this probability
    stop: tuple[str, ...] = ()  # tokens that end a completion, beside the tokenizer's own
    truncated: Truncated = "keep"  # what becomes of completions without an end
    truncation_penalty: float = 1.0  # taken off their reward, where they are penalised
    truncated_reward: float = -10.0  # instead of their reward, where it is replaced
    pairs: bool = False  # for methods on pairs: train on each group's best against its worst; a tie gives none
    reference: Literal["run", "rollout"] = "run"  # the run's, or the policy that sampled: iterative DPO's
    dynamic_sampling: bool = False  # leave out groups that teach nothing, and sample new prompts instead
    max_refills: int = 2  # how often; a rollout that still lacks groups is trained on as it is
    sampling_batch_size: int | None = None  # prompts decoded together; None for all of a rollout
    halvings: int = 2  # how often decoding may go on in half the rows, as completions end; see `pjpo.sampling`
    log_kl: bool = False  # score completions under the reference for the metric alone, where the method has no pull
    log_every_rollouts: int = 10  # how often completions are written to samples.jsonl
    num_logged_prompts: int | None = 2  # whose completions these are; None for all of a rollout

    def __post_init__(self):
        checks.kinds(self)
        checks.at_least(self, 1, "prompts_per_rollout", "num_epochs", "num_completions", "max_completion_tokens")
        checks.at_least(
            self, 1, "log_every_rollouts", *["sampling_batch_size"] * (self.sampling_batch_size is not None)
        )
        checks.at_least(self, 0, "max_refills", *["num_logged_prompts"] * (self.num_logged_prompts is not None))
        checks.not_negative(self, "truncation_penalty")
        checks.finite(self, "truncated_reward")
        checks.positive(self, "temperature")
        if self.pairs and (self.num_completions < 2 or self.truncated == "mask"):
            raise ValueError(
                "online: pairs need num_completions of 2 or more, both of which count, got "
                f"{self.num_completions} and truncated {self.truncated!r}; keep, penalise or replace what is truncated"
            )
        if self.dynamic_sampling and self.num_completions < 2:
            raise ValueError(
                "online: dynamic_sampling leaves out groups whose rewards are all equal, as those of one completion "
                f"are, got num_completions {self.num_completions}; sample 2 or more, or set it to False"
            )
        if self.log_kl and self.pairs:
            raise ValueError(
                "online: log_kl measures samples, but pairs are a choice among them by reward; set log_kl to False "
                "(the sentiment evaluation has the KL of held-out samples)"
            )
        self.sampling(())  # which refuses the rest

    def sampling(self, stop_tokens: Sequence[int]) -> Sampling:
        """By a policy that is `at` the temperature."""
        return Sampling(
            num_completions=self.num_completions,
            max_completion_tokens=self.max_completion_tokens,
            top_k=self.top_k,
            top_p=self.top_p,
            stop_tokens=tuple(stop_tokens),
            halvings=self.halvings,
        )

    def reads_reference(self, method: Any) -> bool:
        """Whether completions are scored under the reference at all."""
        return self.log_kl or getattr(method, "needs_reference", True)

    def reference_in_updates(self, reference: Reference, method: Any) -> Reference:
        """Where updates find what the reference of a run says: with the rollout, of which every epoch reads it."""
        return "stored" if reference != "none" and self.reads_reference(method) else "none"

    def num_updates(self, batch_size: int) -> int:
        """Updates of a rollout.

        Raises:
            ValueError: minibatches that do not divide the rollout.
        """
        if self.prompts_per_rollout % batch_size:
            below = self.prompts_per_rollout // batch_size * batch_size
            raise ValueError(
                f"rollouts.prompts_per_rollout {self.prompts_per_rollout} is not divisible by batch_size {batch_size}; "
                f"use {f'{below} or ' if below else ''}{below + batch_size}"
            )
        return self.num_epochs * self.prompts_per_rollout // batch_size


def check(experiment: Any) -> None:
    """Settings of an experiment with rollouts that do not fit each other.

    Raises:
        ValueError: naming them.
    """
    config, method = experiment.rollouts, experiment.method
    num_updates = config.num_updates(experiment.batch_size)
    for name in ("num_steps", "checkpoint_every_steps"):
        if (steps := getattr(experiment.loop, name)) % num_updates:
            below = steps // num_updates * num_updates
            raise ValueError(
                f"loop.{name} {steps} would end within a rollout, which makes {num_updates} updates; "
                f"use {f'{below} or ' if below else ''}{below + num_updates}"
            )
    if experiment.reference == "stored":
        raise ValueError("reference 'stored' is for data that is there before the run; use 'adapter' or 'online'")
    if experiment.pack:
        raise ValueError("pack is for data that is there before the run; rollouts take False")
    if config.reference == "rollout" and experiment.reference == "none":
        raise ValueError("rollouts.reference is 'rollout', but reference is 'none'; use 'adapter' or 'online'")
    if config.log_kl and experiment.reference == "none":
        raise ValueError("rollouts.log_kl measures the KL to a reference, but reference is 'none'; use 'adapter'")
    shape = (config.prompts_per_rollout, config.num_completions, 2)
    batch = Batch.of(completion_tokens=np.zeros(shape, np.int32))
    trained_on(config, method, batch, reference=experiment.reference)


def trained_on(config: Config, method: Any, batch: Batch, *, reference: Reference) -> Batch:
    """A batch of a rollout's prompts and completions with all else that updates get of it, as shapes and dtypes.

    Args:
        config: of the rollouts.
        method: the config of the method.
        batch: prompts with completions; of pairs, those that are left.
        reference: of the run.

    Raises:
        ValueError: rollouts that the method does not learn from, such as groups too small for its baseline.
    """
    if hasattr(method, "advantages") == config.pairs:
        does, way_out = ("makes", "False") if config.pairs else ("makes no", "True for a method on pairs, such as dpo,")
        raise ValueError(
            f"rollouts: {type(method).__module__} {does} advantages of rewards; set rollouts.pairs to {way_out} or "
            "choose another method"
        )
    shape = batch.completion_tokens.shape
    floats = jax.ShapeDtypeStruct(shape, np.float32)
    batch = dataclasses.replace(
        batch,
        rewards=jax.ShapeDtypeStruct(shape[:2], np.float32),
        old_logps=floats,
        ref_logps=None if config.reference_in_updates(reference, method) == "none" else floats,
        values=floats if "values" in getattr(method, "outputs", ()) else None,
    )
    if config.pairs:
        return batch
    asked = {"truncated": jax.ShapeDtypeStruct(shape[:2], bool), "dpo_logps": floats}
    # What a method refuses, it refuses here.
    return jax.eval_shape(method.advantages, batch, **_of_these(method.advantages, asked))


def judge(rewards: Rewards, batch: Batch, examples: Sequence[Example], tokenizer: Any) -> Scores:
    """Rewards of completions, by the first process for all: one may be slow, or random."""
    if jax.process_count() == 1:
        return rewards.of_samples(batch, examples, tokenizer)

    def score() -> list:
        scores = rewards.of_samples(batch, examples, tokenizer)
        parts = {name: values.tolist() for name, values in scores.rewards.items()}
        return [scores.total.tolist(), parts, [dataclasses.asdict(failure) for failure in scores.failures]]

    total, parts, failures = distributed.from_first(score)
    return Scores(
        np.array(total, np.float32),
        {name: np.array(values, np.float32) for name, values in parts.items()},
        [Failure(**failure) for failure in failures],
    )


class Rollouts:
    """Minibatches of the policy's own completions, as `train.train` asks for them."""

    def __init__(
        self,
        config: Config,
        method: Any,
        policy: Any,
        tokenizer: Any,
        examples: Sequence[Example],
        *,
        batch_size: int,
        seed: int,
        weights: Sequence[float] = (),
        scored_together: int | None = None,
    ):
        """Checks; nothing is compiled.

        Args:
            config: what a rollout is.
            method: the config of a method with `advantages(batch)`.
            policy: samples, and scores its samples; `self.policy` is that at the temperature, to be trained.
            tokenizer: for rewards, which read text.
            examples: prompts, with the columns that rewards read.
            batch_size: prompts in an update.
            seed: of the order of prompts.
            weights: as `Data` has them.
            scored_together: prompts whose log-probs are computed at a time; None for `batch_size`.

        Raises:
            ValueError: what cannot be sampled or scored, by name.
        """
        self.config, self.method, self.tokenizer = config, method, tokenizer
        self.policy = policy.at(config.temperature)
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.period = config.num_updates(batch_size)
        self.sampling = config.sampling(rollouts.stop_tokens(config.stop, tokenizer))
        if not self.sampling.stop_tokens and config.truncated != "keep":
            raise ValueError(
                f"rollouts: truncated is {config.truncated!r}, but the tokenizer has no end token, so that every "
                "completion is cut; give one in stop, or set truncated to keep"
            )
        self.buckets = _buckets(config, policy, examples)
        self._columns = dict.fromkeys(name for example in examples for name in example.columns)  # of any row
        config.rewards.check(self._columns)
        self._scored_together = scored_together or batch_size
        self._order = order(examples, seed, weights=weights)
        self._num_rollouts = self._num_prompts = 0  # so far
        self._ahead: collections.deque[Batch] = collections.deque()  # minibatches still to be trained on
        self._numbers: dict[str, Mean] = {}
        self._beta = getattr(method, "beta", None)  # which some methods adapt
        self._advantages = jax.jit(method.advantages) if not config.pairs else None
        self._about = jax.jit(method.rollout_metrics) if hasattr(method, "rollout_metrics") else None
        self._digest = _digest(examples)

    def start(
        self,
        reference: Callable[[Any], dict | None],
        place: Callable[[Batch], Batch],
        record: Callable[[int, list[dict[str, Any]]], None],
        dpo_logps: Callable[[Batch], Any] | None = None,
        say: Callable[[str], None] = print,
    ) -> Rollouts:
        """What only a run has.

        Args:
            reference: state to the reference's parameters, or None.
            place: a batch on the host, onto the mesh.
            record: where completions are written: a step, and rows of it.
            dpo_logps: log-probs [B, N, T] under the policy that DPO trained, for methods that ask for it.
            say: where failures of rewards are named.
        """
        self._reference, self._place, self._record, self._dpo_logps = reference, place, record, dpo_logps
        self._say = say
        if self.config.top_k or self.config.top_p < 1:
            say(
                f"rollouts: top_k {self.config.top_k} and top_p {self.config.top_p} leave tokens out, and log-probs do "
                "not know: ratios, entropy and KL are of the whole distribution, not of the one that is sampled from"
            )
        return self

    def next(self, state: Any) -> Batch:
        if not self._ahead:
            self._ahead.extend(self._roll_out(state))
        batch = self._ahead.popleft()
        self._num_tokens = int(batch.prompt_mask.sum() + batch.completion_mask.sum())
        return self._place(batch)

    def get_state(self) -> dict[str, Any]:
        """The position, and what it is a position in; as JSON knows it."""
        assert not self._ahead, "a rollout is trained on to its end before anything is saved"
        position = {"rollouts": self._num_rollouts, "prompts": self._num_prompts, "beta": self._beta}
        return position | {"examples_sha256": self._digest}

    def set_state(self, position: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: it is a position in other data.
        """
        if position["examples_sha256"] != self._digest:
            raise ValueError("the saved position is one in other prompts; use the same data, or a new run")
        self._num_rollouts, self._num_prompts, self._beta = (position[n] for n in ("rollouts", "prompts", "beta"))
        self._ahead.clear()

    def timed(self, update: Callable) -> Callable:
        """The update, with the numbers of the rollout and of time among its metrics."""

        def timing(state: Any, ref_params: dict | None, batch: Batch):
            began = time.perf_counter()
            state, metrics = jax.block_until_ready(update(state, ref_params, batch))
            seconds = time.perf_counter() - began
            times = {"time/update": _mean(seconds), "speed/update_tokens_per_second": _mean(self._num_tokens, seconds)}
            return state, self._numbers | metrics | times

        return timing

    def _roll_out(self, state: Any) -> list[Batch]:
        clock = _Clock()
        params, key = state.params, jax.random.fold_in(state.key, self._num_rollouts)
        width, num_prompts = self.buckets.prompt_tokens[-1], self.config.prompts_per_rollout
        everything: list[Scored] = []
        kept: list[Scored] = []
        for refill in range(1 + self.config.max_refills * self.config.dynamic_sampling):
            missing = num_prompts - sum(len(part.examples) for part in kept)
            if not missing:
                break
            asked = [self.examples[self._order[self._num_prompts + number]] for number in range(missing)]
            self._num_prompts += missing
            batch = rollouts.rollouts(
                self.policy,
                params,
                [example.prompt for example in asked],
                jax.random.fold_in(key, refill),
                self.sampling,
                batch_size=min(self.config.sampling_batch_size or num_prompts, num_prompts),
                width=width,
            )
            clock("time/generate")
            scored = self._scored(asked, batch)
            clock("time/reward")
            everything.append(scored)
            kept.append(scored.take(scored.instructive) if self.config.dynamic_sampling else scored)
        scored = Scored.join(kept)
        if self.config.pairs:
            scored = scored.take(~scored.equal).best_and_worst()
        batch, dpo_logps = self._with_logps(self._cut(scored.batch), state)
        logps, sampled = np.asarray(batch.old_logps), np.asarray(scored.batch.old_logps)
        differences = logps - sampled[:, :, : logps.shape[2]]
        whole, of_method = self._with_advantages(batch, scored.truncated, dpo_logps)
        clock("time/score")
        self._numbers = (
            numbers(
                Scored.join(everything), batch, differences, chosen=self.config.pairs or self.config.dynamic_sampling
            )
            | of_method
            | clock.means
        )
        generated = sum(int(part.batch.completion_mask.sum()) for part in everything)
        self._numbers["speed/generate_tokens_per_second"] = _mean(generated, clock.seconds["time/generate"])
        if self._num_rollouts % self.config.log_every_rollouts == 0:
            shown = rows(scored, whole, self.tokenizer, self._num_rollouts, self.config.num_logged_prompts)
            self._record(int(state.step) + 1, shown)  # of the first update that is made of them
        minibatches = self._minibatches()
        self._num_rollouts += 1
        return [_take(whole, part) for part in minibatches]

    def _with_advantages(
        self, batch: Batch, truncated: np.ndarray, dpo_logps: np.ndarray | None
    ) -> tuple[Batch, dict[str, Mean]]:
        """The rollout, filled up, as its minibatches are cut from it; and what the method says of it."""
        num_rows = self.config.prompts_per_rollout
        filled = _filled(batch, num_rows)
        if self._advantages is None:
            return filled, {}
        offered = {"truncated": _filled(truncated, num_rows), "beta": self._beta}
        if getattr(self.method, "needs_dpo", False):
            offered["dpo_logps"] = _filled(dpo_logps, num_rows)
        whole = jax.device_get(self._advantages(filled, **_of_these(self.method.advantages, offered)))
        found = {}
        if self._about is not None:
            found |= jax.device_get(self._about(filled, **_of_these(self.method.rollout_metrics, offered)))
        if hasattr(self.method, "adapted"):
            found["beta"] = _mean(self._beta)
            counted = batch.loss_mask.any(-1)
            if batch.ref_logps is not None and counted.any():
                drift = np.where(batch.loss_mask, np.asarray(batch.old_logps) - batch.ref_logps, 0)
                kl = drift.sum(-1)[counted].mean()  # nats a completion; what does not count is no sample of 0
                self._beta = float(self.method.adapted(self._beta, float(kl), int(counted.sum())))
        return whole, found

    def _minibatches(self) -> list[np.ndarray]:
        """Rows of each, of all epochs."""
        parts = []
        for epoch in range(self.config.num_epochs):
            rng = np.random.default_rng((self.seed, self._num_rollouts, epoch))
            parts += list(rng.permutation(self.config.prompts_per_rollout).reshape(-1, self.batch_size))
        return parts

    def _scored(self, examples: list[Example], batch: Batch) -> Scored:
        """With rewards; a completion that got none does not count in the loss, and methods leave its nan out."""
        rows = [dataclasses.replace(row, columns={**self._columns, **row.columns}) for row in examples]
        scores = judge(self.config.rewards, batch, rows, self.tokenizer)
        for failure in scores.failures[:3]:
            self._say(str(failure))
        totals = scores.total
        truncated = rollouts.truncated(batch, self.sampling.stop_tokens)
        if self.config.truncated == "penalise":
            totals = totals - self.config.truncation_penalty * truncated
        if self.config.truncated == "replace":
            totals = np.where(truncated, np.float32(self.config.truncated_reward), totals)
        failed = np.isnan(totals)
        unread = failed | truncated if self.config.truncated == "mask" else failed
        sources = None if examples[0].source is None else np.array([example.source for example in examples], np.int32)
        batch = dataclasses.replace(
            batch,
            rewards=totals,
            loss_mask=batch.completion_mask & ~unread[..., None],
            sources=sources,
        )
        return Scored(examples, batch, truncated, scores.rewards, scores.failures)

    def _cut(self, batch: Batch) -> Batch:
        """Completions as wide as the rollout's longest needs."""
        longest = int(batch.completion_mask.sum(-1).max(initial=1))
        length = self.buckets.fit(1, longest)[1]
        wide = ("completion_tokens", "completion_mask", "loss_mask", "old_logps")
        return dataclasses.replace(batch, **{name: getattr(batch, name)[:, :, :length] for name in wide})

    def _with_logps(self, batch: Batch, state: Any) -> tuple[Batch, np.ndarray | None]:
        """What the trainer makes of the samples before it changes: its own log-probs, the reference's, a critic's.

        And those of the DPO policy, where the method asks for them.
        """
        ref_params = self._reference(state)
        asked = {"old_logps": functools.partial(self.policy.logps, state.params)}
        reads_reference = self.config.reads_reference(self.method)
        if reads_reference and ref_params is not None and self.config.reference == "run":
            asked["ref_logps"] = functools.partial(self.policy.logps, ref_params)
        if "values" in getattr(self.method, "outputs", ()):
            asked["values"] = functools.partial(self.policy.values, state.params)
        if getattr(self.method, "needs_dpo", False):
            assert self._dpo_logps is not None, "the run knows a DPO policy where the method asks for one"
            asked["dpo_logps"] = self._dpo_logps
        size = self._scored_together
        bare = dataclasses.replace(batch, rewards=None, old_logps=None, sources=None)
        found: dict[str, list] = {name: [] for name in asked}
        for start in range(0, max(len(batch.prompt_tokens), 1), size):
            rows = np.arange(len(batch.prompt_tokens))[start : start + size]
            part = self._place(_filled(_take(bare, rows), size))
            for name, function in asked.items():
                found[name].append(function(part))
        whole = {name: np.concatenate(x)[: len(batch.prompt_tokens)] for name, x in distributed.fetch(found).items()}
        dpo_logps = whole.pop("dpo_logps", None)
        if reads_reference and self.config.reference == "rollout":
            whole["ref_logps"] = whole["old_logps"]
        return dataclasses.replace(batch, **whole), dpo_logps


class _Clock:
    """Seconds between its calls, added up by name."""

    def __init__(self):
        self.seconds: collections.Counter[str] = collections.Counter()
        self._last = time.perf_counter()

    def __call__(self, what: str) -> None:
        now = time.perf_counter()
        self.seconds[what] += now - self._last
        self._last = now

    @property
    def means(self) -> dict[str, Mean]:
        return {what: _mean(seconds) for what, seconds in self.seconds.items()}


def _mean(value: float | int, count: float | int = 1) -> Mean:
    return Mean(np.float64(value), np.float64(count))


def _of_these(function: Callable, offered: dict[str, Any]) -> dict[str, Any]:
    """What the function reads beside the batch."""
    return {name: offered[name] for name in inspect.signature(function).parameters if name in offered}


def _take(batch: Batch, rows: np.ndarray) -> Batch:
    return jax.tree.map(lambda x: x[rows], batch)


def _filled(tree: Any, num_rows: int) -> Any:
    """A batch, or an array, with empty rows after its own, whose masks are all False."""
    return jax.tree.map(lambda x: np.pad(x, [(0, num_rows - len(x))] + [(0, 0)] * (np.ndim(x) - 1)), tree)


def _buckets(config: Config, policy: Any, examples: Sequence[Example]) -> Buckets:
    """The width of prompts, and a few lengths of completions.

    Raises:
        ValueError: examples with completions, or a prompt too long for the model.
    """
    length = config.max_completion_tokens
    longest = max(examples, key=lambda example: len(example.prompt))
    for example in examples:
        if example.completions or not len(example.prompt):
            what = "no prompt" if not len(example.prompt) else "completions"
            raise ValueError(f"rollouts: {example.id} has {what}; they need prompts alone, see pjpo.data.prompts")
    room = policy.config.max_positions - length
    if len(longest.prompt) > room:
        raise ValueError(
            f"rollouts: the prompt of {longest.id} has {len(longest.prompt)} tokens, but the model's "
            f"{policy.config.max_positions} positions less max_completion_tokens {length} leave {max(room, 0)}; set "
            "the data's max_prompt_tokens, or a smaller max_completion_tokens"
        )
    return Buckets((len(longest.prompt),), tuple(sorted({math.ceil(length / 2**halvings) for halvings in range(3)})))


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.prompt.tobytes() + json.dumps(example.columns, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
