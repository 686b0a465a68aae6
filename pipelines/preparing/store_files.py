"""Files of a store: each is written whole or not at all (`pipelines.basics.atomic`), and known by its content.

`index.json` remembers the content hash of a scan by path, and for which state of the file it holds: its size, inode and
times. A scan that was replaced by one of the same size and time is another inode, and one that was written to has
another change time, which no program can set. A data set that was copied or moved is hashed again, and found prepared.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from isal import isal_zlib

from pipelines.basics.atomic import replacing
from pipelines.basics.errors import StoreError
from pipelines.basics.regular_files import open_regular

T = TypeVar("T")
_PIECE = 1 << 22


@dataclass(frozen=True)
class FileHash:
    """Content hash of a file, and the state of the file that it holds for, see `file_state`."""

    state: tuple[int, ...]
    digest: str


def write_array(array: np.ndarray, file: Any) -> int:
    """Write a C-ordered array as `.npy`; returns the checksum of all that was written."""
    # Not np.save: its OSError on a full disk has no errno.
    assert array.flags.c_contiguous
    header, data = BytesIO(), array.reshape(-1).view(np.uint8)
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    file.write(header.getbuffer())
    file.write(data)
    return isal_zlib.crc32(data, isal_zlib.crc32(header.getbuffer()))


def checksum(path: Path) -> int:
    """Of a whole file, read piece by piece. Raises OSError."""
    crc, buffer = 0, memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            crc = isal_zlib.crc32(buffer[:size], crc)
    return crc


def write_whole(path: Path, write: Callable[[Any], T], needed: int) -> tuple[int, T]:
    """Write a file under a temporary name in its folder and move it into place.

    Args:
        path: the file. write: writes its content to an open file.
        needed: bytes of the whole case, for the message.

    Returns:
        its size in bytes, and what `write` returned.

    Raises:
        StoreError: it can't be written; nothing is left of it.
    """
    try:
        with replacing(path, "wb") as file:
            written = write(file)
            size = file.tell()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = "no space left" if full else "not writable"
        raise StoreError(path.parent, f"{what} ({error.strerror}), writing {path.name}", needed) from error
    return size, written


def make_folder(folder: Path) -> None:
    """Make the store's folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(folder, f"not writable ({error.strerror})", 0) from error


def file_state(path: Path) -> tuple[int, ...]:
    """Size in bytes, inode, and the times of the last change of content and of inode in ns. Raises OSError."""
    return _state(path.stat())


def _state(now: os.stat_result) -> tuple[int, ...]:
    return now.st_size, now.st_ino, now.st_mtime_ns, now.st_ctime_ns


def is_unchanged(path: Path, known: FileHash) -> bool:
    """Whether a file is, by its state, the one that was hashed."""
    try:
        return file_state(path) == known.state
    except (OSError, ValueError):
        return False


def hash_file(path: Path) -> FileHash:
    """Hash the content of a scan. Raises CaseError where it can't be read."""
    with open_regular(path) as file:
        state = _state(os.fstat(file.fileno()))
        digest = hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()
    return FileHash(state, digest)


def read_index(folder: Path) -> dict[str, FileHash]:
    """Known hashes by absolute path; none where the index is missing or damaged: it only saves time."""
    try:
        entries = json.loads((folder / "index.json").read_text())
        return {path: FileHash(tuple(state), digest) for path, (*state, digest) in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def remember(folder: Path, known: Mapping[str, FileHash]) -> None:
    """Add hashes to the index of a store."""
    if not known:
        return
    entries = {path: [*h.state, h.digest] for path, h in {**read_index(folder), **known}.items()}
    content = json.dumps(entries, indent=0).encode()
    with contextlib.suppress(StoreError):  # it only saves time, and must not hide the error of a full disk
        write_whole(folder / "index.json", lambda file: file.write(content), len(content))
