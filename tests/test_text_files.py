"""Text and JSON that users write: UTF-8, well-formed, and no key twice; else the file is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.basics.errors import DataError
from pipelines.basics.regular_files import read_json, read_text


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
