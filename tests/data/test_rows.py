import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pjpo.data.rows import TURN, Row, Skip, preference, prompt_only, supervised


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
        (preference, {"chosen": "The sky", "rejected": "The sky is"}, "empty completion"),
        (preference, {"prompt": [user("Q")], "chosen": [], "rejected": [assistant("a")]}, "empty completion"),
        (preference, {"prompt": "", "chosen": "a", "rejected": "b"}, "empty prompt"),
        (preference, {"chosen": "a", "rejected": "b"}, "empty prompt"),
        (preference, {"chosen": f"one{TURN} a", "rejected": f"two{TURN} b"}, "dialogues whose prompts differ"),
        (
            preference,
            {"prompt": [user("Q")], "chosen": [assistant("a"), user("b")], "rejected": [assistant("c")]},
            "completion that is not one message of the assistant",
        ),
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
        (supervised, {}, "found: none; needed: prompt, completion; or text"),
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
    assert row.completions[0][0] != row.completions[1][0] or row.completions[0][0] == " "
