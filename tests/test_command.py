"""How a command ends, and what it says of its end."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.ranks import command
from engine.ranks.command import REMEDIES, explain, run_command
from engine.ranks.terminal import Terminal

Raises = Callable[[BaseException], tuple[int, str]]


@pytest.fixture
def ends(capsys: pytest.CaptureFixture[str]) -> Raises:
    """Exit status and last words of a command whose work raises an error."""

    def run(error: BaseException) -> tuple[int, str]:
        def work() -> None:
            raise error

        status = run_command(work, lambda: "start again", alone=True)
        return status, capsys.readouterr().err

    return run


@pytest.mark.parametrize("number", list(REMEDIES))
def test_an_error_of_the_system_names_file_cause_and_remedy(number: int, ends: Raises) -> None:
    status, line = ends(OSError(number, os.strerror(number), "runs/a/log.csv"))
    assert status == 2 and line.count("\n") == 1
    assert line.startswith(f"error: runs/a/log.csv: {os.strerror(number)}; ")
    assert "{" not in line


def test_a_limit_of_the_shell_is_told_with_its_value() -> None:
    import resource

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert f"`ulimit -n` ({files})" in explain(OSError(errno.EMFILE, os.strerror(errno.EMFILE), "scan.nii"))


def test_a_full_disk_without_a_file_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "a folder that the system does not name" in explain(error)
    monkeypatch.setattr(command, "_FULL_BELOW", float("inf"))
    assert f"No space left on device in {tmp_path} and " in explain(error)


def test_an_error_that_has_a_remedy_keeps_it() -> None:
    error = OSError(errno.ENOSPC, "No space left on device: no checkpoint could be written; make room", "state.pt")
    assert explain(error) == "state.pt: No space left on device: no checkpoint could be written; make room"
    assert explain(OSError("no such server")) == "no such server"


def test_both_names_of_a_move_are_told() -> None:
    error = OSError(errno.EXDEV, os.strerror(errno.EXDEV), b"a", None, "b")
    assert explain(error) == f"a -> b: {os.strerror(errno.EXDEV)}"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("could not create a primitive"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
)
def test_memory_that_ran_out_is_a_line_with_advice(error: Exception, ends: Raises) -> None:
    status, line = ends(error)
    assert status == 2 and line.startswith("error: out of memory (") and line.count("\n") == 1
    assert "of the machine" in line and "--data.workers" in line


def test_an_error_of_the_program_keeps_its_traceback(ends: Raises) -> None:
    with pytest.raises(RuntimeError, match="no such operator"):
        ends(RuntimeError("no such operator"))


def test_a_name_that_is_not_utf_8_is_told(ends: Raises) -> None:
    with pytest.raises(UnicodeEncodeError) as raised:
        "scan-\udcff".encode()
    status, line = ends(raised.value)
    assert (status, line) == (2, "error: scan-\\udcff can't be written in utf-8: rename the file or the case\n")


def test_the_last_line_steers_no_terminal(ends: Raises) -> None:
    assert ends(ValueError("case \x1b]0;x\x07"))[1] == "error: case \\x1b]0;x\\x07\n"


def prints_help() -> None:
    print("usage")
    raise SystemExit(0)


@pytest.mark.parametrize(("where", "status"), [("pipe", 141), ("/dev/full", 74), ("file", 0)])
def test_a_command_that_only_prints_ends_with_the_status_of_its_output(
    where: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if where == "pipe":
        end, own = os.pipe()
        os.close(end)
    else:
        own = os.open(tmp_path / "out" if where == "file" else where, os.O_WRONLY | os.O_CREAT)
    with open(own, "w") as stream:
        monkeypatch.setattr(sys, "stdout", Terminal(stream))
        assert run_command(prints_help, lambda: "", alone=True) == status
    assert ("error: standard output: No space left on device; free space" in capsys.readouterr().err) == (status == 74)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75)])
def test_a_signal_says_how_to_go_on(
    number: signal.Signals, status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(number)
    assert run_command(lambda: signal.raise_signal(number), lambda: "start again", alone=True) == status
    assert capsys.readouterr().err.endswith("; start again\n")
    assert signal.getsignal(number) is before


def test_a_signal_while_the_end_is_told_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def how_to_go_on() -> str:
        signal.raise_signal(signal.SIGTERM)
        return "start again"

    assert run_command(lambda: signal.raise_signal(signal.SIGUSR1), how_to_go_on, alone=True) == 75
    assert capsys.readouterr().err == "stopped by SIGUSR1; start again\n"


def test_a_hangup_that_nohup_ignores_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_command(lambda: signal.raise_signal(signal.SIGHUP), lambda: "", alone=True) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
