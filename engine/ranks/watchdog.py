"""Ranks that end together when one of them fails, and say once which and why.

A rank that raises or is killed leaves the others in a collective that never returns. So a thread of each rank talks to
a store once a second (PyTorch's TCPStore, over a connection of its own: the main thread may block the other one):

    beat/<rank>   a counter. Rank 0 reads every rank's, the others rank 0's, so a job of N ranks asks for 3 N values a
                  second. A rank whose counter stops for `LOST_AFTER_S` is lost.
    failure       the first one: compare_set lets nobody write a second. A rank that finds it ends its process by
                  os._exit, for the main thread may never return. The reporter, rank 0, waits for the others and prints.

Ranks of one node also hold a pidfd of each other, which reports a killed process at once. The store lives in rank 0
(under torchrun, in the agent of the first node). If it is gone, rank 0 is lost, and its deputy reports: the first rank
of another node, else rank 1.

A peer's death also breaks collectives and makes launchers send SIGTERM. Errors that this causes are reported only if
nobody has given a better reason after `WAIT_FOR_PEERS_S`, or, where a node may be lost, after `LOST_AFTER_S`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist
from rich.console import Console
from torch.distributed.rendezvous import rendezvous

from engine.ranks.distributed import PeerFailed
from engine.ranks.launcher import Launcher
from engine.ranks.rank_env import RankEnv, export_rank_env, read_rank_env
from engine.ranks.signals import STOP_SIGNALS, StoppedBySignal
from pipelines.basics.errors import causes
from pipelines.basics.text import escape_controls

log = logging.getLogger(__name__)
T = TypeVar("T")

BEAT_S = 1.0
LOST_AFTER_S = 20.0  # deepspeed, torchrun and SLURM kill 30 s after they sent SIGTERM
WAIT_FOR_PEERS_S = 5.0
WAIT_TO_REPORT_S = 8.0
MEETING_LIMIT = timedelta(minutes=5)  # from the first rank's start to the last's
NAME_LIMIT_S = 30.0  # a cluster may give a host its name after it has started the others


_REASONS = {
    "EADDRINUSE": "the port is in use, perhaps by another job; choose another (deepspeed and torchrun --master_port, "
    "else MASTER_PORT)",
    "EACCES": "the system reserves this port; choose one above 1023 (deepspeed and torchrun --master_port, else "
    "MASTER_PORT)",
    "timed out": f"some ranks did not connect within {MEETING_LIMIT.seconds // 60} minutes: are all started, with the "
    "same number of ranks? is MASTER_ADDR the first rank's host, and its port open to the others?",
}
"""Why ranks did not meet, by a word of PyTorch's message."""


@dataclass(frozen=True)
class Failure:
    """Why a job ends: the rank that failed, its node, a message for the user, the exit status of all ranks.

    If the rank `is_lost`, others report it.
    """

    rank: int
    host: str
    message: str
    status: int = 1
    is_lost: bool = False

    def __str__(self) -> str:
        """The line on standard error; a signal is not an error."""
        if self.status in (130, os.EX_TEMPFAIL):
            return self.message
        return f"error: rank {self.rank} on {self.host}: {self.message}"


def start_watchdog(launcher: Launcher | None = None) -> Watchdog:
    """Meet the other ranks and start watching them, and the launcher of this node's ranks.

    Raises:
        ValueError: a launcher's variables are missing or contradict each other.
        ConnectionError: the ranks did not meet.
    """
    env = read_rank_env()
    export_rank_env(env)
    address = _master_address()
    try:
        store, *_ = next(rendezvous("env://", env.rank, env.world_size, timeout=MEETING_LIMIT))
        return Watchdog(env, dist.PrefixStore("watch", store), launcher)
    except RuntimeError as error:
        reason = next((text for word, text in _REASONS.items() if word in str(error)), str(error))
        raise ConnectionError(
            f"rank {env.rank} of {env.world_size} did not meet the others at {address}: {reason}"
        ) from error


def _master_address() -> str:
    """Host and port where the ranks meet; raises ValueError for a port or a host that can't be."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ["MASTER_PORT"]
    if not host:
        raise ValueError("MASTER_ADDR is not set: deepspeed and torchrun set it; with srun, set it to the first node")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"MASTER_PORT is {port!r}, which is not a port: give a number from 1024 to 65535")
    limit = time.monotonic() + NAME_LIMIT_S
    while True:
        try:
            socket.getaddrinfo(host, int(port))
            return f"{host}:{port}"
        except (OSError, UnicodeError) as error:
            if time.monotonic() > limit:
                raise ValueError(f"MASTER_ADDR is {host!r}, which has no address on this machine ({error})") from error
            time.sleep(1)


class Watchdog:
    """The watching thread of one of several ranks; `start_watchdog` makes it.

    Nothing else uses the connection of its store. Once it `is_ending`, this rank has failed or is done: no signal may
    change how it ends.
    """

    def __init__(self, env: RankEnv, store: dist.Store, launcher: Launcher | None = None) -> None:
        self.rank, self.world_size, self.store, self.launcher = env.rank, env.world_size, store, launcher
        self.host = socket.gethostname()
        self.own: Failure | None = None
        self.own_due, self.own_traceback = 0.0, ""
        self.is_ending = self.is_leaving = self.has_said_done = self.is_over = False
        self.watched = range(self.world_size) if self.rank == 0 else range(1)
        self.beats = [b""] * len(self.watched)
        self.rounds_still = [0] * len(self.watched)
        self.rounds = 0
        self.deaths = select.poll()
        self.neighbours: dict[int, int] = {}  # rank of each pidfd
        self._meet(env)
        self.wake = threading.Event()
        self.line = ThreadPoolExecutor(1, "watch-store")  # a store on a node without power never answers
        self.thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self.thread.start()

    def fail(self, error: BaseException, message: str, status: int) -> NoReturn:
        """Report to all ranks that this one can't go on, and end the process with the status of the first failure."""
        self.is_ending = True
        if status == 1:  # neither a user's mistake nor a signal
            self.own_traceback = "".join(traceback.format_exception(error))
        self.own_due = time.monotonic() + _waiting_time(error)
        self.own = Failure(self.rank, self.host, message, status)
        self.wake.set()
        try:
            self.thread.join()
        except KeyboardInterrupt:  # a second Ctrl-C waits for nobody
            os._exit(130)
        os._exit(status)

    def close(self) -> None:
        """Wait until all ranks are done, while a failing one still ends them all; then stop watching.

        From then on signals are ignored: a launcher sends SIGTERM to ranks that end a moment after the first.
        """
        self.is_ending = self.is_leaving = True
        self.wake.set()
        self.thread.join()
        self.line.shutdown()
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _meet(self, env: RankEnv) -> None:
        """Publish where this rank runs, find the others of its node, and learn which rank is rank 0's deputy."""
        here = {"host": self.host, "pid": os.getpid(), "pid_namespace": os.readlink("/proc/self/ns/pid")}
        self.store.set(f"process/{self.rank}", json.dumps(here))
        self.store.set(f"beat/{self.rank}", "0")
        if self.rank == 0:
            hosts = [self._process_of(rank)["host"] for rank in range(self.world_size)]
            self.store.set("deputy", str(next((rank for rank, host in enumerate(hosts) if host != self.host), 1)))
        self.deputy = int(self.store.get("deputy"))
        self.first_host = self._process_of(0)["host"]
        first = env.rank - env.local_rank
        for rank in set(range(first, first + env.ranks_on_node)) - {self.rank}:
            there = self._process_of(rank)
            if {**there, "pid": here["pid"]} == here:
                with contextlib.suppress(OSError):  # a sandbox may forbid it; the beats remain
                    pidfd = os.pidfd_open(there["pid"])
                    self.neighbours[pidfd] = rank
                    self.deaths.register(pidfd, select.POLLIN)

    def _process_of(self, rank: int) -> dict[str, Any]:
        return json.loads(self.store.get(f"process/{rank}"))

    def _watch(self) -> None:
        while not self.is_over:
            try:
                failure = self._ask(self._round)
            except (RuntimeError, TimeoutError) as error:
                log.debug("no store: %s", error)
                failure = self._without_store()
            if failure:
                self._end(failure)
            self.wake.wait(0.1 if self.is_leaving else BEAT_S)
            self.wake.clear()

    def _ask(self, work: Callable[[], T]) -> T:
        """What `work` gets from the store. The limit counts turns, not seconds: this process may be stopped itself."""
        answer = self.line.submit(work)
        for _ in range(round(LOST_AFTER_S / BEAT_S)):
            if wait([answer], BEAT_S).done:
                return answer.result()
        raise TimeoutError(f"no answer for {LOST_AFTER_S:.0f} s")

    def _round(self) -> Failure | None:
        """One exchange with the store; returns the failure that ends the job."""
        dead = [self.neighbours[pidfd] for pidfd, _ in self.deaths.poll(0)]  # before asking who left in order
        self.rounds += 1
        self.store.set(f"beat/{self.rank}", str(self.rounds))
        if self.store.check(["failure"]):
            return Failure(**json.loads(self.store.get("failure")))
        if self.is_leaving and self._all_are_done():
            self.is_over = True
            return None
        failure = self.own if self.own and time.monotonic() >= self.own_due else self._find_lost(dead)
        if not failure:
            return None
        return Failure(**json.loads(self.store.compare_set("failure", "", json.dumps(asdict(failure)))))

    def _without_store(self) -> Failure | None:
        """What ends this rank when the store is gone: nothing if it went with torchrun, whose end stops training."""
        if self.launcher and self.launcher.is_gone():
            self.is_over = self.is_leaving
            return self.own
        return Failure(0, self.first_host, "lost: it was killed, or its node can't be reached", is_lost=True)

    def _find_lost(self, dead: list[int]) -> Failure | None:
        message = "ended without a message: it was killed (by the system, if memory ran out) or crashed"
        if not dead:
            message = f"lost: no sign of life for {LOST_AFTER_S:.0f} s"
            beats = self.store.multi_get([f"beat/{rank}" for rank in self.watched])
            stands_still = (before == now for before, now in zip(self.beats, beats))
            self.rounds_still = [rounds + 1 if still else 0 for rounds, still in zip(self.rounds_still, stands_still)]
            self.beats = beats
            dead = [rank for rank, n in zip(self.watched, self.rounds_still) if n >= LOST_AFTER_S / BEAT_S]
        return Failure(dead[0], self._process_of(dead[0])["host"], message, is_lost=True) if dead else None

    def _all_are_done(self) -> bool:
        """Whether no rank has work left. Rank 0 leaves last, as the store goes with it."""
        if not self.has_said_done:
            self.store.add("done", 1)
            self.has_said_done = True
        if self.store.add("done", 0) < self.world_size:
            return False
        if self.rank > 0:
            self.store.add("left", 1)
        else:
            self._wait_for("left", self.world_size - 1)
        return True

    def _wait_for(self, name: str, count: int) -> None:
        limit = time.monotonic() + WAIT_TO_REPORT_S
        while self.store.add(name, 0) < count and time.monotonic() < limit:
            time.sleep(0.05)

    def _end(self, failure: Failure) -> NoReturn:
        """End this process; the last one reports why. Nothing here may need the main thread."""
        try:
            log.debug("ended: %s", failure)
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
            if failure == self.own:
                os.write(2, escape_controls(self.own_traceback).encode())
            is_reporter = self.rank == (self.deputy if failure.is_lost and failure.rank == 0 else 0)
            with contextlib.suppress(RuntimeError, TimeoutError):  # the store may be gone
                if is_reporter:
                    self._ask(lambda: self._wait_for("ended", self.world_size - 1 - failure.is_lost))
                else:
                    self._ask(lambda: self.store.add("ended", 1))
            if is_reporter:
                Console(stderr=True).show_cursor()  # a progress bar hides it
                os.write(2, f"{escape_controls(str(failure))}\n".encode())
        finally:
            os._exit(failure.status)


def _waiting_time(error: BaseException) -> float:
    """Seconds to wait for a better reason from a peer: 0 if the error can't come from a peer's end."""
    for cause in causes(error):
        if isinstance(cause, PeerFailed | StoppedBySignal):
            return WAIT_FOR_PEERS_S
        if isinstance(cause, dist.DistError) or (isinstance(cause, RuntimeError) and "gloo" in str(cause)):
            return LOST_AFTER_S + 2 * BEAT_S
    return 0.0
