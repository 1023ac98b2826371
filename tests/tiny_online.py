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
from pjpo.rewards.protocol import Rewards


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


def early_letters(completions, **columns):
    """The share of characters before "n"."""
    return [float(np.mean([letter < "n" for letter in text] or [False])) for text in completions]


EXPERIMENT = Experiment(
    loss=grpo.loss,
    method=dataclasses.replace(grpo.GRPO, beta=0.01),
    model=Model(source=""),
    data=Prompts(),
    rollouts=online.Config(
        rewards=Rewards(functions=(early_letters,), weights=(1.0,)),
        prompts_per_rollout=4,
        num_epochs=2,
        num_completions=8,
        max_completion_tokens=8,
        temperature=0.8,
        sampling_batch_size=3,
        log_every_rollouts=2,
    ),
    optimizer=optim.Config(learning_rate=0.1, warmup_steps=4),
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
