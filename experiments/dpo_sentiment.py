"""DPO's controlled-sentiment study, small and real: SmolLM2 learns to continue film reviews kindly.

    python -m experiments.dpo_sentiment

SmolLM2-135M-Instruct continues the first 8 tokens of reviews, four samples each; VADER ranks them; best against worst
are the pairs; DPO trains adapters (Rafailov et al. 2023, section 6.1). On held-out openings, along training: reward by
VADER, by an independent judge, KL to the reference; drawn as the reward-KL frontier beside best-of-n.
Expect, in about ten minutes on two CPU cores: held-out VADER reward up by 0.3 or more at a KL below 25 nats, and the
judge with it. Reached on 2026-11-23 (JAX 0.10.2, seed 0): VADER 0.25 to 0.67, judge 0.52 to 0.70, KL 13.9.
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
    model=Model(source="smollm2-135m-instruct", lora=lora.Config(rank=8)),
    data=reviews.SampledPairs(num_openings=256, num_held_out=64, num_held_out_pairs=16, sampling_batch_size=16),
    evaluation=sentiment.Config(num_completions=4),
    optimizer=optim.Config(learning_rate=3e-4, warmup_steps=10, schedule="linear"),
    loop=train.Loop(num_steps=90, log_every_steps=2, evaluate_every_steps=30, checkpoint_every_steps=30),
    batch_size=8,
    reference="adapter",
    keep_best_by=("eval/reward_vader", "max"),
    smoke={
        "model.source": "glassllm-en",
        "data.num_openings": 16,
        "data.num_held_out": 8,
        "optimizer.warmup_steps": 2,
        "loop": train.Loop(num_steps=6, evaluate_every_steps=3, checkpoint_every_steps=2),
    },
)
if __name__ == "__main__":
    launch(EXPERIMENT)
