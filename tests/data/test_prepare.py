import gzip
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import termios

import pytest

from pjpo.data import preference, prepared
from pjpo.data import prepare as command
from pjpo.data.prepare import prepare
from pjpo.data.sources import open_source
from tests.data.fakes import result_or_words, write_rows
from tests.data.test_files import CONTEXT, pairs


@pytest.fixture
def folder(tmp_path):
    prepare(_file(tmp_path, pairs(9)), tmp_path / "pairs")
    return tmp_path / "pairs"


def _file(tmp_path, rows, name="pairs.jsonl"):
    write_rows(tmp_path / name, rows)
    return tmp_path / name


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_a_prepared_folder_holds_the_rows_of_the_file(tmp_path, name):
    rows = [*pairs(4), {"prompt": "né\u2028", "chosen": "a", "rejected": "b"}]
    assert prepare(_file(tmp_path, rows, name), tmp_path / "out" / "pairs") == 5
    source = open_source(str(tmp_path / "out" / "pairs"))
    assert [source[i] for i in range(len(source))] == rows
    assert source.place(4) == "pairs:4"
    data = preference.Config(path=str(tmp_path / "out" / "pairs")).build(CONTEXT)
    assert len(data.train) == 5
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["pairs"]


def test_blank_lines_and_a_bom_do_not_matter(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert prepare(tmp_path / "rows.jsonl", tmp_path / "rows") == 2
    source = open_source(str(tmp_path / "rows"))
    assert [source[0], source[1]] == [{"a": 1}, {"a": 2}]


def test_bad_lines_are_refused_by_number_and_nothing_is_left(tmp_path):
    lines = [json.dumps(row) for row in pairs(20)]
    lines[1], lines[4] = '{"prompt": ', "[1]"
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"has 2 bad lines, so nothing is written:\npairs.jsonl:2: .*\npairs.*5: "):
        prepare(tmp_path / "pairs.jsonl", tmp_path / "out")
    (tmp_path / "pairs.jsonl").write_text("\n".join(["x"] * 15))
    with pytest.raises(ValueError, match=r"(?s)has 15 bad lines.*pairs.jsonl:10: [^\n]*\n\.\.\. and 5 more$"):
        prepare(tmp_path / "pairs.jsonl", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_what_cannot_be_prepared_is_refused(tmp_path, folder):
    with pytest.raises(FileExistsError, match=r"pairs exists already; remove it, or choose another name"):
        prepare(tmp_path / "pairs.jsonl", folder)
    with pytest.raises(ValueError, match=r"no rows can be written to .*: .*pairs.jsonl is a file; choose"):
        prepare(tmp_path / "pairs.jsonl", tmp_path / "pairs.jsonl" / "out")
    with pytest.raises(FileNotFoundError, match=r"near: pairs.jsonl"):
        prepare(tmp_path / "pair.jsonl", tmp_path / "out")
    with pytest.raises(ValueError, match=r"empty.jsonl has no rows"):
        prepare(_file(tmp_path, [], "empty.jsonl"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"pairs is no .jsonl or .jsonl.gz file"):
        prepare(folder, tmp_path / "out")
    (tmp_path / "pairs.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"pairs.csv is no .jsonl or .jsonl.gz file"):
        prepare(tmp_path / "pairs.csv", tmp_path / "out")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 999)[:-9])
    with pytest.raises(ValueError, match=r"torn.jsonl.gz is not a whole gzip file"):
        prepare(tmp_path / "torn.jsonl.gz", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def rows(file):
        yield b"{}"
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_rows", rows)
    file = _file(tmp_path, pairs(3))
    with pytest.raises(SystemExit, match=r"stopped; nothing is written"):
        command.main([str(file), str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    command.main([str(_file(tmp_path, pairs(3))), str(tmp_path / "out")])
    assert f"3 rows in {tmp_path / 'out'}" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"exists already"):
        command.main([str(tmp_path / "pairs.jsonl"), str(tmp_path / "out")])


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_the_command_shows_how_far_it_is(tmp_path, name):
    file = _file(tmp_path, pairs(99), name)
    command = [sys.executable, "-m", "pjpo.data.prepare", file, tmp_path / "out"]
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 200))
    subprocess.run(command, stderr=terminal, check=True, timeout=300)
    os.close(terminal)
    shown = os.read(screen, 2**16).decode()
    os.close(screen)
    # Bytes of the file and their rate: reading pairs.jsonl: 100%|████| 1.23k/1.23k [00:00<00:00, 99.9kB/s]
    assert re.search(rf"reading .*{name}: .* 0.00/\S+ \[", shown), shown
    assert re.search(rf"reading .*{name}: 100%.*\[\S+<\S+, \S+B/s\]\s+99 rows in {tmp_path / 'out'}", shown), shown


def test_what_is_no_terminal_gets_no_progress(tmp_path, capsys):
    command.main([str(_file(tmp_path, pairs(3))), str(tmp_path / "out")])
    assert capsys.readouterr().err == f"3 rows in {tmp_path / 'out'}\n"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / prepared.ABOUT).unlink(), "pairs is half-written: it has rows, but no about.json"),
        (lambda folder: (folder / prepared.ABOUT).write_text("{"), "about.json is damaged"),
        (lambda folder: (folder / prepared.ABOUT).write_text("[]"), "about.json is damaged"),
        (lambda folder: (folder / prepared.ABOUT).write_text("{}"), "about.json is damaged .KeyError"),
        (lambda folder: _edit(folder, format="x"), "of the format 'x', this reads 'pjpo rows, version 1'"),
        (lambda folder: _edit(folder, num_rows=8), "is damaged: it holds 9 of 8 rows"),
        (
            lambda folder: _rewrite(folder, lambda rows: rows[:-70]),
            "half-written: rows.array_record has .* of its .* bytes",
        ),
        (lambda folder: _rewrite(folder, lambda rows: b"\0" * len(rows)), "rows.array_record is damaged"),
        (lambda folder: (folder / prepared.ROWS).write_bytes(b""), "half-written: rows.array_record has 0 of its"),
    ],
)
def test_half_a_folder_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        open_source(str(folder))


def test_a_damaged_record_is_named_or_its_row_is_whole(folder):
    whole = (folder / prepared.ROWS).read_bytes()
    rows = pairs(9)
    for at in range(0, 2000, 37):
        broken = bytearray(whole)
        broken[at] ^= 0x55
        (folder / prepared.ROWS).write_bytes(broken)
        found, words = result_or_words(lambda: list(open_source(str(folder))), ValueError)
        assert re.search("damaged|line", words) if words else found == rows


def _edit(folder, **changes):
    about = json.loads((folder / prepared.ABOUT).read_text())
    (folder / prepared.ABOUT).write_text(json.dumps(about | changes))


def _rewrite(folder, change):
    (folder / prepared.ROWS).write_bytes(change((folder / prepared.ROWS).read_bytes()))


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path, monkeypatch):
    from array_record.python import array_record_module

    class Full:
        def __init__(self, path, options):
            shutil.copy(__file__, path)

        def write(self, row):
            raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(OSError, match=r"out cannot be written: .*No space left.*make room"):
        prepare(_file(tmp_path, pairs(3)), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
