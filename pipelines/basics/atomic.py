"""Files that are written whole or not at all, and folders that can be written to.

A file is written under a temporary name in its folder and moved into place, so that nobody reads a part of it, however
the process ends. The temporary name can't be a user's: it is hidden and holds a random number. It also holds the host
and the process, which distinguish leftovers of dead processes from files being written. A symbolic link in the file's
place is replaced and never followed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

_TEMPORARY = re.compile(r"(?s)^\..*\.tmp-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{32}$")
_LIFETIME_S = 3600.0  # of temporary files of other hosts, whose processes can't be seen
_NAME_BYTES = 100  # of the file's own name in its temporary one: a file system takes 255 in all


@contextlib.contextmanager
def replacing(path: Path, mode: Literal["w", "wb"] = "w", sync: bool = False) -> Iterator[IO[Any]]:
    """A file to write, which takes its name once it is complete; if anything fails, nothing is left of it.

    Args:
        path: the file; its folder must exist.
        mode: "w" for text in UTF-8 with line ends as given, "wb" for bytes.
        sync: flush its content to the disk before it takes its name.

    Raises:
        OSError: it can't be written; `filename` is `path`.
    """
    temporary = temporary_name(path)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        text: dict[str, Any] = {"encoding": "utf-8", "newline": ""} if mode == "w" else {}
        with open(os.open(temporary, flags, 0o666), mode, **text) as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8. Raises OSError."""
    with replacing(path) as file:
        file.write(text)


def write_texts(texts: Mapping[Path, str]) -> None:
    """Write text files that belong together: if one can't be written, none is replaced.

    Raises:
        OSError: naming the file.
    """
    with contextlib.ExitStack() as stack:
        for path, text in texts.items():
            file = stack.enter_context(replacing(path))
            file.write(text)
            file.flush()


def open_to_append(path: Path) -> IO[str]:
    """Open a text file to append, creating it if missing; text that is not UTF-8 is written as escapes.

    Raises:
        ValueError: a symbolic link is in its place, as in a folder that somebody else made.
        OSError: it can't be opened.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP or not path.is_symlink():
            raise
        raise ValueError(f"{path} is a link to {path.readlink()}, which would be written to: remove it") from error
    return open(handle, "a", encoding="utf-8", errors="backslashreplace")


def cannot_write(what: str, error: OSError, or_else: str) -> ValueError:
    """The error shown to the user where `what`, such as "--run_dir runs/a", can't be written; `or_else`: what to do."""
    return ValueError(f"{what} can't be written ({error.strerror}): free space or change its permissions, or {or_else}")


def make_writable(folder: Path) -> None:
    """Make a folder if it is missing, and check that files can be made in it. Raises OSError where they can't."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = temporary_name(folder / "probe")
    probe.touch()
    probe.unlink()


def subfolder(within: Path, *names: str) -> Path:
    """The path of a folder below another one.

    Raises:
        ValueError: a link on the way leads out of `within`, as in a folder that somebody else made.
    """
    folder = within.joinpath(*names)
    if not folder.resolve().is_relative_to(within.resolve()):
        raise ValueError(
            f"{folder} is a link to {folder.resolve()}, outside {within}, so writing to it would change files there: "
            "remove the link, or copy the folder to its place"
        )
    return folder


def make_subfolder(within: Path, *names: str) -> Path:
    """A folder below another one, made if missing. Raises as `subfolder`, and OSError: it can't be made."""
    folder = subfolder(within, *names)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def temporary_name(path: Path) -> Path:
    """A name in the folder of `path` that no other file has, for the file that will replace it."""
    name = os.fsencode(path.name)[:_NAME_BYTES].decode(errors="ignore")  # cut between characters
    return path.with_name(f".{name}.tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}")


def remove_left_over(folder: Path) -> None:
    """Remove the temporary files and folders of dead processes from a folder, if it exists."""
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for path, match in ((folder / name, match) for name in names if (match := _TEMPORARY.search(name))):
        with contextlib.suppress(OSError):
            is_dead = match["host"] == socket.gethostname() and not _is_alive(int(match["pid"]))
            if is_dead or time.time() - path.lstat().st_mtime > _LIFETIME_S:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True
