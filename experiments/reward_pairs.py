"""A reward model from your own pairs, for `pjpo.rewards.learned`: Bradley-Terry on SmolLM2 with a scalar head.

    python -m experiments.reward_pairs --data.path pairs.jsonl
    python -m pjpo.models.export runs/reward_pairs/<id> folder
    python -m pjpo.rewards.normalise folder --data.path pairs.jsonl   # keeps the mean and spread of its scores there

Rows as `dpo_hh` reads them. Held-out loss, accuracy and margin along training; on a CPU core about 20 seconds an update
of 8 pairs of 300 tokens.
"""

from experiments.registry import SMOKE_PAIRS, Experiment, Model, launch
from pjpo import optim, train
from pjpo.data import preference
from pjpo.evals import held_out
from pjpo.methods import reward_model

EXPERIMENT = Experiment(
    loss=reward_model.loss,
    method=reward_model.Config(),
    model=Model(source="smollm2-135m-instruct", scalar_head=True),
    data=preference.Config(path="", num_held_out=64, max_prompt_tokens=256, max_completion_tokens=128),
    evaluation=held_out.Config(batch_size=8, num_sampled=0),
    optimizer=optim.Config(learning_rate=1e-5, warmup_steps=10),
    loop=train.Loop(num_steps=100, evaluate_every_steps=50, checkpoint_every_steps=50),
    batch_size=8,
    reference="none",
    smoke={
        "model.source": "glassllm-en",
        "data.path": SMOKE_PAIRS,
        "data.num_rows": 400,
        "data.num_held_out": 8,
        "data.max_prompt_tokens": 80,
        "data.max_completion_tokens": 40,
        "optimizer.warmup_steps": 2,
        "loop": train.Loop(num_steps=4, evaluate_every_steps=2, checkpoint_every_steps=2),
    },
)
if __name__ == "__main__":
    launch(EXPERIMENT)
