"""What an update and a generation step take on a slice of TPUs, or on CPU devices, compiled here and not run.

    python -m pjpo.plan Llama-3.1-8B --topology v5p:2x2x4
    python -m pjpo.plan glassllm-en --topology cpu:8 --experiment dpo_glass --mesh.data 4 --mesh.fsdp 2

Everything is for one device. Times are the least that each resource allows by itself, from its maker's figures.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import tyro

from pjpo import models, optim, plan, sharding, step
from pjpo.data import examples
from pjpo.experiment import Experiment
from pjpo.methods import dpo
from pjpo.models import lora
from pjpo.models.load import PACKAGED
from pjpo.plan import chips, shapes
from pjpo.plan.chips import GIB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    model: tyro.conf.Positional[str]  # packaged, a folder with config.json, a .gguf file, or a shape: Llama-3.1-8B
    topology: str  # v5e, v5p or v6e and its chips along each axis, as in v5p:4x4x4; or cpu:8
    experiment: str | None = None  # take what follows from an experiment, and its method
    program: Literal["both", "update", "generation"] = "both"
    batch_size: int = 0  # prompts, over all devices; 0 is one for each device that the batch is cut over
    sampling_batch_size: int | None = None  # prompts decoded together; None: the rollout's, or batch_size
    # None: what the experiment samples, or its data holds at most. If nothing says, 512 or what the model has room for.
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    num_completions: int | None = None  # of each prompt; 2 without an experiment
    num_microbatches: int = 1
    pack: bool = False
    mesh: sharding.Config = dataclasses.field(default_factory=lambda: sharding.Config(data=1, fsdp=-1))
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of products and activations
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights at rest, and so of the optimizer
    scan_layers: bool = True
    remat: bool = True
    attention: Literal["plain", "flash"] = "plain"
    lora: lora.Config = dataclasses.field(default_factory=lambda: lora.Config(rank=0))
    scalar_head: bool = False  # for reward models and critics
    reference: step.Reference = "online"
    optimizer: optim.Config = dataclasses.field(default_factory=lambda: optim.Config(learning_rate=1e-6))
    loss: tyro.conf.Suppress[Callable] = dpo.loss
    method: tyro.conf.Suppress[Any] = dataclasses.field(default_factory=dpo.Config)
    rollouts: tyro.conf.Suppress[Any] = None
    critic: tyro.conf.Suppress[Any] = None  # an experiment's; its weights are taken to be as many as the model's


OF_WORK = ("num_microbatches", "reference", "optimizer", "loss", "method", "pack", "rollouts")
OF_EXPERIMENT = (*OF_WORK, "mesh", "batch_size", "critic")
OF_MODEL = ("dtype", "param_dtype", "scan_layers", "remat", "attention", "lora", "scalar_head")


def parse(argv: list[str] | None = None) -> Options:
    """The command line; an experiment's settings stand in for the defaults."""
    options = tyro.cli(Options, args=argv, prog="python -m pjpo.plan", description=__doc__)
    if options.experiment is None:
        return options
    found = importlib.import_module("experiments.registry").get(options.experiment)
    if not isinstance(found, Experiment):
        raise ValueError(f"plan: {options.experiment} is a study of many trainings; name an experiment, which is one")
    settings = {name: getattr(found, name) for name in OF_EXPERIMENT}
    settings |= {name: getattr(found.model, name) for name in OF_MODEL}
    settings |= sizes_of(found)
    if options.batch_size:  # another number of prompts, of which a rollout's would not be a multiple
        settings["sampling_batch_size"] = None
    default = dataclasses.replace(options, **settings)
    options = tyro.cli(Options, args=argv, default=default, prog="python -m pjpo.plan", description=__doc__)
    if options.num_completions is None:
        raise ValueError(
            f"plan: {options.experiment} does not say how many completions a row of its data holds; give "
            "--num-completions: 2 for pairs, 1 for single texts, or let its data config have a shape "
            "(pjpo.data.examples.Shape)"
        )
    return options


def sizes_of(found: Experiment) -> dict[str, int | None]:
    """Prompts and completions as far as the experiment states them: those it samples, or its data's limits."""
    sizes = dataclasses.asdict(getattr(found.data, "shape", examples.Shape()))
    if not (rollouts := found.rollouts):
        return sizes
    sampled = {"num_completions": rollouts.num_completions, "completion_tokens": rollouts.max_completion_tokens}
    return sizes | sampled | {"sampling_batch_size": rollouts.sampling_batch_size or rollouts.prompts_per_rollout}


def work_of(options: Options, mesh: jax.sharding.Mesh) -> plan.Work:
    """What the options ask for.

    Raises:
        ValueError: a model that is not known, or sizes that cannot be.
    """
    model = shape_of(options.model, options)
    prompt, completion = options.prompt_tokens, options.completion_tokens
    if completion is None:
        completion = min(512, max(1, model.max_positions // 2 if prompt is None else model.max_positions - prompt))
    if prompt is None:
        prompt = min(512, max(1, model.max_positions - completion))
    return plan.Work(
        model=model,
        batch_size=options.batch_size or sharding.num_batch_parts(mesh) * options.num_microbatches,
        sampling_batch_size=options.sampling_batch_size,
        prompt_tokens=prompt,
        completion_tokens=completion,
        num_completions=2 if options.num_completions is None else options.num_completions,
        critic=options.critic and dataclasses.replace(shape_of(options.model, options.critic), scalar_head=True),
        **{name: getattr(options, name) for name in OF_WORK},
    )


def shape_of(source: str, settings: Any) -> models.decoder.Config:
    """A model of these settings, those of the options or of an experiment's model."""
    chosen = {name: getattr(settings, name) for name in OF_MODEL}
    chosen["lora"] = settings.lora if settings.lora.rank else None
    if source in shapes.SHAPES:
        return models.decoder.Config(**shapes.SHAPES[source] | chosen)
    known = {name.lower(): name for name in (*shapes.SHAPES, *PACKAGED)}
    if source not in known.values() and not pathlib.Path(source).expanduser().exists():
        near = difflib.get_close_matches(source.lower(), known, n=1)
        raise ValueError(
            f"unknown model {source!r}{f'; did you mean {known[near[0]]!r}?' if near else '.'} Allowed: "
            f"{', '.join(known.values())}, a folder with config.json, or a .gguf file"
        )
    return models.shape(source, **chosen)


def describe(title: str, cost: plan.Cost, chip: chips.Chip | None) -> str:
    """A program's cost as a few lines of text."""
    lines = [f"\n{title}: memory of a device, GiB"]
    parts = cost.held | {"activations, temporaries": cost.temporary}
    lines += [f"  {name:26}{size / GIB:10.2f}" for name, size in parts.items()]
    room = "" if chip is None else f" of {chip.hbm / GIB:g}: {'fits' if cost.fits else 'DOES NOT FIT'}"
    lines.append(f"  {'together':26}{sum(parts.values()) / GIB:10.2f}{room}")
    if cost.program is None:
        return "\n".join([*lines, "  refused by the compiler, so there is nothing more to read"])
    lines.append(f"  products {cost.flops / 1e12:.3g} TFLOPs, memory traffic {cost.traffic / 1e9:.3g} GB")
    lines.append(f"  {'collective':20}{'devices':>8}{'count':>8}{'MB each':>10}{'GB sent':>10}")
    for x in cost.program.collectives[:12]:
        lines.append(f"  {x.kind:20}{x.devices:8}{x.count:8}{x.bytes / 1e6:10.3g}{x.sent / 1e9:10.3g}")
    if len(cost.program.collectives) > 12:
        rest = cost.program.collectives[12:]
        lines.append(f"  {f'and {len(rest)} smaller kinds':20}{'':26}{sum(x.sent for x in rest) / 1e9:10.3g}")
    if chip is not None:
        seconds = cost.seconds(chip)
        lines.append("  at best: " + ", ".join(f"{name} {1e3 * time:.4g} ms" for name, time in seconds.items()))
    return "\n".join(lines)


def run(options: Options) -> None:
    """Compile and print."""
    chip, devices = chips.devices(options.topology)
    mesh = sharding.make_mesh(options.mesh, devices)
    work = work_of(options, mesh)
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    print(f"{options.model} on {options.topology}, {len(devices)} devices: {axes}")

    def title(what: str, num_prompts: int, num_completions: int) -> str:
        each = f"{num_completions} completion{'s' * (num_completions > 1)} of {work.completion_tokens}"
        return f"{what}, {num_prompts} prompts of {work.prompt_tokens} tokens with {each} each"

    if options.program != "generation":
        cost = plan.of_update(work, mesh, chip)
        print(describe(title("update", work.batch_size, work.num_trained), cost, chip))
    if options.program != "update":
        cost = plan.of_generation(work, mesh, chip)
        print(describe(title("generation", work.num_sampled_prompts, work.num_completions), cost, chip))


def main(argv: list[str] | None = None) -> None:
    try:
        options = parse(argv)
        jax.config.update("jax_platforms", "cpu")  # whatever accelerator is here stays free
        name, _, count = options.topology.partition(":")
        if name == "cpu" and count.isdigit() and int(count) > 0:
            jax.config.update("jax_num_cpu_devices", int(count))
        run(options)
    except (ValueError, ModuleNotFoundError, OSError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
