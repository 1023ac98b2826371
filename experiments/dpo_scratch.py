"""A policy from nothing: a SentencePiece vocabulary, supervised fine-tuning from random weights, then DPO.

    python -m experiments.dpo_scratch

Everything is learned from packaged film reviews: 2,048 pieces, a 1.05M-parameter Llama (SFT, full weights), then its
taste for kind words (DPO with adapters on its own samples, ranked by VADER). The first run has a folder of its own,
`runs/dpo_scratch_sft/<id>/`, whose `model/` is what `transformers` opens; started again, the experiment finds it.
Expect, in three minutes on a CPU core, reviews that hardly make sense, and a step in the right direction. Reached
on 2026-11-23 (JAX 0.10.2, seed 0): held-out SFT loss 7.66 to 5.44 nats a token; then held-out VADER 0.13 to 0.19, judge
0.46 to 0.50 (standard errors 0.04 and 0.02), KL 3.6 nats.
"""

from experiments.registry import Experiment, launch
from pjpo import optim, scratch, train
from pjpo.data import reviews
from pjpo.evals import held_out, sentiment
from pjpo.methods import dpo, sft
from pjpo.models import lora

SFT = Experiment(
    loss=sft.loss,
    method=sft.Config(),
    model=scratch.Random(source=""),
    data=reviews.Texts(num_reviews=2048, num_held_out=64),
    evaluation=held_out.Config(batch_size=32),
    optimizer=optim.Config(learning_rate=3e-3, warmup_steps=20, schedule="linear"),
    loop=train.Loop(num_steps=300, evaluate_every_steps=100, checkpoint_every_steps=100),
    batch_size=32,
    reference="none",
)
EXPERIMENT = Experiment(
    loss=dpo.loss,
    method=dpo.Config(beta=0.1),
    model=scratch.Trained(source="", name="dpo_scratch_sft", by=SFT, lora=lora.Config(rank=8)),
    data=reviews.SampledPairs(num_openings=256, num_held_out=64),
    evaluation=sentiment.Config(num_completions=4),
    optimizer=optim.Config(learning_rate=1e-3, warmup_steps=10, schedule="linear"),
    loop=train.Loop(num_steps=90, log_every_steps=2, evaluate_every_steps=30, checkpoint_every_steps=30),
    batch_size=8,
    reference="adapter",
    smoke={
        "model.by.model": scratch.Random(
            source="", vocab_size=512, num_layers=2, model_dim=32, num_heads=2, mlp_dim=64
        ),
        "model.by.data": reviews.Texts(num_reviews=64, num_held_out=8),
        "model.by.optimizer.warmup_steps": 2,
        "model.by.loop": train.Loop(num_steps=4, evaluate_every_steps=2, checkpoint_every_steps=4),
        "data.num_openings": 64,
        "data.num_held_out": 8,
        "batch_size": 4,
        "optimizer.warmup_steps": 2,
        "loop": train.Loop(num_steps=4, evaluate_every_steps=2, checkpoint_every_steps=2),
    },
)
if __name__ == "__main__":
    launch(EXPERIMENT)
