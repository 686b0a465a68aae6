"""Standard streams and log files: a failed write never ends the work."""

from __future__ import annotations

import errno
import io
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.ranks.terminal import LogFile, PlainFormatter, Terminal, set_up_terminal
from pipelines.basics.text import escape_controls

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = "a\x1b]0;title\x07\x1b[2J\x9b1mb\u202ec\r\udcff"
SHOWN = r"a\x1b]0;title\x07\x1b[2J\x9b1mb\u202ec\r\udcff"
WRITES = """
import os, sys
from engine.ranks.terminal import set_up_terminal

set_up_terminal()
for _ in range(1000):
    print("a line that nobody reads" * 10)
os.write(1, b"nor this, of a library")
print("name \\udcff \\u00e4", file=sys.stderr)
"""


def run(redirected: str, **variables: str) -> subprocess.CompletedProcess:
    """A script that prints 240 kB to standard output and a line to standard error, behind a shell's redirection."""
    command = ["bash", "-c", f'"$0" -c "$1" {redirected}', sys.executable, WRITES]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(command, env=environment, capture_output=True, timeout=60)


def test_control_characters_and_bytes_that_are_not_text_become_escapes() -> None:
    assert escape_controls(HOSTILE) == SHOWN
    assert escape_controls("Gehirn größer als 5 µm,\tNo 3\n脳") == "Gehirn größer als 5 µm,\tNo 3\n脳"


@pytest.mark.parametrize("redirected", ["| true", "> /dev/full", ">&-", "2>&-"])
def test_output_that_cannot_be_written_changes_nothing(redirected: str) -> None:
    done = run(f"{redirected}; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 0
    assert done.stderr in (b"", "name \\udcff ä\n".encode())


def test_text_that_an_encoding_lacks_is_written_as_escapes() -> None:
    done = run("> /dev/null", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"name \\udcff \\xe4\n")


def through(write: Callable[[io.TextIOWrapper], object], on_terminal: bool) -> str:
    """What arrives at the other end of a pipe or of a terminal."""
    end, own = pty.openpty() if on_terminal else os.pipe()
    with open(own, "w", encoding="utf-8") as stream:
        terminal = Terminal(stream)
        write(terminal)
        terminal.flush()
        found = os.read(end, 4096).decode()
    os.close(end)
    return found


def test_a_terminal_gets_colours_and_cursor_movements_and_no_other_commands() -> None:
    bar = "\r\x1b[2K\x1b[1A\x1b[1;31mred\x1b[0m\x1b[?25h"
    hostile = HOSTILE.replace("\r", "")
    assert through(lambda stream: stream.write(bar + hostile), on_terminal=True) == bar + escape_controls(hostile)
    assert "\x1b" not in through(lambda stream: stream.write(bar + hostile), on_terminal=False)


def test_a_terminal_that_hung_up_raises_nothing() -> None:
    end, own = pty.openpty()
    with open(own, "w") as stream:
        terminal = Terminal(stream)
        os.close(end)
        terminal.write("text\n")
        terminal.flush()
        assert terminal.lost and terminal.lost.errno == errno.EIO


def test_a_full_pipe_that_does_not_wait_loses_lines_and_not_the_reader() -> None:
    end, own = os.pipe()
    os.set_blocking(own, False)
    with open(own, "w") as stream:
        terminal = Terminal(stream)
        while terminal.lost is None:
            terminal.write("text" * 1000)
            terminal.flush()
        while len(os.read(end, 65536)) == 65536:
            pass
        terminal.write("later\n")
        terminal.flush()
        assert os.read(end, 65536).endswith(b"later\n")
    os.close(end)


def test_lines_of_a_log_cannot_control_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter("%(message)s"))
    handler.handle(logging.makeLogRecord({"msg": "case %s", "args": (HOSTILE,)}))
    assert capsys.readouterr().err == f"case {SHOWN}\n"


def test_existing_handlers_write_through_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    end, own = os.pipe()
    stream = open(own, "w", encoding="utf-8")  # noqa: SIM115  # the Terminal's, from here on
    monkeypatch.setattr(sys, "stderr", stream)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[%(message)s]"))
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    set_up_terminal()
    assert isinstance(handler.stream, Terminal)
    logging.getLogger().error("case %s", HOSTILE)
    assert os.read(end, 4096).decode() == f"[case {SHOWN}]\n"
    os.close(end)
    logging.getLogger().error("nobody reads this")


def test_a_log_file_takes_names_that_are_not_utf_8(tmp_path: Path) -> None:
    handler = LogFile(tmp_path / "run.log")
    handler.handle(logging.makeLogRecord({"msg": "case \udcff ä"}))
    assert (tmp_path / "run.log").read_text(encoding="utf-8").endswith("case \\udcff ä\n")


def test_a_log_file_on_a_full_disk_is_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    handler = LogFile(Path("/dev/full"))
    for _ in range(100):
        handler.handle(logging.makeLogRecord({"msg": "a line"}))
    assert capsys.readouterr().err == "/dev/full can't be written (No space left on device) and will lack lines\n"


def test_a_mistake_in_a_record_is_still_reported_by_logging(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = LogFile(tmp_path / "run.log")
    handler.handle(logging.makeLogRecord({"msg": "%d", "args": ("no number",)}))
    assert "TypeError" in capsys.readouterr().err
