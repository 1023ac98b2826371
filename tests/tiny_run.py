"""A run of seconds, as a program to be killed: DPO of a tiny random Llama, all weights, on made-up pairs.

python -m tests.tiny_run --model.source FOLDER --runs RUNS
"""

import dataclasses
import json
import os
import time
from pathlib import Path

import jax
import numpy as np

from experiments.registry import Experiment, Model, launch
from pjpo import optim, runs, train
from pjpo.data.batches import Batches
from pjpo.data.examples import Data, Example
from pjpo.evals import held_out
from pjpo.methods import dpo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """Ragged, but of one bucket: one compilation."""

    num_pairs: int = 40
    vocab_size: int = 264

    def build(self, context):
        rng = np.random.default_rng(0)

        def tokens():
            return rng.integers(2, self.vocab_size, rng.integers(5, 9)).astype(np.int32)

        pairs = [Example(tokens(), (tokens(), tokens()), {}, f"made up:{row}") for row in range(self.num_pairs)]
        return Data(train=pairs[8:], held_out=pairs[:8], counts={"rows": len(pairs)}, about="made-up pairs")


EXPERIMENT = Experiment(
    loss=dpo.loss,
    method=dpo.Config(beta=0.1),
    model=Model(source=""),
    data=Pairs(),
    evaluation=held_out.Config(batch_size=8, num_sampled=0),
    optimizer=optim.Config(learning_rate=3e-3, warmup_steps=10, schedule="linear", weight_decay=0.1),
    loop=train.Loop(num_steps=120, evaluate_every_steps=30, checkpoint_every_steps=7),
    batch_size=6,  # of 32 pairs: epochs end within batches
    reference="online",
    num_microbatches=2,
    pack=True,
)


def log(folder, step, metrics, write=runs.RunFolder.log):
    """Slow enough to be watched; at a step that the environment names, for ever."""
    write(folder, step, metrics)
    time.sleep(600 if str(step) == os.environ.get("TINY_RUN_HANGS_AT") else 0.02)


def batch(self, index, read=Batches._batch):
    """A batch, with the rows that were read for it listed in a file of this process."""
    rows = self._rows(index)[0][self._own]
    path = Path(os.environ["TINY_RUN_READS"]) / f"{jax.process_index()}.json"
    before = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*before, rows.tolist()]))
    return read(self, index)


if __name__ == "__main__":
    runs.RunFolder.log = log
    if "TINY_RUN_READS" in os.environ:
        Batches._batch = batch
    launch(EXPERIMENT)
