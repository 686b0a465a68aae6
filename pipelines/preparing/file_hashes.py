"""Scans known by their content: hashes of files, and the index that saves hashing them again.

`index.json` holds the content hash of a scan by path, and the state of the file that it was taken in: its size, inode
and times. A scan that was replaced by one of the same size and time has another inode, and one that was written to has
another change time, which no program can set. A data set that was copied or moved is hashed again, and found prepared.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipelines.basics.atomic import write_text
from pipelines.basics.regular_files import open_regular


@dataclass(frozen=True)
class FileHash:
    """Content hash of a file, and the file's state at that time: size in bytes, inode, mtime and ctime in ns."""

    state: tuple[int, ...]
    digest: str


def hash_file(path: Path) -> FileHash:
    """Hash the content of a scan. Raises CaseError where it can't be read."""
    with open_regular(path) as file:
        state = _state(os.fstat(file.fileno()))
        digest = hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()
    return FileHash(state, digest)


def is_unchanged(path: Path, known: FileHash) -> bool:
    """Whether a file is in the state that it was hashed in."""
    try:
        return _state(path.stat()) == known.state
    except (OSError, ValueError):
        return False


def read_index(folder: Path) -> dict[str, FileHash]:
    """Known hashes by absolute path; empty where the index is missing or damaged: it only saves time."""
    try:
        entries = json.loads((folder / "index.json").read_text())
        return {path: FileHash(tuple(state), digest) for path, (*state, digest) in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def add_to_index(folder: Path, known: Mapping[str, FileHash]) -> None:
    """Add hashes to the index of a store."""
    if not known:
        return
    entries = {path: [*h.state, h.digest] for path, h in {**read_index(folder), **known}.items()}
    with contextlib.suppress(OSError):  # it only saves time, and must not hide the error of a full disk
        write_text(folder / "index.json", json.dumps(entries, indent=0))


def _state(now: os.stat_result) -> tuple[int, ...]:
    return now.st_size, now.st_ino, now.st_mtime_ns, now.st_ctime_ns
