"""PPO against DPO from one SFT model, on the same pairs, equally tuned: SmolLM2 ends sentences of reviews.

    python -m experiments.unpacking_sentiment

VADER ranks what an SFT model samples. DPO learns from the pairs, PPO from a reward model of the same pairs, as Ivison
et al. 2024 have it: -10 for a sentence that does not end, the pull to the SFT model in the rewards, a critic with
weights of its own that begins as the reward model; but old log-probs are those of the rollout, so ratios are clipped,
as the paper says and its code does not. The best of nine policies by VADER, three strengths by three looks, is what a
method is worth: on other openings, by a classifier that taught nobody. Expect 106 minutes on a CPU core. So run,
neither leaves the SFT model by more than 1.5 nats and neither beats it (docs/claims.md), so it does not say which is
better.
"""

import dataclasses

from experiments.study import bench, dpo_and_ppo, stages, study
from pjpo import optim
from pjpo.data import reviews
from pjpo.experiment import Model
from pjpo.models import lora

STEPS = optim.Config(learning_rate=5e-4, warmup_steps=4, schedule="linear")
RANKING = dataclasses.replace(STEPS, critic_learning_rate=2e-3)
PPO = dataclasses.replace(STEPS, schedule="constant", critic_learning_rate=5e-4)
EXPERIMENT = dpo_and_ppo.Study(
    start=stages.Config(
        # Rounded to bfloat16, which decoding reads faster; see `grpo_arithmetic`.
        model=Model(source="smollm2-135m-instruct", param_dtype="bfloat16", lora=lora.Config(rank=8), scalar_head=True),
        num_held_out=64,
        max_completion_tokens=16,
        num_completions=1,
        stop=(".", "!", "?"),
        texts=reviews.Texts(num_reviews=288, num_held_out=0, max_completion_tokens=12, whole_sentences=True),
        sft=bench.Training(num_steps=24, batch_size=12, optimizer=STEPS),
        ranking=bench.Training(num_steps=56, batch_size=8, optimizer=RANKING),
    ),
    dpo=bench.Training(num_steps=24, batch_size=8, optimizer=STEPS),
    training=bench.Training(num_steps=16, batch_size=16, optimizer=PPO),
    minibatches=2,
    smoke={
        "start": stages.Config(
            model=Model(source="glassllm-en", scalar_head=True),
            num_held_out=8,
            max_completion_tokens=8,
            num_completions=1,
            stop=(".", "!", "?"),
            num_pair_openings=16,
            texts=reviews.Texts(num_reviews=16, num_held_out=0, max_completion_tokens=12, whole_sentences=True),
            sft=bench.Training(num_steps=2, batch_size=8),
            ranking=bench.Training(num_steps=2, batch_size=4, optimizer=optim.Config(learning_rate=1e-3)),
        ),
        "num_seeds": 2,
        "betas": ((0.1, 0.05),),
        "num_looks": 2,
        "dpo": bench.Training(num_steps=2, batch_size=4),
        "training": bench.Training(num_steps=2, batch_size=4),
    },
)
if __name__ == "__main__":
    study.launch(EXPERIMENT)
