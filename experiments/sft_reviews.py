"""Supervised fine-tuning of SmolLM2 on positive film reviews, full weights.

    python -m experiments.sft_reviews

Held-out loss in nats per token, before and after; a few minutes on two CPU cores.
"""

from experiments.registry import Experiment, Model, launch
from pjpo import optim, train
from pjpo.data import reviews
from pjpo.evals import held_out
from pjpo.methods import sft

EXPERIMENT = Experiment(
    loss=sft.loss,
    method=sft.Config(),
    model=Model(source="smollm2-135m-instruct"),
    data=reviews.Texts(num_reviews=1024, num_held_out=64, label=1),
    evaluation=held_out.Config(batch_size=8),
    optimizer=optim.Config(learning_rate=2e-5, warmup_steps=5, schedule="linear"),
    loop=train.Loop(num_steps=40, evaluate_every_steps=20, checkpoint_every_steps=40),
    batch_size=8,
    reference="none",
    smoke={
        "model.source": "glassllm-en",
        "data.num_reviews": 32,
        "data.num_held_out": 8,
        "optimizer.warmup_steps": 2,
        "loop": train.Loop(num_steps=4, evaluate_every_steps=2, checkpoint_every_steps=2),
    },
)
if __name__ == "__main__":
    launch(EXPERIMENT)
