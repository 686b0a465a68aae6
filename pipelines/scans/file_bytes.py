"""The bytes of a scan's file, and of a gzip file no more than its header announces.

Sizes are compared before memory is taken: deflate compresses by a factor of at most 1032, so a header can announce more
than the file could hold. Content that goes on far beyond the announced end is refused unread: the dimensions are
damaged, or the file was made to fill memory.

gzip is inflated by isal (about 690 MB/s out of one core), a file of one member in one call, which checks its CRC.
bgzip writes members of 64 KiB: each is given a slice twice as long as the member before, because the input that a
member does not use is copied.
"""

from __future__ import annotations

import os
import re
from io import BufferedReader
from pathlib import Path

from isal import isal_zlib

from pipelines.basics.errors import CaseError
from pipelines.basics.input_files import FETCH_ANNEXED

COPY_AGAIN = "Copy or download the file again"
_GZIP_MAGIC = b"\x1f\x8b"
_HEAD_BYTES = 544  # a NIfTI-2 header and the four bytes behind it
_FIRST_READ = 1 << 16
_GZIP_OVERHEAD = 1 << 24  # bytes: of a gzip file, at most twice its content and this much more are read
_SLACK = 1 << 20  # bytes after the voxels that pass as padding
_LARGEST_RATIO = 1032  # of deflate
_SMALLEST_SLICE = 1 << 12
_DOWNLOAD = f"{COPY_AGAIN}, and look at the server's answer"
_DECOMPRESS = "Decompress it, and compress it with gzip or not at all"
_CONVERT = "Convert the image to .nii.gz"
_OTHER_CONTENT = [  # how a file that is not NIfTI begins; what it is; what to do
    (rb"version https://git-lfs", "a Git LFS pointer, the scan itself was not downloaded", "Run git lfs pull there"),
    (rb"/annex/objects/", "a git-annex pointer, the scan itself was not fetched", FETCH_ANNEXED),
    (rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<(!doctype html|html|head|body)\b", "a web page", _DOWNLOAD),
    (rb"\s*<\?xml", "an XML text", _DOWNLOAD),
    (rb"\s*[{\[]\s*\"", "a JSON text", _DOWNLOAD),
    (rb"\x1f\x8b", "compressed twice", "Run gunzip on it once"),
    (rb"BZh\d", "compressed by bzip2", _DECOMPRESS),
    (rb"\xfd7zXZ\0", "compressed by xz", _DECOMPRESS),
    (rb"\x28\xb5\x2f\xfd", "compressed by zstd", _DECOMPRESS),
    (rb"PK\x03\x04", "a zip archive", "Unpack it"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "Unpack it"),
    (rb"NRRD\d", "an NRRD image", _CONVERT),
    (rb"ObjectType\s*=", "a MetaImage", _CONVERT),
    (rb".{128}DICM", "a DICOM file", "Convert the series to .nii.gz (dcm2niix)"),
    (rb"\x89HDF", "an HDF5 file", _CONVERT),
    (rb"\x93NUMPY", "a NumPy array, without voxel size and orientation", _CONVERT),
]


class ScanFile:
    """The content of an open file, inflated where it is gzip.

    Args:
        path: of the file, for messages.
        file: at its start, from `open_regular`.

    Attributes:
        head: the first bytes of the content, at least a NIfTI header's if there are that many.

    Raises:
        CaseError: it is empty, or damaged gzip.
    """

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self._path, self._file = path, file
        self._size = os.fstat(file.fileno()).st_size
        start = file.read(_FIRST_READ)
        if not start:
            raise CaseError(path, "empty file: 0 bytes", COPY_AGAIN)
        self._is_gzip = start[:2] == _GZIP_MAGIC
        self.head, is_whole = _inflate(path, start, _HEAD_BYTES, _SMALLEST_SLICE) if self._is_gzip else (start, True)
        if len(self.head) < _HEAD_BYTES and not is_whole:
            raise self._ends_early()
        if not self.head:
            raise CaseError(path, "empty gzip: nothing inside", COPY_AGAIN)

    def content(self, needed: int, what: str) -> bytes:
        """The content, at least as long as is needed.

        Args:
            needed: bytes that the header announces.
            what: what they are, for messages.

        Raises:
            CaseError: less is there, or much more; damaged or truncated gzip.
        """
        at_most = self._size * (_LARGEST_RATIO if self._is_gzip else 1)
        if needed > at_most:
            raise self._too_short(needed, what, f"at most {at_most}" if self._is_gzip else f"{at_most}")
        self._file.seek(0)
        if self._is_gzip:
            raw = self._file.read(min(2 * needed + _GZIP_OVERHEAD, self._size))
            data, is_whole = _inflate(self._path, raw, needed + _SLACK, len(raw))
            goes_on = len(data) == needed + _SLACK
            if not is_whole and not goes_on:
                raise self._ends_early()
        else:
            goes_on = self._size > needed + _SLACK
            data = b"" if goes_on else self._file.read(needed)
        if goes_on:
            problem = f"goes on for over {_SLACK} bytes after the {needed} that the header announces for {what}"
            raise CaseError(self._path, problem, f"Its dimensions may be damaged. {COPY_AGAIN}")
        if len(data) < needed:
            raise self._too_short(needed, what, f"{len(data)}")
        return data

    def _too_short(self, needed: int, what: str, there: str) -> CaseError:
        problem = f"truncated: the header announces {needed} bytes for {what}, there are {there}"
        return CaseError(self._path, problem, COPY_AGAIN)

    def _ends_early(self) -> CaseError:
        return CaseError(self._path, f"truncated gzip: ends within its data, after {self._size} bytes", COPY_AGAIN)


def _inflate(path: Path, raw: bytes, limit: int, first_slice: int) -> tuple[bytes, bool]:
    """The content of consecutive gzip members, at most `limit` bytes of it, and whether that is all there is."""
    view, position, length = memoryview(raw), 0, first_slice
    parts: list[bytes] = []
    left = limit
    while raw[position : position + 2] == _GZIP_MAGIC:
        member, start = isal_zlib.decompressobj(31), position
        while not member.eof:
            piece = view[position : position + length]
            if not left or not piece:
                return b"".join(parts), False
            try:
                part = member.decompress(piece, left)
            except isal_zlib.error as error:  # type: ignore[misc]  # a class; isal's stub has an instance
                raise CaseError(path, f"damaged gzip ({error})", COPY_AGAIN) from error
            parts.append(part)
            left -= len(part)
            position += len(piece) - len(member.unconsumed_tail) - len(member.unused_data)
            length *= 2
        length = max(_SMALLEST_SLICE, 2 * (position - start))
    return parts[0] if len(parts) == 1 else b"".join(parts), True


def not_nifti(path: Path, head: bytes) -> CaseError:
    """The error for a file without a NIfTI header: what it is instead, and what to do with it."""
    for start, what, remedy in _OTHER_CONTENT:
        if re.match(start, head, re.IGNORECASE | re.DOTALL):
            return CaseError(path, f"not a NIfTI file but {what}: it starts with {head[:8]!r}", remedy)
    return CaseError(path, f"not a NIfTI file: it starts with {head[:8]!r}", _CONVERT)
