"""Measurements that outlive a run: kept whole by processes that write at once, and never a reason to stop."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kernels import measured_cache
from kernels.measured_cache import MeasuredCache, cache_folder
from pipelines.basics.machine import cache_dir

VARIABLES = ("GLIOFORGE_CACHE", "XDG_CACHE_HOME", "HOME")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of measurements, which is not made yet, in a process that has not warned."""
    monkeypatch.setenv("GLIOFORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measured_cache, "_has_warned", False)
    return tmp_path / "cache" / "measured"


@pytest.fixture
def file(folder: Path) -> Path:
    """A file with one measurement."""
    MeasuredCache("steps").put("a", 1)
    return folder / "steps.json"


def test_what_is_put_is_there_for_the_next_run(folder: Path) -> None:
    cache = MeasuredCache("steps")
    assert not folder.parent.exists() and cache.get("a") is None and cache.entries() == {}
    assert not folder.parent.exists()
    cache.put("a", {"ms": [1.5, None], "way": "graph"})
    cache.put("b", 2)
    cache.put("b", 3)
    again = MeasuredCache("steps")
    assert again.path == folder / "steps.json"
    assert again.get("a") == {"ms": [1.5, None], "way": "graph"} and again.get("b") == 3
    assert MeasuredCache("others").entries() == {}


def test_clearing_says_how_many_there_were(file: Path) -> None:
    cache = MeasuredCache("steps")
    cache.put("b", 2)
    assert (cache.clear(), cache.clear(), cache.entries()) == (2, 0, {})
    assert not file.exists()


@pytest.mark.parametrize("given", [VARIABLES, VARIABLES[1:], VARIABLES[2:]])
def test_the_folder_is_that_of_prepared_volumes(
    given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "" if name not in given else str(tmp_path / name))
        (tmp_path / name).mkdir()
    assert cache_folder() == cache_dir()


PUTS = """
import sys
from kernels.measured_cache import MeasuredCache
for number in range(40):
    MeasuredCache("steps").put(f"{sys.argv[1]} {number}", number)
print(sorted({"torch", "triton"} & set(sys.modules)))
"""


def test_two_processes_that_write_at_once_lose_nothing_and_need_no_pytorch() -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", PUTS, name], stdout=subprocess.PIPE, text=True) for name in "ab"
    ]
    assert [process.communicate(timeout=60)[0] for process in processes] == 2 * ["[]\n"]
    assert MeasuredCache("steps").entries() == {f"{name} {number}": number for name in "ab" for number in range(40)}


DAMAGED = {
    "cut short": b'{"version": 1, "entr',
    "not text": b"\xff\xfe\x00",
    "too deep": b"[" * 100_000,
    "a list": b"[]",
    "an older format": b'{"version": 0, "entries": {"a": 1}}',
    "without entries": b'{"version": 1}',
    "of a list of entries": b'{"version": 1, "entries": [1]}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_empty_and_the_next_measurement_replaces_it(
    content: bytes, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.write_bytes(content)
    cache = MeasuredCache("steps")
    assert cache.get("a") is None and cache.entries() == {}
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"measured: {file} is replaced when something is next measured: ")
    cache.put("b", 2)
    assert cache.entries() == {"b": 2} and len(caplog.messages) == 1


def as_a_folder(file: Path) -> str:
    file.unlink()
    file.mkdir()
    return f"{file} can't be read (Is a directory)"


def below_a_file(file: Path) -> str:
    os.environ["GLIOFORGE_CACHE"] = str(file)
    return f"{file}/measured/steps.json can't be read (Not a directory)"


def without_a_home(file: Path) -> str:
    for name in VARIABLES:
        os.environ.pop(name, None)
    return "steps can't be written (no home folder; GLIOFORGE_CACHE can name another), so each run measures again"


@pytest.mark.parametrize("spoil", [as_a_folder, below_a_file, without_a_home])
def test_a_file_that_cannot_be_used_is_one_line_of_the_log(
    spoil: Callable[[Path], str], file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: os.environ.get("HOME", path))
    for name in VARIABLES:
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back at the end
    message = spoil(file)
    for cache in (MeasuredCache("steps"), MeasuredCache("steps")):
        assert cache.get("a") is None
        cache.put("b", 2)
        assert cache.entries() == {} and cache.clear() == 0
    assert caplog.messages == [f"measured: {message}"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_keeps_the_old_file_and_leaves_no_other(
    code: int, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", refuse)
    MeasuredCache("steps").put("b", 2)
    assert MeasuredCache("steps").entries() == {"a": 1}
    assert sorted(path.name for path in file.parent.iterdir()) == ["steps.json", "steps.lock"]
    assert caplog.messages == [f"measured: {file} can't be written ({os.strerror(code)}), so each run measures again"]


def test_a_file_system_without_locks_and_a_stopped_process_are_passed_over(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(measured_cache, "LOCK_SECONDS", 0.05)
    with open(file.with_suffix(".lock")) as lock:
        measured_cache._wait_for(lock.fileno())
        MeasuredCache("steps").put("b", 2)

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(measured_cache.fcntl, "flock", refuse)
    MeasuredCache("steps").put("c", 3)
    assert MeasuredCache("steps").entries() == {"a": 1, "b": 2, "c": 3} and not caplog.messages


def test_a_value_that_json_cannot_hold_is_the_callers_mistake(file: Path) -> None:
    with pytest.raises(TypeError):
        MeasuredCache("steps").put("b", {1, 2})
    assert json.loads(file.read_text())["entries"] == {"a": 1}


def test_only_the_first_fault_of_a_process_is_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        (folder / f"{name}.json").write_text("[")
        assert MeasuredCache(name).entries() == {}
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
