"""Rewards that know the right answer, and those of form."""

import importlib.util
import sys

import pytest

from pjpo.rewards import format, gsm8k, math_answer, reasoning_gym
from pjpo.rewards.answers import extract

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="needs the extra 'rewards'"
)
needs_reasoning_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="needs the extra 'rewards'"
)
# The end of a row of the data set.
SOLUTION = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = <<48+24=72>>72.\n#### 72"


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("all", "So 2 and\n-1,250.5 it is <answer> 4 </answer><answer>5\n6</answer>"),
        ("first line", "So 2 and"),
        ("first number", "2"),
        ("last number", "6"),
        ("tag", "5\n6"),
        ("####", None),
    ],
)
def test_extract(how, expected):
    assert extract(" So 2 and\n-1,250.5 it is <answer> 4 </answer><answer>5\n6</answer>\n", how) == expected


@pytest.mark.parametrize("how", ["first number", "last number", "tag", "####", "first line"])
def test_nothing_to_extract(how):
    assert extract("\n", how) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("$1,250.50.", "1250.50"),
        ("is -3.", "-3"),
        ("5-3", "3"),
        ("x=7,", "7"),
        ("-$20", "-20"),
        ("1,2", "2"),
        ("is .5", ".5"),
        ("is -.5.", "-.5"),
        ("wait...5", "5"),
        ("v.5", "5"),
    ],
)
def test_numbers_as_they_are_written(text, number):
    assert extract(text, "last number") == number


@pytest.mark.parametrize(
    ("completion", "answer", "strict", "flexible"),
    [
        ("48 + 24 = 72\n#### 72", SOLUTION, 1, 1),
        ("#### $72.00", SOLUTION, 1, 1),
        ("The answer is 72.", SOLUTION, 0, 1),
        ("#### 72 clips, not 73", SOLUTION, 1, 0),
        ("#### 27", SOLUTION, 0, 0),
        ("no idea", SOLUTION, 0, 0),
        ("#### 1,200", 1200, 1, 1),
        ("#### -5", "-5", 1, 1),
        ("#### -5", 1e-5, 0, 0),
        ("#### 0.00001", 1e-5, 1, 1),
        ("#### 20", 1e20, 0, 0),
        ("#### 5", ".5", 0, 0),
        ("it is .5", 0.5, 0, 1),
    ],
)
def test_gsm8k(completion, answer, strict, flexible):
    assert gsm8k.Config()(completions=[completion], answer=[answer], question=["?"]) == [strict]
    assert gsm8k.Config(extract="last number")(completions=[completion], answer=[answer]) == [flexible]


def test_gsm8k_without_an_answer_is_refused():
    with pytest.raises(ValueError, match="'answer' holds no number: 'many'"):
        gsm8k.Config()(completions=["#### 1"], answer=["many"])


@needs_math_verify
@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (r"so it is $\frac{3}{4}$", "0.75", 1),
        (r"\boxed{0.75}", r"\frac{3}{4}", 1),
        ("The answer is 3/4.", "$0.75$", 1),
        (r"$\{2, 1\}$", r"\{1, 2\}", 1),
        (r"$x^2 + 2x + 1$", "(x+1)^2", 1),
        ("The answer is 0.7", "0.75", 0),
        ("no idea", "0.75", 0),
    ],
)
def test_math_answer(completion, answer, expected):
    assert math_answer.Config()(completions=[completion], answer=[answer]) == [expected]


@needs_math_verify
def test_math_answer_works_outside_the_main_thread():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(math_answer.Config(), completions=["$3$"], answer=["3"])
    assert done.result() == [1]


@needs_math_verify
def test_math_answer_without_an_answer_is_refused():
    with pytest.raises(ValueError, match="'answer' holds nothing to compare with"):
        math_answer.Config()(completions=["$1$"], answer=[""])
    with pytest.raises(ValueError, match="the row has no answer"):
        math_answer.Config()(completions=["$1$"], answer=[None])
    assert math_answer.Config()(completions=["$0.00001$"], answer=[1e-5]) == [1]


@needs_reasoning_gym
def test_the_tasks_own_scorer_judges_what_is_extracted():
    import reasoning_gym as package

    data = package.create_dataset("basic_arithmetic", size=3, seed=7, min_terms=2, max_terms=2, max_digits=1)
    texts = [f"It is {data[0]['answer']}.", "It is 123456.", "no idea"]
    columns = {"task": ["basic_arithmetic"] * 3, "entry": [data[i] for i in range(3)]}
    assert reasoning_gym.Config()(completions=texts, **columns)[0] == 1
    assert max(reasoning_gym.Config()(completions=texts, **columns)[1:]) < 0.5
    bare = reasoning_gym.Config(extract="all")(completions=texts, **columns)
    assert bare == [data.score_answer(text, data[i]) for i, text in enumerate(texts)]
    assert bare[0] < 1


@pytest.mark.parametrize(
    ("config", "package"), [(math_answer.Config(), "math_verify"), (reasoning_gym.Config(), "reasoning_gym")]
)
def test_a_missing_package_is_named_with_the_way_out(config, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pjpo\[rewards\]"):
        config.prepare()


@pytest.mark.parametrize(
    ("text", "tags", "pattern"),
    [
        ("<think>a\nb</think>\n<answer>3</answer>\n", 1, 1),
        ("<think></think><answer></answer>", 1, 1),
        ("<think>a</think> so <answer>3</answer>", 0, 1),
        ("<answer>3</answer><think>a</think>", 0, 0),
        ("<think>a</think><answer>3</answer><answer>4</answer>", 0, 1),
        ("<think>a<answer>3</answer>", 0, 0),
        ("<think>a</think><answer>3</answer>.", 0, 0),
        ("", 0, 0),
    ],
)
def test_format(text, tags, pattern):
    assert format.Config(tags=("think", "answer"))(completions=[text]) == [tags]
    assert format.Config(pattern=r"<think>.*</think>.*<answer>.*</answer>\s*")(completions=[text]) == [pattern]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "give tags or a pattern"),
        ({"tags": ("a",), "pattern": "a"}, "give tags or a pattern"),
        ({"tags": ("<a>",)}, "a tag is a word without brackets, got '<a>'"),
        ({"pattern": "("}, "is no regular expression"),
    ],
)
def test_bad_formats_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        format.Config(**settings)


def test_unknown_places_of_the_answer_are_refused(unchecked):
    with pytest.raises(ValueError, match="gsm8k: extract must be one of ####, last number, got 'all'"):
        gsm8k.Config(extract="all")
    with pytest.raises(ValueError, match=r"reasoning_gym: extract must be one of all, .*, got 'word'"):
        reasoning_gym.Config(extract="word")
