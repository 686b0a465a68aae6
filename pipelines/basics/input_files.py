"""Files that users give: opened only if regular, as a pipe would keep the reader waiting and a device has no end; and
text and JSON in UTF-8. Every error names the file.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from pipelines.basics.errors import CaseError, DataError
from pipelines.basics.text import brief

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
        broken = f"is a link to {os.readlink(path)}, which does not exist"
        return CaseError(path, broken, "Put the file there, or correct the link")
    if stat.S_ISREG(mode):
        return None
    if stat.S_ISDIR(mode):
        return CaseError(path, "is a folder, must be a file", "Name the scan itself, which may be in that folder")
    kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
    return CaseError(path, f"is {kind}, not a regular file", "Copy the scan to a file")


def is_annexed(link: Path | str) -> bool:
    """Whether a symbolic link leads to git-annex's store, which holds files only, fetched or not."""
    return "annex/objects" in os.readlink(link)


def read_text(path: Path, remedy: str = "save it as UTF-8") -> str:
    """A text file in UTF-8, its line ends unchanged; `remedy` is for one in another encoding.

    Raises:
        DataError: it can't be read, or is in another encoding.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8 ({error}): {remedy}") from error
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror}): check its permissions and the disk") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: it can't be read, is not JSON, or gives a key twice with different values.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        twice = [key for key, value in pairs if value is not found[key] and value != found[key]]
        if twice:
            raise DataError(f"{path}: the key {brief(twice[0])} is given twice in one object: keep one of the two")
        return found

    try:
        return json.loads(read_text(path), object_pairs_hook=unique)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: also a number of over 4300 digits
        raise DataError(f"{path} is not valid JSON ({error}): correct or replace the file") from error
