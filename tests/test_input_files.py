"""Only regular files are opened, text is UTF-8 and JSON is well-formed; whatever else is there is named."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from pipelines.basics.errors import CaseError, DataError
from pipelines.basics.input_files import file_fault, open_regular, read_json, read_text
from pipelines.basics.text import escape_controls
from pipelines.preparing.prepared_case import hash_file
from pipelines.scans.nifti import read_grid, read_nifti


def refused(path: Path, match: str) -> CaseError:
    with pytest.raises(CaseError, match=match) as caught, open_regular(path):
        pass
    assert caught.value.path == Path(escape_controls(str(path)))
    return caught.value


@pytest.mark.parametrize("reader", [read_nifti, read_grid, hash_file])
def test_what_is_not_a_regular_file_is_refused_at_once(tmp_path: Path, reader: object) -> None:
    assert callable(reader)
    pipe, folder, plug = tmp_path / "pipe.nii.gz", tmp_path / "folder.nii", tmp_path / "socket.nii"
    os.mkfifo(pipe)
    folder.mkdir()
    server = socket.socket(socket.AF_UNIX)
    os.chdir(tmp_path)
    server.bind(plug.name)  # a whole path may be too long
    endless = tmp_path / "endless.nii"
    endless.symlink_to("/dev/zero")
    kinds = {
        pipe: "is a pipe, not",
        folder: "is a folder, must be a file",
        plug: "is a socket, not",
        endless: "is a device, not",
    }
    for path, kind in kinds.items():
        with pytest.raises(CaseError, match=kind):
            reader(path)
    server.close()


def test_a_broken_link_says_where_it_points(tmp_path: Path) -> None:
    (tmp_path / "a.nii").symlink_to("gone.nii")
    assert "correct the link" in refused(tmp_path / "a.nii", "is a link to gone.nii, which does not exist").remedy
    (tmp_path / "b.nii").symlink_to("../.git/annex/objects/Xx/Yy/SHA256E-s9--0.nii/SHA256E-s9--0.nii")
    assert "git annex get" in refused(tmp_path / "b.nii", "is a git-annex link to a file that is not here").remedy
    (tmp_path / "c.nii").symlink_to("c.nii")
    refused(tmp_path / "c.nii", "is a link to c.nii, which does not exist")


def test_a_name_that_no_file_can_have_is_refused() -> None:
    refused(Path("a\0.nii"), "no file can have this name")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads what it likes")
def test_an_unreadable_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    (folder / "a.nii").touch()
    folder.chmod(0)
    try:
        assert "permissions" in refused(folder / "a.nii", "can't be read .Permission denied").remedy
    finally:
        folder.chmod(0o700)


def test_a_link_into_a_closed_folder_is_not_called_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(path))

    link = tmp_path / "a.nii"
    link.symlink_to("closed/a.nii")
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", closed)
        fault = file_fault(link)
    assert fault and "can't be read (Permission denied)" in fault.problem


def test_text_keeps_its_line_ends_and_loses_its_mark(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("\ufeffé\r\nb\n".encode())
    assert read_text(tmp_path / "a.csv") == "é\r\nb\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"modality": ', "a.json is not valid JSON"),
        (b'{"training": [], "x": ' + b"[" * 100_000, "a.json is not valid JSON"),
        (b'{"training": [' + b"9" * 5000 + b"]}", "a.json is not valid JSON"),
        (b'{"a": {"training": [], "training": [1]}}', "a.json: the key 'training' is given twice"),
        ('{"training": "é"}'.encode("latin-1"), "a.json is not in UTF-8 .*: save it as UTF-8"),
        ("{}".encode("utf-16"), "a.json is not in UTF-8"),
    ],
)
def test_broken_json_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_json(tmp_path / "a.json")


def test_a_key_that_is_repeated_with_one_value_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1, "a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"b\.json can't be read \(No such file or directory\)"):
        read_json(tmp_path / "b.json")
