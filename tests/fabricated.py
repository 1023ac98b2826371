"""A small run that never happened, with every kind of row a run writes."""

import numpy as np

from pjpo import runs

OPENINGS = ("I went to see this film", "The first ten minutes", "A quiet <drama> about", "My brother told me")


def make_run(root, experiment="dpo_sentiment", num_steps=200, beta=0.1):
    config = {"method": {"beta": beta}, "data": {"path": "reviews", "num_pairs": 512}, "num_steps": num_steps}
    folder = runs.create(root, experiment, config)
    rng = np.random.default_rng(0)
    folder.summary({"counts/pairs": 512, "counts/skipped: tie": 31, "counts/skipped: identical": 2})
    folder.summary({"start/reward_vader": 0.21, "start/reward_vader_stderr": 0.02, "start/kl": 0.0})
    folder.summary({"start/reward_judge": 0.55, "start/distinct_2": 0.81})
    for step in range(0, num_steps + 1, 2):
        done = 1 - np.exp(-3 * step / num_steps)
        chosen, rejected = 1.2 * done + rng.normal(0, 0.25), -1.8 * done + rng.normal(0, 0.25)
        training = {
            "loss": np.log1p(np.exp(rejected - chosen)),
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": np.clip(0.5 + 0.4 * done + rng.normal(0, 0.08), 0, 1),
            "logps/chosen": -84 + 12 * done + rng.normal(0, 2),
            "logps/rejected": -86 - 18 * done + rng.normal(0, 2),
            "grad_norm": 4 + rng.normal(0, 0.4),
            "learning_rate": 5e-5 * min(1, step / 20) * (1 - step / num_steps),
            "tokens_per_second": 3000 + rng.normal(0, 60),
        }
        folder.log(step, training)
        if step % (num_steps // 5) == 0:
            measured = {"reward_vader": 0.21 + 0.55 * done, "reward_judge": 0.55 + 0.2 * done, "kl": 11 * done**2}
            errors = {"reward_vader_stderr": 0.02, "reward_judge_stderr": 0.015, "kl_stderr": 0.5 * done}
            others = {"distinct_2": 0.81 - 0.1 * done, "mean_length": 31.0, "loss": training["loss"]}
            folder.log(step, {f"eval/{name}": value for name, value in (measured | errors | others).items()})
            for opening in OPENINGS:
                text = f"{opening} and it was {'wonderful' if done > 0.5 else 'long & dull'} ({step})"
                row = {"kind": "completion", "prompt": opening, "text": text, "reward_vader": measured["reward_vader"]}
                folder.sample(step, [row])
    folder.summary({f"eval/{name}": value for name, value in (measured | errors | others).items()})
    for num, vader, judge in ((1, 0.21, 0.55), (2, 0.45, 0.6), (4, 0.63, 0.64)):
        numbers = {"reward_vader": vader, "reward_judge": judge, "kl": np.log(num) - (num - 1) / num}
        folder.summary({f"best_of/{num}/{name}": value for name, value in numbers.items()})
    tokens = [" and", " it", " was", " really", " wonder", "ful", ",", " not", " a", " dull", " minute", "\n", "<b>"]
    for label in ("chosen", "rejected"):
        rewards = rng.normal(0, 0.05, len(tokens)) + np.array([0, 0, 0, 0.3, 0.9, 0.5, 0, -0.1, 0, -0.8, -0.2, 0, 0])
        row = {"kind": "token_rewards", "label": label, "prompt": OPENINGS[0], "tokens": tokens}
        folder.sample(num_steps, [row | {"token_rewards": rewards}])
    folder.summary({"finished": True})
    folder.close()
    return folder.path


def make_rollouts(root, num_steps=20):
    """The same of a run of GRPO."""
    folder = runs.create(root, "grpo_arithmetic", {"method": {"beta": 0.01}, "num_steps": num_steps})
    rng = np.random.default_rng(0)
    for step in range(1, num_steps + 1):
        share = step / num_steps
        lengths = {f"completions/{what}_length": length for what, length in (("mean", 3), ("min", 2), ("max", 4))}
        rewards = {"reward": 0.4 + 0.5 * share, "reward_std": 0.5 - 0.4 * share, "frac_reward_zero_std": share}
        gaps = {f"sampling/sampling_logp_difference/{what}": rng.uniform(0, 1e-6) for what in ("mean", "max")}
        times = {f"time/{what}": rng.uniform(1, 2) for what in ("generate", "reward", "score", "update")}
        folder.log(step, {"loss": rng.normal(), **lengths, **rewards, **gaps, **times})
        if step % 5 == 0:
            folder.log(step, {"eval/accuracy": 0.4 + 0.5 * share, "eval/accuracy_stderr": 0.05})
    for step, right in ((1, 2), (num_steps, 4)):
        for number in range(4):
            row = {
                "kind": "rollout",
                "rollout": step,
                "prompt": "1 + 2 =",
                "completion": " 3" if number < right else " 4",
            }
            advantage = 0.0 if right == 4 else 0.87 if number < right else -0.87
            scored = {"reward": float(number < right), "advantage": advantage, "truncated": number == 3}
            folder.sample(step, [row | scored])
    folder.summary({"finished": True})
    folder.close()
    return folder.path
