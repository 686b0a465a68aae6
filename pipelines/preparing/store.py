"""Prepared volumes on disk: each case is decoded, resampled and oriented once, and mapped into memory from then on.

A case is four files, `<name>-<key>.image.npy` (float32, (X, Y, Z, C)), `.label.npy` (uint8, (X, Y, Z)),
`.foreground.npy` (some voxels of the tumour, for crops that hold it) and `.json` (grids, sizes, checksums). A case of
BraTS is 32 MB at 1.5 x 1.5 x 2.0 mm, a quarter of its raw size. Intensities are the file's own: crops are normalised.

With float16 it is half the bytes, and each voxel is off by at most 2^-11 of itself (0.05 %). Each channel is divided by
a power of two so that nothing overflows, and what is too small for float16 becomes its smallest number, not zero: zero
means "outside the head" to the z-score.

The key is a hash of the content of the input files, of the options (spacing, modalities, channels, label values) and of
the format's version: other data or options make other files, and one folder serves any number of experiments. A second
run opens no scan, as `index.json` keeps the hashes of the files.

Every file is written whole or not at all, the `.json` last: a case without it does not exist. So a run may be killed at
any point and started again, and several may fill one folder at once: at worst both write the same bytes.

Each `.npy`, its header included, is compared with its checksum when it is first opened; one that is damaged or gone is
prepared again from the scans, with a warning. A `.json` holds its own checksum, and a damaged one counts as missing.

Cases are prepared in processes (processes.py), and only their records and hashes come back: memory is about 0.4 GB per
worker, however many cases there are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.basics.atomic import remove_left_over
from pipelines.basics.errors import CaseError, CaseFailure, DataError, StoreError
from pipelines.layouts.cases import Case, CaseSet
from pipelines.layouts.labels import Coding
from pipelines.preparing.prepared_case import (
    FileHash,
    PrepareOptions,
    Resample,
    StoreDtype,
    add_to_index,
    build,
    case_stem,
    checksum,
    files_of,
    hash_files,
    is_unchanged,
    prepare_case,
    read_index,
    read_record,
    resample_on_cpu,
)
from pipelines.preparing.processes import run_on_cases
from pipelines.scans.geometry import DEFAULT_SPACING, Spacing, as_spacing, target_grid
from pipelines.scans.nifti import read_case

log = logging.getLogger(__name__)

MAPS = 16384  # arrays kept mapped: mapping again costs page faults. Linux allows a process 65,530 maps


class Store:
    """Prepared volumes of some cases, read-only; `prepare` makes it.

    Args:
        options: how they were prepared, and where to.
        case_set: the cases, in this order; records: what the `.json` of each holds.
    """

    def __init__(self, options: PrepareOptions, case_set: CaseSet, records: Sequence[Mapping[str, Any]]) -> None:
        self.folder = options.folder
        self.names = case_set.names
        self.modalities = case_set.modalities
        self.coding: Coding = case_set.coding
        self.spacing_mm: tuple[float, float, float] = options.spacing.mm
        self._options, self._cases = options, case_set.cases
        self._records = tuple(records)
        self._index = {name: i for i, name in enumerate(self.names)}
        self._found_whole: set[Path] = set()
        self._map = lru_cache(MAPS)(partial(np.load, mmap_mode="r"))

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: str) -> int:
        """Position of a case.

        Raises:
            DataError: there is no such case.
        """
        if name not in self._index:
            raise DataError(f"store {self.folder}: no case {name!r} among its {len(self)}: see Store.names")
        return self._index[name]

    def image(self, i: int) -> np.ndarray:
        """float32 (X, Y, Z, C) in RAS, read-only; channels as `modalities`. Memory-mapped where it is stored so."""
        voxels, scale = self.voxels(i)
        return voxels if scale is None else voxels.astype(np.float32) * scale

    def voxels(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The image as stored, memory-mapped, and the factor of each channel, float32 (C,); None: 1."""
        scale = self._records[i].get("scale")
        return self._array(i, "image"), None if scale is None else np.array(scale, np.float32)

    def label(self, i: int) -> np.ndarray | None:
        """uint8 (X, Y, Z) in RAS, memory-mapped, read-only; None where the case has no label."""
        return self._array(i, "label") if self.has_label(i) else None

    def has_label(self, i: int) -> bool:
        """Whether the case has a label; no file is opened."""
        return "label" in self._records[i]["files"]

    def has_tumour(self, i: int) -> bool:
        """Whether the label of a case has a voxel of the whole tumour; no file is opened."""
        _, whole, _ = self.coding.regions
        return not set(whole).isdisjoint(self._records[i]["label_values"] or ())

    def foreground(self, i: int) -> np.ndarray:
        """int32 (K, 3): at most 4096 voxels of label > 0, evenly spaced in C order; K is 0 if there are none."""
        return self._array(i, "foreground") if self.has_label(i) else np.empty((0, 3), np.int32)

    def shape(self, i: int) -> tuple[int, int, int]:
        """(X, Y, Z) of the prepared volume; no file is opened."""
        x, y, z = self._records[i]["shape"]
        return x, y, z

    def affine(self, i: int) -> np.ndarray:
        """(4, 4) float64, voxel index to mm (RAS+), of the prepared volume."""
        return np.array(self._records[i]["affine"])

    def source_affine(self, i: int) -> np.ndarray:
        """The same of the original file."""
        return np.array(self._records[i]["source_affine"])

    def nbytes(self, cases: Sequence[int] | None = None) -> int:
        """Bytes of all arrays of some cases, by index; None: of all."""
        records = self._records if cases is None else [self._records[i] for i in set(cases)]
        return sum(file["bytes"] for record in records for file in record["files"].values())

    def _array(self, i: int, kind: str) -> np.ndarray:
        """An array of a case, mapped and checked; the case is prepared again if it is damaged.

        Raises:
            DataError: it is damaged or gone, and the scans have changed.
        """
        record = self._records[i]
        path = self.folder / f"{case_stem(self.names[i], record['key'])}.{kind}.npy"
        if path not in self._found_whole:
            fault = _fault(path, record["files"][kind]["crc32"])
            if fault:
                log.warning("%s: %s; preparing case %s again", path, fault, self.names[i])
                self._build_again(i, f"{path}: {fault}")
            self._found_whole.add(path)
        return self._map(path)

    def _build_again(self, i: int, fault: str) -> None:
        case, remedy = self._cases[i], "put the scans of this case back as they were, or leave the case out"
        try:
            hashes = hash_files(case)
            if self._options.key(case, hashes) != self._records[i]["key"]:
                raise DataError(f"{fault}, and the scans of {case.name} have changed since: {remedy}")
            build(self._options, case, hashes)
        except CaseError as error:
            raise DataError(f"{fault}, and can't be prepared again: {error}") from error


def _fault(path: Path, crc32: int) -> str:
    """What is wrong with an array on disk; empty if nothing."""
    try:
        return "" if checksum(path) == crc32 else "its checksum differs from the recorded one"
    except FileNotFoundError:
        return "the file is gone"
    except OSError as error:
        return f"can't be read ({error.strerror})"


def prepare(
    case_set: CaseSet,
    store_dir: Path,
    spacing: Spacing | Sequence[float] = DEFAULT_SPACING,
    workers: int | None = None,
    dtype: StoreDtype = "float32",
    skip_faulty: bool = False,
    resample: Resample = resample_on_cpu,
    most_workers: int | None = None,
) -> Store:
    """Open the store of some cases, after preparing those that it lacks; if it has all, nothing is written.

    Args:
        case_set: the cases.
        store_dir: folder of the store; made where it is missing.
        spacing: voxel size of the result; three numbers are R, A and S.
        workers: processes; 1 works in this process. None: one per core available, if that is faster than working here.
        dtype: of the images on disk.
        skip_faulty: skip cases whose scans are faulty, with a warning that names each, instead of raising.
        resample: of images; on GPUs `pipelines.loading.raw.resample_on_gpus`, within 3e-6 of their range.
        most_workers: processes that `resample` allows; None: any number.

    Returns:
        the cases in their order, without the faulty ones that were skipped.

    Raises:
        DataError: one error that names every case that is faulty or failed otherwise; the others are prepared. Also:
            no cases, all are faulty, the folder can't be written, or the disk is full.
    """
    if not case_set.cases:
        raise DataError("there are no cases to prepare: check --data.root")
    folder = Path(store_dir).absolute()
    options = PrepareOptions(folder, case_set.modalities, case_set.coding, as_spacing(spacing), dtype, resample)
    remove_left_over(folder)
    index = read_index(folder)
    records = {case.name: _record_of(options, case, index) for case in case_set.cases}
    pending = [case for case in case_set.cases if records[case.name] is None]
    if pending:
        started = time.perf_counter()
        done, faults = _prepare_pending(options, pending, workers, most_workers)
        failed = any(isinstance(fault, CaseFailure) for fault in faults.values())
        if faults and (not skip_faulty or failed or len(faults) == len(case_set.cases)):
            lines = "".join(f"\n  {name}: {fault}" for name, fault in sorted(faults.items()))
            count = f"{len(faults)} of {len(case_set.cases)} cases"
            raise DataError(f"{count} can't be prepared (the others are prepared now):{lines}")
        for name, fault in faults.items():
            log.warning("skipped: case %s: %s", name, fault)
        log.info("prepared %d cases in %.1f s: %s", len(done), time.perf_counter() - started, folder)
        records |= done
    whole = {name: record for name, record in records.items() if record is not None}
    return Store(options, case_set.select(list(whole)), list(whole.values()))


def _record_of(options: PrepareOptions, case: Case, index: Mapping[str, FileHash]) -> dict[str, Any] | None:
    """The record of a case, if it is prepared and the index knows the hashes of its scans."""
    hashes = {path: index[str(path.absolute())] for path in files_of(case) if str(path.absolute()) in index}
    if len(hashes) < len(files_of(case)) or not all(is_unchanged(path, known) for path, known in hashes.items()):
        return None
    return read_record(options, case, options.key(case, hashes))


def _prepare_pending(
    options: PrepareOptions, pending: Sequence[Case], workers: int | None, most_workers: int | None
) -> tuple[dict[str, dict[str, Any]], dict[str, CaseError]]:
    """The records of the cases that could be prepared, and the faults of the others. Raises StoreError."""
    done: dict[str, dict[str, Any]] = {}
    faults: dict[str, CaseError] = {}
    known: dict[str, FileHash] = {}
    folder = options.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(folder, f"not writable ({error.strerror})", 0) from error
    try:
        task = partial(prepare_case, options)
        for case, result in run_on_cases(task, pending, workers, "Preparing", most_workers):
            if isinstance(result, CaseError):
                faults[case.name] = result
            else:
                done[case.name], hashes = result
                known.update(hashes)
    except StoreError as error:
        raise StoreError(folder, error.problem, error.needed * (len(pending) - len(done))) from error
    finally:
        add_to_index(folder, known)
    return done, faults


def check_cases(
    case_set: CaseSet,
    workers: int | None = None,
    spacing: Spacing | Sequence[float] = DEFAULT_SPACING,
    crop_size: Sequence[int] | None = None,
) -> list[CaseError]:
    """Read every file of every case and report all faulty cases at once, the first fault of each; writes nothing.

    Args:
        case_set: the cases.
        workers: as in `prepare`.
        spacing: as in `prepare`.
        crop_size: (X, Y, Z); a case whose prepared volume is smaller is a fault. None: any size will do.

    Returns:
        the faults, in the order of the cases.
    """
    check = partial(_check_case, case_set.coding, as_spacing(spacing), crop_size)
    results = {case.name: result for case, result in run_on_cases(check, case_set.cases, workers, "Checking")}
    return [fault for name in case_set.names if isinstance(fault := results[name], CaseError)]


def _check_case(coding: Coding, spacing: Spacing, crop_size: Sequence[int] | None, case: Case) -> None:
    raw = read_case(case, coding)
    shape = target_grid(raw.image.shape[:3], raw.affine, spacing).shape
    if crop_size is not None and np.less(shape, crop_size).any():
        problem = f"prepared volume {shape} is smaller than the crop {tuple(crop_size)}"
        raise CaseError(case.images[0], problem, "Choose a smaller --data.crop_size_voxels, or --data.pad true")
