"""What was measured on this machine, kept between runs: a JSON file for each kind of measurement, in the cache folder.

A measurement costs milliseconds and can be taken again, so a file is never a reason to stop: one that can't be read is
an empty cache, one that can't be written is left as it is, and the log has one line a process about it. The folder is
the one that `pipelines.basics.machine.cache_dir` uses.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
LOCK_SECONDS = 10.0
"""Longest wait for other processes, which hold the lock for milliseconds; then one of them is stopped."""

_has_warned = False


class MeasuredCache:
    """Measurements by key, in `<cache folder>/measured/<name>.json`. Nothing is read or made before the first call.

    Every call reads the file: keep in memory what is needed often. Processes may write at once and lose nothing.

    Args:
        name: of the file, without its suffix.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def path(self) -> Path | None:
        """The file, which may not exist; None where this user has no home folder and no variable names a cache."""
        folder = cache_folder()
        return folder and folder / "measured" / f"{self.name}.json"

    def entries(self) -> dict[str, Any]:
        """All measurements; empty where the file is missing, damaged or of another format."""
        path = self.path
        try:
            return _entries_of(path.read_bytes()) if path else {}
        except FileNotFoundError:
            return {}
        except OSError as error:
            _warn_once(f"{path} can't be read ({error.strerror})")
        except (ValueError, RecursionError) as error:
            _warn_once(f"{path} is replaced when something is next measured: {error}")
        return {}

    def get(self, key: str) -> Any | None:
        """The value of a key, or None."""
        return self.entries().get(key)

    def put(self, key: str, value: Any) -> None:
        """Add or replace one value, of numbers, strings, lists, dicts, bools and None."""
        self.update({key: value})

    def update(self, values: dict[str, Any]) -> None:
        """Add or replace several values in one write; those of other keys stay, also if another process adds them."""

        def add(path: Path, found: dict[str, Any]) -> None:
            content = {"version": FORMAT_VERSION, "entries": found | values}
            _replace(path, json.dumps(content, indent=1) + "\n")

        self._change(add)

    def clear(self) -> int:
        """Remove all measurements, and return how many there were."""
        return self._change(lambda path, _: path.unlink(missing_ok=True))

    def _change(self, change: Callable[[Path, dict[str, Any]], None]) -> int:
        """Change the file, given its path and entries, while no other process does.

        Returns:
            how many entries there were; 0 where the system refuses the change, which is logged.
        """
        path = self.path
        try:
            if path is None:
                raise FileNotFoundError(errno.ENOENT, "no home folder; GLIOFORGE_CACHE can name another")
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.with_suffix(".lock"), "a") as lock:
                _wait_for(lock.fileno())
                found = self.entries()
                change(path, found)
            return len(found)
        except OSError as error:
            _warn_once(f"{path or self.name} can't be written ({error.strerror}), so each run measures again")
            return 0


def cache_folder() -> Path | None:
    """`GLIOFORGE_CACHE`, else `$XDG_CACHE_HOME/glioforge`, else `~/.cache/glioforge`; None without a home folder."""
    own, shared = os.environ.get("GLIOFORGE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).absolute()
    if shared:
        return Path(shared).absolute() / "glioforge"
    home = os.path.expanduser("~")
    return None if home == "~" else Path(home) / ".cache" / "glioforge"


def _entries_of(content: bytes) -> dict[str, Any]:
    found = json.loads(content)
    version = found.get("version") if isinstance(found, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"its format has version {version}, not {FORMAT_VERSION}")
    if not isinstance(found.get("entries"), dict):
        raise ValueError('it has no "entries"')
    return found["entries"]


def _wait_for(lock: int) -> None:
    """Take a lock, waiting for others; a file system without locks, and a process that keeps one, are passed over."""
    last = time.monotonic() + LOCK_SECONDS
    while time.monotonic() < last:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.005)
        except OSError:
            return


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex}")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _warn_once(message: str) -> None:
    global _has_warned
    if not _has_warned:
        log.warning("measured: %s", message)
    _has_warned = True
