"""Two ranks on a CPU whose command is a test's own work; shared by the tests of `engine.ranks`."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from commands import free_port

from engine.ranks import watchdog
from engine.ranks.command import run_command
from engine.ranks.distributed import Ranks, init_ranks

LAUNCHER_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
PROMPT_S = 15.0  # 5 to 8 on an idle machine; a lost rank is given up after 20
LIMIT_S = 300.0  # ends only a test that hangs
Work = Callable[[], None]


@dataclass
class Ended:
    """What two ranks left: exit statuses, everything they wrote to one terminal, seconds from rank 1's `ready`."""

    statuses: list[int | None]
    output: str
    seconds: float

    def lines(self) -> list[str]:
        return self.output.strip().splitlines()


class TwoRanks:
    """Starts two ranks of `run_command` on one terminal, each with a test's work; they run in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.terminal = folder, folder / "terminal"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["engine.ranks.distributed"])  # imported once, not once per rank
        self.variables = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                          "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}  # fmt: skip

    def start(self, work: Work, lost_after_s: float = watchdog.LOST_AFTER_S, **variables: str) -> TwoRanks:
        self.ranks = []
        for rank in range(2):
            mine = {"RANK": str(rank), "LOCAL_RANK": str(rank), **self.variables, **variables}
            process = self.context.Process(target=_rank, args=(self.folder, mine, work, lost_after_s), daemon=True)
            process.start()
            self.ranks.append(process)
        return self

    def pid(self, rank: int) -> int:
        """The process of a rank that has called `ready`."""
        wait_for(self.folder / f"ready{rank}")
        return int((self.folder / f"ready{rank}").read_text())

    def end(self, limit_s: float = LIMIT_S, frozen: int | None = None) -> Ended:
        """Wait for both ranks, or for the one that is not frozen."""
        self.pid(1)
        started = time.monotonic()
        for rank, process in enumerate(self.ranks):
            if rank != frozen:
                process.join(max(0.0, started + limit_s - time.monotonic()))
        seconds, statuses = time.monotonic() - started, [process.exitcode for process in self.ranks]
        for process in self.ranks:
            process.kill()
            process.join()
        return Ended(statuses, self.terminal.read_text(), seconds)


def _rank(folder: Path, variables: dict[str, str], work: Work, lost_after_s: float) -> None:
    terminal = os.open(folder / "terminal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    os.environ |= variables
    os.chdir(folder)
    watchdog.LOST_AFTER_S = lost_after_s
    sys.exit(run_command(work, lambda: "start again"))


def ready() -> Ranks:
    """Join the process group, and let the test know."""
    ranks = init_ranks("cpu")
    partial = Path(f"ready{ranks.rank}.partial")
    partial.write_text(str(os.getpid()))
    partial.rename(f"ready{ranks.rank}")
    return ranks


def wait_for(path: Path, limit_s: float = LIMIT_S) -> None:
    limit = time.monotonic() + limit_s
    while not path.exists():
        assert time.monotonic() < limit, f"no {path} after {limit_s:.0f} s"
        time.sleep(0.02)
