import json
import pathlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pjpo.data.rows import TURN, Row, Skip, preference, prompt_only, supervised, unpaired
from tests.data.fakes import result_or_words

SPLITS = json.loads((pathlib.Path(__file__).parents[1] / "data_files" / "extract_prompt.json").read_text())


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("read", "row", "expected"),
    [
        (
            preference,
            {"prompt": "The sky is", "chosen": " blue.", "rejected": " green.", "score": 3},
            Row("The sky is", (" blue.", " green."), {"score": 3}),
        ),
        (  # TRL's own example of an implicit prompt: the space goes with the word
            preference,
            {"chosen": "The sky is blue.", "rejected": "The sky is green.", "id": 7},
            Row("The sky is", (" blue.", " green."), {"id": 7}),
        ),
        (
            preference,
            {"prompt": None, "chosen": "The sky is blue.", "rejected": "The sky is green."},
            Row("The sky is", (" blue.", " green."), {"prompt": None}),
        ),
        (
            preference,
            {"prompt": [user("Colour?")], "chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]},
            Row([user("Colour?")], ([assistant("Blue.")], [assistant("Green.")]), {}),
        ),
        (
            preference,
            {"chosen": [user("Colour?"), assistant("Blue.")], "rejected": [user("Colour?"), assistant("Green.")]},
            Row([user("Colour?")], ([assistant("Blue.")], [assistant("Green.")]), {}),
        ),
        (  # a text prompt that repeats what the chats share
            preference,
            {"prompt": "Q?", "chosen": [user("Q?"), assistant("A")], "rejected": [user("Q?"), assistant("B")]},
            Row([user("Q?")], ([assistant("A")], [assistant("B")]), {}),
        ),
        (  # HH: the answers share "I", which is theirs all the same
            preference,
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: I do",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: I don't",
            },
            Row("\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:", (" I do", " I don't"), {}),
        ),
        (supervised, {"prompt": "1+1=", "completion": "2", "label": True}, Row("1+1=", ("2",), {"label": True})),
        (
            supervised,
            {"prompt": [user("Q?")], "completion": [assistant("A")]},
            Row([user("Q?")], ([assistant("A")],), {}),
        ),
        (
            supervised,
            {"messages": [user("Q?"), assistant("A"), user("R?"), assistant("B")]},
            Row([user("Q?"), assistant("A"), user("R?")], ([assistant("B")],), {}),
        ),
        (  # the rest of a conversation
            preference,
            {
                "prompt": [user("Q?")],
                "chosen": [assistant("A"), user("R?"), assistant("B")],
                "rejected": [assistant("C")],
            },
            Row([user("Q?")], ([assistant("A"), user("R?"), assistant("B")], [assistant("C")]), {}),
        ),
        (
            unpaired,
            {"prompt": "1+1=", "completion": "2", "label": True, "id": 7},
            Row("1+1=", ("2",), {"id": 7}, (True,)),
        ),
        (unpaired, {"prompt": "1+1=", "completion": "3", "label": 0}, Row("1+1=", ("3",), {}, (False,))),
        (
            unpaired,
            {"prompt": [user("Q?")], "completion": [assistant("A")], "label": 1},
            Row([user("Q?")], ([assistant("A")],), {}, (True,)),
        ),
        (supervised, {"text": "A tale.", "source": "x"}, Row("", ("A tale.",), {"source": "x"})),
        (prompt_only, {"prompt": "1+1=", "answer": 2, "hint": None}, Row("1+1=", (), {"answer": 2, "hint": None})),
        (prompt_only, {"prompt": [user("Q?")], "answer": "A"}, Row([user("Q?")], (), {"answer": "A"})),
    ],
)
def test_formats(read, row, expected):
    assert read(row) == expected


@pytest.mark.parametrize(
    ("read", "row", "reason"),
    [
        (preference, {"prompt": "Q", "chosen": "a", "rejected": "a"}, "identical completions"),
        (preference, {"chosen": "The sky", "rejected": "The sky"}, "identical completions"),
        (preference, {"prompt": "Q", "chosen": "a", "rejected": " \n"}, "empty completion"),
        (preference, {"chosen": "The ", "rejected": "The sky"}, "empty completion"),
        (preference, {"chosen": [assistant("a")], "rejected": [assistant("a"), user("b")]}, "empty prompt"),
        (preference, {"prompt": [user("Q")], "chosen": [], "rejected": [assistant("a")]}, "empty completion"),
        (preference, {"prompt": "", "chosen": "a", "rejected": "b"}, "empty prompt"),
        (preference, {"chosen": "a", "rejected": "b"}, "empty prompt"),
        (preference, {"chosen": f"one{TURN} a", "rejected": f"two{TURN} b"}, "dialogues whose prompts differ"),
        (
            preference,
            {"prompt": [user("Q")], "chosen": [assistant("a"), user("b")], "rejected": [assistant("c")]},
            "completion that does not begin and end with the assistant",
        ),
        (supervised, {"messages": [user("Q"), assistant("A"), user("R")]}, "chat that does not end with the assistant"),
        (supervised, {"messages": []}, "chat that does not end with the assistant"),
        (supervised, {"messages": [assistant("A")]}, "empty prompt"),
        (unpaired, {"prompt": "Q", "completion": " ", "label": True}, "empty completion"),
        (supervised, {"prompt": "Q", "completion": ""}, "empty completion"),
        (supervised, {"text": " "}, "empty text"),
        (prompt_only, {"prompt": [user("")]}, "empty prompt"),
    ],
)
def test_what_cannot_be_used_is_skipped_with_its_reason(read, row, reason):
    with pytest.raises(Skip, match=reason):
        read(row)


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (preference, {"question": "Q", "chosen": "a"}, "found: question, chosen; needed: prompt, chosen, rejected; or"),
        (preference, {"chosen": "a", "rejected": None}, "found: chosen; needed: prompt, chosen, rejected; or chosen"),
        (supervised, {}, "found: none; needed: prompt, completion; or messages; or text"),
        (supervised, {"messages": "Q"}, "'messages' must hold chat messages"),
        (unpaired, {"prompt": "Q", "completion": "A"}, "found: prompt, completion; needed: prompt, completion, label"),
        (
            unpaired,
            {"prompt": "Q", "completion": "A", "label": "good"},
            "'label' must be true .* or 1 or 0; got 'good'",
        ),
        (unpaired, {"prompt": "Q", "completion": "A", "label": 2}, "'label' must be .* got 2"),
        (unpaired, {"prompt": "Q", "completion": "A", "label": float("nan")}, "'label' must be .* got nan"),
        (
            unpaired,
            {"prompt": "Q", "completion": [assistant("a")], "label": True},
            "mixed .prompt text, completion mess",
        ),
        (prompt_only, {"text": "Q"}, "found: text; needed: prompt"),
        (preference, {"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' must hold text, or chat.*got 3"),
        (preference, {"prompt": "Q", "chosen": "a", "rejected": [{"role": "assistant"}]}, "'rejected' must hold text"),
        (preference, {"prompt": [user("Q")], "chosen": "a", "rejected": "b"}, "mixed .prompt messages, chosen text"),
        (preference, {"chosen": "a", "rejected": [assistant("b")]}, "mixed .chosen text, rejected messages"),
        (supervised, {"text": [user("Q")]}, "'text' must hold text"),
    ],
)
def test_a_row_without_what_is_needed_is_refused(read, row, message):
    with pytest.raises(ValueError, match=message):
        read(row)


@given(st.text(), st.text(min_size=1), st.text(min_size=1))
@example("The sky is ", "blue", "black")
def test_a_split_prompt_loses_nothing(prompt, chosen, rejected):
    try:
        row = preference({"chosen": prompt + chosen, "rejected": prompt + rejected})
    except Skip:
        return
    assert row.prompt + row.completions[0] == prompt + chosen
    assert row.prompt + row.completions[1] == prompt + rejected
    assert len(row.prompt) >= len(prompt) - 1  # all that is shared, but for one space
    first = {completion[0] for completion in row.completions}
    one_goes_on = any(a.startswith(b) for a, b in (row.completions, row.completions[::-1]))
    assert len(first) == 2 or first == {" "} or one_goes_on


@pytest.mark.parametrize(("chosen", "rejected", "expected"), SPLITS)
def test_prompts_are_split_off_where_trl_does(chosen, rejected, expected):
    row, reason = result_or_words(lambda: preference({"chosen": chosen, "rejected": rejected}), Skip)
    prompt, *completions = (expected[name] for name in ("prompt", "chosen", "rejected"))
    if row is not None:
        assert (row.prompt, *row.completions) == (prompt, *completions)
    elif reason == "empty prompt":
        assert not prompt or not prompt.strip()
    elif reason == "empty completion":
        assert any(not completion.strip() for completion in completions)
    else:
        assert reason == "completion that does not begin and end with the assistant"
        assert any({turns[0]["role"], turns[-1]["role"]} != {"assistant"} for turns in completions)


def test_most_of_trls_splits_are_usable():
    rows = [result_or_words(lambda a=a, b=b: preference({"chosen": a, "rejected": b}), Skip)[0] for a, b, _ in SPLITS]
    assert sum(row is not None for row in rows) >= 0.6 * len(SPLITS)


def test_all_turns_of_a_chat_follow_its_first_question():
    messages = [user("Q?"), assistant("A"), user("R?"), assistant("B")]
    row = supervised({"messages": messages, "id": 1}, turns="all")
    assert row == Row([user("Q?")], (messages[1:],), {"id": 1})


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=4)}),
    max_size=4,
)
NAMES = st.sampled_from(["prompt", "chosen", "rejected", "completion", "label", "text", "messages", "other"])


@given(st.dictionaries(NAMES, PLAIN | MESSAGES | st.lists(PLAIN, max_size=2)))
def test_any_row_is_read_skipped_or_refused(row):
    for read in (preference, unpaired, supervised, prompt_only):
        found, words = result_or_words(lambda read=read: read(row), Skip, ValueError)
        if found is None:
            assert words
            continue
        assert all(found.completions)
        assert {type(part) for part in (found.prompt, *found.completions)} in ({str}, {list})
