"""One prepared case: what it is known by, which files it has, and how they are made. `preparing.store` holds many."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from isal import isal_zlib

from pipelines.basics.errors import CaseError
from pipelines.cases import Case
from pipelines.geometry import label_grid, target_grid
from pipelines.labels import Coding
from pipelines.preparing.store_files import FileHash, hash_file, is_unchanged, write_array, write_whole
from pipelines.resample import resample_image, resample_label
from pipelines.scans.nifti import read_case
from pipelines.spacing import Spacing

FORMAT = 3
StoreDtype = Literal["float32", "float16"]
FOREGROUND_VOXELS = 4096
_NAME_LENGTH = 150
_INTENSITIES = "as in the files, resampled; not normalised"


@dataclass(frozen=True)
class Task:
    """What is asked of each case, for a worker."""

    folder: Path
    modalities: tuple[str, ...]
    coding: Coding
    spacing: Spacing
    dtype: StoreDtype
    device: Literal["cpu", "gpu"]

    def key(self, case: Case, digests: Sequence[str]) -> str:
        """Hash of what is asked and of the content of the files, given by their hashes."""
        asked = {
            "format": FORMAT,
            "name": case.name,
            "modalities": self.modalities,
            "channels": case.channels,
            "label_values": self.coding.values,  # other values are other checks
            "spacing_mm": self.spacing.mm,
            "spacing_axes": self.spacing.axes,
            "files": list(digests),
            "labelled": case.label is not None,
        }
        if self.dtype != "float32":
            asked["dtype"] = self.dtype
        return hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).hexdigest()


def files_of(case: Case) -> list[Path]:
    """The files that a case is made from, the label last."""
    return [*case.images, *([] if case.label is None else [case.label])]


def stem_of(name: str, key: str) -> str:
    """What the names of a case's files begin with; a file system takes names of 255 bytes, and a case any."""
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)[:_NAME_LENGTH]}-{key[:12]}"


def read_record(task: Task, case: Case, key: str) -> dict[str, Any] | None:
    """The `.json` of a case; None unless it and all its arrays are there, whole."""
    stem = stem_of(case.name, key)
    try:
        content = json.loads((task.folder / f"{stem}.json").read_bytes())
        record = content["record"]
        if content["crc32"] != _crc_of_record(record) or record["key"] != key:
            return None
        sizes = {kind: (task.folder / f"{stem}.{kind}.npy").stat().st_size for kind in record["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if all(sizes[kind] == file["bytes"] for kind, file in record["files"].items()) else None


def prepare_case(task: Task, case: Case) -> tuple[dict[str, Any], dict[str, FileHash]]:
    """Prepare one case, in a worker: its record, and the hashes of its files."""
    hashes = hash_files(case)
    record = read_record(task, case, key_of(task, case, hashes))
    if record is None:
        record = build(task, case, hashes)
    return record, {str(path.absolute()): known for path, known in hashes.items()}


def hash_files(case: Case) -> dict[Path, FileHash]:
    """The hash of each file of a case. Raises CaseError."""
    return {path: hash_file(path) for path in files_of(case)}


def key_of(task: Task, case: Case, hashes: Mapping[Path, FileHash]) -> str:
    """`Task.key` of a case whose files were hashed."""
    return task.key(case, [hashes[path].digest for path in files_of(case)])


def build(task: Task, case: Case, hashes: Mapping[Path, FileHash]) -> dict[str, Any]:
    """Make the files of a case, the `.json` last; returns what that holds.

    Raises:
        CaseError: the scans are faulty, or were changed meanwhile. StoreError: the disk is full or can't be written.
    """
    key = key_of(task, case, hashes)
    raw = read_case(case, task.coding)
    for path, known in hashes.items():
        if not is_unchanged(path, known) and hash_file(path).digest != known.digest:
            raise CaseError(path, "was changed while it was prepared", "Run again when it is whole")
    source_shape = raw.image.shape[:3]
    grid = target_grid(source_shape, raw.affine, task.spacing)
    if task.device == "gpu":
        from pipelines.loading.raw import resample_case  # which imports the store

        arrays = {"image": resample_case(raw, grid, torch.device("cuda"))}
    else:
        arrays = {"image": resample_image(raw.image, raw.affine, grid)}
    if raw.label is not None and raw.label_affine is not None:
        # As MONAI: the label on its own affine, which decides its ties, in the shape of the image.
        own = label_grid(grid, source_shape, raw.label_affine, task.spacing)
        arrays["label"] = resample_label(raw.label, raw.label_affine, own)
        arrays["foreground"] = foreground_voxels(arrays["label"])
    scale = None
    if task.dtype == "float16":
        arrays["image"], scale = to_float16(arrays["image"])
    record = {
        "format": FORMAT,
        "name": case.name,
        "key": key,
        "modalities": list(task.modalities),
        "spacing_mm": list(task.spacing.mm),
        "spacing_axes": task.spacing.axes,
        "shape": list(grid.shape),
        "affine": grid.affine.tolist(),
        "source_shape": list(source_shape),
        "source_affine": raw.affine.tolist(),
        "label_values": np.flatnonzero(np.bincount(arrays["label"].ravel())).tolist() if "label" in arrays else None,
        "intensities": _INTENSITIES,
        "scale": scale,
    }
    return _write(task.folder / stem_of(case.name, key), arrays, record)


def _write(stem: Path, arrays: Mapping[str, np.ndarray], record: dict[str, Any]) -> dict[str, Any]:
    """Write the files of a case, the `.json` last; where one can't be written, none is left of a new case.

    Returns:
        the record, with the sizes and checksums of the arrays.
    """
    paths = {kind: stem.with_name(f"{stem.name}.{kind}.npy") for kind in arrays}
    about, needed = stem.with_name(f"{stem.name}.json"), sum(array.nbytes for array in arrays.values())
    files: dict[str, dict[str, int]] = {}
    try:
        for kind, array in arrays.items():
            size, crc = write_whole(paths[kind], partial(write_array, array), needed)
            files[kind] = {"bytes": size, "crc32": crc}
        record = record | {"files": files}
        content = json.dumps({"record": record, "crc32": _crc_of_record(record)}).encode()
        write_whole(about, lambda file: file.write(content), needed)
    except BaseException:
        if not about.exists():
            for path in paths.values():
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
        raise
    return record


def to_float16(image_XYZC: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """float16, and what to multiply each channel with to have the image again; zero exactly where the image is."""
    peak = np.maximum(np.abs(image_XYZC).max(axis=(0, 1, 2)), np.finfo(np.float32).tiny)
    scale = np.exp2(np.ceil(np.log2(peak)) - 15).astype(np.float32)  # to at most 2^15, of 65504
    compact = (image_XYZC / scale).astype(np.float16)
    lost = (compact == 0) & (image_XYZC != 0)
    compact[lost] = np.copysign(np.finfo(np.float16).smallest_subnormal, image_XYZC[lost])
    return compact, scale.tolist()


def foreground_voxels(label_XYZ: np.ndarray) -> np.ndarray:
    """int32 (K, 3): the voxels of label > 0, in C order; of more than `FOREGROUND_VOXELS` so many, evenly taken."""
    voxels = np.argwhere(label_XYZ > 0)
    if len(voxels) > FOREGROUND_VOXELS:
        voxels = voxels[np.linspace(0, len(voxels) - 1, FOREGROUND_VOXELS).round().astype(np.int64)]
    return np.ascontiguousarray(voxels, np.int32)  # argwhere's result is in Fortran order


def _crc_of_record(record: dict[str, Any]) -> int:
    return isal_zlib.crc32(json.dumps(record).encode())  # the same for what is written and for what is read
