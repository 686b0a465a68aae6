"""YAML files of options: what is text, what is none, and what is refused with its line."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from engine.parser import parse_yaml, read_yaml


def test_scalars_stay_text_and_nothing_is_none() -> None:
    content = b"\xef\xbb\xbfa: 00001\nb: 1e-4\nc: on\nd: 2024-01-01\ne: 'null'\nf: null\ng: ~\nh:\ni: '~'\n<<: x\n"
    assert parse_yaml(content, "a.yaml") == {
        "a": "00001", "b": "1e-4", "c": "on", "d": "2024-01-01", "e": "null", "f": None, "g": None, "h": None, "i": "~",
        "<<": "x",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\na: 2\n", "a.yaml, line 2: a is given twice"),
        (b"a: {b: {c: 1}}\nd: {e: 1,\n    e: 2}\n", "a.yaml, line 3: e is given twice"),
        (b"a: &x [1]\nb: [*x, *x]\n", "a.yaml, line 1: anchors"),
        (b"a: *x\n", "a.yaml, line 1: anchors"),
        (b"a: !!python/object/apply:os.getcwd []\n", "a.yaml, line 1: tags .*python.* are not allowed"),
        (b"a: !!timestamp x\n", "a.yaml, line 1: tags"),
        (b"a:\n\tb: 1\n", "a.yaml is not YAML: line 2: .*indent with spaces, not tabs"),
        (b"a: [\n", "a.yaml is not YAML: line "),
        (b"a: 1\n---\na: 2\n", "a.yaml is not YAML: line 2: but found another document"),
        (b"? [1]\n: 2\n", "a.yaml is not YAML: line 1: found unhashable key"),
        (b"a: \0\n", "a.yaml is not YAML: unacceptable character"),
        ("a: ü\n".encode("latin-1"), "a.yaml is not YAML: byte 3 is not UTF-8; save it as UTF-8"),
        (b"[" * 50_000, "a.yaml is not an options file: its brackets are nested too deeply"),
        (b"a: " + b"{b: " * 5_000, "a.yaml is not an options file: its brackets are nested too deeply"),
    ],
)
def test_a_wrong_options_file_is_refused_by_file_and_line(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        parse_yaml(content, "a.yaml")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_a_path_that_is_not_an_options_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder: give a YAML file"):
        read_yaml(tmp_path)
    with pytest.raises(ValueError, match="/dev/zero is a device: give a YAML file"):
        read_yaml(Path("/dev/zero"))
    with pytest.raises(ValueError, match="a.yaml can't be read .No such file or directory.: correct the path"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "scan.nii").write_bytes(bytes(2**20 + 1))
    with pytest.raises(ValueError, match="scan.nii is larger than 1 MiB"):
        read_yaml(tmp_path / "scan.nii")


def test_a_pipe_is_read_as_shells_give_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # as --config <(...)
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("a: {b: 1}\n",))
    writer.start()
    assert read_yaml(tmp_path / "pipe") == {"a": {"b": "1"}}
    writer.join()
