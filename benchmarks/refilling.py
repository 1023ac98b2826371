"""What refilling the rows of ended completions could gain over halving the batch, from measured costs of a step.

    python -m benchmarks.bench gen_sizes --model mini --steps 2 | python -m benchmarks.refilling

Lengths are drawn geometrically, as a stop token of constant probability gives them, and cut. Every step costs what the
job `gen_sizes` measured for that many rows, between its sizes in proportion. A waiting completion takes an ended one's
row at no cost, so what is printed for refilling is the most that it could reach: once for each number of rows, which
themselves may halve when nothing waits any more. Prints JSON: tokens a second over those of a batch that never shrinks.
"""

import argparse
import json
import sys

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, default=64, help="of a rollout")
    parser.add_argument("--mean-tokens", type=float, default=48, help="of a completion that is not cut")
    parser.add_argument("--max-tokens", type=int, default=256, help="of any, and the length whose costs are looked up")
    parser.add_argument("--draws", type=int, default=100, help="of all lengths")
    args = parser.parse_args()
    costs = step_costs(json.load(sys.stdin)["variants"], args.max_tokens)
    random, gains = np.random.default_rng(0), {}
    for _ in range(args.draws):
        lengths = random.geometric(1 / args.mean_tokens, args.completions).clip(max=args.max_tokens).tolist()
        whole = seconds(lengths, args.completions, 0, costs)
        for rows in (args.completions >> shift for shift in range(4)):
            for halvings in range(4):
                name = f"{'no refilling' if rows == args.completions else f'{rows} rows refilled'}, {halvings} halvings"
                gains.setdefault(name, []).append(whole / seconds(lengths, rows, halvings, costs))
    print(json.dumps({name: round(float(np.mean(found)), 2) for name, found in gains.items()}, indent=1))


def step_costs(variants: dict[str, dict], length: int) -> tuple[list[int], list[float]]:
    """Rows in order, and the seconds of one step with each."""
    sizes = sorted((int(rows), name) for name in variants for rows, new in [name.split(" x ")] if int(new) == length)
    if len(sizes) < 2:
        sys.exit(f"costs of completions of {length} tokens at two sizes or more are needed, got {list(variants)}")
    return [rows for rows, _ in sizes], [float(np.median(variants[name]["step_s"])) / length for _, name in sizes]


def seconds(lengths: list[int], rows: int, halvings: int, costs: tuple[list[int], list[float]]) -> float:
    """Of decoding all completions in so many rows."""
    waiting, total, width = list(lengths), 0.0, rows
    growing = [waiting.pop() for _ in range(rows)]
    while growing:
        total += float(np.interp(width, *costs))
        growing = [left - 1 for left in growing if left > 1]
        while waiting and len(growing) < width:
            growing.append(waiting.pop())
        while halvings and not waiting and len(growing) <= width // 2:
            width, halvings = width // 2, halvings - 1
    return total


if __name__ == "__main__":
    main()
