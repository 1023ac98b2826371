"""GRPO of seconds, as a program to be killed: a tiny random Llama learns to write early letters.

python -m tests.tiny_online --model.source FOLDER --runs RUNS
"""

import dataclasses
import time

import numpy as np

from experiments.registry import Experiment, Model, launch
from pjpo import online, optim, runs, train
from pjpo.data.examples import Data, Example
from pjpo.methods import grpo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    num_prompts: int = 10
    num_held_out: int = 4

    def build(self, context):
        rng = np.random.default_rng(0)

        def example(row):
            prompt = rng.integers(2, 264, rng.integers(2, 6)).astype(np.int32)
            return Example(prompt, (), {"row": row}, f"made up:{row}")

        examples = [example(row) for row in range(self.num_prompts + self.num_held_out)]
        train, held_out = examples[: self.num_prompts], examples[self.num_prompts :]
        return Data(train=train, held_out=held_out, counts={"rows": len(examples)}, about="made-up prompts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Letters:
    """The share of completions' characters below "n"."""

    def build(self):
        return self

    def score(self, completions, *, prompts, columns):
        shares = [[np.mean([c < "n" for c in text] or [0.0]) for text in group] for group in completions]
        return shares, {"letters": shares}


EXPERIMENT = Experiment(
    loss=grpo.loss,
    method=dataclasses.replace(grpo.GRPO, beta=0.01),
    model=Model(source=""),
    data=Prompts(),
    rollouts=online.Config(
        rewards=Letters(),
        prompts_per_rollout=4,
        num_epochs=2,
        num_completions=4,
        max_completion_tokens=8,
        sampling_batch_size=3,
        log_every_rollouts=2,
    ),
    optimizer=optim.Config(learning_rate=1e-2, warmup_steps=4),
    loop=train.Loop(num_steps=96, checkpoint_every_steps=8),
    batch_size=2,  # so a rollout is four updates, and prompts' epochs end within rollouts
    reference="online",
)


def log(folder, step, metrics, write=runs.RunFolder.log):
    """Slow enough to be watched."""
    write(folder, step, metrics)
    time.sleep(0.02)


if __name__ == "__main__":
    runs.RunFolder.log = log
    launch(EXPERIMENT)
