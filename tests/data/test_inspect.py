import io
import re

import pytest
import rich.console

from pjpo.data import inspect as command
from pjpo.data import preference, supervised
from pjpo.data.sources import open_source
from tests.data.fakes import ByteTokenizer, write_rows

ROWS = [
    {"prompt": "Why?", "chosen": " So.", "rejected": " No.", "id": 7},
    {"prompt": "Why?", "chosen": " So.", "rejected": " No."},  # again
    {"prompt": "Why?", "chosen": " No.", "rejected": " So."},  # the other way round
    {"prompt": "When?", "chosen": " " + "a" * 40 + ".", "rejected": " " + "a" * 40 + "!"},  # nearly the same
    {"prompt": "wit", "chosen": "hout", "rejected": "her"},
    {"prompt": "Who?", "chosen": "", "rejected": " No."},
    {"prompt": "What?", "chosen": " \x1b[31mRed", "rejected": " No."},
]


@pytest.fixture(autouse=True)
def byte_tokenizer(monkeypatch):
    def load(source):
        if source == "none":
            raise ValueError("unknown model source 'none'")
        return ByteTokenizer()

    monkeypatch.setattr(command.models, "tokenizer", load)


def counts(rows, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    findings = command.inspect(open_source(path), preference.Config(path=path), ByteTokenizer(), 2)
    return findings, {what: findings.tally.counts[what] for what in findings.tally.counts}


def test_all_rows_are_counted_by_what_is_odd_about_them(tmp_path):
    findings, found = counts(ROWS, tmp_path)
    assert found == {
        "rows": 7,
        "used": 6,
        "prompt of an earlier row": 2,
        "duplicate of an earlier row": 1,
        "an earlier row's pair, preferred the other way round": 1,
        "near-tie: 90% of the longer completion is in both, at the beginning and the end": 1,
        "joint and separate encoding differ": 1,
        "skipped, empty completion": 1,
    }
    assert [example.id for example in findings.shown] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert findings.lengths["prompt"].tolist() == [4, 4, 4, 5, 3, 5]
    assert findings.lengths["chosen"].tolist() == [5, 5, 5, 43, 5, 10]


@pytest.mark.parametrize(("same", "near"), [(9, True), (8, False)])
def test_near_ties_share_nine_tenths_of_the_longer(tmp_path, same, near):
    shared = "abcdefghijklmnopqrs"[: same - 1]  # the end token is shared too
    rows = [{"prompt": "Q", "chosen": shared + "X" * (10 - same), "rejected": shared + "Y"}]
    _, found = counts(rows, tmp_path)
    assert any(what.startswith("near-tie") for what in found) == near


def run(path, capsys, *options):
    command.main([str(path), *options])
    return capsys.readouterr().out


def test_rows_are_printed_without_colour_where_nobody_sees_it(tmp_path, capsys):
    out = run(write_rows(tmp_path / "rows.jsonl", ROWS), capsys, "--rows", "7")
    assert "\x1b" not in out  # neither ours nor the data's
    assert "7 rows, read as preference, in tokens of smollm2-135m-instruct" in out
    assert "rows.jsonl:1  {'id': 7}\nprompt, 4 tokens: [Why?]\nchosen, 5 tokens, 5 in the loss: « So.<end>»\n" in out
    assert "« \\x1b[31mRed<end>»" in out
    assert re.search(r"skipped, empty completion .* 1 .* 14.3% .* 6 ", out)
    assert re.search(r"prompt .* 3 .* 3 .* 4 .* 5 .* 5 .* 5 .* 4\.2", out)


def test_colours_say_what_counts(tmp_path):
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "ABCD", strict=True)]
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": turns}])
    config = supervised.Config(path=path, turns="all")
    findings = command.inspect(open_source(path), config, ByteTokenizer(), 1)
    (_, prompt, completion, _) = command.rows_as_text(findings.shown, ByteTokenizer())
    assert completion.plain == ("completion, 25 tokens, 4 in the loss: «B<end>»[\n<user>C<end>\n<assistant>]«D<end>»")
    file = io.StringIO()
    rich.console.Console(file=file, force_terminal=True, color_system="standard").print(completion)
    assert file.getvalue().count("\x1b[32m") == 2  # green
    assert "\x1b[34m[<user>A" in _ansi(prompt)


def _ansi(text):
    file = io.StringIO()
    rich.console.Console(file=file, force_terminal=True, color_system="standard").print(text)
    return file.getvalue()


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"chosen": "a", "rejected": "b"}, "preference"),
        ({"prompt": "Q", "completion": "A", "label": True}, "unpaired"),
        ({"prompt": "Q", "completion": "A", "label": None}, "supervised"),
        ({"messages": []}, "supervised"),
        ({"text": "A"}, "supervised"),
        ({"prompt": "Q", "answer": "A"}, "prompts"),
    ],
)
def test_the_kind_is_told_by_the_columns(row, kind):
    assert command.kind_of(row) == kind


def test_unpaired_rows_and_prompts_are_shown_too(tmp_path, capsys):
    rows = [{"prompt": "Q", "completion": " A", "label": i == 0} for i in range(3)]
    out = run(write_rows(tmp_path / "rows.jsonl", rows), capsys)
    assert "completion (desirable), 3 tokens" in out
    assert "completion (undesirable), 3 tokens" in out
    assert re.search("undesirable .* 2 .* 66.7%", out)
    out = run(write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Q", "answer": "A"}]), capsys)
    assert "prompts.jsonl:1  {'answer': 'A'}\nprompt, 1 tokens: [Q]\n" in out


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], (), "rows.jsonl has no rows"),
        ([{"question": "Q"}], (), "columns found: question; needed: chosen and rejected; or"),
        ([{"prompt": "Q"}, {"question": "Q"}], (), "rows.jsonl:2: columns found: question; needed: prompt"),
        ([{"prompt": "Q"}], ("--kind", "preference"), "rows.jsonl:1: columns found: prompt; needed: prompt, chosen"),
        ([{"prompt": "Q"}], ("--rows", "-1"), "rows must be >= 0, got -1"),
        ([{"prompt": "Q"}], ("--max-prompt-tokens", "0"), "max_prompt_tokens must be >= 1 or None, got 0"),
        ([{"prompt": "Q"}], ("--tokenizer", "none"), "unknown model source 'none'"),
    ],
)
def test_mistakes_are_told_in_a_line(tmp_path, rows, options, message):
    with pytest.raises(SystemExit, match=message):
        command.main([write_rows(tmp_path / "rows.jsonl", rows), *options])


def test_nothing_usable_is_shown_with_its_reasons(tmp_path, capsys):
    out = run(write_rows(tmp_path / "rows.jsonl", [{"prompt": "Q", "chosen": "a", "rejected": "a"}]), capsys)
    assert re.search("skipped, identical completions .* 1 .* 100.0%", out)
