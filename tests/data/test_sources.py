import gzip
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from pjpo.data import json_lines
from pjpo.data.sources import open_source
from tests.bounded import bounded
from tests.data.fakes import result_or_words, write_rows

TEXT = tfds.features.Text()
CHAT = tfds.features.Sequence({"role": TEXT, "content": TEXT})
ROWS = [
    {
        "prompt": [{"role": "user", "content": f"Hé {i}?"}, {"role": "assistant", "content": "Yes?"}],
        "text": f"né {i}",
        "tags": ["á", "b"],
        "score": i,
        "ok": True,
        "weights": np.array([1.5, 2.5], np.float32),
    }
    for i in range(5)
]


class TinyRows(tfds.core.GeneratorBasedBuilder):
    """Five rows with every kind of column."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "prompt": CHAT,
            "text": TEXT,
            "tags": tfds.features.Sequence(TEXT),
            "score": tfds.features.Scalar(np.int64),
            "ok": tfds.features.Scalar(np.bool_),
            "weights": tfds.features.Tensor(shape=(2,), dtype=np.float32),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": enumerate(ROWS), "test": enumerate(ROWS[:2])}

    def _generate_examples(self):
        raise AssertionError("_split_generators gives the rows")


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    TinyRows(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder / "tiny_rows" / "1.0.0"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_json_lines_are_read_at_random_access(tmp_path, name):
    path = write_rows(tmp_path / name, [{"text": f"né {i}\u2028"} for i in range(3)])  # U+2028 ends no line
    source = open_source(path)
    assert len(source) == 3
    assert [source[i] for i in (2, 0)] == [{"text": "né 2\u2028"}, {"text": "né 0\u2028"}]
    assert source.place(2) == f"{name}:3"


def test_the_home_folder_may_be_abbreviated(tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl", [{"a": 1}])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_source("~/rows.jsonl")[0] == {"a": 1}  # no shell expands this in --data.path=~/rows.jsonl


def test_blank_lines_bom_and_windows_ends_do_not_matter(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    source = open_source(str(tmp_path / "rows.jsonl"))
    assert [source[i] for i in range(len(source))] == [{"a": 1}, {"a": 2}]
    assert source.place(1) == "rows.jsonl:4"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": "\xff"}', "rows.jsonl:2: the line is not UTF-8.*save the file as UTF-8"),
        (b'{"a": "\\ud800"}', "rows.jsonl:2: the line is not UTF-8.*surrogates"),
        (b'{"a": 1', "rows.jsonl:2: the line is not JSON"),
        (b"[" * 100_000, "rows.jsonl:2: the line is not JSON"),
        (b"[1, 2]", "rows.jsonl:2: the line holds a list, not an object"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n' + line + b"\n")
    source = open_source(str(tmp_path / "rows.jsonl"))
    assert source[0] == {"a": 1}
    with pytest.raises(ValueError, match=message):
        source[1]


FEW = settings(max_examples=100)  # always the same
MANY = settings(max_examples=3000, derandomize=False, database=None)
PIECES = [
    b'{"a": 1}',
    b"\n",
    b"\r\n",
    b"[",
    b"{",
    b'"',
    b"1e999",
    b'"\\ud800"',
    b"\xff",
    b"null",
    b"[" * 9999,
    b"9" * 9999,
]


@pytest.mark.parametrize(
    "examples", [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]
)
def test_any_file_is_read_or_refused_by_line(tmp_path, examples):
    @examples
    @given(st.binary(max_size=60) | st.lists(st.sampled_from(PIECES) | st.binary(max_size=3), max_size=9).map(b"".join))
    @bounded()
    def each(content):
        for name, data in (("rows.jsonl", content), ("rows.jsonl.gz", gzip.compress(content))):
            (tmp_path / name).write_bytes(data)
            source = open_source(str(tmp_path / name))
            numbers = [number for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
            if not content.startswith(b"\xef\xbb\xbf"):
                assert [source.place(i) for i in range(len(source))] == [f"{name}:{number}" for number in numbers]
            for i in range(len(source)):
                row, words = result_or_words(lambda i=i, source=source: source[i], ValueError)
                assert words.startswith(source.place(i)) if words else isinstance(row, dict)

    each()


@pytest.mark.parametrize(
    "examples", [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]
)
def test_any_damaged_gzip_file_is_read_or_refused_by_name(tmp_path, examples):
    whole = gzip.compress(b'{"a": 1}\n' * 99)

    @examples
    @given(st.integers(0, len(whole)), st.binary(max_size=4), st.integers(0, 4), st.integers(0, len(whole)))
    @bounded()
    def each(place, put_in, taken_out, kept):
        damaged = whole[:place] + put_in + whole[place + taken_out :]
        (tmp_path / "rows.jsonl.gz").write_bytes(damaged if kept % 2 else damaged[:kept])
        source, words = result_or_words(lambda: open_source(str(tmp_path / "rows.jsonl.gz")), ValueError)
        assert "rows.jsonl.gz is not a whole gzip file" in words if words else len(source) <= 99

    each()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_line_that_is_too_long_is_named(tmp_path, monkeypatch, name):
    row = '{"a": "' + "x" * 80 + '"}'
    content = f'{{"a": 1}}\n{row}\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    monkeypatch.setattr(json_lines, "MAX_LINE", len(row) + 1)  # its end is one of them
    assert len(open_source(str(tmp_path / name))) == 2
    monkeypatch.setattr(json_lines, "MAX_LINE", len(row))
    with pytest.raises(ValueError, match=rf"{name}:2: the line is longer than {len(row)} bytes; one object a line is"):
        open_source(str(tmp_path / name))


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_a_small_file_with_an_endless_line_does_not_fill_memory(tmp_path):
    """160 MB in 160 KB. In a process of its own, whose memory is what the system says."""
    with gzip.open(tmp_path / "rows.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(160):
            file.write(b"a" * 10**6)
    out = subprocess.run([sys.executable, "-c", OPEN, tmp_path / "rows.jsonl.gz"], capture_output=True, text=True)
    assert "rows.jsonl.gz:1: the line is longer than 67,108,864 bytes" in out.stdout, out.stderr
    assert int(out.stdout.split()[-1]) < 2.1 * json_lines.MAX_LINE + 1e7


OPEN = """
import sys
from pjpo.data.json_lines import JsonLines

def peak():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

before = peak()
try:
    JsonLines(sys.argv[1])
except ValueError as error:
    print(error, peak() - before)
"""


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"text", lambda data: data[:12] + b"\0" * 20])
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    (tmp_path / "rows.jsonl.gz").write_bytes(damage(gzip.compress(b'{"a": 1}\n' * 99)))
    with pytest.raises(ValueError, match=r"rows.jsonl.gz is not a whole gzip file"):
        open_source(str(tmp_path / "rows.jsonl.gz"))


def test_a_missing_file_brings_near_names(tmp_path):
    write_rows(tmp_path / "pairs_train.jsonl", [])
    with pytest.raises(FileNotFoundError, match=r"near: pairs_train.jsonl"):
        open_source(str(tmp_path / "pairs_trian.jsonl"))
    (tmp_path / "preferences").mkdir()
    with pytest.raises(FileNotFoundError, match=r"near: preferences"):
        open_source(str(tmp_path / "preferenecs"))  # a TFDS folder, perhaps
    with pytest.raises(FileNotFoundError, match=r"is named 'preference'; near: preferences"):
        open_source(str(tmp_path / "preference" / "pairs.jsonl"))


def test_what_is_no_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no data file is given.*--data.path"):
        open_source("")
    (tmp_path / "pairs.csv").write_text("chosen,rejected")
    with pytest.raises(ValueError, match=r"pairs.csv is neither a .jsonl"):
        open_source(str(tmp_path / "pairs.csv"))


def test_tfds_is_read_without_tensorflow(tfds_folder):
    source = open_source(str(tfds_folder))
    assert "tensorflow" not in sys.modules
    assert source.place(3) == "tiny_rows/1.0.0#train:3"
    rows = sorted((source[i] for i in range(len(source))), key=lambda row: row["score"])
    assert rows == [row | {"weights": [1.5, 2.5]} for row in ROWS]
    assert {type(value) for value in rows[0].values()} == {list, str, int, bool}


def test_tfds_splits_names_and_misses(tfds_folder, monkeypatch):
    assert len(open_source(f"{tfds_folder}#test")) == 2
    assert len(open_source(f"{tfds_folder}#train[:60%]")) == 3
    with pytest.raises(ValueError, match=r"has no split 'valid', only: (test, train|train, test); choose"):
        open_source(f"{tfds_folder}#valid")
    with pytest.raises(ValueError, match=r"no dataset_info.json.*can be read below it: .*tiny_rows/1.0.0"):
        open_source(str(tfds_folder.parents[1]))
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tfds_folder.parents[1]))
    assert len(open_source("tfds:tiny_rows:1.0.0#test")) == 2
    with pytest.raises(FileNotFoundError, match=r"near: .*tiny_rows"):
        open_source("tfds:tiny_row")
    for name in ("", "tiny_rows:9.9.9", "tiny_rows/other:1.0.0", "a b"):
        with pytest.raises((ValueError, FileNotFoundError), match=rf"^TFDS (refuses|has no data set) '{name}'[^\n]*$"):
            open_source(f"tfds:{name}")
    for part in ("train[:x]", "train[5:2:1]", "train["):
        with pytest.raises(ValueError, match=r"has no part 'train\[.*; cut as in #train\[:80%\]$"):
            open_source(f"{tfds_folder}#{part}")


def test_addresses_are_not_fetched():
    with pytest.raises(FileNotFoundError, match=r"^https://a.b/rows.jsonl is an address, and nothing is downlo"):
        open_source("https://a.b/rows.jsonl")


def test_tfds_in_another_format_is_refused(tfds_folder, tmp_path):
    (tmp_path / "tiny_rows" / "1.0.0").mkdir(parents=True)
    for name in ("dataset_info.json", "features.json"):
        text = (tfds_folder / name).read_text().replace("array_record", "tfrecord")
        (tmp_path / "tiny_rows" / "1.0.0" / name).write_text(text)
    with pytest.raises(ValueError, match=r"not stored as array_record.*prepare it again"):
        open_source(str(tmp_path / "tiny_rows" / "1.0.0"))


def test_half_a_tfds_folder_is_refused(tfds_folder, tmp_path):
    half = tmp_path / "tiny_rows" / "1.0.0"
    shutil.copytree(tfds_folder, half)
    (shard,) = half.glob("*train*")
    shard.unlink()
    with pytest.raises(ValueError, match=r"1.0.0 is half-written or damaged: .*prepare it again"):
        open_source(str(half))
    shutil.copy(tfds_folder / shard.name, half)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"1.0.0 is half-written or damaged: .*prepare it again"):
        open_source(str(half))


def _stranger(tfds_folder, tmp_path, file, change):
    """A copy of the data set, one of whose files says something else."""
    folder = tmp_path / "tiny_rows" / "1.0.0"
    shutil.copytree(tfds_folder, folder)
    changed = change(json.loads((folder / file).read_text()))
    (folder / file).write_text(changed if isinstance(changed, str) else json.dumps(changed))
    return folder


EVIL = "downloads.evil.Features"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree | {"pythonClassName": EVIL}, "features.json asks for the class 'downloads.evil.Features'"),
        (lambda tree: {("python_class_name" if k == "pythonClassName" else k): EVIL for k in tree}, "asks for the cl"),
        (lambda tree: {"type": EVIL, "content": {}}, "features.json asks for the class 'downloads.evil.Features'"),
        (
            lambda tree: {"pythonClassName": tree["pythonClassName"], "jsonFeature": {"json": _inner(EVIL)}},
            "features.json asks for the class 'downloads.evil.Features'",
        ),
        (
            lambda tree: json.loads(json.dumps(tree).replace("sequence_feature.Sequence", "evil.Features").replace(
                "tensorflow_datasets.core.features.evil", "downloads.evil")),
            "features.json asks for the class 'downloads.evil.Features'",
        ),
        (lambda tree: '{"feature": ' * 100 + "{}" + "}" * 100, "features.json is nested in more than 50 levels"),
        (lambda tree: "[" * 100_000, "features.json is not a readable JSON file"),
        (lambda tree: {"jsonFeature": {"json": "{"}}, "features.json is not a readable JSON file"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("by_name", [False, True])
def test_a_tfds_folder_runs_no_code(tfds_folder, tmp_path, monkeypatch, change, message, by_name):
    folder = _stranger(tfds_folder, tmp_path, "features.json", change)
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "evil.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=message):
        open_source("tfds:tiny_rows:1.0.0" if by_name else str(folder))
    assert not (tmp_path / "was_run").exists()
    assert "downloads.evil" not in sys.modules


def _inner(name):
    """An older features.json, which a newer one may hold as a text."""
    return json.dumps({"text": {"type": name, "content": {}}})


def test_a_tfds_folder_reads_only_its_own_files(tfds_folder, tmp_path):
    def change(info):
        for split in info["splits"]:
            split["filepathTemplate"] = "../secret/{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        return info

    folder = _stranger(tfds_folder, tmp_path, "dataset_info.json", change)
    shutil.copytree(tfds_folder, folder.parent / "secret")
    with pytest.raises(ValueError, match=r"dataset_info.json names '.*secret.*'; allowed: files of its own folder"):
        open_source(str(folder))
