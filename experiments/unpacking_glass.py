"""PPO against DPO as in `unpacking_sentiment`, on the 0.85M-parameter model, all of whose weights learn.

    python -m experiments.unpacking_glass

SFT has to teach it what a pretrained model knows: to write sentences about films that end. Eight minutes on a CPU core;
what came out, PPO ahead of DPO by less than the intervals, is in docs/studies/unpacking_glass.md.
"""

import dataclasses

from experiments import unpacking_sentiment
from experiments.study import bench, stages, study
from pjpo import optim
from pjpo.data import reviews
from pjpo.experiment import Model

SFT = optim.Config(learning_rate=1e-3, warmup_steps=10, schedule="linear")
RANKING = dataclasses.replace(SFT, learning_rate=5e-4)
EXPERIMENT = dataclasses.replace(
    unpacking_sentiment.EXPERIMENT,
    start=stages.Config(
        model=Model(source="glassllm-en", scalar_head=True),
        num_held_out=192,
        max_completion_tokens=24,
        num_completions=2,
        stop=(".", "!", "?"),
        num_pair_openings=512,
        texts=reviews.Texts(num_reviews=640, num_held_out=0, max_completion_tokens=20, whole_sentences=True),
        sft=bench.Training(num_steps=120, batch_size=32, optimizer=SFT),
        ranking=bench.Training(num_steps=120, batch_size=16, optimizer=RANKING),
    ),
    dpo=bench.Training(num_steps=32, optimizer=optim.Config(learning_rate=5e-4, warmup_steps=4, schedule="linear")),
    minibatches=4,
    training=bench.Training(
        num_steps=64,
        batch_size=16,
        optimizer=optim.Config(learning_rate=5e-4, critic_learning_rate=5e-4, warmup_steps=4),
    ),
)
if __name__ == "__main__":
    study.launch(EXPERIMENT)
