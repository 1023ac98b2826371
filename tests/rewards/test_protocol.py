"""Several rewards at once: who gets what, how totals add up, and what becomes of those that fail."""

import dataclasses
import math
import re
import time

import numpy as np
import pytest

from pjpo.data.examples import Example
from pjpo.rewards import format, protocol
from pjpo.rewards.protocol import Failure, Rewards
from pjpo.types import Batch
from tests.data.fakes import ByteTokenizer

PROMPTS, IDS = ["a", "b"], ["rows:1", "rows:2"]
COMPLETIONS = [["x", "xx", "bad"], ["xxxx", "x", ""]]


def length(completions, **columns):
    return [len(text) for text in completions]


def refuses_bad(completions):
    if "bad" in completions:
        raise KeyError("bad")
    return [1.0] * len(completions)


def of(*functions, weights=None, **settings):
    return Rewards(functions=functions, weights=weights or (1.0,) * len(functions), **settings)


def test_total_is_the_weighted_sum_and_each_is_kept_apart():
    def is_x(completions):
        return [text == "x" for text in completions]

    scores = of(length, is_x, weights=(0.5, -2.0)).score(PROMPTS, COMPLETIONS)
    np.testing.assert_array_equal(scores.rewards["length"], [[1, 2, 3], [4, 1, 0]])
    np.testing.assert_array_equal(scores.rewards["is_x"], [[1, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(scores.total, [[-1.5, 1, 1.5], [2, -1.5, 0]])
    assert scores.total.dtype == np.float32
    assert scores.scored.all()
    expected = {"rewards/length/mean": 11 / 6, "rewards/length/std": np.std([1, 2, 3, 4, 1, 0], ddof=1)}
    expected |= {"rewards/is_x/mean": 1 / 3, "rewards/is_x/std": np.std([1, 0, 0, 0, 1, 0], ddof=1)}
    assert scores.metrics() == pytest.approx(expected | {"rewards/failures": 0})


def test_one_call_for_the_rollout_with_what_the_function_reads():
    calls = []

    def everything(prompts, completions, **others):
        calls.append({"prompts": prompts, "completions": completions, **others})
        return [0] * len(completions)

    def only_the_answer(completions, answer):
        calls.append({"completions": completions, "answer": answer})
        return [0] * len(completions)

    columns, tokens = [{"answer": 3}, {"answer": None, "level": "hard"}], [[[1], [2], [3]], [[4], [5], []]]
    of(everything, only_the_answer).score(PROMPTS, COMPLETIONS, columns=columns, completion_ids=tokens)
    flat = ["x", "xx", "bad", "xxxx", "x", ""]
    first = {"prompts": list("aaabbb"), "completions": flat, "completion_ids": [[1], [2], [3], [4], [5], []]}
    first |= {"answer": [3, 3, 3, None, None, None], "level": [None, None, None, "hard", "hard", "hard"]}
    assert calls == [first, {"completions": flat, "answer": [3, 3, 3, None, None, None]}]


def test_what_raises_is_found_named_and_left_out():
    scores = of(length, refuses_bad, weights=(1.0, 10.0)).score(PROMPTS, COMPLETIONS, ids=IDS)
    assert scores.failures == [Failure("refuses_bad", "rows:1", 2, "KeyError: 'bad'")]
    assert str(scores.failures[0]) == "reward 'refuses_bad', row rows:1, completion 2: KeyError: 'bad'"
    np.testing.assert_array_equal(scores.total, [[11, 12, 3], [14, 11, 10]])
    np.testing.assert_array_equal(scores.rewards["refuses_bad"], [[1, 1, np.nan], [1, 1, 1]])
    assert scores.metrics()["rewards/refuses_bad/mean"] == 1
    assert scores.metrics()["rewards/failures"] == 1


def test_a_completion_that_nothing_could_score_is_masked():
    scores = of(refuses_bad).score(PROMPTS, COMPLETIONS)
    np.testing.assert_array_equal(scores.scored, [[True, True, False], [True] * 3])
    assert math.isnan(scores.total[0, 2])
    measured = of(refuses_bad, length, weights=(1.0, 0.0)).score(PROMPTS, COMPLETIONS)
    np.testing.assert_array_equal(measured.scored, scores.scored)
    nothing = of(lambda completions: 1 / 0).score(["a"], [["x"]])
    assert not nothing.scored.any()
    assert math.isnan(nothing.metrics()["rewards/<lambda>/mean"])


@pytest.mark.parametrize("value", [None, math.nan, math.inf, 1e39])
@pytest.mark.filterwarnings("ignore:overflow")
def test_values_that_are_no_numbers_are_failures(value):
    def strange(completions):
        return [value if text == "xxxx" else np.float32(1) for text in completions]

    scores = of(strange).score(PROMPTS, COMPLETIONS, ids=IDS)
    assert scores.failures == [Failure("strange", "rows:2", 0, f"gave {value}")]
    assert scores.scored.sum() == 5


def test_a_total_beyond_float32_is_none():
    scores = Rewards(functions=(lambda completions: [1e10] * len(completions),), weights=(1e30,)).score(["p"], [["a"]])
    assert np.isnan(scores.total).all()


def test_too_few_values_are_a_failure_of_those_they_are_missing_for():
    def drops_empty_texts(completions):
        return [1.0 for text in completions if text]

    scores = of(drops_empty_texts).score(PROMPTS, COMPLETIONS, ids=IDS)
    assert [str(failure) for failure in scores.failures] == [
        "reward 'drops_empty_texts', row rows:2, completion 2: ValueError: gave 0 values for 1 completions"
    ]


def test_one_that_never_returns_costs_that_completion():
    def hangs_at_bad(completions):
        while "bad" in completions:
            time.sleep(0.01)
        return [1.0] * len(completions)

    scores = of(hangs_at_bad, timeout_seconds=0.6).score(PROMPTS, COMPLETIONS, ids=IDS)
    ((name, row, completion, cause),) = map(dataclasses.astuple, scores.failures)
    assert (name, row, completion) == ("hangs_at_bad", "rows:1", 2)
    assert re.fullmatch(
        r"TimeoutError: took longer than 0\.1\d* s", cause
    )  # a fourth of what is left of 0.6, with four to ask
    assert scores.scored.sum() == 5


class Clock:
    """In the place of the module `time` and of `limited`: a call takes what `seconds(completions)` says."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.seconds, self.limits = 0.0, seconds, []
        monkeypatch.setattr(protocol, "time", self)
        monkeypatch.setattr(protocol, "limited", self.limited)

    def monotonic(self):
        return self.now

    def limited(self, call, limit):
        self.limits.append(limit)
        found = call()
        self.now += min(limit, self.seconds(found))
        if self.seconds(found) > limit:
            raise TimeoutError("late")
        return found


def test_all_calls_together_take_twice_the_limit_at_most(monkeypatch):
    clock = Clock(monkeypatch, lambda lengths: 0.1 * len(lengths) + 1e9 * sum(n > 1 for n in lengths))
    completions = [["x", "xx"] * 2, ["xx"] * 4, ["x"] * 4]
    scores = of(length, timeout_seconds=12.0).score(["p"] * 3, completions)
    np.testing.assert_array_equal(scores.scored, [[text == "x" for text in row] for row in completions])
    assert clock.limits[0] == 12
    assert len(clock.limits) == 1 + 12
    assert min(clock.limits) > 0.999  # each completion's share of 12 seconds
    assert clock.now < 24
    everything = Clock(monkeypatch, lambda lengths: 1e9)
    assert not of(length, timeout_seconds=12.0).score(["p"] * 3, completions).scored.any()
    assert everything.now == pytest.approx(24)


def test_what_hangs_is_found_beside_what_raises(monkeypatch):
    def refuses_and_hangs(completions):
        refuses_bad(completions)
        return length(completions)

    clock = Clock(monkeypatch, lambda lengths: 0.1 + 1e9 * (4 in lengths))  # of one that is nowhere near the first
    completions = [["bad", "x", "x", "x"], ["x", "x", "x", "xxxx"]]
    scores = of(refuses_and_hangs, timeout_seconds=8.0).score(PROMPTS, completions, ids=IDS)
    assert [(failure.row, failure.completion) for failure in scores.failures] == [("rows:1", 0), ("rows:2", 3)]
    assert clock.now < 16


def test_the_run_ends_where_it_is_told_to():
    with pytest.raises(
        RuntimeError, match=r"reward 'refuses_bad', row rows:1, completion 2: KeyError: 'bad'"
    ) as raised:
        of(refuses_bad, on_error="raise").score(PROMPTS, COMPLETIONS, ids=IDS)
    assert isinstance(raised.value.__cause__, KeyError)
    with pytest.raises(RuntimeError, match=r"completion 0: gave None"):
        of(lambda completions: [None] * len(completions), on_error="raise").score(PROMPTS, COMPLETIONS)


def test_a_missing_package_is_no_failure_of_a_completion():
    def needs(completions):
        raise ModuleNotFoundError("install it")

    with pytest.raises(ModuleNotFoundError, match="install it"):
        of(needs).score(PROMPTS, COMPLETIONS)


def test_of_samples_decodes_completions_as_they_read_after_their_prompts():
    class Stripping(ByteTokenizer):
        """As SentencePiece does, it decodes a text's first space away."""

        def decode(self, ids):
            return super().decode([i for i in ids if i != 257]).removeprefix(" ")

    seen = {}

    def spy(completions, **given):
        seen.update(given, completions=completions)
        return range(len(completions))

    tokens = np.array([[[*b" ab", 257], [*b"c", 257, 0, 0]], [[*b" d", 257, 0], [257, 0, 0, 0]]], np.int32)
    mask = np.arange(4) < np.array([[4, 2], [3, 1]])[..., None]
    examples = [
        Example(np.frombuffer(text, np.uint8).astype(np.int32), (), {"answer": answer}, id)
        for text, answer, id in ((b"one", 1, "f:1"), (b"two!", 2, "f:2"))
    ]
    batch = Batch.of(completion_tokens=tokens, completion_mask=mask)
    scores = of(spy).of_samples(batch, examples, Stripping())
    np.testing.assert_array_equal(scores.total, [[0, 1], [2, 3]])
    assert seen == {
        "prompts": ["one", "one", "two!", "two!"],
        "completions": [" ab", "c", " d", ""],
        "prompt_ids": [[*b"one"], [*b"one"], [*b"two!"], [*b"two!"]],
        "completion_ids": [[*b" ab", 257], [*b"c", 257], [*b" d", 257], [257]],
        "tokenizer": ["bytes"] * 4,
        "answer": [1, 1, 2, 2],
    }


def test_missing_and_hidden_columns_are_refused_by_name():
    def reads_answer(completions, answer, level=None):
        return [0] * len(completions)

    rewards = of(length, reads_answer)
    rewards.check({"answer", "other"})
    message = r"reward 'reads_answer' reads answer, but the rows have only the columns level, question"
    with pytest.raises(ValueError, match=message):
        rewards.check({"question", "level"})
    with pytest.raises(ValueError, match=r"reads answer, .* columns \(none\)"):
        rewards.score(PROMPTS, COMPLETIONS)
    with pytest.raises(ValueError, match="columns cannot be named prompts; rename"):
        of(length).check({"prompts"})


def test_what_a_reward_prepares_is_prepared_before_the_run():
    class Prepared:
        def __call__(self, completions):
            return [0] * len(completions)

        def prepare(self):
            raise FileNotFoundError("no model there")

    with pytest.raises(FileNotFoundError, match="no model there"):
        of(Prepared()).check({})


def test_what_a_reward_warms_up_is_on_no_clock():
    class Compiling:
        seen = ()

        def __call__(self, completions):
            assert self.seen == tuple(completions)
            return [0] * len(completions)

        def warm_up(self, completions):
            time.sleep(0.6)
            self.seen = tuple(completions)

    scores = of(Compiling(), timeout_seconds=0.5).score(PROMPTS, COMPLETIONS)
    assert scores.failures == []


def test_rewards_by_name():
    rewards = of("vader", "tests.rewards.test_protocol:length", format.Config(tags=("a",)), length, names=tuple("vlft"))
    assert list(rewards.by_name) == list("vlft")
    assert rewards.by_name["l"] is length
    assert list(of("vader", format.Config(tags=("a",)), length).by_name) == ["vader", "format", "length"]
    assert {"gsm8k", "judge", "math_answer", "reasoning_gym", "vader"} < set(protocol.known())
    for name in ("protocol", "answers", "time_limit"):
        assert name not in protocol.known()
    for name, words in {
        "vadr": r"unknown reward 'vadr'; known: .*gsm8k, .*vader",
        "overlong": r"reward 'overlong' has settings without a default: .*max_tokens.*give it as a value",
        "nowhere:reward": r"'nowhere:reward' is not there: No module named 'nowhere'; give module:function",
        "tests.rewards.test_protocol:no": r"is not there: .*no attribute 'no'",
    }.items():
        with pytest.raises(ValueError, match=words):
            of(name)


def test_the_value_is_frozen_and_hashable():
    assert hash(of(length, "vader")) == hash(of(length, "vader"))
    assert of(length) != of(length, on_error="raise")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"functions": (), "weights": ()}, "0 functions with 0 weights"),
        ({"weights": (1.0, 2.0)}, "1 functions with 2 weights; give one weight for each"),
        ({"weights": (math.nan,)}, r"weights must be finite and not all 0, got \(nan,\)"),
        ({"weights": (0.0,)}, "weights must be finite and not all 0"),
        ({"names": ("a", "b")}, "1 functions with 2 names"),
        ({"functions": (length, length), "weights": (1.0, 1.0)}, "two rewards have one name among length, length; set"),
        ({"timeout_seconds": 0.0}, "timeout_seconds must be > 0 and finite, got 0"),
        ({"functions": (3,)}, "3 cannot be called"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Rewards(**({"functions": (length,), "weights": (1.0,)} | settings))


def test_an_unknown_way_to_handle_errors_is_refused(unchecked):
    with pytest.raises(ValueError, match="on_error must be one of nan, raise, got 'skip'"):
        of(length, on_error="skip")


@pytest.mark.parametrize(
    ("completions", "others"),
    [([["x"], ["x", "y"]], {}), ([["x"]], {}), ([["x"], ["y"]], {"ids": ["1"]}), ([[], []], {})],
)
def test_rows_that_do_not_fit_are_refused(completions, others):
    with pytest.raises(ValueError, match="give every prompt one of each, and the same number of completions"):
        of(length).score(PROMPTS, completions, **others)
