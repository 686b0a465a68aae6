"""The launcher that this process runs under, and the signal that reports its end.

`deepspeed` has no handler for SIGTERM: it dies, and the ranks, its grandchildren, would train on with nobody to stop
them. A launcher that is killed leaves its ranks behind as well. So a thread checks once a second that the launchers
among this process's ancestors still run, and otherwise sends it `LAUNCHER_GONE`, which stops it as SIGTERM does. Only
programs known as launchers count: a shell may end and leave what it started running.

Only `deepspeed` starts `python -m deepspeed.launcher.launch`. If that has lost its parent before this process could
look, `deepspeed` has ended. A process without its first parent belongs to a session that its new parent is not in, and
that it does not lead.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import NamedTuple

LAUNCHER_GONE = signal.SIGRTMAX
LOOK_EVERY_S = 1.0
_NODE_LAUNCHER = "deepspeed.launcher.launch"
_LAUNCHERS = (
    _NODE_LAUNCHER, "deepspeed", "deepspeed.launcher.runner", "torchrun", "torch.distributed.run",
    "torch.distributed.launch", "accelerate",
)  # fmt: skip
_PROC = Path("/proc")


class Process(NamedTuple):
    """A process; number and start time identify it."""

    number: int
    started: int
    parent: int
    session: int
    program: str
    arguments: tuple[str, ...]


class Launcher:
    """The launchers that this process runs under, watched within a `with` block."""

    def __init__(self) -> None:
        self.found, self.has_ended = find_launchers(os.getpid(), "CROSS_RANK" in os.environ)  # set by deepspeed
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="launcher", daemon=True)

    def __enter__(self) -> Launcher:
        if self.found or self.has_ended:
            self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join()

    def is_gone(self) -> bool:
        """Whether one of them has ended."""
        self.has_ended = self.has_ended or not all(map(is_there, self.found))
        return self.has_ended

    def _watch(self) -> None:
        while not self.is_gone():
            if self._is_over.wait(LOOK_EVERY_S):
                return
        os.kill(os.getpid(), LAUNCHER_GONE)


def find_launchers(number: int, is_of_deepspeed: bool) -> tuple[list[Process], bool]:
    """The launchers among a process's ancestors, and whether one of them is known to have ended already.

    With `is_of_deepspeed`, the process was started by `deepspeed.launcher.launch`.
    """
    found: list[Process] = []
    process, has_launcher, has_ended = read_process(number), is_of_deepspeed, False
    while process and (parent := read_process(process.parent)):
        if parent.program in _LAUNCHERS:
            found.append(parent)
        elif has_launcher and process.session not in (process.number, parent.session):
            has_ended = True
        # On several nodes (`--node_rank`) another program starts it.
        has_launcher = parent.program == _NODE_LAUNCHER and not any("--node_rank" in word for word in parent.arguments)
        process = parent
    return found, has_ended


def is_there(process: Process) -> bool:
    """Whether a process still runs: not a zombie, nor another process with the same number."""
    now = read_process(process.number)
    return now is not None and now.started == process.started


def read_process(number: int) -> Process | None:
    """The process of a number; None if none runs."""
    try:
        # The second field is a name in parentheses, which may hold blanks and parentheses itself.
        fields = (_PROC / str(number) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        arguments = (_PROC / str(number) / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return None
    if len(fields) < 20 or fields[0] in "ZX":
        return None
    return Process(number, int(fields[19]), int(fields[1]), int(fields[3]), program_of(arguments), tuple(arguments))


def program_of(arguments: list[str]) -> str:
    """The program that a command line runs; for Python the name of its script or module."""
    first, *rest = arguments or [""]
    program, words = Path(first).name, iter(rest)
    word = next((word for word in words if word in ("-m", "-c") or not word.startswith("-")), "-c")
    if not program.startswith("python") or word == "-c":
        return program
    return next(words, "") if word == "-m" else Path(word).name
