import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjpo.data.encode import Limits, encode
from pjpo.data.examples import Tally
from pjpo.data.rows import Row, Skip
from tests.data.fakes import ByteTokenizer
from tests.test_chat import REFERENCE, byte_tokenizer

END = ByteTokenizer.eos_id
QUESTION = [{"role": "user", "content": "Q?"}]


def answer(text):
    return [{"role": "assistant", "content": text}]


def run(prompt, *completions, tokenizer=None, **limits):
    tally = Tally()
    row = Row(prompt, completions, {"score": 1})
    example = encode(row, "rows:7", tokenizer or ByteTokenizer(), Limits(**limits), tally)
    return example, dict(tally.counts)


def texts(example, tokenizer=None):
    decode = (tokenizer or ByteTokenizer()).decode
    return decode(example.prompt), *map(decode, example.completions)


def test_text_is_encoded_apart_and_ended_once():
    example, counts = run("Why?", " So.", " No.")
    assert texts(example) == ("Why?", " So.<end>", " No.<end>")
    assert {array.dtype for array in (example.prompt, *example.completions)} == {np.dtype(np.int32)}
    assert (example.id, example.columns, counts) == ("rows:7", {"score": 1}, {})


def test_without_an_end_token_nothing_is_appended():
    tokenizer = ByteTokenizer(eos_id=None)
    assert texts(run("Why?", " So.", tokenizer=tokenizer)[0]) == ("Why?", " So.")


def test_special_strings_in_text_are_only_text():
    example, _ = run("Why?", " So.<end>")
    assert (example.completions[0] == END).sum() == 1
    assert texts(example)[1] == " So.<end><end>"  # the first one in five bytes, the last one a token


def test_joint_and_separate_encodings_that_differ_are_counted_and_kept():
    example, counts = run("no", "thing", "where")  # "th" is one token in both ways
    assert counts == {}
    example, counts = run("wit", "hout", "er")  # "t" and "h" meet where the completion starts
    assert counts == {"joint and separate encoding differ": 1}
    assert texts(example) == ("wit", "hout<end>", "er<end>")


def test_plain_text_starts_with_its_own_first_token():
    example, counts = run("", "Tale.")
    assert texts(example) == ("T", "ale.<end>")
    assert counts == {}


def test_chats_are_rendered_and_end_with_their_turn():
    example, counts = run(QUESTION, answer("Aye"), answer("B"))
    assert texts(example) == ("<user>Q?<end>\n<assistant>", "Aye<end>", "B<end>")  # not the newline behind
    assert (example.prompt == END).sum() == 1
    assert counts == {}
    assert texts(run(QUESTION)[0]) == ("<user>Q?<end>\n<assistant>",)


def test_chats_get_an_end_token_where_the_template_writes_none():
    tokenizer = ByteTokenizer(template="<{role}>{content}")
    assert texts(run(QUESTION, answer("A"), tokenizer=tokenizer)[0]) == ("<user>Q?<assistant>", "A<end>")


def test_an_end_token_inside_a_completion_skips_the_row():
    with pytest.raises(Skip, match="end token inside a completion"):
        run(QUESTION, answer("A<end>B"))
    with pytest.raises(Skip, match="end token inside a completion"):
        run(QUESTION, [*answer("A<end>B"), {"role": "user", "content": "R?"}, *answer("C")])


def test_a_template_that_opens_turns_for_sampling_alone_is_counted():
    tokenizer = ByteTokenizer(opening="<assistant><think>")
    example, counts = run(QUESTION, answer("A"), tokenizer=tokenizer)
    assert texts(example) == ("<user>Q?<end>\n<assistant>", "A<end>")
    assert counts == {"chat template ends the prompt otherwise when a completion follows": 1}
    example, _ = run(QUESTION, answer("<think>A"), answer("B"), tokenizer=tokenizer)  # one of them shows it
    assert texts(example) == ("<user>Q?<end>\n<assistant>", "<think>A<end>", "B<end>")


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_prompt_tokens": 5}, "prompt over 5 tokens"),
        ({"max_completion_tokens": 4}, "completion over 4 tokens"),
    ],
)
def test_over_long_rows_are_skipped_unless_asked(limits, reason):
    with pytest.raises(Skip, match=reason):
        run("prompt", "four", "2", **limits)
    example, counts = run("prompt", "four", "2", **{name: value + 1 for name, value in limits.items()})
    assert (texts(example)[0], counts) == ("prompt", {})


def test_rows_are_cut_on_the_side_that_is_stated():
    limits = {"max_prompt_tokens": 3, "max_completion_tokens": 4, "cut_completion": "end"}
    example, counts = run("prompt", "four", "fives", cut_prompt="start", **limits)
    assert texts(example) == ("mpt", "four", "five")  # the end token is cut too
    assert counts == {"prompt cut to 3 tokens at its start": 1, "completion cut to 4 tokens at its end": 1}
    example, counts = run("prompt", "four", "1", cut_prompt="end", **limits)
    assert texts(example) == ("pro", "four", "1<end>")
    assert counts == {"prompt cut to 3 tokens at its end": 1, "completion cut to 4 tokens at its end": 1}


def test_a_cut_that_leaves_no_difference_skips_the_row_and_counts_no_cut():
    tally = Tally()
    limits = Limits(max_completion_tokens=2, cut_completion="end")
    with pytest.raises(Skip, match="identical completions"):
        encode(Row("Q", ("same", "sample"), {}), "rows:1", ByteTokenizer(), limits, tally)
    assert not tally.counts


@settings(max_examples=50)
@given(st.text(alphabet="th<end>é ", min_size=1), st.text(alphabet="th<end>é ", min_size=1), st.integers(1, 12))
def test_tokens_are_those_of_the_texts_and_limits_hold(prompt, completion, limit):
    tokenizer = ByteTokenizer()
    example, _ = run(
        prompt,
        completion,
        max_prompt_tokens=limit,
        max_completion_tokens=limit,
        cut_prompt="start",
        cut_completion="end",
    )
    assert list(example.prompt) == tokenizer.encode(prompt)[-limit:]
    assert list(example.completions[0]) == [*tokenizer.encode(completion), END][:limit]


TURNS = [*answer("A"), {"role": "user", "content": "R?"}, *answer("B")]


def test_of_several_turns_only_what_the_assistant_wrote_counts():
    example, counts = run(QUESTION, TURNS, answer("C"))
    assert texts(example) == (
        "<user>Q?<end>\n<assistant>",
        "A<end>\n<user>R?<end>\n<assistant>B<end>",
        "C<end>",
    )
    decode = ByteTokenizer().decode
    counted = [decode(ids[mask]) for ids, mask in zip(example.completions, example.loss_masks, strict=True)]
    assert counted == ["A<end>B<end>", "C<end>"]
    assert {mask.dtype for mask in example.loss_masks} == {np.dtype(bool)}
    assert counts == {}


def test_masks_are_cut_with_their_tokens():
    example, _ = run(QUESTION, TURNS, max_completion_tokens=4, cut_completion="end")
    assert texts(example)[1] == "A<end>\n<"
    assert example.loss_masks[0].tolist() == [True, True, False, False]


def test_two_messages_are_several_turns():
    example, _ = run(QUESTION, [*answer("Aye"), *answer("B")])
    assert texts(example)[1] == "Aye<end>\n<assistant>B<end>"
    assert ByteTokenizer().decode(example.completions[0][example.loss_masks[0]]) == "Aye<end>B<end>"


def test_a_cut_that_leaves_nothing_of_the_assistants_skips_the_row():
    tokenizer = ByteTokenizer(template="<{role}>{content}", eos_id=None)
    turns = [*answer(""), {"role": "user", "content": "R?"}, *answer("B")]
    assert texts(run(QUESTION, turns, tokenizer=tokenizer)[0])[1] == "<user>R?<assistant>B"
    with pytest.raises(Skip, match="empty completion"):
        run(QUESTION, turns, tokenizer=tokenizer, max_completion_tokens=4, cut_completion="end")


def test_several_turns_need_a_template_that_marks_them():
    with pytest.raises(Skip, match=r"several turns, but the chat template has no {% generation %} block"):
        run(QUESTION, TURNS, tokenizer=ByteTokenizer(marks=False))
    assert run(QUESTION, answer("A"), tokenizer=ByteTokenizer(marks=False))[0].loss_masks is None


def test_several_turns_end_once_where_the_template_writes_no_end():
    example, _ = run(QUESTION, TURNS, tokenizer=ByteTokenizer(template="<{role}>{content}"))
    assert texts(example)[1] == "A<user>R?<assistant>B<end>"
    assert ByteTokenizer().decode(example.completions[0][example.loss_masks[0]]) == "AB<end>"


def test_labels_stay_and_are_counted():
    tally = Tally()
    examples = [
        encode(Row("Q", (" a",), {}, (label,)), f"rows:{i}", ByteTokenizer(), Limits(), tally)
        for i, label in enumerate((True, False, True))
    ]
    assert [example.labels for example in examples] == [(True,), (False,), (True,)]
    assert tally.counts == {"desirable": 2, "undesirable": 1}


def test_a_completion_of_one_token_with_the_id_zero_is_a_completion():
    example, _ = run("Q", "\0", tokenizer=ByteTokenizer(eos_id=None))
    assert example.completions[0].tolist() == [0]


@pytest.mark.parametrize("name", REFERENCE["marked"])
def test_turns_of_published_templates_are_told_apart(name):
    tokenizer = byte_tokenizer(REFERENCE["marked"][name]["template"])
    turns = [*answer("first"), {"role": "user", "content": "R?"}, *answer("second")]
    tally = Tally()
    example = encode(Row(QUESTION, (turns,), {}), "rows:1", tokenizer, Limits(), tally)
    (ids,), (mask,) = example.completions, example.loss_masks
    whole = tokenizer.decode([*example.prompt, *ids], skip_special=False)
    assert whole == tokenizer.render_chat([*QUESTION, *turns])
    counted, prompt = tokenizer.decode(ids[mask], skip_special=False), tokenizer.decode(example.prompt)
    assert counted.index("first") < counted.index("second")
    assert "R?" not in counted
    assert "Q?" in prompt
    assert "first" not in prompt
