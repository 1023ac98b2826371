import datetime
import decimal

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjpo.data import preference
from pjpo.data.sources import open_source
from tests.data.fakes import result_or_words
from tests.data.test_files import CONTEXT, ids

PAIRS = [{"prompt": f"Q{i}:", "chosen": f" a{i}", "rejected": " b"} for i in range(10)]


def write(path, rows, **settings):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **settings)
    return str(path)


def test_rows_are_those_of_the_file_whatever_its_row_groups(tmp_path):
    chat = [{"role": "user", "content": "Hé?"}]
    rows = [pair | {"chat": chat, "score": 0.5, "tags": ["a"], "none": None} for pair in PAIRS]
    source = open_source(write(tmp_path / "pairs.parquet", rows, row_group_size=3))
    assert len(source) == 10
    assert [source[i] for i in (9, 0, 3, 2, 5)] == [rows[i] for i in (9, 0, 3, 2, 5)]
    assert source.place(4) == "pairs.parquet:4"
    with pytest.raises(IndexError):
        source[10]


def test_examples_are_those_of_json_lines(tmp_path):
    data = preference.Config(path=write(tmp_path / "pairs.parquet", PAIRS)).build(CONTEXT)
    assert ids(data.train) == [f"pairs.parquet:{i}" for i in range(10)]
    assert CONTEXT.tokenizer.decode(data.train[7].completions[0]) == " a7<end>"


def test_values_that_json_lacks_become_text(tmp_path):
    rows = [
        {
            "day": datetime.date(2026, 1, 2),
            "at": datetime.datetime(2026, 1, 2, 3),
            "price": decimal.Decimal("1.50"),
            "raw": "né".encode(),
        }
    ]
    source = open_source(write(tmp_path / "rows.parquet", rows))
    assert source[0] == {"day": "2026-01-02", "at": "2026-01-02T03:00:00", "price": "1.50", "raw": "né"}
    source = open_source(write(tmp_path / "bytes.parquet", [{"raw": b"\xff"}]))
    with pytest.raises(ValueError, match=r"bytes.parquet:0: bytes that are not UTF-8"):
        source[0]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (2**60, pyarrow.timestamp("ms")),
        (2**30, pyarrow.date32()),
        (2**62, pyarrow.duration("ms")),
        (1, pyarrow.timestamp("ms", tz="Mars/X")),
        (1, pyarrow.timestamp("ns")),
    ],
)
def test_values_that_python_lacks_are_named(tmp_path, value, kind):
    table = pyarrow.table({"prompt": ["a", "b"], "when": pyarrow.array([None, value], kind)})
    pyarrow.parquet.write_table(table, tmp_path / "odd.parquet")
    source = open_source(str(tmp_path / "odd.parquet"))
    with pytest.raises(ValueError, match=r"^odd.parquet:1: a value that Python cannot hold: .*; leave its column out"):
        source[1]


def test_a_folder_of_shards_has_splits(tmp_path):
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for number in (0, 1):
        write(tmp_path / "hub" / "data" / f"train-0000{number}-of-00002.parquet", PAIRS[5 * number : 5 * number + 5])
    write(tmp_path / "hub" / "data" / "test.parquet", PAIRS[:2])
    source = open_source(str(tmp_path / "hub"))
    assert [source[i] for i in range(len(source))] == PAIRS
    assert source.place(6) == "train-00001-of-00002.parquet:1"
    assert len(open_source(f"{tmp_path}/hub#test")) == 2
    with pytest.raises(ValueError, match=r"hub has no split 'valid', only: test, train; choose one with #split"):
        open_source(f"{tmp_path}/hub#valid")


def test_a_file_without_the_columns_is_refused(tmp_path):
    path = write(tmp_path / "pairs.parquet", [{"question": "Q", "answer": "A"}])
    with pytest.raises(ValueError, match=r"pairs.parquet:0: columns found: question, answer; needed: prompt, chosen"):
        preference.Config(path=path).build(CONTEXT)
    path = write(tmp_path / "empty.parquet", PAIRS[:1])
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).slice(0, 0), path)
    with pytest.raises(ValueError, match=r"empty.parquet has no row that can be used"):
        preference.Config(path=path).build(CONTEXT)


def test_a_hugging_face_folder_of_arrow_files_says_what_to_do(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match=r"written by save_to_disk.*to_parquet"):
        open_source(str(tmp_path))


@settings(max_examples=60)
@given(st.data())
def test_a_damaged_file_is_named_or_read(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "pairs.parquet"
    write(path, PAIRS, row_group_size=4)
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["cut", "byte", "noise"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if kind == "cut":
        content = content[:at]
    elif kind == "byte":
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        content[at : at + 20] = data.draw(st.binary(min_size=20, max_size=20))
    path.write_bytes(content)

    def read():
        source = open_source(str(path))
        return [source[i] for i in range(len(source))]

    rows, words = result_or_words(read, ValueError)
    assert "pairs.parquet" in words if words else all(isinstance(row, dict) for row in rows)
