"""GRPO on one-digit arithmetic: SmolLM2 learns sums and differences from right and wrong alone.

    python -m experiments.grpo_arithmetic

SmolLM2-135M-Instruct completes lines such as "7 - 4 =" behind four solved ones; reasoning-gym's scorer says of each of
8 samples whether it is right, and GRPO trains adapters on the difference within each group (Shao et al. 2024). On 64
held-out problems, along training: greedy accuracy, and the share that samples solve.
Expect, in about 30 minutes on a CPU core: greedy accuracy from 0.45 to 0.85 or more. Reached on 2026-11-30 (JAX
0.10.2, seed 0), at steps 0, 40, 80 and 120: 0.453, 0.844, 0.859 and 0.906 (standard errors 0.06 to 0.04;
docs/online_runs.md); by samples, 0.39 to 0.88. Most groups are all right then, and teach no more.
"""

from experiments.registry import Experiment, Model, launch
from pjpo import online, optim, train
from pjpo.data import tasks
from pjpo.evals import exact_match
from pjpo.methods import grpo
from pjpo.models import lora
from pjpo.rewards import reasoning_gym
from pjpo.rewards.protocol import Rewards

RIGHT = Rewards(functions=(reasoning_gym.Config(extract="first number"),), weights=(1.0,))
END = ("\n",)  # of an answer
EXPERIMENT = Experiment(
    loss=grpo.loss,
    method=grpo.Config(beta=0.01),
    # The file's 4-bit weights are rounded to bfloat16, which moves a token's log-prob by 0.008 nats on average, for all
    # that reads them alike; decoding reads half as much.
    model=Model(source="smollm2-135m-instruct", param_dtype="bfloat16", lora=lora.Config(rank=16)),
    data=tasks.Config(
        task="chain_sum",
        settings='{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}',
        num_train=96,
        num_held_out=64,
        form="plain",
        template="{expression} =",
        num_shots=4,
    ),
    rollouts=online.Config(
        rewards=RIGHT, prompts_per_rollout=16, num_completions=8, max_completion_tokens=4, stop=END, halvings=0
    ),
    evaluation=exact_match.Config(rewards=RIGHT, max_completion_tokens=4, stop=END),
    optimizer=optim.Config(learning_rate=1e-4, warmup_steps=10),
    loop=train.Loop(num_steps=120, log_every_steps=2, evaluate_every_steps=40, checkpoint_every_steps=40),
    batch_size=8,
    reference="adapter",
    keep_best_by=("eval/accuracy", "max"),
    smoke={
        "model.source": "glassllm-en",
        "data.num_train": 16,
        "data.num_held_out": 8,
        "data.num_shots": 1,
        "rollouts.stop": (),
        "evaluation.stop": (),
        "optimizer.warmup_steps": 2,
        "loop": train.Loop(num_steps=6, evaluate_every_steps=2, checkpoint_every_steps=2),
    },
)
if __name__ == "__main__":
    launch(EXPERIMENT)
