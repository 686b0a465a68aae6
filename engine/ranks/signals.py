"""The signals that ask a command to stop, and their handlers."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from engine.ranks.launcher import LAUNCHER_GONE

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, LAUNCHER_GONE)
Handler = Callable[[int, FrameType | None], Any]


class TrainingStopped(Exception):
    """A signal stopped training, which can go on from its checkpoint; the argument names the signal."""


class StoppedBySignal(KeyboardInterrupt):
    """A signal came outside training, where nothing can be saved; the argument names it."""


def signal_name(number: int) -> str:
    """What a signal is called in a message."""
    return "the end of its launcher" if number == LAUNCHER_GONE else signal.Signals(number).name


def install_handlers(handler: Handler, with_ctrl_c: bool = False) -> dict[int, Any]:
    """Have stop signals call `handler`, except those that this process ignores, as SIGHUP under `nohup`.

    Args:
        handler: takes a signal's number and the frame. with_ctrl_c: for SIGINT too, unless it has a handler.

    Returns:
        the previous handlers by signal, for `restore_handlers`.
    """
    numbers: list[int] = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    if with_ctrl_c and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    return {number: signal.signal(number, handler) for number in numbers}


def restore_handlers(handlers: dict[int, Any]) -> None:
    """Undo `install_handlers`."""
    for number, handler in handlers.items():
        signal.signal(number, handler)
