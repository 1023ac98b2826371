from pjpo.evals.result import side_by_side


def test_side_by_side_shows_both_texts_of_a_prompt():
    row = {"step": 0, "kind": "completion", "prompt": "The film", "text": "The film is fine", "reward_vader": 0.25}
    row |= {"reward_judge": 0.5}
    new = row | {"step": 9, "text": "The film shines", "reward_vader": 0.75}
    assert side_by_side([row, row], [new, new], num_shown=1).splitlines() == [
        " 1. The film ...",
        "    before vader +0.25  judge +0.50  ' is fine'",
        "    after  vader +0.75  judge +0.50  ' shines'",
    ]


def test_texts_without_scores():
    rows = [{"prompt": "a", "text": "ab"}]
    assert side_by_side(rows, rows).splitlines()[1] == "    before 'b'"
