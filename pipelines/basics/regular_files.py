"""Only regular files are opened: a pipe would keep the reader waiting, and a device has no end."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from pipelines.basics.errors import CaseError

FETCH_ANNEXED = "Run git annex get or datalad get"


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file to read.

    Raises:
        CaseError: it is missing, not a regular file, a broken link, or can't be opened or read, within the block too.
    """
    fault = file_fault(path, "there is no such file", "Put it there, or correct the path or the list")
    if fault:
        raise fault
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise CaseError(path, f"can't be read ({error.strerror})", "Check its permissions and the disk") from error


def file_fault(path: Path, missing: str = "is gone", remedy: str = "Put it back") -> CaseError | None:
    """What keeps a path from being that of a regular file; None where nothing does.

    Args:
        path: a path that a case names.
        missing, remedy: what to say where nothing is there.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a null character, or half a surrogate pair
        return CaseError(path, f"no file can have this name ({error})", "Correct the path or the list")
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return CaseError(path, f"can't be read ({error.strerror})", "Check its name, its permissions and the disk")
        if not os.path.islink(path):
            return CaseError(path, missing, remedy)
        if is_annexed(path):
            return CaseError(path, "is a git-annex link to a file that is not here", FETCH_ANNEXED)
        problem = f"is a link to {os.readlink(path)}, which does not exist"
        return CaseError(path, problem, "Put the file there, or correct the link")
    if stat.S_ISREG(mode):
        return None
    if stat.S_ISDIR(mode):
        return CaseError(path, "is a folder, must be a file", "Name the scan itself, which may be in that folder")
    kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
    return CaseError(path, f"is {kind}, not a regular file", "Copy the scan to a file")


def is_annexed(link: Path | str) -> bool:
    """Whether a symbolic link leads to git-annex's store, which holds files only, fetched or not."""
    return "annex/objects" in os.readlink(link)
