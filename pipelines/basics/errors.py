"""Errors for the user, of data and of the operating system: which file or folder, what is wrong with it, what to do."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipelines.basics.text import escape_controls

REMEDIES = {
    errno.ENOSPC: "free space on that disk, or choose a folder on another one",
    errno.EDQUOT: "your quota is used up: remove files, ask for more, or choose a folder elsewhere",
    errno.EFBIG: "files may not be that large here (`ulimit -f`, or the file system): choose a folder elsewhere",
    errno.EACCES: "change its permissions or those of the folders above, or choose another place",
    errno.EPERM: "change its owner or permissions, or choose another place",
    errno.EROFS: "this file system is read-only: choose another place",
    errno.ENOENT: "check the path; a link may lead nowhere",
    errno.ENOTDIR: "a part of the path is a file, not a folder: check the path, or move that file",
    errno.EISDIR: "it is a folder, and should be a file: check the path, or move that folder",
    errno.ELOOP: "symbolic links lead in a circle there: check them",
    errno.ENAMETOOLONG: "most file systems take names of 255 bytes and paths of 4,096: choose a shorter one",
    errno.EMFILE: "too many files are open for `ulimit -n` ({files}): raise it, or use fewer --data.workers",
    errno.ENFILE: "too many files are open on this machine: end other programs",
    errno.EIO: "the disk or the connection to it failed: see the system's log (dmesg), and copy the file elsewhere",
    errno.ESTALE: "the network file system has lost it: mount it again, and start again",
    errno.EAGAIN: "too many processes or threads for `ulimit -u` ({processes}): end other programs, or raise it",
}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_BELOW = 2**20  # bytes


class DataError(ValueError):
    """A fault of the user's data or options; the message gives path or value, rule and remedy."""

    def __str__(self) -> str:
        return escape_controls(super().__str__())


class CaseError(DataError):
    """A fault in the files of one case.

    Args:
        path: the file at fault; kept in a form that any log and table can hold (`pipelines.basics.text`).
        problem: what is wrong with it, with the value and the rule.
        remedy: what the user can do.
    """

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        super().__init__(path, problem, remedy)  # args: pickle needs them to bring the error from a worker process
        self.path = Path(escape_controls(str(path)))
        self.problem = escape_controls(problem)
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}. {self.remedy}."


class CaseFailure(CaseError):
    """A case that could not be processed, though its scans may be sound: it may succeed another time."""


class StoreError(DataError):
    """The store's folder can't be written; `needed` is the size in bytes of the case that was being written."""

    def __init__(self, folder: Path, problem: str, needed: int) -> None:
        super().__init__(folder, problem, needed)
        self.folder, self.problem, self.needed = folder, problem, needed

    def __str__(self) -> str:
        size = f" It needs about {self.needed / 1e6:.1f} MB more." if self.needed else ""
        return (
            f"store {self.folder}: {self.problem}.{size} Free space there or change its permissions, or choose another "
            "folder with --data.store_dir. Cases already prepared are kept."
        )


def explain(error: OSError) -> str:
    """The error on one line; an error whose message has a remedy of its own keeps it."""
    if error.errno is None or error.strerror is None:
        return str(error)
    files = [name for name in (error.filename, error.filename2) if name is not None]
    named = " -> ".join(os.fsdecode(name) if isinstance(name, bytes) else str(name) for name in files)
    cause = f"{named}: {error.strerror}" if named else error.strerror
    if error.strerror != os.strerror(error.errno) or error.errno not in REMEDIES:
        return cause
    if error.errno == errno.ENOSPC and not named:
        folders = (os.getcwd(), os.environ.get("GLIOFORGE_CACHE", ""), os.environ.get("TMPDIR", "/tmp"), "/dev/shm")
        full = [name for name in folders if os.path.isdir(name) and shutil.disk_usage(name).free < _FULL_BELOW]
        cause = f"{cause} in {' and '.join(full) or 'a folder that the system does not name'}"
    limits = {"files": resource.RLIMIT_NOFILE, "processes": resource.RLIMIT_NPROC}
    return f"{cause}; {REMEDIES[error.errno].format(**{name: resource.getrlimit(k)[0] for name, k in limits.items()})}"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, its cause, the cause of that, and so on."""
    while error:
        yield error
        error = error.__cause__ or error.__context__
