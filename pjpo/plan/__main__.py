"""What an update and a generation step take on a slice of TPUs, or on CPU devices, compiled here and not run.

    python -m pjpo.plan Llama-3.1-8B --topology v5p:2x2x4
    python -m pjpo.plan glassllm-en --topology cpu:8 --experiment dpo_glass --mesh.data 4 --mesh.fsdp 2

Everything is for one device. Times are the least that each resource allows by itself, from its maker's figures.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import tyro

from pjpo import models, optim, plan, sharding, step
from pjpo.experiment import Experiment
from pjpo.methods import dpo
from pjpo.models import lora
from pjpo.plan import chips, shapes
from pjpo.plan.chips import GIB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    model: tyro.conf.Positional[str]  # packaged, a folder with config.json, a .gguf file, or a shape: Llama-3.1-8B
    topology: str  # v5e, v5p or v6e and its chips along each axis, as in v5p:4x4x4; or cpu:8
    experiment: str | None = None  # take what follows from an experiment, and its method
    program: Literal["both", "update", "generation"] = "both"
    batch_size: int = 0  # prompts, over all devices; 0 is one for each device that the batch is cut over
    prompt_tokens: int = 512
    completion_tokens: int = 512
    num_completions: int = 2  # of each prompt
    num_microbatches: int = 1
    mesh: sharding.Config = dataclasses.field(default_factory=lambda: sharding.Config(data=1, fsdp=-1))
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of products and activations
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights at rest, and so of the optimizer
    scan_layers: bool = True
    remat: bool = True
    attention: Literal["plain", "flash"] = "plain"
    lora: lora.Config = dataclasses.field(default_factory=lambda: lora.Config(rank=0))
    reference: step.Reference = "online"
    optimizer: optim.Config = dataclasses.field(default_factory=lambda: optim.Config(learning_rate=1e-6))
    loss: tyro.conf.Suppress[Callable] = dpo.loss
    method: tyro.conf.Suppress[Any] = dataclasses.field(default_factory=dpo.Config)


OF_EXPERIMENT = ("mesh", "batch_size", "num_microbatches", "reference", "optimizer", "loss", "method")
OF_MODEL = ("dtype", "param_dtype", "scan_layers", "remat", "attention", "lora")


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
    default = dataclasses.replace(options, **settings)
    return tyro.cli(Options, args=argv, default=default, prog="python -m pjpo.plan", description=__doc__)


def work_of(options: Options, mesh: jax.sharding.Mesh) -> plan.Work:
    settings = {name: getattr(options, name) for name in OF_MODEL}
    settings["lora"] = options.lora if options.lora.rank else None
    if options.model in shapes.SHAPES:
        config = models.decoder.Config(**shapes.SHAPES[options.model] | settings)
    else:
        config = models.shape(options.model, **settings)
    names = [field.name for field in dataclasses.fields(plan.Work) if field.name not in ("model", "batch_size")]
    batch_size = options.batch_size or sharding.num_batch_parts(mesh) * options.num_microbatches
    return plan.Work(model=config, batch_size=batch_size, **{name: getattr(options, name) for name in names})


def describe(title: str, cost: plan.Cost, chip: chips.Chip | None) -> str:
    """A program's cost as a few lines of text."""
    lines = [f"\n{title}: memory of a device, GiB"]
    parts = cost.held | {"activations, temporaries": cost.temporary}
    lines += [f"  {name:26}{size / GIB:10.2f}" for name, size in parts.items()]
    room = "" if chip is None else f" of {chip.hbm / GIB:.0f}: {'fits' if cost.fits else 'DOES NOT FIT'}"
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
    print(
        f"{work.batch_size} prompts of {work.prompt_tokens} tokens, "
        f"{work.num_completions} completions of {work.completion_tokens} each"
    )
    if options.program != "generation":
        print(describe("update", plan.of_update(work, mesh, chip), chip))
    if options.program != "update":
        print(describe("generation", plan.of_generation(work, mesh, chip), chip))


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
