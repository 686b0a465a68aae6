"""Files of a store: each is written whole or not at all (`pipelines.atomic`), and known by its content.

`index.json` remembers the content hash of a scan by path, size and time.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.atomic import remove_left_over, replacing
from pipelines.cases import DataError
from pipelines.layouts import CaseError


class StoreError(DataError):
    """The store's folder can't be written; `needed` is the size in bytes of the case that was being written."""

    def __init__(self, folder: Path, problem: str, needed: int) -> None:
        super().__init__(folder, problem, needed)
        self.folder = folder
        self.problem = problem
        self.needed = needed

    def __str__(self) -> str:
        size = f" It needs about {self.needed / 1e6:.1f} MB more." if self.needed else ""
        return (
            f"store {self.folder}: {self.problem}.{size} Free space there or change its permissions, or choose another "
            "folder with --data.store_dir. Cases that are done stay done."
        )


@dataclass(frozen=True)
class FileHash:
    """Content hash of a file, and the state of the file that it holds for."""

    size: int
    mtime_ns: int
    digest: str


def write_array(array: np.ndarray, file: Any) -> None:
    """Write a C-ordered array as `.npy`."""
    # Not np.save: its OSError on a full disk has no errno.
    assert array.flags.c_contiguous
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.reshape(-1).view(np.uint8))


def write_whole(path: Path, write: Callable[[Any], Any], needed: int) -> int:
    """Write a file under a temporary name in its folder and move it into place.

    Args:
        path: the file. write: writes its content to an open file.
        needed: bytes of the whole case, for the message.

    Returns:
        its size in bytes.

    Raises:
        StoreError: it can't be written; nothing is left of it.
    """
    try:
        with replacing(path, "wb") as file:
            write(file)
            size = file.tell()
    except OSError as error:
        raise store_error(path.parent, error, needed) from error
    return size


def store_error(folder: Path, error: OSError, needed: int) -> StoreError:
    """What the system says, in the words of a store."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return StoreError(folder, f"{'no space left' if full else 'not writable'} ({error.strerror})", needed)


def make_folder(folder: Path) -> None:
    """Make the store's folder, and remove the temporary files of runs that died."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise store_error(folder, error, 0) from error
    remove_left_over(folder)


def file_state(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def hash_file(path: Path) -> FileHash:
    """Hash the content of a scan. Raises CaseError where it can't be read."""
    try:
        size, mtime_ns = file_state(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()
    except FileNotFoundError:
        raise CaseError(path, "there is no such file", "Put it there, or correct the path or the list") from None
    except OSError as error:
        raise CaseError(path, f"can't be read ({error.strerror})", "Check its permissions and the disk") from error
    return FileHash(size, mtime_ns, digest)


def read_index(folder: Path) -> dict[str, FileHash]:
    """Known hashes by absolute path; none where the index is missing or damaged: it only saves time."""
    try:
        entries = json.loads((folder / "index.json").read_text())
        return {path: FileHash(*entry) for path, entry in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def remember(folder: Path, known: Mapping[str, FileHash]) -> None:
    """Add hashes to the index of a store."""
    if not known:
        return
    entries = {path: [h.size, h.mtime_ns, h.digest] for path, h in {**read_index(folder), **known}.items()}
    content = json.dumps(entries, indent=0).encode()
    with contextlib.suppress(StoreError):  # it only saves time, and must not hide the error of a full disk
        write_whole(folder / "index.json", lambda file: file.write(content), len(content))
