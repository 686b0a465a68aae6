"""A command from its start to its exit status, on one rank or several: how failures are told."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

import torch.distributed as dist

from engine.ranks.launcher import Launcher
from engine.ranks.memory_limits import is_out_of_memory, plain_message
from engine.ranks.signals import Interrupted, Preempted, handle, put_back, signal_name
from engine.ranks.terminal import Terminal, set_up_terminal
from engine.ranks.watchdog import Watch, join_watch
from pipelines.basics.text import as_text

log = logging.getLogger(__name__)

REMEDIES = {
    errno.ENOSPC: "free space on that disk, or have it written to another one",
    errno.EDQUOT: "your quota is used up: remove files, ask for more, or have it written elsewhere",
    errno.EFBIG: "files may not be that large here (`ulimit -f`, or the file system): have it written elsewhere",
    errno.EACCES: "change its permissions or those of the folders above, or choose another place",
    errno.EPERM: "change its owner or permissions, or choose another place",
    errno.EROFS: "this file system can only be read: choose another place",
    errno.ENOENT: "check the path; a link may lead nowhere",
    errno.ENOTDIR: "a file stands where the path has a folder: check the path, or move that file",
    errno.EISDIR: "a folder stands where a file should be: check the path, or move that folder",
    errno.ELOOP: "symbolic links lead in a circle there: check them",
    errno.ENAMETOOLONG: "most file systems take names of 255 bytes and paths of 4,096: choose a shorter one",
    errno.EMFILE: "too many files are open for `ulimit -n` ({files}): raise it, or take fewer --data.workers",
    errno.ENFILE: "too many files are open on this machine: end other programs",
    errno.EIO: "the disk or the connection to it failed: see the system's log (dmesg), and copy the file elsewhere",
    errno.ESTALE: "the network file system has lost it: mount it again, and start again",
    errno.EAGAIN: "too many processes or threads for `ulimit -u` ({processes}): end other programs, or raise it",
}
"""What to do about an error of the operating system."""
_FULL_BELOW = 2**20  # bytes


def run_command(work: Callable[[], int | None], how_to_go_on: Callable[[], str], alone: bool = False) -> int:
    """Run a command's work; returns the exit status, or ends the process where one of several ranks fails.

    A user's mistake (`ValueError`: a bad value, a faulty scan), a file that can't be used and memory that ran out are
    one line on standard error and status 2; the traceback goes to the log. Ctrl-C (130), and a signal or a launcher's
    end that stops the work (75), say how to go on. Of several ranks, the first to fail gives the line and the status of
    all. Standard output that can't be written, as before `| head`, changes neither the work nor its status; where it
    was all that was asked for (`--help`), the status is 141, or 74 with the reason.

    Args:
        work: returns its status, None for 0. how_to_go_on: advice for a user whose command was stopped.
        alone: this process has no peers, whatever a launcher's variables say.
    """
    set_up_terminal()
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _log_thread_error
    watch: Watch | None = None
    status, line, is_over = 0, "", False
    is_ours = not dist.is_initialized()  # the process group, which a caller may have made

    def interrupt(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if is_over:  # a second Ctrl-C waits for nobody
                os._exit(130)
            raise KeyboardInterrupt
        if not (is_over or (watch and watch.is_ending)):
            raise Interrupted(signal_name(number))

    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as launch/start.py left it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = handle(interrupt, with_ctrl_c=True)
    try:
        with contextlib.nullcontext() if alone else Launcher() as launcher:
            watch = None if alone else join_watch(launcher)
            status = work() or 0
    except Preempted as stop:
        status, line = _told(stop, how_to_go_on)
        log.debug(line)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        is_over = watch is None
        log.debug("traceback", exc_info=True)
        status, line = _told(error, how_to_go_on)
        if watch and status:
            watch.fail(error, line, status)
        if isinstance(error, SystemExit) and not status:
            return _status_of_output()
        if status == 1 or isinstance(error, SystemExit):
            raise
        line = f"error: {line}" if status == 2 else line
    finally:
        is_over = True
        if is_ours and dist.is_initialized():
            dist.destroy_process_group()
        if watch:  # a signal that comes now must not end this rank while another one is still writing
            watch.close()
        else:
            put_back(handlers)
    if line and (watch is None or watch.rank == 0):
        print(as_text(line), file=sys.stderr)
    return status


def _told(error: BaseException, how_to_go_on: Callable[[], str]) -> tuple[int, str]:
    """Exit status and words for the user."""
    if is_out_of_memory(error):
        return 2, plain_message(error)
    if isinstance(error, OSError):
        return 2, explain(error)
    if isinstance(error, UnicodeEncodeError):
        return 2, f"{error.object[:200]} can't be written in {error.encoding}: rename the file or the case"
    if isinstance(error, ValueError):
        return 2, str(error)
    if isinstance(error, Preempted | Interrupted):
        return os.EX_TEMPFAIL, f"stopped by {error}; {how_to_go_on()}"
    if isinstance(error, KeyboardInterrupt):
        return 130, f"\ninterrupted; {how_to_go_on()}"
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        return status, "the command line was refused, see above"
    return 1, f"{type(error).__name__}: {error}"


def _log_thread_error(args: threading.ExceptHookArgs) -> None:
    """An error of the system in a thread is told by whoever waits for it, e.g. for TensorBoard's on a full disk."""
    if issubclass(args.exc_type, OSError) and args.exc_value:
        log.debug("traceback of a thread", exc_info=args.exc_value)
    else:
        threading.__excepthook__(args)


def explain(error: OSError) -> str:
    """An error of the operating system in a line: the file, the cause, the remedy."""
    if error.errno is None or error.strerror is None:
        return str(error)
    files = [name for name in (error.filename, error.filename2) if name is not None]
    named = " -> ".join(os.fsdecode(name) if isinstance(name, bytes) else str(name) for name in files)
    cause = f"{named}: {error.strerror}" if named else error.strerror
    if error.strerror != os.strerror(error.errno) or error.errno not in REMEDIES:  # it has a remedy of its own
        return cause
    if error.errno == errno.ENOSPC and not named:
        cause = f"{cause} in {' and '.join(_full_folders()) or 'a folder that the system does not name'}"
    limits = {"files": resource.RLIMIT_NOFILE, "processes": resource.RLIMIT_NPROC}
    return f"{cause}; {REMEDIES[error.errno].format(**{name: resource.getrlimit(k)[0] for name, k in limits.items()})}"


def _full_folders() -> list[str]:
    """Which of the folders that a command writes to are on full disks."""
    folders = (os.getcwd(), os.environ.get("GLIOFORGE_CACHE", ""), os.environ.get("TMPDIR", "/tmp"), "/dev/shm")
    return [name for name in folders if os.path.isdir(name) and shutil.disk_usage(name).free < _FULL_BELOW]


def _status_of_output() -> int:
    """The exit status of a command that was asked for nothing but what it printed."""
    sys.stdout.flush()
    lost = sys.stdout.lost if isinstance(sys.stdout, Terminal) else None
    if lost is None:
        return 0
    if isinstance(lost, BrokenPipeError):
        return 128 + signal.SIGPIPE
    print(f"error: {explain(OSError(lost.errno, lost.strerror, 'standard output'))}", file=sys.stderr)
    return os.EX_IOERR
