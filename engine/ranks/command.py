"""A command from its start to its exit status, on one rank or several.

It imports no PyTorch, so that a command can parse its options first and import the work afterwards, inside `work`:
`--help` and a refused option answer at once, and memory that runs out during the imports is reported like any other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from engine.ranks.launcher import Launcher
from engine.ranks.memory_limits import is_out_of_memory, plain_message
from engine.ranks.rank_env import read_rank_env
from engine.ranks.signals import StoppedBySignal, TrainingStopped, install_handlers, restore_handlers, signal_name
from engine.ranks.terminal import Terminal, set_up_terminal
from pipelines.basics.errors import DISK_FULL, causes, explain
from pipelines.basics.text import escape_controls

if TYPE_CHECKING:
    from engine.ranks.watchdog import Watchdog

log = logging.getLogger(__name__)


def run_command(work: Callable[[], int | None], how_to_continue: Callable[[], str], alone: bool = False) -> int:
    """Run a command's work; returns the exit status, or ends the process where one of several ranks fails.

    A user's mistake (`ValueError`: a bad value, a faulty scan), a file that can't be used and memory that ran out are
    one line on standard error and status 2; the traceback goes to the log. Ctrl-C (130), and a signal or a launcher's
    end that stops the work (75), say how to continue. Of several ranks, the first to fail gives the line and the status
    of all. A reader of standard output that goes away, as before `| head`, changes neither the work nor its status,
    except of a command that only prints (`--help`): 141. A full disk behind standard output is reported at the end: 74.

    Args:
        work: returns its status, None for 0. how_to_continue: advice for a user whose command was stopped.
        alone: this process has no peers, whatever a launcher's variables say.
    """
    set_up_terminal()
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _log_thread_error
    watchdog: Watchdog | None = None
    status, line, is_over, only_prints = 0, "", False, False
    is_ours = not _has_process_group()  # a caller may have made it

    def interrupt(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and is_over:  # a second Ctrl-C waits for nobody
            os._exit(130)
        if is_over or (watchdog and watchdog.is_ending and number != signal.SIGINT):
            return
        error = KeyboardInterrupt() if number == signal.SIGINT else StoppedBySignal(signal_name(number))
        specification = getattr(sys.modules.get("torch"), "__spec__", None)
        if getattr(specification, "_initializing", False):  # its import crashes where an exception comes in between
            status, line = _status_and_line(error, how_to_continue)
            os.write(2, f"{line}\n".encode())
            os._exit(status)
        raise error

    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as launch/start.py left it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = install_handlers(interrupt, with_ctrl_c=True)
    try:
        with contextlib.nullcontext() if alone else Launcher() as launcher:
            if launcher and read_rank_env().world_size > 1:
                from engine.ranks.watchdog import start_watchdog

                watchdog = start_watchdog(launcher)
            status = work() or 0
    except TrainingStopped as stop:
        status, line = _status_and_line(stop, how_to_continue)
        log.debug(line)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        is_over = watchdog is None
        log.debug("traceback", exc_info=True)
        status, line = _status_and_line(error, how_to_continue)
        if watchdog and status:
            watchdog.fail(error, line, status)
        only_prints = isinstance(error, SystemExit)
        if status == 1 or (only_prints and status):
            raise
        line = f"error: {line}" if status == 2 else "" if only_prints else line
    finally:
        is_over = True
        if is_ours and _has_process_group():
            sys.modules["torch.distributed"].destroy_process_group()
        if watchdog:  # a signal that comes now must not end this rank while another one is still writing
            watchdog.close()
        else:
            restore_handlers(handlers)
    if line and (watchdog is None or watchdog.rank == 0):
        print(escape_controls(line), file=sys.stderr)
    return status or _status_of_output(only_prints)


def _has_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def _status_and_line(error: BaseException, how_to_continue: Callable[[], str]) -> tuple[int, str]:
    """Exit status and message for the user."""
    if isinstance(error, ImportError):  # extension modules raise one where a signal or missing memory stopped them
        error = next((each for each in causes(error) if isinstance(each, KeyboardInterrupt | MemoryError)), error)
    if is_out_of_memory(error):
        return 2, plain_message(error)
    if isinstance(error, UnicodeEncodeError):
        return 2, f"{error.object[:200]} can't be written in {error.encoding}: rename the file or the case"
    if isinstance(error, OSError | ValueError):
        return 2, explain(error) if isinstance(error, OSError) else str(error)
    if isinstance(error, TrainingStopped | StoppedBySignal):
        return os.EX_TEMPFAIL, f"stopped by {error}; {how_to_continue()}"
    if isinstance(error, KeyboardInterrupt):
        return 130, f"\ninterrupted; {how_to_continue()}"
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        return status, "the command line was refused, see above"
    return 1, f"{type(error).__name__}: {error}"


def _log_thread_error(args: threading.ExceptHookArgs) -> None:
    """Whoever waits for a thread reports its OSError, e.g. for TensorBoard's on a full disk."""
    if issubclass(args.exc_type, OSError) and args.exc_value:
        log.debug("traceback of a thread", exc_info=args.exc_value)
    else:
        threading.__excepthook__(args)


def _status_of_output(only_prints: bool) -> int:
    """The exit status of a command that succeeded but for what it printed."""
    sys.stdout.flush()
    lost = sys.stdout.lost if isinstance(sys.stdout, Terminal) else None
    if lost is None:
        return 0
    if isinstance(lost, BrokenPipeError) and only_prints:
        return 128 + signal.SIGPIPE
    if lost.errno not in DISK_FULL and not only_prints:
        return 0
    print(f"error: {explain(OSError(lost.errno, lost.strerror, 'standard output'))}", file=sys.stderr)
    return os.EX_IOERR
