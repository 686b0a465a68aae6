"""How a command ends, and what it says of its end."""

from __future__ import annotations

import errno
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from two_ranks import LAUNCHER_VARIABLES

from engine.ranks.command import run_command
from engine.ranks.signals import STOP_SIGNALS
from engine.ranks.terminal import Terminal
from pipelines.basics.errors import explain

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


def test_a_name_that_is_not_utf_8_is_refused_in_one_line(ends: Raises) -> None:
    with pytest.raises(UnicodeEncodeError) as raised:
        "scan-\udcff".encode()
    status, line = ends(raised.value)
    assert (status, line) == (2, "error: scan-\\udcff can't be written in utf-8: rename the file or the case\n")


def test_the_last_line_cannot_control_a_terminal(ends: Raises) -> None:
    assert ends(ValueError("case \x1b]0;x\x07"))[1] == "error: case \\x1b]0;x\\x07\n"


def test_an_error_of_the_system_is_a_line_with_the_remedy(ends: Raises) -> None:
    status, line = ends(OSError(errno.EROFS, os.strerror(errno.EROFS), "runs/a/log.csv"))
    assert (status, line) == (
        2,
        f"error: {explain(OSError(errno.EROFS, os.strerror(errno.EROFS), 'runs/a/log.csv'))}\n",
    )


def prints_help() -> None:
    print("usage")
    raise SystemExit(0)


def works() -> None:
    print("table")


@pytest.mark.parametrize(
    ("work", "where", "status"),
    [
        (prints_help, "pipe", 141), (prints_help, "/dev/full", 74), (prints_help, "file", 0),
        (works, "pipe", 0), (works, "/dev/full", 74), (works, "file", 0),
    ],
)  # fmt: skip
def test_a_full_disk_behind_standard_output_is_an_error_and_a_reader_that_left_is_not(
    work: Callable[[], None],
    where: str,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Except of a command that only prints."""
    if where == "pipe":
        end, own = os.pipe()
        os.close(end)
    else:
        own = os.open(tmp_path / "out" if where == "file" else where, os.O_WRONLY | os.O_CREAT)
    with open(own, "w") as stream:
        monkeypatch.setattr(sys, "stdout", Terminal(stream))
        assert run_command(work, lambda: "", alone=True) == status
    assert ("error: standard output: No space left on device; free space" in capsys.readouterr().err) == (status == 74)


def test_a_terminal_that_hung_up_does_not_change_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    end, own = pty.openpty()
    with open(own, "w") as stream:
        monkeypatch.setattr(sys, "stdout", Terminal(stream))
        os.close(end)
        assert run_command(works, str, alone=True) == 0


@pytest.mark.parametrize(("cause", "status"), [(KeyboardInterrupt(), 130), (MemoryError(), 2)])
def test_an_import_that_was_stopped_ends_as_its_cause(cause: BaseException, status: int, ends: Raises) -> None:
    """pybind11 makes an ImportError of whatever ends the initialisation of a module."""
    error = ImportError("initialization failed")
    error.__cause__ = cause
    assert ends(error)[0] == status


IMPORTING = """
import importlib.machinery, signal, sys, types
from engine.ranks.command import run_command

torch = sys.modules["torch"] = types.ModuleType("torch")
torch.__spec__ = importlib.machinery.ModuleSpec("torch", None)
torch.__spec__._initializing = True

def work():
    try:
        signal.raise_signal(int(sys.argv[1]))
    except BaseException:
        print("raised")

run_command(work, lambda: "start again", alone=True)
"""


@pytest.mark.parametrize(
    ("number", "status", "line"),
    [(signal.SIGINT, 130, "\ninterrupted; start again\n"), (signal.SIGTERM, 75, "stopped by SIGTERM; start again\n")],
)
def test_nothing_is_raised_while_pytorch_is_being_imported(number: signal.Signals, status: int, line: str) -> None:
    """Its extension module crashes where an exception comes in between."""
    done = subprocess.run([sys.executable, "-c", IMPORTING, str(int(number))], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", line)


def test_a_single_rank_needs_no_thread_and_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    threads = threading.active_count()
    assert run_command(lambda: threading.active_count() - threads, str) == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), *((stop, 75) for stop in STOP_SIGNALS)])
def test_a_signal_says_how_to_continue(number: signal.Signals, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    assert run_command(lambda: signal.raise_signal(number), lambda: "start again", alone=True) == status
    assert capsys.readouterr().err.endswith("; start again\n")
    assert signal.getsignal(number) is before


def test_a_signal_while_the_last_line_is_made_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def how_to_continue() -> str:
        signal.raise_signal(signal.SIGTERM)
        return "start again"

    assert run_command(lambda: signal.raise_signal(signal.SIGUSR1), how_to_continue, alone=True) == 75
    assert capsys.readouterr().err == "stopped by SIGUSR1; start again\n"
