"""A table of scaling: DPO and generation of three models on slices of TPUs, compiled for them and not run.

    python -m benchmarks.scaling results.jsonl          compile what is not in the file yet, a line for each program
    python -m benchmarks.scaling results.jsonl --table  print the file as a table

Each program is compiled in a process of its own, as the compiler keeps memory; a minute or two each on one core. With
`--effort=-1` it takes a fourth of that: products, collectives and the memory taken stay, but less is fused, so that the
traffic with the memory is about twice what it could be.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import jax

from pjpo import plan, sharding
from pjpo.models import decoder
from pjpo.plan import chips, shapes

# Model, slice, mesh (data, fsdp, model), pairs (prompts with two completions) for each device the batch is cut over.
# An update's first mesh of a slice is the one that the rule of docs/scaling.md picks; the others are there to compare.
ROWS = {
    "update": [
        ("Llama-3.2-1B", "v5e:2x2", (1, 4, 1), 1),
        ("Llama-3.2-1B", "v5e:4x4", (1, 16, 1), 2),
        ("Llama-3.2-1B", "v6e:2x2", (1, 4, 1), 4),
        ("Llama-3.2-1B", "v6e:4x4", (1, 16, 1), 4),
        ("Llama-3.2-1B", "v5p:2x2x1", (1, 4, 1), 8),
        ("Llama-3.1-8B", "v5e:4x4", (1, 16, 1), 1),
        ("Llama-3.1-8B", "v5e:8x8", (1, 64, 1), 1),
        ("Llama-3.1-8B", "v5e:8x8", (1, 32, 2), 2),
        ("Llama-3.1-8B", "v6e:4x4", (1, 16, 1), 2),
        ("Llama-3.1-8B", "v6e:8x8", (1, 64, 1), 3),
        ("Llama-3.1-8B", "v5p:2x2x4", (1, 16, 1), 4),
        ("Llama-3.1-8B", "v5p:4x4x4", (1, 64, 1), 4),
        ("Llama-3.1-8B", "v5p:4x4x4", (4, 16, 1), 4),
        ("Llama-3.1-8B", "v5p:4x4x8", (1, 128, 1), 4),
        ("Llama-3.1-70B", "v5p:4x4x4", (1, 64, 1), 4),
        ("Llama-3.1-70B", "v5p:4x4x4", (1, 16, 4), 16),
        ("Llama-3.1-70B", "v5p:4x4x8", (1, 128, 1), 4),
        ("Llama-3.1-70B", "v5p:8x8x8", (1, 128, 4), 8),
        ("Llama-3.1-70B", "v6e:16x16", (1, 64, 4), 8),
        ("Llama-3.1-70B", "v5e:16x16", (1, 256, 1), 1),
        ("Llama-3.1-70B", "v5e:16x16", (1, 64, 4), 4),
        ("Llama-3.1-70B", "v6e:16x16", (1, 256, 1), 1),
        ("Llama-3.1-70B", "v5p:8x8x8", (1, 512, 1), 4),
        ("Llama-3.1-70B", "v6e:8x8", (1, 64, 1), 1),
        ("Llama-3.1-70B", "v5e:8x8", (1, 64, 1), 1),
        ("Llama-3.1-8B", "v5e:2x2", (1, 4, 1), 1),
        ("Llama-3.1-8B", "v6e:2x2", (1, 4, 1), 1),
        ("Llama-3.1-70B", "v5p:4x8x8", (1, 256, 1), 4),
        ("Llama-3.1-8B", "v6e:16x16", (4, 64, 1), 3),
        ("Llama-3.2-1B", "v5e:8x8", (16, 4, 1), 2),
        ("Llama-3.2-1B", "v6e:8x8", (16, 4, 1), 4),
        ("Llama-3.2-1B", "v5p:2x2x4", (4, 4, 1), 8),
        ("Llama-3.2-1B", "v5p:4x4x4", (16, 4, 1), 8),
        ("Llama-3.2-1B", "v5p:4x8x8", (64, 4, 1), 8),
        ("Llama-3.2-1B", "v5p:8x8x8", (128, 4, 1), 8),
        ("Llama-3.2-1B", "v5e:16x16", (64, 4, 1), 2),
        ("Llama-3.2-1B", "v6e:16x16", (64, 4, 1), 4),
        ("Llama-3.1-8B", "v5p:2x2x1", (1, 4, 1), 4),
        ("Llama-3.1-8B", "v5p:4x8x8", (16, 16, 1), 4),
        ("Llama-3.1-8B", "v5p:8x8x8", (32, 16, 1), 4),
        ("Llama-3.1-8B", "v5p:4x4x8", (8, 16, 1), 4),
        ("Llama-3.1-8B", "v5e:16x16", (4, 32, 2), 2),
        ("Llama-3.2-1B", "v5p:4x4x8", (32, 4, 1), 8),
        ("Llama-3.2-1B", "v5e:4x4", (4, 4, 1), 2),
        ("Llama-3.2-1B", "v6e:4x4", (4, 4, 1), 4),
        ("Llama-3.1-8B", "v6e:8x8", (4, 16, 1), 3),
        ("Llama-3.1-8B", "v5e:4x4", (1, 8, 2), 2),
        ("Llama-3.1-8B", "v6e:4x4", (1, 8, 2), 4),
        ("Llama-3.1-8B", "v5p:2x2x4", (2, 8, 1), 4),
        ("Llama-3.1-8B", "v5e:16x16", (4, 64, 1), 1),
        ("Llama-3.1-70B", "v6e:8x16", (1, 32, 4), 4),
        ("Llama-3.1-70B", "v5p:2x4x4", (1, 32, 1), 1),
        ("Llama-3.1-70B", "v5p:2x2x4", (1, 16, 1), 1),
        ("Llama-3.2-1B", "v5e:8x16", (32, 4, 1), 2),
        ("Llama-3.2-1B", "v6e:8x16", (32, 4, 1), 4),
        ("Llama-3.1-8B", "v5e:8x16", (2, 32, 2), 2),
        ("Llama-3.1-8B", "v6e:8x16", (8, 16, 1), 3),
        ("Llama-3.1-8B", "v6e:8x16", (2, 64, 1), 3),
        ("Llama-3.1-8B", "v5e:4x8", (1, 16, 2), 2),
        ("Llama-3.1-8B", "v5e:4x8", (1, 32, 1), 1),
        ("Llama-3.1-8B", "v6e:4x8", (2, 16, 1), 3),
        ("Llama-3.1-8B", "v6e:4x8", (1, 16, 2), 6),
        ("Llama-3.1-8B", "v5p:2x4x4", (2, 16, 1), 4),
        ("Llama-3.1-8B", "v5p:2x4x4", (4, 8, 1), 4),
        ("Llama-3.1-70B", "v5p:2x4x4", (1, 8, 4), 4),
        ("Llama-3.1-70B", "v5p:4x4x8", (1, 32, 4), 16),
        ("Llama-3.1-70B", "v5p:4x8x8", (1, 64, 4), 16),
        ("Llama-3.1-70B", "v6e:8x16", (1, 64, 2), 2),
        ("Llama-3.1-70B", "v6e:8x8", (1, 16, 4), 4),
        ("Llama-3.1-70B", "v5e:8x16", (1, 32, 4), 4),
        ("Llama-3.1-70B", "v5e:8x16", (1, 128, 1), 1),
        ("Llama-3.1-70B", "v5p:2x2x4", (1, 4, 4), 4),
        ("Llama-3.1-8B", "v5p:2x2x1", (1, 2, 2), 8),
        ("Llama-3.1-8B", "v5p:4x8x8", (32, 8, 1), 4),
        ("Llama-3.1-8B", "v5p:8x8x8", (64, 8, 1), 4),
        ("Llama-3.1-8B", "v5e:8x16", (4, 32, 1), 1),
        ("Llama-3.1-8B", "v6e:16x16", (16, 16, 1), 3),
        ("Llama-3.2-1B", "v5e:4x8", (8, 4, 1), 2),
        ("Llama-3.2-1B", "v5e:4x8", (4, 8, 1), 2),
        ("Llama-3.2-1B", "v6e:4x8", (8, 4, 1), 4),
        ("Llama-3.2-1B", "v6e:4x8", (4, 8, 1), 4),
        ("Llama-3.2-1B", "v5p:2x4x4", (8, 4, 1), 8),
        ("Llama-3.2-1B", "v5p:2x4x4", (16, 2, 1), 8),
        ("Llama-3.2-1B", "v5e:2x2", (2, 2, 1), 1),
        ("Llama-3.2-1B", "v6e:2x2", (2, 2, 1), 4),
        ("Llama-3.2-1B", "v5p:2x2x1", (2, 2, 1), 8),
        ("Llama-3.2-1B", "v5p:2x2x4", (8, 2, 1), 8),
        ("Llama-3.2-1B", "v5e:8x8", (8, 8, 1), 2),
        ("Llama-3.2-1B", "v6e:8x8", (8, 8, 1), 4),
        ("Llama-3.2-1B", "v5p:4x4x4", (32, 2, 1), 8),
        ("Llama-3.2-1B", "v5e:8x16", (16, 8, 1), 2),
        ("Llama-3.2-1B", "v6e:8x16", (16, 8, 1), 4),
        ("Llama-3.2-1B", "v5p:4x4x8", (64, 2, 1), 8),
        ("Llama-3.2-1B", "v5e:16x16", (32, 8, 1), 2),
        ("Llama-3.2-1B", "v6e:16x16", (32, 8, 1), 4),
        ("Llama-3.2-1B", "v5p:4x8x8", (128, 2, 1), 8),
        ("Llama-3.2-1B", "v5p:8x8x8", (256, 2, 1), 8),
    ],
    "generation": [
        ("Llama-3.2-1B", "v5e:2x2", (1, 4, 1), 8),
        ("Llama-3.2-1B", "v5e:2x2", (4, 1, 1), 8),
        ("Llama-3.2-1B", "v6e:2x2", (4, 1, 1), 16),
        ("Llama-3.1-8B", "v5e:4x4", (2, 1, 8), 16),
        ("Llama-3.1-8B", "v6e:4x4", (4, 1, 4), 32),
        ("Llama-3.1-8B", "v5p:2x2x4", (16, 1, 1), 16),
        ("Llama-3.1-70B", "v5p:4x4x4", (8, 1, 8), 32),
        ("Llama-3.1-70B", "v6e:16x16", (8, 4, 8), 32),
    ],
}
PROGRAMS = {"update": plan.of_update, "generation": plan.of_generation}
SETTINGS = {"dtype": "bfloat16", "param_dtype": "float32", "scan_layers": True, "remat": True}


def compile_row(effort: float, model: str, topology: str, mesh: tuple[int, int, int], pairs: int, program: str) -> dict:
    """What one line of the file says, but for its name."""
    jax.config.update("jax_platforms", "cpu")
    if effort:
        jax.config.update("jax_exec_time_optimization_effort", effort)
        jax.config.update("jax_memory_fitting_effort", effort)
    chip, devices = chips.devices(topology)
    assert chip is not None, "these are TPUs"
    laid = sharding.make_mesh(sharding.Config(**dict(zip(sharding.MESH_AXES, mesh, strict=True))), devices)
    config = decoder.Config(**shapes.SHAPES[model] | SETTINGS)
    work = plan.Work(model=config, batch_size=pairs * sharding.num_batch_parts(laid))
    cost = PROGRAMS[program](work, laid, chip)
    return {
        "effort": effort,
        "bytes": cost.held | {"temporary": cost.temporary},
        "fits": cost.fits,
        "tokens": work.batch_size * work.num_completions * work.completion_tokens,
        **({"flops": cost.flops, "seconds": cost.seconds(chip)} if cost.program else {}),
        "collectives": [dataclasses.asdict(x) for x in cost.program.collectives[:20]] if cost.program else [],
        "versions": {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")},
    }


def table(lines: list[dict]) -> str:
    """Markdown, a row for each line, of small ones first."""
    head = ["model", "slice", "mesh; pairs a chip", "GiB a chip", "of", "compute, ms", "memory, ms", "network, ms"]
    rows = [head, ["---"] * len(head)]
    for line in sorted(lines, key=_place):
        model, topology, mesh, pairs, _ = line["row"]
        chip = chips.CHIPS[topology.partition(":")[0]]
        used = f"{sum(line['bytes'].values()) / chips.GIB:.1f}{'' if line['fits'] else ', does not fit'}"
        seconds = line.get("seconds", {})
        bound = "<= " if line["effort"] < 0 else ""
        times = [f"{1e3 * seconds[name]:.0f}" if seconds else "" for name in ("compute", "memory", "network")]
        times[1] = times[1] and bound + times[1]
        size, parts = math.prod(mesh), math.prod(mesh[:2])
        laid = f"{' x '.join(map(str, mesh))}; {pairs * parts / size:g}"
        rows.append([model, f"{topology}, {size} chips", laid, used, f"{chip.hbm / chips.GIB:g}", *times])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _place(line: dict) -> tuple:
    """Models by size, then chips, and slices of one kind by size."""
    model, topology, mesh, *_ = line["row"]
    return list(shapes.SHAPES).index(model), list(chips.CHIPS).index(topology.partition(":")[0]), math.prod(mesh), mesh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--effort", type=float, default=0.0, help="of the compiler, -1 to 1; for JAX below 0.12")
    options = parser.parse_args()
    if options.effort and not hasattr(jax.config, "jax_exec_time_optimization_effort"):
        parser.error(f"JAX {jax.__version__} cannot be told an effort; leave --effort away")
    lines = [json.loads(line) for line in options.file.read_text().splitlines()] if options.file.exists() else []
    if options.table:
        for program in options.programs:
            print(f"\n{program}\n\n{table([line for line in lines if line['row'][-1] == program])}")
        return
    done = {json.dumps(line["row"]) for line in lines}
    context = multiprocessing.get_context("spawn")
    try:
        file = options.file.open("a")  # before minutes of work for it
    except OSError as error:
        parser.error(str(error))
    failed = []
    with file:
        for row in [[*row, program] for program in options.programs for row in ROWS[program]]:
            if json.dumps(row) in done:
                continue
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                try:
                    result = pool.submit(compile_row, options.effort, *row).result()
                except BrokenProcessPool:
                    failed.append(row)
                    print(row, "the compiler ended the process; what it said is above", flush=True)
                    continue
            print(json.dumps({"row": row, **result}), file=file, flush=True)
            print(row, result.get("seconds", "does not fit"), flush=True)
    if failed:
        raise SystemExit(f"not in {options.file}, as the compiler failed on them: {failed}")


if __name__ == "__main__":
    main()
