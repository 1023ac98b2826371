"""DPO with the 0.85M-parameter model on pairs of its own samples of film reviews; seconds on a laptop.

    python -m experiments.dpo_glass

The loss starts at log 2 = 0.693 nats, where policy and reference agree, and falls from there. The model has read
nothing but Lewis Carroll, so its continuations of film reviews mean little: it is here to see the machinery work.
"""

from experiments.registry import Experiment, Model, launch
from pjpo import optim, train
from pjpo.data import reviews
from pjpo.evals import sentiment
from pjpo.methods import dpo
from pjpo.models import lora

EXPERIMENT = Experiment(
    loss=dpo.loss,
    method=dpo.Config(beta=0.1),
    model=Model(source="glassllm-en", lora=lora.Config(rank=8)),
    data=reviews.SampledPairs(num_openings=64, num_held_out=32),
    evaluation=sentiment.Config(num_completions=4),
    optimizer=optim.Config(learning_rate=1e-3, warmup_steps=5),
    loop=train.Loop(num_steps=60, log_every_steps=5, evaluate_every_steps=30, checkpoint_every_steps=20),
    batch_size=8,
    reference="adapter",
    smoke={
        "data.num_openings": 16,
        "data.num_held_out": 8,
        "loop.num_steps": 6,
        "loop.log_every_steps": 1,
        "loop.evaluate_every_steps": 3,
        "loop.checkpoint_every_steps": 2,
        "optimizer.warmup_steps": 2,
    },
)
if __name__ == "__main__":
    launch(EXPERIMENT)
