"""RTO's token rewards against published values, what their sums are, and whose log-probs they need."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from pjpo import token_mdp
from pjpo.methods import ppo, rto
from pjpo.types import Batch
from tests import online
from tests.methods import test_ppo
from tests.methods.contract import Contract


def near(rng, shape):
    return {"dpo_logps": -np.exp(rng.normal(size=shape)).astype(np.float32)}


CONTRACT = Contract(
    configs=(
        rto.Config(variant="semi", delimiters=(1, 2), dpo_clip=None, score_clip=None),
        rto.Config(variant="ddpo"),
        rto.Config(variant="rs", missing_end_score=-1.0),
        rto.Config(variant="ppo"),
        rto.Config(estimator="reinforce_pp"),
    ),
    start=rto.Config(variant="semi", delimiters=tuple(range(25)), score_clip=0.5, kl_target=1.0),
    fields=test_ppo.CONTRACT.fields,
    arguments=test_ppo.CONTRACT.arguments,
    rollout=lambda rng, shape: test_ppo.CONTRACT.rollout(rng, shape) | near(rng, shape),
    also=test_ppo.adapted,
    nudged=test_ppo.CONTRACT.nudged
    | {"variant": "rto", "delimiters": (1, 2), "aggregation": "token", "estimator": "reinforce_pp"},
    bad=test_ppo.CONTRACT.bad
    | {"variant": ("dpo",), "estimator": ("td",), "dpo_clip": (0.0, float("nan")), "score_clip": (-1.0, float("inf"))},
)


def case(inputs, dtype):
    names = ("logp", "ref_logp", "dpo_logp", "mask", "rm_score")
    logps, ref_logps, dpo_logps, mask, scores = (x[:, None] for x in online.arrays(inputs, dtype, *names))
    tokens = jnp.zeros(mask.shape, jnp.int32)
    fields = {"completion_mask": mask, "old_logps": logps, "ref_logps": ref_logps, "rewards": scores}
    settings = {
        "dpo_weight": inputs["beta1"],
        "beta": inputs["beta2"],
        "score_weight": inputs["beta3"],
        "dpo_clip": inputs["dpo_token_clip"] or None,
        "score_clip": inputs["rm_clip"],
    }
    return Batch.of(completion_tokens=tokens, **fields), dpo_logps, settings


@online.cases("rto_token_reward")
def test_golden_values(inputs, expected, dtype):
    with online.x64(dtype):
        batch, dpo_logps, settings = case(inputs, dtype)
        found = {
            variant: rto.token_rewards(rto.Config(variant=variant, **settings), batch, batch.rewards, dpo_logps)[:, 0]
            for variant in ("rto", "rs", "ddpo", "ppo")
        }
        for variant, rewards in found.items():
            online.check(rewards, expected[variant], dtype)
        for one, other in (("rs", "ppo"), ("rto", "ddpo")):
            np.testing.assert_allclose(found[one].sum(-1), found[other].sum(-1), atol=1e-6)


def test_defaults():
    """Those of the paper; the clips are the released script's."""
    found = rto.Config()
    assert (found.dpo_weight, found.beta, found.score_weight) == (0.05, 0.01, 1.0)
    assert (found.dpo_clip, found.score_clip) == (0.05, 10.0)
    assert (found.epsilon_low, found.epsilon_high, found.value_clip, found.value_weight) == (0.2, 0.2, 0.2, 0.5)
    assert (found.gamma, found.lam, found.aggregation, found.variant) == (1.0, 0.95, "sequence", "rto")


def test_a_sentences_reward_is_at_its_end():
    rewards = jnp.array([[[1.0, 2.0, 4.0, 8.0, 16.0, 0.0]]])
    mask = jnp.array([[[True] * 5 + [False]]])
    ends = jnp.array([[[False, True, False, True, False, True]]])
    found = rto.dpo_rewards(rewards, mask, "semi", ends)
    np.testing.assert_array_equal(found[0, 0], [0, 3, 0, 12, 16, 0])
    config = rto.Config(variant="semi", delimiters=(7, 9), dpo_clip=None, dpo_weight=1.0, beta=0.0)
    batch = Batch.of(
        completion_tokens=[[[5, 7, 5, 9, 5, 7]]], completion_mask=mask, ref_logps=-rewards, rewards=jnp.zeros((1, 1))
    )
    found = rto.token_rewards(config, batch, batch.rewards, jnp.zeros_like(rewards))
    np.testing.assert_array_equal(found[0, 0], [0, 3, 0, 12, 16, 0])


def test_clips_scores_and_without_a_dpo_policy_it_is_ppo():
    batch = test_ppo.rollout()
    found = rto.Config(variant="ppo", score_clip=0.5, score_weight=2.0).advantages(batch)
    clipped = Batch.of(**{name: getattr(batch, name) for name in ("completion_tokens", "completion_mask", "old_logps")})
    clipped = vars(clipped) | {"ref_logps": batch.ref_logps, "values": batch.values}
    expected = ppo.Config(beta=0.01).advantages(Batch(**clipped | {"rewards": 2 * np.clip(batch.rewards, -0.5, 0.5)}))
    np.testing.assert_allclose(found.labels, expected.labels, rtol=1e-6)
    assert not rto.Config(variant="ppo").needs_dpo
    assert rto.Config().needs_dpo


def test_without_a_critic_a_token_gets_the_whitened_sum_of_its_own_and_later_rewards():
    with online.x64("float64"):
        batch, rng = dataclasses.replace(test_ppo.rollout(3), values=None), np.random.default_rng(4)
        dpo_logps = batch.ref_logps + rng.normal(size=batch.ref_logps.shape)
        config = rto.Config(
            estimator="reinforce_pp", dpo_weight=0.2, dpo_clip=0.3, beta=0.1, score_weight=2.0, gamma=0.9
        )
        assert config.outputs == ("logps",) != rto.Config().outputs
        found = config.advantages(batch, dpo_logps=dpo_logps)
        mask = batch.loss_mask
        rewards = np.clip(0.2 * (dpo_logps - batch.ref_logps), -0.3, 0.3) - 0.1 * (batch.old_logps - batch.ref_logps)
        sums = np.zeros(mask.shape)
        for b, n in np.ndindex(mask.shape[:2]):
            after = 2 * batch.rewards[b, n]  # the score, at the last token
            for t in reversed(range(mask[b, n].sum())):
                after = sums[b, n, t] = rewards[b, n, t] + after
                after *= 0.9
        white = (sums - sums[mask].mean()) / sums[mask].std(ddof=1)
        np.testing.assert_allclose(found.advantages, np.where(mask, white, 0), atol=1e-7)
        logps = jnp.asarray(batch.old_logps + 0.1 * rng.normal(size=mask.shape))
        mean, metrics = rto.loss(config, found, logps, None)
        ratios = np.exp(logps - batch.old_logps)
        losses = np.maximum(-white * ratios, -white * np.clip(ratios, 0.8, 1.2))
        of_completions = np.where(mask, losses, 0).sum(-1) / mask.sum(-1)
        np.testing.assert_allclose(mean.value(), of_completions.mean(), rtol=1e-6)
        assert "loss/value_avg" not in metrics


def test_needs_the_reference_for_the_pull_or_for_the_dpo_policy():
    assert rto.Config(beta=0.0).needs_reference
    assert rto.Config(variant="ppo").needs_reference
    assert not rto.Config(variant="ppo", beta=0.0).needs_reference


def test_the_log_says_how_the_dpo_policy_rewards_and_how_much_is_clipped():
    mask = [[[True, True, True, False], [True, True, False, False]]]
    zeros = np.zeros((1, 2, 4))
    batch = Batch.of(
        completion_tokens=np.zeros((1, 2, 4), np.int32),
        completion_mask=mask,
        rewards=np.array([[1.0, -20.0]]),
        old_logps=zeros,
        ref_logps=zeros,
    )
    logratios = np.array([[[0.4, -3.0, 2.0, 9.0], [3.0, 1.0, 9.0, 9.0]]])  # weighted 0.02, -0.15, 0.1; 0.15, 0.05
    found = rto.Config().rollout_metrics(batch, dpo_logps=logratios)
    # Clipped, the weighted ones are 0.02, -0.05, 0.05 and 0.05, 0.05, and the scores 1 and -10.
    assert {name: float(mean.value()) for name, mean in found.items()} == pytest.approx(
        {"dpo_logratios/mean": 0.68, "dpo_logratios/clipped_ratio": 0.6, "returns/mean": (1.02 - 9.9) / 2}
    )
    free = rto.Config(dpo_clip=None).rollout_metrics(batch, dpo_logps=logratios)
    assert free["dpo_logratios/clipped_ratio"].value() == 0
    of_ppo = rto.Config(variant="ppo").rollout_metrics(batch)
    assert {name: float(mean.value()) for name, mean in of_ppo.items()} == {"returns/mean": -4.5}


def test_an_optimal_dpo_policys_rewards_sum_to_the_return_less_the_prompts_value():
    # pi* = ref exp(R / beta) / Z on every one of the 4^3 sequences: sum_t beta log(pi* / ref) = R - beta log Z.
    rng, beta, shape = np.random.default_rng(0), 0.7, (4, 3)
    states = [state for t in range(shape[1]) for state in itertools.product(range(shape[0]), repeat=t)]
    rewards = {state: rng.normal(size=shape[0]) for state in states}
    reference = {state: rng.dirichlet(np.ones(shape[0])) for state in states}
    solution = token_mdp.solve(rewards, reference, beta)
    sequences = list(itertools.product(range(shape[0]), repeat=shape[1]))

    def logps(policy):
        return np.array([[[np.log(policy[s[:t]][token]) for t, token in enumerate(s)]] for s in sequences])

    with online.x64("float64"):
        batch = Batch.of(
            completion_tokens=np.array(sequences, np.int32)[:, None],
            ref_logps=logps(reference),
            rewards=np.zeros((len(sequences), 1)),
        )
        config = rto.Config(dpo_weight=beta, dpo_clip=None, beta=0.0)
        found = rto.token_rewards(config, batch, jnp.asarray(batch.rewards), jnp.asarray(logps(solution.policy)))
    returns = np.array([token_mdp.sequence_return(rewards, s) for s in sequences])
    np.testing.assert_allclose(np.asarray(found).sum(-1)[:, 0], returns - solution.v[()], atol=1e-10)


def test_what_is_missing_is_refused():
    with pytest.raises(ValueError, match="rto: rewards of tokens need the DPO policy's dpo_logps"):
        rto.Config().advantages(test_ppo.rollout())
    with pytest.raises(ValueError, match="rto: variant 'semi' needs delimiters"):
        rto.Config(variant="semi")
    with pytest.raises(ValueError, match="rto: the rollout has no rewards"):
        rto.Config().advantages(Batch.of(completion_tokens=[[[1]]]))
