"""DPO on human preference pairs from your own file: HH's two columns, or TRL's prompt, chosen, rejected.

    python -m experiments.dpo_hh --data.path pairs.jsonl.gz

Reads JSON lines (gzipped or not), Parquet or a TFDS data set; `--smoke` has a few pairs of its own. The reference's
log-probs are computed once and stored. Held-out loss and reward accuracy along training; on two CPU cores about 20
seconds an update.
"""

from experiments.registry import SMOKE_PAIRS, Experiment, Model, launch
from pjpo import optim, train
from pjpo.data import preference
from pjpo.evals import held_out
from pjpo.methods import dpo

EXPERIMENT = Experiment(
    loss=dpo.loss,
    method=dpo.Config(beta=0.1),
    model=Model(source="smollm2-135m-instruct"),
    data=preference.Config(path="", num_held_out=64, max_prompt_tokens=256, max_completion_tokens=128),
    evaluation=held_out.Config(batch_size=8),
    optimizer=optim.Config(learning_rate=5e-6, warmup_steps=10),
    loop=train.Loop(num_steps=100, evaluate_every_steps=50, checkpoint_every_steps=50),
    batch_size=8,
    reference="stored",
    pack=True,
    smoke={
        "model.source": "glassllm-en",
        "data.path": SMOKE_PAIRS,
        "data.num_rows": 400,
        "data.num_held_out": 8,
        "data.max_prompt_tokens": 80,
        "data.max_completion_tokens": 40,
        "evaluation.max_completion_tokens": 8,
        "optimizer.warmup_steps": 2,
        "loop": train.Loop(num_steps=4, evaluate_every_steps=2, checkpoint_every_steps=2),
    },
)
if __name__ == "__main__":
    launch(EXPERIMENT)
