"""A command from its start to its exit status, on one rank or several: how failures are told."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from engine.failure import Watch, join_watch
from engine.watch import STOP_SIGNALS, Interrupted, Preempted
from pipelines.atomic import temporary_name

log = logging.getLogger(__name__)


def run_command(work: Callable[[], int | None], how_to_go_on: Callable[[], str], alone: bool = False) -> int:
    """Run a command's work; returns the exit status, or ends the process where one of several ranks fails.

    A user's mistake (`ValueError`: a bad value, a faulty scan) becomes one line on standard error and status 2; the
    traceback goes to the log. Ctrl-C (130) and a signal that stops the work (75) say how to go on. Of several ranks,
    the first to fail gives the line and the status of all.

    Args:
        work: returns its status, None for 0. how_to_go_on: advice for a user whose command was stopped.
        alone: this process has no peers, whatever a launcher's variables say.
    """
    for stream in (sys.stdout, sys.stderr):  # names of files may be no text, and must not end what prints them
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    watch: Watch | None = None
    status, line = 0, ""
    is_ours = not dist.is_initialized()  # the process group, which a caller may have made

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not (watch and watch.is_ending):
            raise Interrupted(signal.Signals(number).name)

    handlers = {number: signal.signal(number, interrupt) for number in STOP_SIGNALS}
    try:
        watch = None if alone else join_watch()
        status = work() or 0
    except Preempted as stop:
        status, line = _told(stop, how_to_go_on)
        log.debug(line)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        log.debug("traceback", exc_info=True)
        status, line = _told(error, how_to_go_on)
        if watch and status:
            watch.fail(error, line, status)
        if not isinstance(error, ValueError | OSError | KeyboardInterrupt):
            raise
        line = f"error: {line}" if status == 2 else line
    finally:
        if is_ours and dist.is_initialized():
            dist.destroy_process_group()
        if watch:  # a signal that comes now must not end this rank while another one is still writing
            watch.close()
        else:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    if line and (watch is None or watch.rank == 0):
        print(line, file=sys.stderr)
    return status


def _told(error: BaseException, how_to_go_on: Callable[[], str]) -> tuple[int, str]:
    """Exit status and words for the user."""
    if isinstance(error, ValueError | OSError):
        return 2, str(error)
    if isinstance(error, Preempted | Interrupted):
        return os.EX_TEMPFAIL, f"stopped by {error}; {how_to_go_on()}"
    if isinstance(error, KeyboardInterrupt):
        return 130, f"\ninterrupted; {how_to_go_on()}"
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        return status, "the command line was refused, see above"
    return 1, f"{type(error).__name__}: {error}"


def make_writable(folder: Path) -> None:
    """Make a folder where there is none, and see that files can be made in it.

    Raises:
        OSError: they can't.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = temporary_name(folder / "probe")
    probe.touch()
    probe.unlink()
