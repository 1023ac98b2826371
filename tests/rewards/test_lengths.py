"""Rewards of length against values worked out elsewhere."""

import math
from typing import ClassVar

import numpy as np
import pytest

from pjpo.rewards import cosine_length, gsm8k, overlong
from pjpo.rewards.protocol import Rewards

LENGTHS = [0, 500, 999, 1000]  # of a limit of 1000; Yeo et al.'s constants are the defaults
COSINE = {  # (right, cap): expected
    (True, math.inf): [2.0, 1.5, 1.00000247, -10.0],
    (True, 1.5): [1.5, 1.5, 1.00000247, -10.0],
    (False, math.inf): [-10.0, -5.0, -2.467e-05, -10.0],
    (False, 1.5): [-10.0, -5.0, -2.467e-05, -10.0],
}


@pytest.mark.parametrize(("case", "expected"), COSINE.items())
def test_cosine_golden_values(case, expected):
    is_right, cap = case
    config = cosine_length.Config(verifier=lambda completions: [float(is_right)] * 4, max_tokens=1000, cap=cap)
    found = config(completions=[""] * 4, completion_ids=list(map(range, LENGTHS)))
    np.testing.assert_allclose(found, expected, atol=5e-9)


def test_cosine_reads_what_its_verifier_reads():
    config = cosine_length.Config(verifier=gsm8k.Config(), max_tokens=4)
    rewards = Rewards(functions=(config,), weights=(1.0,))
    with pytest.raises(ValueError, match=r"reward 'cosine_length' reads answer"):
        rewards.check({"question"})
    tokens = [[[1], [1]], [[1], [1] * 4]]
    scores = rewards.score(
        ["a", "b"],
        [["#### 3", "3"], ["#### 4", "#### 5"]],
        columns=[{"answer": 3}, {"answer": 5}],
        completion_ids=tokens,
    )
    short = 0.5 * (1 + math.cos(math.pi / 4))
    np.testing.assert_allclose(scores.total, [[1 + short, -10 * short], [-10 * short, -10]], rtol=1e-6)


def test_cosine_without_a_verdict_is_no_reward():
    config = cosine_length.Config(verifier=lambda completions: [None, math.nan, 1.0], max_tokens=4)
    assert config(completions=["", "", ""], completion_ids=[[], [], []]) == [None, None, 2.0]


def test_cosine_warms_its_verifier_up():
    class Verifier:
        warmed: ClassVar[list] = []

        def __call__(self, completions, *, answer):
            return [1.0] * len(completions)

        def warm_up(self, completions, *, answer):
            self.warmed.append((completions, answer))

    config = cosine_length.Config(verifier=Verifier(), max_tokens=4)
    config.warm_up(["a"], completion_ids=[[1]], answer=["b"])
    assert Verifier.warmed == [(["a"], ["b"])]


def test_overlong_golden_values():
    config = overlong.Config(max_tokens=20480, cache_tokens=4096)
    lengths = [16000, 16384, 18432, 20480, 20481]
    assert config(completions=[""] * 5, completion_ids=list(map(range, lengths))) == [0.0, 0.0, -0.5, -1.0, -1.0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: overlong.Config(max_tokens=0, cache_tokens=1), "overlong: max_tokens must be >= 1, got 0"),
        (lambda: overlong.Config(max_tokens=4, cache_tokens=0), "overlong: cache_tokens must be >= 1, got 0"),
        (lambda: overlong.Config(max_tokens=4, cache_tokens=5), "cache_tokens must be <= max_tokens 4, got 5"),
        (lambda: cosine_length.Config(verifier=len, max_tokens=0), "cosine_length: max_tokens must be >= 1, got 0"),
        (lambda: cosine_length.Config(verifier="gsm8k", max_tokens=1), "verifier must be a reward that can be called"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
