"""The signals that ask a command to stop, and how all ranks stop at the same step after one of them got one.

Schedulers send SIGTERM or SIGUSR1 before they take the nodes away, to all ranks or to one; a terminal that is closed
sends SIGHUP, and `engine.ranks.launcher` reports the end of the launcher. Each rank gets the signal at a different
moment, so the ranks agree: an all-reduce of the signal's number over a gloo group, which runs beside the steps on the
CPU. It is started at one step and read at a later one, and no step waits for it.

PyTorch is imported only where several ranks agree, as `engine.ranks.command` installs handlers before any import of it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from engine.ranks.launcher import LAUNCHER_GONE
from pipelines.basics.lazy import Lazy

if TYPE_CHECKING:
    from engine.ranks.distributed import Ranks

torch, dist = Lazy("torch"), Lazy("torch.distributed")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, LAUNCHER_GONE)
AGREE_EVERY_S = 1.0
SAME_SIGNAL_S = 1.0  # launchers and schedulers both pass a signal on: ranks get it twice


class TrainingStopped(Exception):
    """A signal stopped training, which can go on from its checkpoint; the argument names the signal."""


class StoppedBySignal(KeyboardInterrupt):
    """A signal came outside training, where nothing can be saved; the argument names it."""


def signal_name(number: int) -> str:
    """What a signal is called in a message."""
    return "the end of its launcher" if number == LAUNCHER_GONE else signal.Signals(number).name


def install_handlers(handler: Callable[[int, FrameType | None], Any], with_ctrl_c: bool = False) -> dict[int, Any]:
    """Have stop signals call `handler`, except those that this process ignores, as SIGHUP under `nohup`.

    With `with_ctrl_c`, SIGINT too, unless it has a handler. Returns the previous handlers, for `restore_handlers`.
    """
    numbers: list[int] = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    if with_ctrl_c and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    return {number: signal.signal(number, handler) for number in numbers}


def restore_handlers(handlers: dict[int, Any]) -> None:
    """Undo `install_handlers`."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


class StopSignal:
    """Whether one of `STOP_SIGNALS` was sent to any of the ranks. A context manager.

    Stopping is due about two seconds after the signal, or two steps where those take longer. A second SIGTERM ends the
    process at once.

    Args:
        ranks: this process's; every rank makes a `StopSignal`, at the same point.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.number = 0  # of the signal; this process's own until all ranks agree
        self.is_agreed = False
        self.first_sigterm: float | None = None
        self.is_first = ranks.is_first
        self.group = dist.new_group(backend="gloo") if ranks.world_size > 1 else None
        self.work: Any = None
        self.step, self.asked_at, self.due_at, self.every, self.started = 0, 0, 1, 1, time.monotonic()

    def __enter__(self) -> StopSignal:
        self.previous = install_handlers(self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, *failure: object) -> None:
        restore_handlers(self.previous)
        if self.work and kind is None:
            self.work.wait()

    @property
    def name(self) -> str:
        """Of the signal, e.g. SIGTERM."""
        return signal_name(self.number)

    def due(self) -> bool:
        """Whether to stop now. Each rank calls it once a step; it is True on all of them at the same step."""
        if self.group is None or self.is_agreed:
            return self.number != 0
        self.step += 1
        if self.step < self.due_at:
            return False
        if self.work:
            self.work.wait()
            number, self.every = self.values.tolist()
            if number:
                self.number, self.is_agreed, self.work = number, True, None
                return True
        self._ask_all()
        return False

    def _ask_all(self) -> None:
        """Start the next all-reduce: the signal's number, and how many of rank 0's steps take `AGREE_EVERY_S`."""
        now = time.monotonic()
        step_s = max((now - self.started) / (self.step - self.asked_at or 1), 1e-3)
        steps = max(1, min(100, round(AGREE_EVERY_S / step_s))) if self.is_first else 0
        self.values = torch.tensor([self.number, steps])
        self.work = dist.all_reduce(self.values, dist.ReduceOp.MAX, group=self.group, async_op=True)
        self.started, self.asked_at, self.due_at = now, self.step, self.step + self.every

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGTERM:
            if self.first_sigterm is not None and now - self.first_sigterm > SAME_SIGNAL_S:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self.first_sigterm = self.first_sigterm or now
        self.number = self.number or number
