"""The implicit reward says nothing at all of words that it has not seen, or less where everything is trained."""

import jax
import numpy as np
import pytest

from experiments.claims import generalisation, sequences


def test_the_explicit_reward_transfers_and_the_implicit_one_does_not():
    found = generalisation.transfer(0)
    assert found["explicit, seen words"] == found["explicit, unseen words"] == 1
    assert found["implicit, seen words"] == 1
    assert found["implicit, unseen words"] == 0.5  # every margin is exactly 0


def test_what_is_kept_from_the_rewards_is_kept(monkeypatch):
    """Words and topics of training pairs and of each set that is asked, as they reach the losses."""
    trained = []
    monkeypatch.setattr(generalisation, "pretrained", lambda rng, seed: generalisation.MODEL.init(jax.random.key(0)))
    monkeypatch.setattr(
        sequences, "train", lambda policy, loss, config, start, batch, **_: trained.append(batch) or start
    )
    made = []
    monkeypatch.setattr(
        generalisation, "word_pairs", lambda *args, of=generalisation.word_pairs: made.append(of(*args)) or made[-1]
    )
    generalisation.trained_transfer(0)
    assert len(trained) == 2
    assert all(batch is made[0] for batch in trained)

    def words_and_topics(batch):
        good, bad = np.asarray(batch.completion_tokens)[:, :, 0].T
        return set(good) | set(bad), set(np.asarray(batch.prompt_tokens)[:, 1])

    (seen, known), (_, kept), (unseen, _), both = map(words_and_topics, made)
    assert not seen & unseen
    assert not known & kept
    assert both == (unseen, kept)
    assert seen | unseen == {*generalisation.GOOD, *generalisation.BAD}
    assert set(np.asarray(made[2].completion_tokens)[:, 0, 0]) <= set(generalisation.GOOD)


@pytest.mark.slow
def test_the_explicit_reward_transfers_further_where_everything_is_trained():
    found = generalisation.trained_transfer(0)
    for of in ("training pairs", "new topics"):
        assert found[f"explicit, {of}"] > 0.95
        assert found[f"implicit, {of}"] > 0.95
    assert found["explicit, both"] > 0.95 > 0.8 > found["implicit, both"]
