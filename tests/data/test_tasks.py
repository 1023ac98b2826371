"""Problems as prompts: which are held out, how they are asked, and that their scorers understand the columns."""

import importlib.util
import sys
import types

import pytest

from pjpo.data import gsm8k, tasks
from pjpo.rewards import reasoning_gym
from pjpo.rewards.protocol import Rewards
from tests.data.fakes import ByteTokenizer, write_rows

needs_reasoning_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="needs the extra 'rewards'"
)
ONE_DIGIT = '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}'
CONTEXT = types.SimpleNamespace(tokenizer=ByteTokenizer())


def of(**settings):
    return tasks.Config(**{"task": "chain_sum", "settings": ONE_DIGIT, "num_train": 20, "num_held_out": 8} | settings)


def text(example):
    return CONTEXT.tokenizer.decode(example.prompt)


@needs_reasoning_gym
@pytest.mark.parametrize("seed", [0, 1])
def test_no_problem_is_on_two_sides(seed):
    # There are 200 such problems: two digits and a sign.
    data = of(num_train=130, num_held_out=64, num_shots=4, seed=seed).build(CONTEXT)
    train, held_out = (
        [example.columns["entry"]["question"] for example in part] for part in (data.train, data.held_out)
    )
    assert (len(set(train)), len(set(held_out))) == (130, 64)
    assert not set(train) & set(held_out)
    shots = text(data.train[0]).split("<user>")[1:-1]
    assert len(set(shots)) == 4
    assert not any(question in shot for shot in shots for question in train + held_out)


@needs_reasoning_gym
def test_one_problem_in_other_words_is_the_same():
    natural = '{"min_terms": 2, "max_terms": 2, "max_digits": 1, "operators": ["+"], "format_style": "natural", '
    natural += '"allow_parentheses": false, "whitespace": "random"}'
    data = of(task="basic_arithmetic", settings=natural, num_train=60, num_held_out=40).build(CONTEXT)
    train, held_out = (
        {example.columns["entry"]["metadata"]["expression"].replace(" ", "") for example in part}
        for part in (data.train, data.held_out)
    )
    assert (len(train), len(held_out)) == (60, 40)
    assert not train & held_out
    assert len({example.columns["entry"]["question"].split()[0] for example in data.train}) > 1


@needs_reasoning_gym
def test_forms_of_prompts():
    template = "{expression} ="
    shot, first = list(of(num_train=1, num_held_out=0, num_shots=1).draw().values())
    asked, answer, last = shot["metadata"]["expression"], shot["answer"], first["metadata"]["expression"]

    def prompt(**settings):
        return text(of(num_train=1, num_held_out=0, num_shots=1, template=template, **settings).build(CONTEXT).train[0])

    assert prompt(form="plain") == f"{asked} = {answer}\n{last} ="
    chat = f"<user>{asked} =<end>\n<assistant>{answer}<end>\n<user>{last} =<end>\n<assistant>"
    assert prompt() == chat
    data = of(num_train=1, num_held_out=0).build(CONTEXT)
    assert text(data.train[0]) == f"<user>{shot['question']} Reply with the answer only.<end>\n<assistant>"
    assert text(data.train[0]) in data.about


@needs_reasoning_gym
@pytest.mark.parametrize("task", ["chain_sum", "lcm", "word_sorting", "letter_counting", "countdown"])
def test_scorers_understand_the_columns(task):
    data = of(task=task, settings="{}", num_train=3, num_held_out=1).build(CONTEXT)
    rewards = Rewards(functions=(reasoning_gym.Config(extract="all"),), weights=(1.0,))
    columns = [example.columns for example in data.train]
    # Countdown's answer is any expression that makes the number: the metadata holds one.
    answers = [row["entry"]["metadata"].get("expression", row["answer"]) for row in columns]
    answers = answers if task == "countdown" else [row["answer"] for row in columns]
    scores = rewards.score([""] * 3, [[answer, "?"] for answer in answers], columns=columns, ids=["a", "b", "c"])
    assert not scores.failures
    assert (scores.total[:, 0] == 1).all()
    assert (scores.total[:, 1] < 0.5).all()


@needs_reasoning_gym
def test_the_seed_decides():
    first, again, other = ([text(e) for e in of(seed=seed).build(CONTEXT).train] for seed in (0, 0, 1000))
    assert first == again != other


@needs_reasoning_gym
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"task": "chain_sums"}, "no task 'chain_sums'; near: chain_sum"),
        ({"settings": '{"terms": 2}'}, r"chain_sum refuses .*'terms'; its settings: min_terms, max_terms"),
        ({"settings": '{"min_terms": 0}'}, "refuses .*min_terms must be positive"),
        ({"num_train": 300}, "has only 200 different problems in 30800 draws, but .* is 308; lower these"),
        (
            {"template": "{expr} ="},
            "template '{expr} =' cannot be filled: KeyError.*its places: .*expression.*question",
        ),
        ({"task": "rearc", "settings": "{}"}, "the scorer of rearc does not understand its problems any more"),
        ({"template": "{"}, "template '{' cannot be filled"),
    ],
)
def test_what_the_generator_refuses_is_told(settings, words):
    with pytest.raises(ValueError, match=words):
        of(**settings).build(CONTEXT)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_train": 0}, "tasks: num_train must be >= 1, got 0"),
        ({"num_held_out": -1}, "tasks: num_held_out must be >= 0, got -1"),
        ({"settings": "{"}, "settings must be a JSON object, got '{'"),
        ({"settings": '{"seed": 1}'}, "settings must be a JSON object without seed and size"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        of(**settings)


def test_unknown_forms_are_refused(unchecked):
    with pytest.raises(ValueError, match="tasks: form must be one of chat, plain, got 'few_shot'"):
        of(form="few_shot")
    with pytest.raises(ValueError, match="gsm8k: form must be one of chat, plain, got 'few_shot'"):
        gsm8k.Config(path="x.jsonl", form="few_shot")


def test_a_missing_package_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"pjpo\[rewards\]"):
        of().build(CONTEXT)


ROWS = [{"question": f"What is {i} + {{1}}?", "answer": f"It is {i + 1}.\n#### {i + 1}", "level": i} for i in range(3)]


def test_gsm8k_rows(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [*ROWS, {"question": " ", "answer": "#### 1"}])
    data = gsm8k.Config(path=str(tmp_path / "rows.jsonl"), num_held_out=1).build(CONTEXT)
    assert (len(data.train), len(data.held_out)) == (2, 1)
    assert data.counts["skipped, empty question"] == 1
    for example in [*data.train, *data.held_out]:
        row = ROWS[example.columns["level"]]
        asked = gsm8k.ASK.replace("{question}", row["question"])
        assert text(example) == f"<user>{asked}<end>\n<assistant>"
        assert {name: example.columns[name] for name in row} == row
    plain = gsm8k.Config(path=str(tmp_path / "rows.jsonl"), form="plain", template="Q: {question}\nA:").build(CONTEXT)
    assert text(plain.train[0]) == "Q: What is 0 + {1}?\nA:"


def test_gsm8k_rows_that_cannot_be_read(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"question": "?", "solution": "#### 1"}])
    with pytest.raises(ValueError, match=r"rows.jsonl:1: .*question, answer; answer is not, among question, solution"):
        gsm8k.Config(path=str(tmp_path / "rows.jsonl")).build(CONTEXT)
    with pytest.raises(ValueError, match=r"template must hold {question}, got 'Q: '"):
        gsm8k.Config(path="rows.jsonl", template="Q: ")
