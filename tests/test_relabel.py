"""Reward-augmented relabelling against golden rows, ties and the edges of the scale."""

import re

import numpy as np
import pytest

from pjpo import relabel
from pjpo.relabel import Scale

ROWS = [
    {"id": name, "score_chosen": high, "score_rejected": low, "chosen": "W", "rejected": "L"}
    for name, high, low in (("a", 9.0, 8.0), ("b", 7.5, 2.0), ("c", 5.0, 5.0))
]
GOLDEN = [
    ("a", "9", "W", "L", 0.0, -1.0, False),
    ("a", "8", "L", "W", 0.0, -1.0, False),
    ("b", "7.5", "W", "L", 0.0, -30.25, False),
    ("b", "2", "L", "W", 0.0, -30.25, False),
    ("c", "5", "W", "L", 0.0, 0.0, True),
    ("c", "5", "L", "W", 0.0, 0.0, True),
]
COLUMNS = ("id", "goal", "chosen", "rejected", "chosen_reward", "rejected_reward", "tie")


def test_golden_rows():
    kept = [tuple(row[name] for name in COLUMNS) for row in relabel.relabel(ROWS, ties="keep")]
    assert kept == GOLDEN
    assert [tuple(row[name] for name in COLUMNS) for row in relabel.relabel(ROWS)] == GOLDEN[:4]


def test_scores_change_places_with_the_completions():
    _, swapped = relabel.relabel(ROWS[:1])
    assert (swapped["score_chosen"], swapped["score_rejected"]) == (8.0, 9.0)


def test_the_goal_is_in_the_prompt_of_both_copies():
    scale = Scale(text="Score wanted: {goal}.")
    texts = [row["prompt"] for row in relabel.relabel([ROWS[1] | {"prompt": "Hello"}], scale)]
    assert texts == ["Score wanted: 7.5.\n\nHello", "Score wanted: 2.\n\nHello"]


def test_chats_are_asked_by_the_system_or_in_front_of_the_user():
    chat = [{"role": "user", "content": "Hello"}]
    scale = Scale(text="Score: {goal}")
    assert scale.ask(chat, 9) == [{"role": "system", "content": "Score: 9"}, *chat]
    without = Scale(text="Score: {goal}", has_system_role=False)
    assert without.ask(chat, 9) == [{"role": "user", "content": "Score: 9\n\nHello"}]
    system = [{"role": "system", "content": "Be kind."}, *chat]
    assert scale.ask(system, 9)[0] == {"role": "system", "content": "Score: 9\n\nBe kind."}
    assert chat == [{"role": "user", "content": "Hello"}]  # nothing is edited in place


@pytest.mark.parametrize("prompt", [{}, {"prompt": "Hello"}])
def test_a_goal_outside_the_scale_is_refused(prompt):
    with pytest.raises(ValueError, match="a goal must be within 1 and 10, got 11"):
        relabel.relabel([ROWS[0] | {"score_chosen": 11.0} | prompt])


@pytest.mark.parametrize(
    ("score", "spelled"),
    [
        (9.0, "9"),
        (np.int64(9), "9"),
        (7.5, "7.5"),
        (1234567.5, "1234567.5"),
        (12345678.0, "12345678"),
        (8.1234567, "8.1234567"),
        (np.float32(7.1), "7.1"),
        (0.1 + 0.2, "0.3"),
    ],
)
def test_a_goal_is_spelled_with_all_its_digits(score, spelled):
    assert relabel.spell(score) == spelled


def test_scores_that_differ_stay_different_goals_and_those_that_are_spelled_alike_are_a_tie():
    scale = Scale(low=0.0, high=2e6)
    near = ROWS[0] | {"score_chosen": 1234567.5, "score_rejected": 1234567.0}
    assert [row["goal"] for row in relabel.relabel([near], scale)] == ["1234567.5", "1234567"]
    alike = ROWS[0] | {"score_chosen": 0.1 + 0.2, "score_rejected": 0.3}
    assert relabel.relabel([alike], scale) == []
    assert [row["tie"] for row in relabel.relabel([alike], scale, ties="keep")] == [True, True]


def test_a_tie_outside_the_scale_is_refused_too():
    with pytest.raises(ValueError, match="row 0, score_chosen: a goal must be within 1 and 10, got 11"):
        relabel.relabel([ROWS[0] | {"score_chosen": 11.0, "score_rejected": 11.0}])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("score", ["9", None, True, [9]])
def test_a_score_that_is_no_number_is_refused(score):
    message = re.escape(f"relabel: row 1, score_rejected: a goal must be a number, got {score!r}; convert it")
    with pytest.raises(ValueError, match=message):
        relabel.relabel([ROWS[0], ROWS[1] | {"score_rejected": score}])
    with pytest.raises(ValueError, match="a goal must be within 1 and 10, got nan"):
        Scale().ask("Hello", float("nan"))


@pytest.mark.parametrize("text", ["Reply well.", "Score {low} to {high}", "{goal} {level}", "{goal} {}"])
def test_a_text_without_the_goal_or_with_other_places_is_refused(text):
    with pytest.raises(ValueError, match=r"text must have the place {goal}, and may have {low} and {high}, got "):
        Scale(text=text)
    assert Scale(text="{{json}} {goal:>3}").ask("", 9) == "{json}   9\n\n"


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_relabelled_is_refused():
    with pytest.raises(ValueError, match="row 0 lacks score_rejected"):
        relabel.relabel([{"chosen": "W", "rejected": "L", "score_chosen": 3}])
    with pytest.raises(ValueError, match="ties must be 'drop' or 'keep', got 'half'"):
        relabel.relabel(ROWS, ties="half")
    with pytest.raises(ValueError, match="the scale must rise, got 10 to 1"):
        Scale(low=10, high=1)
