"""The implicit reward says nothing at all of words that it has not seen."""

from experiments.claims import generalisation


def test_the_explicit_reward_transfers_and_the_implicit_one_does_not():
    found = generalisation.transfer(0)
    assert found["explicit, seen words"] == found["explicit, unseen words"] == 1
    assert found["implicit, seen words"] == 1
    assert found["implicit, unseen words"] == 0.5  # every margin is exactly 0
