"""What `Config()` of each method is, beside where its numbers come from.

Most of a method's own tests set what they compute with, so that they go on holding when a default changes; this table
does not. A method without a row here says the same in its own tests.
"""

import dataclasses
import importlib

import pytest

from pjpo.methods import grpo

# Shao et al. 2024 have beta 0.04 and means over each completion; std with n - 1 and 1e-4 is TRL's, the clip PPO's.
GRPO = {
    "baseline": "group",
    "std": "group",
    "std_ddof": 1,
    "std_eps": 1e-4,
    "importance": "token",
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "dual_clip": None,
    "aggregation": "sequence",
    "max_completion_tokens": None,
    "beta": 0.04,
    "kl": "k3",
    "kl_in": "loss",
}
# Ivison et al. 2024 and its code (hamishivi/EasyLM): KL coefficient 0.05 and not adapted, value loss 0.1, both means
# over tokens, both clips 0.2, gamma 1, lambda 0.95, -10 for a missing end where that is asked for. Schulman et al. 2017
# has the clip; the horizon of Ziegler et al. 2019's controller is 10,000.
PPO = {
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "value_clip": 0.2,
    "value_weight": 0.1,
    "aggregation": "token",
    "gamma": 1.0,
    "lam": 0.95,
    "beta": 0.05,
    "kl_target": None,
    "kl_horizon": 10_000,
    "missing_end_score": None,
    "old_logps": "rollout",
}
DEFAULTS = {
    "cdpo": {"beta": 0.1, "flip_rate": 0.1},  # DPO's beta; the rate is a property of the data
    "cpo": {"beta": 0.1, "nll_weight": 1.0, "nll_reduction": "mean"},  # TRL's CPOConfig, which the authors contributed
    "dpo": {"beta": 0.1},  # Rafailov et al. 2023, appendix B
    "dpo_attenuated": {"beta": 0.1, "gamma": 0.5},  # of those that Chen et al. 2024 try: 0.01 to 10, and 0 to 2
    "grpo": GRPO,
    "ipo": {"beta": 0.1, "reduction": "mean"},  # TRL's beta; means as there since January 2024
    "kto": {"beta": 0.1, "weight_chosen": 1.0, "weight_rejected": 1.0},  # Ethayarajh et al. 2024 and TRL
    "orpo": {"weight": 0.1},  # lambda: TRL's ORPOConfig, and the Mistral of Hong et al. 2024
    "ppo": PPO,
    "rdpo": {"beta": 0.1, "flip_rate": 0.1},  # likewise
    "reward_model": {"center_weight": 0.0, "annotated_margins": False},  # Ouyang et al. 2022 have neither
    "rso": {"gamma": 0.05, "form": "sigmoid_norm"},  # Liu et al. 2023, section 5
    # Zhong et al. 2024, table of appendix D: beta_1 to beta_3; value loss, clip and means of their released script.
    "rto": PPO
    | {"variant": "rto", "dpo_weight": 0.05, "dpo_clip": 0.05, "score_weight": 1.0, "score_clip": 10.0}
    | {"delimiters": (), "estimator": "gae", "beta": 0.01, "value_weight": 0.5, "aggregation": "sequence"},
    "sft": {},
    "simpo": {"beta": 2.0, "margin": 1.0},  # Meng et al. 2024: beta 2 to 2.5, gamma / beta of 0.5 for their Llama 3
    "slic": {"margin": 1.0, "nll_weight": 0.5},  # delta and lambda of Zhao et al. 2023
    "unlikelihood": {"weight": 0.5},  # alpha, one of the four that Rafailov et al. 2023 sweep over
}
PRESETS = {
    # Liu et al. 2025: no division by std or length, no KL; 3000 tokens in its script for Qwen2.5-Math-7B.
    "DR_GRPO": {"std": "none", "aggregation": "constant", "max_completion_tokens": 3000, "beta": 0.0},
    # Yu et al. 2025: clip 0.2 and 0.28, a mean over tokens, no KL.
    "DAPO": {"epsilon_high": 0.28, "aggregation": "token", "beta": 0.0},
    # Zheng et al. 2025: ratios of sequences, clip 3e-4 and 4e-4, no KL.
    "GSPO": {"importance": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4, "beta": 0.0},
    # Ahmadian et al. 2024: leave-one-out, KL in the reward; 0.05 is TRL's RLOOConfig.
    "RLOO": {"baseline": "leave_one_out", "aggregation": "sequence_sum", "beta": 0.05, "kl": "k1", "kl_in": "reward"},
    # Hu 2025: returns whitened over the batch, KL in the reward; 0.01 is OpenRLHF's.
    "REINFORCE_PP": {"baseline": "reinforce_pp", "aggregation": "token", "beta": 0.01, "kl": "k1", "kl_in": "reward"},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_table(name):
    config = importlib.import_module(f"pjpo.methods.{name}").Config()
    assert dataclasses.asdict(config) == DEFAULTS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_relatives_of_grpo_differ_where_their_papers_do(name):
    assert dataclasses.asdict(getattr(grpo, name)) == GRPO | PRESETS[name]


def test_a_relative_of_grpo_without_a_row_would_be_noticed():
    assert {name for name, value in vars(grpo).items() if isinstance(value, grpo.Config)} == {"GRPO", *PRESETS}
