"""Places for results are refused before the work, and asking leaves nothing there."""

import tempfile

import pytest

from pjpo import outputs

NAMED = {"what": "table", "way_out": "choose another"}


@pytest.fixture
def file(tmp_path):
    (tmp_path / "file").write_text("mine")
    return tmp_path / "file"


def test_a_folder_is_there_or_can_be_made(tmp_path, file):
    for good in (tmp_path, tmp_path / "new" / "newer"):
        outputs.check_folder(good, **NAMED)
    for bad in (file, file / "in" / "it"):
        with pytest.raises(ValueError, match=f"^no table can be written to {bad}: {file} is a file; choose another$"):
            outputs.check_folder(bad, **NAMED)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_is_there_or_can_be_made(tmp_path, file):
    for good in (file, tmp_path / "new", tmp_path / "deep" / "new"):
        outputs.check_file(good, **NAMED)
    with pytest.raises(ValueError, match=f"to {tmp_path}: it is a folder; choose another"):
        outputs.check_file(tmp_path, **NAMED)
    with pytest.raises(ValueError, match=f"to {file}: {file} is a file"):
        outputs.check_file(file / "new", **NAMED)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "mine")]


def test_a_folder_that_takes_no_file_is_refused(tmp_path, monkeypatch):
    def read_only(dir):
        raise OSError(30, "Read-only file system", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(ValueError, match=f"to {tmp_path}/new: {tmp_path}: Read-only file system; choose another"):
        outputs.check_folder(tmp_path / "new", **NAMED)
