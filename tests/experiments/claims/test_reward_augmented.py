"""The conditioned policy's scores by goal, and what DPO without goals makes of the same pairs."""

import numpy as np

from experiments.claims import reward_augmented as ra


def test_a_goal_is_met():
    asked = ra.conditioned()
    for goal, expected in ((3.0, 3.00), (8.0, 8.00), (10.0, 10.00)):
        np.testing.assert_allclose(asked(goal) @ ra.SCORES, expected, atol=0.02)


def test_without_goals_the_best_answer_is_missed():
    found = ra.blind()
    np.testing.assert_allclose(found @ ra.SCORES, 8.30, atol=0.02)
    np.testing.assert_allclose(found[4:], [0.83, 0.15], atol=0.02)
