"""One prepared case: its key, its files, and how they are made and read. store.py holds many.

Scans are known by their content. `index.json` saves hashing them again: it holds the hash of a scan by path, and the
state of the file at that time, its size, inode and times. A scan that was replaced by one of the same size and time has
another inode, and one that was written to has another change time, which no program can set. A data set that was copied
or moved is hashed again, and found prepared.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from pipelines.basics.atomic import replacing, write_text
from pipelines.basics.errors import DISK_FULL, CaseError, StoreError
from pipelines.basics.input_files import open_regular
from pipelines.layouts.cases import Case
from pipelines.layouts.labels import Coding
from pipelines.scans.geometry import Grid, Spacing, label_grid, target_grid
from pipelines.scans.nifti import RawCase, read_case
from pipelines.scans.resample import resample_image, resample_label

FORMAT = 3
StoreDtype = Literal["float32", "float16"]
FOREGROUND_VOXELS = 4096
Resample = Callable[[RawCase, Grid], NDArray[np.float32]]
"""Resamples and orients the image of a case; a function of a module, or a `partial` of one."""


def resample_on_cpu(raw: RawCase, grid: Grid) -> NDArray[np.float32]:
    """`resample_image` of a case."""
    return resample_image(raw.image, raw.affine, grid)


class FileHash(NamedTuple):
    """Content hash of a file, and the file's state at that time: size in bytes, inode, mtime and ctime in ns."""

    state: tuple[int, ...]
    digest: str


@dataclass(frozen=True)
class PrepareOptions:
    """How cases are prepared, and where to."""

    folder: Path  # of the store
    modalities: tuple[str, ...]  # channels of the images
    coding: Coding  # of the labels
    spacing: Spacing  # of the result
    dtype: StoreDtype  # of the images on disk
    resample: Resample

    def key(self, case: Case, hashes: Mapping[Path, FileHash]) -> str:
        """Hash of these options and of the content of a case's files."""
        asked: dict[str, Any] = {
            "format": FORMAT,
            "name": case.name,
            "modalities": self.modalities,
            "channels": case.channels,
            "label_values": self.coding.values,  # other values are other checks
            "spacing_mm": self.spacing.mm,
            "spacing_axes": self.spacing.axes,
            "files": [hashes[path].digest for path in files_of(case)],
            "labelled": case.label is not None,
        }
        asked |= {} if self.dtype == "float32" else {"dtype": self.dtype}
        return hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).hexdigest()


def files_of(case: Case) -> list[Path]:
    """The scans of a case, the label last."""
    return [*case.images, *([] if case.label is None else [case.label])]


def case_stem(name: str, key: str) -> str:
    """How the names of a case's files begin. A case may have any name, a file 255 bytes."""
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)[:150]}-{key[:12]}"


def read_record(options: PrepareOptions, case: Case, key: str) -> dict[str, Any] | None:
    """The record in a case's `.json`; None unless it and all arrays are there, undamaged as far as sizes tell."""
    stem = case_stem(case.name, key)
    try:
        content = json.loads((options.folder / f"{stem}.json").read_bytes())
        record = content["record"]
        if content["crc32"] != _crc_of_record(record) or record["key"] != key:
            return None
        sizes = {kind: (options.folder / f"{stem}.{kind}.npy").stat().st_size for kind in record["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if all(sizes[kind] == file["bytes"] for kind, file in record["files"].items()) else None


def prepare_case(options: PrepareOptions, case: Case) -> tuple[dict[str, Any], dict[str, FileHash]]:
    """Prepare one case, in a worker: its record, and the hashes of its files."""
    hashes = hash_files(case)
    record = read_record(options, case, options.key(case, hashes)) or build(options, case, hashes)
    return record, {str(path.absolute()): known for path, known in hashes.items()}


def build(options: PrepareOptions, case: Case, hashes: Mapping[Path, FileHash]) -> dict[str, Any]:
    """Make the files of a case, the `.json` last; returns its record.

    Raises:
        CaseError: the scans are faulty, or were changed meanwhile.
        StoreError: the disk is full or can't be written.
    """
    key = options.key(case, hashes)
    raw = read_case(case, options.coding)
    for path, known in hashes.items():
        if not is_unchanged(path, known) and hash_file(path).digest != known.digest:
            raise CaseError(path, "was changed while it was prepared", "Run again when the file is complete")
    source_shape = raw.image.shape[:3]
    grid = target_grid(source_shape, raw.affine, options.spacing)
    arrays = {"image": options.resample(raw, grid)}
    if raw.label is not None:
        arrays["label"] = prepared_label(raw, grid, options.spacing)
        arrays["foreground"] = foreground_voxels(arrays["label"])
    scale = None
    if options.dtype == "float16":
        arrays["image"], scale = to_float16(arrays["image"])
    record = {
        "format": FORMAT,
        "name": case.name,
        "key": key,
        "modalities": list(options.modalities),
        "spacing_mm": list(options.spacing.mm),
        "spacing_axes": options.spacing.axes,
        "shape": list(grid.shape),
        "affine": grid.affine.tolist(),
        "source_shape": list(source_shape),
        "source_affine": raw.affine.tolist(),
        "label_values": np.flatnonzero(np.bincount(arrays["label"].ravel())).tolist() if "label" in arrays else None,
        "intensities": "as in the files, resampled; not normalised",
        "scale": scale,
    }
    return _write(options.folder / case_stem(case.name, key), arrays, record)


def prepared_label(raw: RawCase, grid: Grid, spacing: Spacing) -> np.ndarray:
    """uint8 (X, Y, Z): the label of a case, which has one, on the grid of its image.

    As in MONAI, it is resampled by its own affine, which decides its ties, in the shape of the image.
    """
    assert raw.label is not None and raw.label_affine is not None
    return resample_label(raw.label, raw.label_affine, label_grid(grid, raw.label.shape, raw.label_affine, spacing))


def _write(stem: Path, arrays: Mapping[str, np.ndarray], record: dict[str, Any]) -> dict[str, Any]:
    """Write the files of a case, the `.json` last, or none of a new case; returns the record, with sizes added."""
    paths = {kind: stem.with_name(f"{stem.name}.{kind}.npy") for kind in arrays}
    about, files = stem.with_name(f"{stem.name}.json"), {}
    try:
        for kind, array in arrays.items():
            with replacing(paths[kind], "wb") as file:
                crc = write_array(array, file)
                files[kind] = {"bytes": file.tell(), "crc32": crc}
        record = record | {"files": files}
        with replacing(about) as file:
            file.write(json.dumps({"record": record, "crc32": _crc_of_record(record)}))
    except BaseException as error:
        for path in () if about.exists() else paths.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            what = f"{'no space left' if error.errno in DISK_FULL else 'not writable'} ({error.strerror})"
            needed = sum(array.nbytes for array in arrays.values())
            raise StoreError(stem.parent, f"{what}, writing {Path(error.filename).name}", needed) from error
        raise
    return record


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
    crc, buffer = 0, memoryview(bytearray(1 << 22))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            crc = isal_zlib.crc32(buffer[:size], crc)
    return crc


def to_float16(image_XYZC: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """float16, and the factor of each channel that restores the image; zero exactly where the image is."""
    peak = np.maximum(np.abs(image_XYZC).max(axis=(0, 1, 2)), np.finfo(np.float32).tiny)
    scale = np.exp2(np.ceil(np.log2(peak)) - 15).astype(np.float32)  # to at most 2^15, of 65504
    compact = (image_XYZC / scale).astype(np.float16)
    lost = (compact == 0) & (image_XYZC != 0)
    compact[lost] = np.copysign(np.finfo(np.float16).smallest_subnormal, image_XYZC[lost])
    return compact, scale.tolist()


def foreground_voxels(label_XYZ: np.ndarray) -> np.ndarray:
    """int32 (K, 3): the voxels of label > 0 in C order, or of these `FOREGROUND_VOXELS`, evenly spaced."""
    voxels = np.argwhere(label_XYZ > 0)
    if len(voxels) > FOREGROUND_VOXELS:
        voxels = voxels[np.linspace(0, len(voxels) - 1, FOREGROUND_VOXELS).round().astype(np.int64)]
    return np.ascontiguousarray(voxels, np.int32)  # argwhere's result is in Fortran order


def _crc_of_record(record: dict[str, Any]) -> int:
    return isal_zlib.crc32(json.dumps(record).encode())  # the same when written and when read


def hash_files(case: Case) -> dict[Path, FileHash]:
    """The hash of each file of a case. Raises CaseError where one can't be read."""
    return {path: hash_file(path) for path in files_of(case)}


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
