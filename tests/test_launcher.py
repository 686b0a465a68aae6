"""What a process runs under, and how it hears that its launcher ended."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.ranks import launcher
from engine.ranks.launcher import LAUNCHER_GONE, find_launchers, program_of

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ("python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30=")
SHELL = ("bash", "job.sh", "torchrun")
LIMIT_S = 60.0  # ends a test that hangs, and no other


class Processes:
    """A `/proc` of a test's making."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, number: int, parent: int, session: int, *arguments: str, state: str = "S", started: int = 7) -> None:
        folder = self.folder / str(number)
        folder.mkdir(exist_ok=True)
        fields = [state, parent, number, session, *[0] * 15, started, 0]
        (folder / "stat").write_text(f"{number} (a (very) odd name) {' '.join(map(str, fields))}\n")
        (folder / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in arguments))


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Processes:
    monkeypatch.setattr(launcher, "_PROC", tmp_path)
    processes = Processes(tmp_path)
    processes.add(1, 0, 1, "/sbin/init")
    processes.add(50, 1, 50, *SHELL)
    return processes


@pytest.mark.parametrize(
    ("line", "program"),
    [
        ("/usr/bin/python3.11 -u -m deepspeed.launcher.launch --node_rank=0", "deepspeed.launcher.launch"),
        ("/venv/bin/python /venv/bin/torchrun --nnodes 2 train.py", "torchrun"),
        ("bash run.sh deepspeed", "bash"),
        ("python -c pass torchrun", "python"),
        ("python3", "python3"),
        ("", ""),
    ],
)
def test_a_program_is_recognised_by_its_command_line(line: str, program: str) -> None:
    assert program_of(line.split()) == program


def test_both_processes_of_deepspeed_are_launchers_and_a_shell_is_not(processes: Processes) -> None:
    processes.add(60, 50, 50, "python", "/venv/bin/deepspeed", "train.py")
    processes.add(61, 60, 50, *LAUNCH)
    processes.add(62, 61, 50, "python", "train.py")
    found, has_ended = find_launchers(62, is_of_deepspeed=True)
    assert [one.number for one in found] == [61, 60] and not has_ended


def test_deepspeed_that_ended_before_its_ranks_could_look_is_gone(processes: Processes) -> None:
    processes.add(61, 1, 50, *LAUNCH)  # of the shell's session still, and init's child
    processes.add(62, 61, 50, "python", "train.py")
    assert find_launchers(62, is_of_deepspeed=True)[1]


def test_a_rank_whose_launcher_ended_before_it_could_look_knows_by_its_session(processes: Processes) -> None:
    processes.add(62, 1, 50, "python", "train.py")
    assert find_launchers(62, is_of_deepspeed=True)[1]
    assert not find_launchers(62, is_of_deepspeed=False)[1]


@pytest.mark.parametrize(
    ("parent", "session", "arguments"),
    [
        (50, 50, LAUNCH),  # started by hand, from a shell that is there
        (1, 61, LAUNCH),  # by setsid or a supervisor: it leads a session
        (1, 50, (*LAUNCH, "--node_rank=1")),  # by ssh, which may be gone
        (1, 1, LAUNCH),  # in a container, whose first process started it
        (40, 50, LAUNCH),  # by a process that may not be looked at
    ],
)
def test_a_node_launcher_without_deepspeed_above_it_raises_no_alarm(
    parent: int, session: int, arguments: tuple[str, ...], processes: Processes
) -> None:
    processes.add(61, parent, session, *arguments)
    processes.add(62, 61, session, "python", "train.py")
    found, has_ended = find_launchers(62, is_of_deepspeed=True)
    assert [one.number for one in found] == [61] and not has_ended


def test_an_ended_process_is_gone_even_if_its_number_is_in_use(processes: Processes) -> None:
    processes.add(60, 50, 50, "torchrun")
    before = launcher.read_process(60)
    assert before and launcher.is_there(before)
    processes.add(60, 50, 50, "torchrun", state="Z")  # nobody has asked for its status yet
    assert not launcher.is_there(before)
    processes.add(60, 50, 50, "torchrun", started=8)  # another one
    assert not launcher.is_there(before)


CHILD = f"""
import pathlib, signal, time
from engine.ranks.launcher import Launcher, LAUNCHER_GONE

def stop(number, frame):
    raise SystemExit(pathlib.Path("gone").touch())

signal.signal(LAUNCHER_GONE, stop)
with Launcher():
    pathlib.Path("ready").touch()
    time.sleep({LIMIT_S})
"""


def start_and_kill(folder: Path, parent: str) -> None:
    """A program of that name starts a child that watches its launcher, and is killed when the child is ready."""
    (folder / "child.py").write_text(CHILD)
    (folder / parent).write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, 'child.py'])\n"
        "open('pid', 'w').write(str(child.pid))\n"
        f"time.sleep({LIMIT_S})\n"
    )
    with subprocess.Popen([sys.executable, parent], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        wait_for(folder / "ready")
        process.kill()


def wait_for(path: Path) -> None:
    limit = time.monotonic() + LIMIT_S
    while not path.exists():
        assert time.monotonic() < limit, f"no {path}"
        time.sleep(0.02)


def test_a_child_learns_that_its_launcher_was_killed(tmp_path: Path) -> None:
    start_and_kill(tmp_path, "torchrun")
    wait_for(tmp_path / "gone")


def test_the_end_of_another_parent_sends_no_signal(tmp_path: Path) -> None:
    start_and_kill(tmp_path, "job.py")
    time.sleep(2.5 * launcher.LOOK_EVERY_S)
    assert not (tmp_path / "gone").exists()
    os.kill(int((tmp_path / "pid").read_text()), LAUNCHER_GONE)  # it was there all the time
    wait_for(tmp_path / "gone")


def test_no_signal_comes_after_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    gone = launcher.Process(1, 0, 0, 0, "torchrun", ())
    monkeypatch.setattr(launcher, "find_launchers", lambda *_: ([gone], False))
    monkeypatch.setattr(launcher, "LOOK_EVERY_S", 0.05)
    is_there = [True]
    monkeypatch.setattr(launcher, "is_there", lambda _: is_there[0])
    monkeypatch.setattr(launcher.os, "kill", lambda number, what: sent.append(what))
    with launcher.Launcher():
        time.sleep(0.1)
    is_there[0] = False
    time.sleep(0.2)
    assert not sent
    with launcher.Launcher() as mine:
        time.sleep(0.2)
    assert sent == [LAUNCHER_GONE] and mine.is_gone()
