import json
import tracemalloc
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from pjpo.data import gsm8k, preference, prompts, supervised, unpaired
from pjpo.data.buckets import Buckets, collate
from pjpo.methods import slic
from tests.data.fakes import ByteTokenizer, write_rows

CONTEXT = SimpleNamespace(tokenizer=ByteTokenizer())


def pairs(number, per_prompt=1):
    return [{"prompt": f"Q{i // per_prompt}:", "chosen": f" a{i}", "rejected": " b"} for i in range(number)]


def ids(examples):
    return [example.id for example in examples]


def test_pairs_come_with_an_account_of_every_row(tmp_path):
    rows = [
        {"prompt": "Why?", "chosen": " So.", "rejected": " No.", "score": 2},
        {"prompt": "Why?", "chosen": " So.", "rejected": " So."},
        {"prompt": "Why?", "chosen": "", "rejected": " So."},
        {"prompt": "Why", "chosen": " So.", "rejected": " No."},
        {"prompt": "wit", "chosen": "hout", "rejected": "her"},
        {"prompt": "Why, oh why?", "chosen": " So.", "rejected": " No."},
        {"prompt": "Why?", "chosen": " So.", "rejected": " So."},
    ]
    path = write_rows(tmp_path / "rows.jsonl.gz", rows)
    data = preference.Config(path=path, max_prompt_tokens=4).build(CONTEXT)
    assert ids(data.train) == ["rows.jsonl.gz:1", "rows.jsonl.gz:4", "rows.jsonl.gz:5"]
    assert len(data.held_out) == 0
    assert data.train[0].columns == {"score": 2}
    assert data.counts == {
        "rows": 7,
        "skipped, identical completions": 2,
        "skipped, empty completion": 1,
        "joint and separate encoding differ": 1,
        "skipped, prompt over 4 tokens": 1,
        "used": 3,
    }
    json.dumps(data.counts)
    assert "skipped, identical completions: 2 (rows.jsonl.gz:2, rows.jsonl.gz:7)\n" in data.about
    assert "encoding differ: 1 (rows.jsonl.gz:5)\n" in data.about


@pytest.mark.parametrize(
    ("kind", "settings", "num_completions"),
    [
        (preference, {}, 2),
        (preference, {"with_target": True}, 3),
        (unpaired, {}, 1),
        (supervised, {}, 1),
        (prompts, {}, 0),
        (gsm8k, {"template": "{question}", "form": "plain"}, 0),
    ],
)
def test_a_config_says_what_its_rows_will_be(tmp_path, kind, settings, num_completions):
    row = dict.fromkeys(("prompt", "chosen", "completion", "target", "question", "answer"), "Why?")
    path = write_rows(tmp_path / "rows.jsonl", [row | {"rejected": "No.", "label": True}])
    limits = {"max_prompt_tokens": 7} | ({"max_completion_tokens": 9} if num_completions else {})
    config = kind.Config(path=path, **limits, **settings)
    (example,) = config.build(CONTEXT).train
    assert config.shape.num_completions == len(example.completions) == num_completions
    assert (config.shape.prompt_tokens, config.shape.completion_tokens) == (7, 9 if num_completions else None)


def test_a_target_is_a_third_completion(tmp_path):
    row = {"prompt": "Why?", "chosen": " So.", "rejected": " No."}
    rows = [row | {"target": " Because."}, row | {"target": ""}, row | {"target": " So."}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = preference.Config(path=path, with_target=True).build(CONTEXT)
    assert [len(example.completions) for example in data.train] == [3, 3]
    assert bytes(data.train[0].completions[2][:-1].tolist()) == b" Because."
    assert data.counts["skipped, empty completion"] == 1
    batch = collate(data.train, Buckets.of(data.train))
    mean, _ = slic.loss(slic.Config(margin=1.0, nll_weight=0.5), batch, -jnp.float32(batch.completion_mask), None)
    # Every token costs a nat: " So." and " No." are as likely as each other, targets have 10 and 5 tokens.
    np.testing.assert_allclose(mean.value(), 1 + 0.5 * (10 + 5) / 2, rtol=1e-6)
    (without,) = preference.Config(path=path, num_rows=1).build(CONTEXT).train
    assert (len(without.completions), without.columns) == (2, {"target": " Because."})
    bare = write_rows(tmp_path / "bare.jsonl", [row])
    with pytest.raises(ValueError, match="needed: prompt, chosen, rejected, target"):
        preference.Config(path=bare, with_target=True).build(CONTEXT)


def test_only_the_first_places_are_listed(tmp_path):
    rows = [{"prompt": "Q", "chosen": "a", "rejected": "b"}] + [{"prompt": "Q", "chosen": "", "rejected": "b"}] * 4
    data = preference.Config(path=write_rows(tmp_path / "r.jsonl", rows)).build(CONTEXT)
    assert "empty completion: 4 (r.jsonl:2, r.jsonl:3, r.jsonl:4, ...)" in data.about


def test_nothing_left_is_an_error_with_the_counts(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Why?", "chosen": "x", "rejected": "x"}] * 2)
    with pytest.raises(ValueError, match=r"rows.jsonl has no row that can be used:\n  rows: 2\n.*identical.*: 2"):
        preference.Config(path=path).build(CONTEXT)
    with pytest.raises(ValueError, match=r"empty.jsonl has no row that can be used:\n  rows: 0"):
        preference.Config(path=write_rows(tmp_path / "empty.jsonl", [])).build(CONTEXT)


def test_a_row_that_is_refused_is_named(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [*pairs(2), {"question": "Q", "chosen": "a"}])
    with pytest.raises(ValueError, match=r"^rows.jsonl:3: columns found: question, chosen; needed: prompt, chosen"):
        preference.Config(path=path).build(CONTEXT)
    chat = [{"role": "user", "content": "Q"}]
    path = write_rows(tmp_path / "chats.jsonl", [{"prompt": chat}])
    with pytest.raises(ValueError, match=r"^chats.jsonl:1: this tokenizer has no chat template"):
        prompts.Config(path=path).build(SimpleNamespace(tokenizer=ByteTokenizer(template=None)))


def test_other_kinds_of_rows(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "completion": "2", "answer": 2}, {"text": "Tale"}])
    data = supervised.Config(path=path).build(CONTEXT)
    assert [len(example.completions) for example in data.train] == [1, 1]
    assert data.train[0].columns == {"answer": 2}
    data = prompts.Config(path=path, num_rows=1).build(CONTEXT)
    assert [(example.completions, example.columns) for example in data.train] == [
        ((), {"completion": "2", "answer": 2})
    ]
    assert data.counts == {"rows": 1, "used": 1}


def test_unpaired_rows_give_labels_and_their_balance(tmp_path):
    rows = [{"prompt": f"{i}:", "completion": " x", "label": i % 3 == 0} for i in range(7)]
    data = unpaired.Config(path=write_rows(tmp_path / "rows.jsonl", rows)).build(CONTEXT)
    batch = collate(list(data.train), Buckets.of(data.train))
    assert batch.labels.tolist() == [[row["label"]] for row in rows]
    assert (data.counts["desirable"], data.counts["undesirable"]) == (3, 4)
    assert "desirable: 3 (" in data.about
    path = write_rows(tmp_path / "odd.jsonl", [*rows, {"prompt": "Q", "completion": "A", "label": "maybe"}])
    with pytest.raises(ValueError, match=r"^odd.jsonl:8: column 'label' must be true .* got 'maybe'"):
        unpaired.Config(path=path).build(CONTEXT)


def test_chats_are_learned_by_their_last_turn_or_all(tmp_path):
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "ABCD", strict=True)]
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": turns}])
    decode = CONTEXT.tokenizer.decode
    (last,) = supervised.Config(path=path).build(CONTEXT).train
    assert decode(last.prompt) == "<user>A<end>\n<assistant>B<end>\n<user>C<end>\n<assistant>"
    assert [decode(ids) for ids in last.completions] == ["D<end>"]
    (whole,) = supervised.Config(path=path, turns="all").build(CONTEXT).train
    assert decode(whole.prompt) == "<user>A<end>\n<assistant>"
    assert decode(whole.completions[0][whole.loss_masks[0]]) == "B<end>D<end>"
    unmarked = SimpleNamespace(tokenizer=ByteTokenizer(marks=False))
    with pytest.raises(
        ValueError, match=r"(?s)no row that can be used:.*  skipped, several turns, but the chat template"
    ):
        supervised.Config(path=path, turns="all").build(unmarked)


@pytest.mark.usefixtures("unchecked")
def test_turns_that_are_none_are_refused():
    with pytest.raises(ValueError, match="supervised: turns must be one of last, all, got 'first'"):
        supervised.Config(path="chats.jsonl", turns="first")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    """Neither its lines nor their tokens are held: less than 400 bytes a row are, of 4,000 and as many tokens."""
    peaks = []
    for number in (100, 1800):  # so many that what other threads allocate meanwhile does not decide
        rows = ({"prompt": f"Q{i}:", "chosen": "a" * 1000, "rejected": "b" * 3000} for i in range(number))
        path = write_rows(tmp_path / f"rows{number}.jsonl", rows)
        tracemalloc.start()
        data = preference.Config(path=path, num_held_out=50).build(CONTEXT)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(data.train) == number - 50
    assert peaks[1] - peaks[0] < 1700 * 400


def test_whole_prompts_are_held_out_by_seed(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", pairs(40, per_prompt=2))
    data = preference.Config(path=path, num_held_out=10).build(CONTEXT)
    assert (len(data.train), len(data.held_out)) == (30, 10)
    assert sorted(ids(data.train) + ids(data.held_out)) == sorted(f"rows.jsonl:{line}" for line in range(1, 41))
    sides = [{example.prompt.tobytes() for example in side} for side in (data.train, data.held_out)]
    assert not sides[0] & sides[1]
    again = preference.Config(path=path, num_held_out=10).build(CONTEXT)
    other = preference.Config(path=path, num_held_out=10, seed=1).build(CONTEXT)
    assert ids(again.held_out) == ids(data.held_out) != ids(other.held_out)


def test_plain_texts_are_held_out_one_by_one(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"Once {i}"} for i in range(9)])  # one first token
    data = supervised.Config(path=path, num_held_out=3).build(CONTEXT)
    assert (len(data.train), len(data.held_out)) == (6, 3)


def test_too_many_held_out_is_refused(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", pairs(4, per_prompt=2))
    for number, most in ((3, 2), (4, 3), (9, 3)):
        with pytest.raises(ValueError, match=f"num_held_out {number} is too many for 4 examples of 2.*at most {most}"):
            preference.Config(path=path, num_held_out=number).build(CONTEXT)


def test_held_out_rows_can_have_a_file_of_their_own(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", pairs(3))
    test = write_rows(tmp_path / "test.jsonl", [*pairs(2), {"prompt": "Q", "chosen": "", "rejected": "b"}])
    data = preference.Config(path=train, held_out_path=test).build(CONTEXT)
    assert ids(data.train) == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:3"]
    assert ids(data.held_out) == ["test.jsonl:1", "test.jsonl:2"]
    assert data.counts["held_out/skipped, empty completion"] == 1
    assert "test.jsonl:3" in data.about


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_held_out": -1}, "num_held_out must be >= 0, got -1"),
        ({"num_rows": 0}, "num_rows must be >= 1, got 0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens must be >= 1 or None, got 0"),
        ({"max_completion_tokens": 0}, "max_completion_tokens must be >= 1 or None, got 0"),
        ({"cut_prompt": "middle"}, "cut_prompt must be one of never, start, end, got 'middle'"),
        ({"cut_completion": "start"}, "cut_completion must be one of never, end, got 'start'"),
        ({"num_held_out": 1, "held_out_path": "x.jsonl"}, "held_out_path and num_held_out exclude each other"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        preference.Config(path="rows.jsonl", **settings)


class HeldPairs(tfds.core.GeneratorBasedBuilder):
    """Pairs with a test split."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict({"prompt": text, "chosen": text, "rejected": text})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": enumerate(pairs(5)), "test": enumerate(pairs(2))}

    def _generate_examples(self):
        raise AssertionError("_split_generators gives the rows")


def test_a_tfds_data_set_gives_the_same_examples_as_a_file(tmp_path):
    HeldPairs(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    folder = f"{tmp_path}/held_pairs/1.0.0"
    data = preference.Config(path=folder, held_out_path=f"{folder}#test").build(CONTEXT)
    assert (len(data.train), len(data.held_out)) == (5, 2)
    assert data.held_out[0].id == "held_pairs/1.0.0#test:0"
    lines = preference.Config(path=write_rows(tmp_path / "rows.jsonl", pairs(5))).build(CONTEXT)
    tokens = [
        sorted(np.concatenate([example.prompt, *example.completions]).tolist() for example in side.train)
        for side in (data, lines)
    ]
    assert tokens[0] == tokens[1]


def test_hh_dialogues_share_their_prompts(hh_path):
    data = preference.Config(path=hh_path).build(CONTEXT)
    assert data.counts["rows"] == 2000
    assert data.counts["used"] == len(data.train) == 1992
    assert data.counts["skipped, dialogues whose prompts differ"] == 4
    assert data.counts["skipped, empty completion"] == 4
    assert all(ByteTokenizer().decode(example.prompt[-12:]) == "\n\nAssistant:" for example in data.train)
