"""Speed and memory of one job, beside the same job with one part taken away: python -m benchmarks.bench dpo_fixed

Prints JSON. Weights are random, tokens are drawn from the job file's seed, so another program can be given the same
work. The variants of a job take turns in one process, step by step, as the load of a machine changes over minutes:

- `default`: what users get;
- `no_sharing`: every completion computes its own copy of the prompt;
- `full_head`: all logits at once, differentiated by JAX;
- `transposed`: products of XLA instead of outer products (generation in float32);
- `plain_products`: products as JAX writes them, in the compute dtype;
- `no_packing`: padding goes through every product (jobs of variable lengths);
- `sft`: the supervised loss on the same completions (jobs with a stored reference);
- `halvings_1` to `halvings_3`: rows that shrink by half as completions end (jobs whose completions end);
- `refilled_2`, `refilled_4`: that fraction of the rows, refilled as completions end, then halved; see refilled.py;
- `generate`, `update`, `update_no_sharing`: the parts of a step of GRPO, of which `default` is the whole;
- `weights_bf16`: weights that lie in memory as bfloat16, products in float32 as before (generation in float32).

Kinds of job: a `dpo` or `sft` step with AdamW on all weights (`ref` "adapter": on LoRA's alone), `score` (log-probs and
their gradient), `generate`, `sizes` (greedy generation, a variant for each batch size and length), `grpo` (full
completions and an update on them), and `head` (memory of the output head by vocabulary, compiled but not run).
A token counts wherever a row of its own would hold it: a prompt once for each completion. Times are CPU seconds on
one core, wall seconds on more.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import refilled
from pjpo import logps, optim, products, sampling, sharding, step
from pjpo.methods import dpo, grpo, sft
from pjpo.models import Policy, lora
from pjpo.models.decoder import Config
from pjpo.packing import pack
from pjpo.types import Batch

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
WIDTH_STEP, PLACE_STEP = 64, 64  # widths and packed places are rounded up to these: few shapes, little padding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job")
    parser.add_argument("--jobs", type=Path, default=Path(__file__).with_name("jobs.json"), help="job sizes, JSON")
    parser.add_argument("--model", default="smol135m")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of products; weights at rest are float32")
    parser.add_argument(
        "--attention",
        choices=("plain", "flash"),
        default="plain",
        help="flash: JAX's fused kernels, on GPU and TPU alone",
    )
    parser.add_argument(
        "--remat", action="store_true", help="compute layers again going backward, rather than keep them"
    )
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each variant; one more warms up")
    parser.add_argument("--variants", help="comma-separated; all that fit the job by default")
    args = parser.parse_args()
    spec = json.loads(args.jobs.read_text())
    for kind, name in (("jobs", args.job), ("models", args.model)):
        if name not in spec[kind]:
            parser.error(f"{args.jobs} has no {name!r} among its {kind}: {', '.join(spec[kind])}")
    cores = sorted(os.sched_getaffinity(0))[-args.cores :]
    os.sched_setaffinity(0, cores)
    job, model = spec["jobs"][args.job], spec["models"][args.model]
    kinds = {"dpo": train, "sft": train, "score": score, "generate": generate, "sizes": sizes}
    kinds |= {"grpo": rollout, "head": head}
    if job["kind"] not in kinds:
        parser.error(f"job {args.job!r} is of kind {job['kind']!r}; known: {', '.join(kinds)}")
    bench = Bench(spec, job, model, args)
    variants = kinds[job["kind"]](bench)
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    report = {
        "job": {"name": args.job, **job},
        "model": {"name": args.model, **model},
        "dtype": args.dtype,
        "attention": args.attention,
        "remat": args.remat,
        "cores": len(cores),
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "load_average": round(os.getloadavg()[0], 1),
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "max_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "variants": variants,
    }
    print(json.dumps(report, indent=1))


@dataclasses.dataclass
class Bench:
    """A job with its data, and the two things done to it: compile a variant, take turns in running them."""

    spec: dict
    job: dict
    model: dict
    args: argparse.Namespace

    def __post_init__(self):
        m, reference = self.model, self.job.get("ref")
        config = Config(
            vocab_size=m["vocab"],
            num_layers=m["layers"],
            model_dim=m["hidden"],
            num_heads=m["heads"],
            num_kv_heads=m["kv_heads"],
            head_dim=m["head_dim"],
            mlp_dim=m["ffn"],
            rope_theta=m["rope_theta"],
            norm_eps=m["norm_eps"],
            tied_head=m["tied"],
            max_positions=m["max_pos"],
            dtype=DTYPES[self.args.dtype],
            attention=self.args.attention,
            remat=self.args.remat,
            lora=lora.Config() if reference == "adapter" else None,
        )
        self.policy = Policy(config)
        name = self.args.job.removesuffix("_pre") + self.args.model  # a job and its "_pre" share their data
        seed = self.spec["seed"] + sum(ord(c) * 31**i for i, c in enumerate(name))
        self.random = np.random.RandomState(seed % 2**31)
        self.num_steps = self.args.steps + 1

    def tokens(self, count: int) -> list[int]:
        first = self.spec["special_tokens"]["first_free"]
        return self.random.randint(first, self.model["vocab"], size=count).tolist()

    def length(self, low: int, high: int) -> int:
        """Log-uniform; a fixed length draws nothing."""
        return low if low == high else round(math.exp(self.random.uniform(math.log(low), math.log(high))))

    def pairs(self) -> list[dict]:
        eos, rows = self.spec["special_tokens"]["eos"], []
        for _ in range(self.job["pairs"]):
            lengths = [self.length(*self.job[part]) for part in ("prompt", "completion", "completion")]
            prompt, *completions = [self.tokens(n - (i > 0)) for i, n in enumerate(lengths)]
            rows.append((prompt, [[*tokens, eos] for tokens in completions]))
        return rows

    def chosen(self, names: list[str]) -> list[str]:
        """The variants to run: those that fit, or those of them that were asked for."""
        asked = self.args.variants.split(",") if self.args.variants else names
        if unknown := [name for name in asked if name not in names]:
            raise SystemExit(f"job {self.args.job!r} has no variant {', '.join(unknown)}; it has {', '.join(names)}")
        return asked

    def compile(self, variant: str, jitted, *args) -> tuple[Callable, dict]:
        """The compiled program and what XLA says about it."""
        jax.clear_caches()  # or a function traced for another variant would be taken again
        with ExitStack() as stack:
            for place, other in PATCHES.get(variant, {}).items():
                stack.enter_context(mock.patch(place, other))
            start = _now(self.args.cores)
            compiled = jitted.lower(*args).compile()
            seconds = _now(self.args.cores) - start
        memory = compiled.memory_analysis()
        return compiled, {
            "compile_s": round(seconds, 2),
            "xla_gflop": round(compiled.cost_analysis()["flops"] / 1e9, 2),
            "temp_mb": round(memory.temp_size_in_bytes / 2**20, 1),
            "peak_mb": round(
                (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes) / 2**20
                + memory.temp_size_in_bytes / 2**20,
                1,
            ),
        }

    def take_turns(self, runs: dict[str, Callable[[int], object]], work: list | dict[str, list], facts: dict) -> dict:
        """Every variant does step i before any does step i + 1; the first step warms up, as does each new shape.

        Args:
            runs: by variant, what does step i and returns something to wait for.
            work: (tokens, nominal FLOPs) of each step; by variant, where they do not do the same.
            facts: by variant, what `compile` returned.
        """
        seconds = {name: [] for name in runs}
        for name, run in runs.items():  # a program's first run costs up to three of the later ones
            for i in range(self.num_steps if facts[name].get("shapes", 1) > 1 else 0):
                jax.block_until_ready(run(i))
        for i in range(self.num_steps):
            for name, run in runs.items():
                start = _now(self.args.cores)
                jax.block_until_ready(run(i))
                seconds[name].append(_now(self.args.cores) - start)
        results = {}
        for name in runs:
            done = work[name] if isinstance(work, dict) else work
            speeds = [tokens / s for (tokens, _), s in zip(done, seconds[name], strict=True)][1:]
            flops = [flop / s / 1e9 for (_, flop), s in zip(done, seconds[name], strict=True)][1:]
            first = next(iter(runs))
            slower = [mine / first for mine, first in zip(seconds[name], seconds[first], strict=True)][1:]
            results[name] = {
                "tokens_per_s": round(statistics.median(speeds), 1),
                "tokens_per_s_range": [round(min(speeds), 1), round(max(speeds), 1)],
                "nominal_gflop_per_s": round(statistics.median(flops), 1),
                f"time_over_{first}": round(statistics.median(slower), 3),
                "step_s": [round(s, 3) for s in seconds[name][1:]],
                **facts[name],
            }
        return results

    def work(self, prompt: int, completion: int, passes: float, scored: int | None = None) -> tuple[int, float]:
        """(tokens, nominal FLOPs) of one row by itself: matrices on real tokens, the head where one is predicted."""
        m, length = self.model, prompt + completion
        heads, keys = m["hidden"] * m["heads"] * m["head_dim"], m["hidden"] * m["kv_heads"] * m["head_dim"]
        matrices = m["layers"] * (2 * heads + 2 * keys + 3 * m["hidden"] * m["ffn"])
        attention = 2 * m["heads"] * m["head_dim"] * m["layers"] * length * (length + 1)
        scored = completion if scored is None else scored
        return length, passes * (2 * matrices * length + attention + 2 * m["vocab"] * m["hidden"] * scored)


def train(bench: Bench) -> dict:
    """Steps of `pjpo.step.make_update`, all variants on one state."""
    job, policy, spec = bench.job, bench.policy, bench.spec
    if job["kind"] == "dpo":
        rows = [bench.pairs() for _ in range(bench.num_steps)]
        reference = {"online": "online", "cached": "stored", "adapter": "adapter"}[job["ref"]]
        loss, method = dpo.loss, dpo.Config(beta=spec["beta"])
        names = ["default", "no_sharing", "full_head", "plain_products"]
        names += ["no_packing"] * (job["prompt"][0] < job["prompt"][1]) + ["sft"] * (reference == "stored")
    else:
        lines = [[bench.tokens(job["length"]) for _ in range(job["batch"])] for _ in range(bench.num_steps)]
        rows = [[(line[:1], [line[1:]]) for line in some] for some in lines]  # all but the first token are predicted
        reference, loss, method, names = "none", sft.loss, sft.Config(), ["default", "full_head", "plain_products"]
    passes = 4 if reference in ("online", "adapter") else 3
    work = [
        np.sum([bench.work(len(p), len(c), passes) for p, completions in some for c in completions], axis=0).tolist()
        for some in rows
    ]
    batches = [to_batch(some, ref_logps=reference == "stored") for some in rows]
    packed = [pack(b, prompt_step=PLACE_STEP, completion_step=PLACE_STEP) for b in batches]
    packing_pays = any(b.prompt_mask.mean() < 1 or b.completion_mask.mean() < 1 for b in batches)
    params = policy.init(jax.random.key(0))
    config = optim.Config(learning_rate=spec["lr"], max_grad_norm=spec["max_grad_norm"])
    optimizer = optim.make_optimizer(config, lambda _: spec["lr"])
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    state = step.init_state(policy, params, optimizer, jax.random.key(0), mesh)
    ref_params = jax.tree.map(lambda x: jnp.array(x, policy.config.dtype), params) if reference == "online" else None
    state_mb = sum(x.nbytes for x in jax.tree.leaves((state.params, ref_params))) / 2**20
    del params

    def runner(name: str) -> tuple[Callable, dict]:
        own, own_reference = (sft.loss, sft.Config()), "none"
        if name != "sft":
            own, own_reference = (loss, method), reference
        scored = Unshared(policy) if name == "no_sharing" else policy
        update = step.make_update(*own, scored, optimizer, mesh, reference=own_reference)
        data = packed if packing_pays and name not in ("no_packing", "no_sharing") else batches
        programs, facts = {}, {}
        for batch in data:
            if (shape := _shape(batch)) not in programs:
                programs[shape], new = bench.compile(name, update.jitted, state, ref_params, batch)
                facts = {key: max(facts.get(key, 0), value) for key, value in new.items()}

        def run(i: int):
            nonlocal state
            state, metrics = programs[_shape(data[i])](state, ref_params, data[i])
            return metrics

        return run, facts | {"shapes": len(programs), "policy_and_reference_mb": round(state_mb, 1)}

    runs = {name: runner(name) for name in bench.chosen(names)}
    return bench.take_turns({n: run for n, (run, _) in runs.items()}, work, {n: f for n, (_, f) in runs.items()})


def score(bench: Bench) -> dict:
    """Log-probs of a group of completions of one prompt, and their gradient by all weights."""
    job, names = bench.job, ["default", "no_sharing", "full_head", "plain_products"]
    batches = [
        to_batch(
            [
                (bench.tokens(job["prompt"]), [bench.tokens(job["completion"]) for _ in range(job["group"])])
                for _ in range(job["prompts"])
            ]
        )
        for _ in range(bench.num_steps)
    ]
    count, flops = bench.work(job["prompt"], job["completion"], 3)
    rows = job["prompts"] * job["group"]
    params = bench.policy.init(jax.random.key(0))
    runs = {}
    for name in bench.chosen(names):
        policy = Unshared(bench.policy) if name == "no_sharing" else bench.policy
        gradient = jax.jit(jax.grad(lambda params, batch, policy=policy: policy.logps(params, batch).mean()))
        program, facts = bench.compile(name, gradient, params, batches[0])
        runs[name] = (lambda i, program=program: program(params, batches[i])), facts
    work = [(rows * count, rows * flops)] * bench.num_steps
    return bench.take_turns({n: run for n, (run, _) in runs.items()}, work, {n: f for n, (_, f) in runs.items()})


def generate(bench: Bench) -> dict:
    """Completions of full length, weights in the compute dtype, or as bfloat16 numbers."""
    job, group = bench.job, bench.job.get("group", 1)
    prompts = [[bench.tokens(job["prompt"]) for _ in range(job["batch"])] for _ in range(bench.num_steps)]
    prompts = [np.array(some, np.int32) for some in prompts]
    config = bench.policy.config
    params = jax.tree.map(lambda x: jnp.array(x, config.dtype), bench.policy.init(jax.random.key(0)))
    # Any token is about as likely as another one, so a completion ends after `mean_tokens` on average.
    stops = range(config.vocab_size // job["mean_tokens"]) if "mean_tokens" in job else ()
    settings = sampling.Sampling(
        num_completions=group,
        max_completion_tokens=job["new_tokens"],
        temperature=0.0 if job["greedy"] else 1.0,
        stop_tokens=tuple(stops),
    )
    runs, halvings = {}, {f"halvings_{n}": n for n in (1, 2, 3) if stops}
    refills = {f"refilled_{part}": part for part in (2, 4) if stops}
    names = ["default", *halvings, *refills, "transposed", "plain_products"] + ["no_sharing"] * (group > 1)
    names += ["weights_bf16"] * (config.dtype == "float32")
    for name in bench.chosen(names):
        repeats, own, policy, weights = 1, settings, bench.policy, params
        if name in halvings:
            own = dataclasses.replace(settings, halvings=halvings[name])
        if name == "weights_bf16":
            policy = Policy(dataclasses.replace(config, param_dtype="bfloat16"))
            weights = jax.tree.map(lambda x: x.astype("bfloat16"), params)
        if name == "no_sharing":
            repeats, own = group, dataclasses.replace(settings, num_completions=1)

        def inputs(tokens, repeats=repeats, own=own):
            tokens = np.repeat(tokens, repeats, axis=0)
            keys = sampling.sequence_keys(jax.random.key(0), len(tokens), own.num_completions)
            return sampling.Prompts(tokens, np.ones(tokens.shape, bool)), keys

        @functools.partial(jax.jit, static_argnums=(0, 1))
        def refill(config, own, params, prompts, keys, name=name):
            rows, own = keys.size // refills[name], dataclasses.replace(own, halvings=3)
            return refilled.generate(config, own, params, prompts, keys, rows, max(1, rows // 8))

        given = weights, *inputs(prompts[0])
        plain = name in ("transposed", "plain_products")
        decode = (
            refill if name in refills else sampling.transposed if plain else sampling.program(policy.config, *given)
        )
        program, facts = bench.compile(name, decode, policy.config, own, *given)
        run = lambda i, p=program, w=weights, inputs=inputs: p(w, *inputs(prompts[i]))  # noqa: E731
        runs[name] = run, facts
    count = job.get("mean_tokens", job["new_tokens"])
    rows, (_, flops) = job["batch"] * group, bench.work(job["prompt"], count - 1, 1, count)
    work = [(rows * count, rows * flops)] * bench.num_steps
    return bench.take_turns({n: run for n, (run, _) in runs.items()}, work, {n: f for n, (_, f) in runs.items()})


def sizes(bench: Bench) -> dict:
    """Greedy completions of full length by batch size and length; weights in the compute dtype."""
    job, policy = bench.job, bench.policy
    params = jax.tree.map(lambda x: jnp.array(x, policy.config.dtype), policy.init(jax.random.key(0)))
    shapes = {f"{batch} x {new}": (batch, new) for batch in job["batches"] for new in job["new_tokens"]}
    runs, work, about = {}, {}, {}
    for name in bench.chosen(list(shapes)):
        batch, new = shapes[name]
        tokens = np.array([bench.tokens(job["prompt"]) for _ in range(batch)], np.int32)
        settings = sampling.Sampling(max_completion_tokens=new, temperature=0.0)
        keys = sampling.sequence_keys(jax.random.key(0), batch, 1)
        given = params, sampling.Prompts(tokens, np.ones(tokens.shape, bool)), keys
        decode = sampling.program(policy.config, *given)
        program, about[name] = bench.compile(name, decode, policy.config, settings, *given)
        runs[name] = lambda i, program=program, given=given: program(*given)
        work[name] = [(batch * new, batch * bench.work(job["prompt"], new - 1, 1, new)[1])] * bench.num_steps
    return bench.take_turns(runs, work, about)


def rollout(bench: Bench) -> dict:
    """Completions of full length and one update on them, with advantages out of the air: any cost the same."""
    job, policy, spec = bench.job, bench.policy, bench.spec
    prompts = [np.array([bench.tokens(job["prompt"]) for _ in range(job["prompts"])], np.int32)] * bench.num_steps
    settings = sampling.Sampling(num_completions=job["group"], max_completion_tokens=job["new_tokens"])
    shape = (job["prompts"], job["group"], job["new_tokens"])
    advantages = bench.random.normal(size=shape[:2]).astype(np.float32)
    config = optim.Config(learning_rate=spec["lr"], max_grad_norm=spec["max_grad_norm"])
    optimizer = optim.make_optimizer(config, lambda _: spec["lr"])
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    state = step.init_state(policy, policy.init(jax.random.key(0)), optimizer, jax.random.key(0), mesh)
    keys = sampling.sequence_keys(jax.random.key(0), *shape[:2])

    def inputs(i: int) -> sampling.Prompts:
        return sampling.Prompts(prompts[i], np.ones(prompts[i].shape, bool))

    def batch_of(i: int, tokens) -> Batch:
        return Batch.of(prompt_tokens=prompts[i], completion_tokens=tokens, advantages=advantages)

    decode = sampling.program(policy.config, state.params, inputs(0), keys)
    generator, facts = bench.compile("generate", decode, policy.config, settings, state.params, inputs(0), keys)
    some, programs, about = np.ones(shape, np.int32), {}, {"default": facts, "generate": facts}
    for name, scored in (("update", policy), ("update_no_sharing", Unshared(policy))):
        update = step.make_update(grpo.loss, grpo.Config(beta=0.0), scored, optimizer, mesh, reference="none")
        programs[name], about[name] = bench.compile(name, update.jitted, state, None, batch_of(0, some))

    def update(i: int, name: str, tokens=some):
        nonlocal state
        state, metrics = programs[name](state, None, batch_of(i, tokens))
        return metrics

    runs = {
        "default": lambda i: update(i, "update", generator(state.params, inputs(i), keys).tokens),
        "generate": lambda i: generator(state.params, inputs(i), keys),
        **{name: functools.partial(update, name=name) for name in programs},
    }
    rows, new = shape[0] * shape[1], job["new_tokens"]
    flops = bench.work(job["prompt"], new - 1, 1, new)[1] + bench.work(job["prompt"], new, 3)[1]
    chosen = bench.chosen(list(runs))
    work = [(rows * new, rows * flops)] * bench.num_steps
    return bench.take_turns({n: runs[n] for n in chosen}, work, {n: about[n] for n in chosen})


def head(bench: Bench) -> dict:
    """Memory that log-probs and their gradient take beyond inputs and results, by vocabulary."""
    results, dtype = {}, bench.policy.config.dtype
    for vocab in bench.job["vocabs"]:
        hidden = jax.ShapeDtypeStruct((1, bench.job["positions"], bench.model["hidden"]), dtype)
        table = jax.ShapeDtypeStruct((vocab, bench.model["hidden"]), jnp.float32)
        targets = jax.ShapeDtypeStruct(hidden.shape[:2], jnp.int32)
        for name, function in (("default", logps.token_logps), ("full_head", full_logits)):

            def total(hidden, table, targets, function=function):
                return function(hidden, table, targets, bench.policy.config.head_block_numbers).sum()

            _, facts = bench.compile(name, jax.jit(jax.grad(total, argnums=(0, 1))), hidden, table, targets)
            results[f"{name}, vocabulary {vocab}"] = facts | {"table_mb": round(table.size * 4 / 2**20, 1)}
    return results


@dataclasses.dataclass(frozen=True)
class Unshared:
    """A policy that computes a prompt again for each of its completions."""

    policy: Policy

    def logps(self, params: dict, batch: Batch) -> jax.Array:
        shape = batch.completion_tokens.shape

        def alone(x):
            return x.reshape(shape[0] * shape[1], 1, shape[2])

        rows = Batch.of(
            prompt_tokens=jnp.repeat(batch.prompt_tokens, shape[1], axis=0),
            prompt_mask=jnp.repeat(batch.prompt_mask, shape[1], axis=0),
            completion_tokens=alone(batch.completion_tokens),
            completion_mask=alone(batch.completion_mask),
        )
        return self.policy.logps(params, rows).reshape(shape)

    def __getattr__(self, name: str):
        return getattr(self.policy, name)


def full_logits(hidden, table, targets, block_numbers, softcap=None, temperature=1.0):
    """`pjpo.logps.token_logps` as one writes it at first."""
    logits = jnp.einsum("gcd,vd->gcv", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)
    logits = logps.soft_cap(logits, softcap) / temperature
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def plain_product(x, kernel, cut=()):
    return jnp.tensordot(x, kernel.astype(x.dtype), 1)


PATCHES = {
    "full_head": {"pjpo.models.policy.token_logps": full_logits},
    "plain_products": {
        "pjpo.models.decoder.product": plain_product,
        "pjpo.models.decoder.few_rows": lambda x, kernel, transposed: plain_product(x, kernel),
        "pjpo.sampling.few_rows": lambda x, kernel, transposed: products.dot(x, kernel, (x.ndim - 1,), (0,)),
        "pjpo.logps.contract_rows": lambda a, b: products.dot(a, b, tuple(range(a.ndim - 1)), tuple(range(a.ndim - 1))),
    },
}


def to_batch(rows: list[tuple[list[int], list[list[int]]]], ref_logps: bool = False) -> Batch:
    """(prompt, completions) of each row, padded to widths that few batches differ in."""
    width = _round_up(max(len(prompt) for prompt, _ in rows))
    length = _round_up(max(len(c) for _, completions in rows for c in completions))
    prompts, counts = np.zeros((len(rows), width), np.int32), (len(rows), len(rows[0][1]), length)
    prompt_mask, completions, mask = np.zeros(prompts.shape, bool), np.zeros(counts, np.int32), np.zeros(counts, bool)
    for b, (prompt, its_completions) in enumerate(rows):
        prompts[b, : len(prompt)], prompt_mask[b, : len(prompt)] = prompt, True
        for n, tokens in enumerate(its_completions):
            completions[b, n, : len(tokens)], mask[b, n, : len(tokens)] = tokens, True
    return Batch.of(
        prompt_tokens=prompts,
        prompt_mask=prompt_mask,
        completion_tokens=completions,
        completion_mask=mask,
        ref_logps=np.zeros(counts, np.float32) if ref_logps else None,  # any numbers cost the same
    )


def _round_up(count: int) -> int:
    return count if count == 1 or count % WIDTH_STEP == 0 else -(-count // WIDTH_STEP) * WIDTH_STEP


def _shape(batch: Batch) -> tuple:
    return jax.tree.structure(batch), *(x.shape for x in jax.tree.leaves(batch))


def _now(cores: int) -> float:
    return time.process_time() if cores == 1 else time.perf_counter()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
