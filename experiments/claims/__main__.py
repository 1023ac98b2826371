"""Every claim at five seeds or more, written to docs/claims.md: `python -m experiments.claims`.

The results of studies on real models, which take longer, follow as they lie in docs/studies/: `result.md` and
`plot.png` of their last published runs, under the name of the study.
"""

import argparse
import datetime
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import tqdm

from experiments import registry
from experiments.claims import (
    differential_information,
    dpo,
    generalisation,
    grpo,
    insights,
    online_dpo,
    ranking,
    rdpo,
    reward_augmented,
    rso,
    rto,
    token_credit,
    unpacking,
)
from experiments.claims.claim import run, seeds, table
from pjpo import outputs, runs

OFFLINE = (dpo, rdpo, rso, insights, reward_augmented, ranking, generalisation, differential_information, token_credit)
PAPERS = (*OFFLINE, grpo, rto, unpacking, online_dpo)
CLAIMS = tuple(claim for paper in PAPERS for claim in paper.CLAIMS)
HEADER = """# What the papers claim, in miniature

`python -m experiments.claims` wrote this: {seeds}, {date}, JAX {jax}, CPU, {minutes:.1f} minutes. Numbers are
means over seeds ± half a 95 % t-interval; a difference is paired by seed, with its interval in brackets, and holds if
the interval lies above zero (or above the bound that is given). A toy can refute a mechanism; it cannot show that a
claim about large models is true. A claim that does not hold here stays in the table.
"""
REAL = """
## On real models

Each section is what a run of `python -m experiments.<name>` left: means over seeds ± half a 95 % t-interval, paired
differences with their interval in brackets. These models are small; what does not hold here may hold for large ones.
"""


@registry.told()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.claims", description=__doc__)
    parser.add_argument("--num-seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("docs/claims.md"))
    options = parser.parse_args(argv)
    outputs.check_file(options.out, "table", "choose another file with --out")
    began = time.perf_counter()
    verdicts = [run(claim, options.num_seeds) for claim in tqdm.tqdm(CLAIMS, desc="claims", unit="claim", disable=None)]
    minutes = (time.perf_counter() - began) / 60
    header = HEADER.format(
        seeds=seeds(options.num_seeds), date=datetime.date.today(), jax=jax.__version__, minutes=minutes
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    runs.write_whole(options.out, f"{header}\n{table(verdicts)}\n{real(options.out.parent / 'studies')}")
    held = sum(verdict.holds for verdict in verdicts)
    print(f"{held} of {len(verdicts)} claims hold; {options.out}")


def real(folder: Path) -> str:
    """The studies that are kept in a folder; nothing without any."""
    sections = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md"))]
    return "\n".join([REAL, *sections]) if sections else ""


if __name__ == "__main__":
    main()
