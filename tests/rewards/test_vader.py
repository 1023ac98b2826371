import sys

import numpy as np
import pytest

from pjpo.rewards import vader

pytest.importorskip("vaderSentiment", reason="needs the extra 'rewards'")


def test_matches_the_published_formula_by_hand():
    # The lexicon rates "great" 3.1, a negation before it multiplies by -0.74, and compound = s / sqrt(s^2 + 15).
    def compound(s):
        return s / np.sqrt(s * s + 15)

    scores = vader.reward(["a great film", "not a great film", "a film"])
    np.testing.assert_allclose(scores, [compound(3.1), compound(-0.74 * 3.1), 0], atol=1e-4)  # it rounds to four places
    assert scores.dtype == np.float32


def test_no_texts_give_no_scores():
    assert vader.reward([]).shape == (0,)


def test_a_missing_package_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    vader._analyzer.cache_clear()
    with pytest.raises(ImportError, match=r"pjpo\[rewards\]"):
        vader.reward(["a great film"])


def test_as_a_reward_it_reads_prompt_and_completion_as_one_text():
    prompts, completions = ["It was not", "It was"], [" great", " great"]
    whole = vader.reward(["It was not great", "It was great"]).tolist()
    assert whole[0] < 0 < whole[1]
    assert vader.Config()(completions=completions, prompts=prompts) == whole
    alone = vader.Config(whole=False)(completions=completions, prompts=prompts)
    assert alone == vader.reward(completions).tolist()
    assert alone[0] > 0
