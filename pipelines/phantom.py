"""Synthetic brain-tumour scans: seeded, four modalities, skull-stripped, in the layout of Decathlon Task01.

They let everything run without a download: trials, tests, benchmarks. They are drawn from distances, not from scans:

1. Coordinates are mm of a head of 240 x 240 x 155 mm, whatever the voxels: any `size` shows the whole head. Smooth
   random fields (normal deviates on a coarse grid under cubic B-splines) bend them; a mass effect pushes them off the
   tumour.
2. Anatomy by distance to the brain's surface, to folded sheets (sulci: the zero set of a random field), to the fissure
   between the hemispheres and to the ventricles: CSF, grey and white matter. Borders are ramps at least a voxel wide,
   which is partial volume.
3. Tumour by a distance whose level sets are roughened at two scales: oedema (finger-like, it prefers white matter)
   around a core, whose shell enhances and whose inside is necrotic. One case in ten does not enhance: its ET is empty.
4. Intensities by tissue and modality, drawn for each case; texture, bias field, noise; background exactly 0.

Thresholding does not solve them: contrasts vary between cases, oedema fades out at its border, FLAIR and T2 also show
white-matter lesions and caps on the ventricles, T1c also vessels and choroid plexus, and T2 all CSF.

Labels are Decathlon's: 1 oedema, 2 non-enhancing core (with necrosis), 3 enhancing rim.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pipelines import anatomy as head
from pipelines.anatomy import CENTRE_MM, HEAD_MM, Anatomy, Field, Tumour
from pipelines.basics.atomic import remove_left_over, write_text
from pipelines.basics.errors import DataError
from pipelines.basics.machine import cores
from pipelines.basics.progress_bar import show_progress
from pipelines.scans.nifti import write_nifti

log = logging.getLogger(__name__)

FORMAT = 1  # raise it whenever the same parameters give other voxels
_MIN_VOXELS = 16
_MARKER = "phantom.json"

_TISSUES = ("csf", "grey", "white", "oedema", "necrosis", "solid", "rim", "lesion", "vessel")
# Mean of each tissue, relative to a case's scale, in the order of _TISSUES.
_CONTRAST = {
    "FLAIR": (0.16, 0.66, 0.55, 1.02, 0.60, 0.86, 0.92, 0.95, 0.40),
    "T1w": (0.22, 0.58, 0.78, 0.54, 0.36, 0.50, 0.56, 0.64, 0.50),
    "T1gd": (0.23, 0.58, 0.76, 0.54, 0.34, 0.56, 1.30, 0.62, 1.25),
    "T2w": (1.20, 0.66, 0.48, 0.98, 1.12, 0.84, 0.80, 0.86, 0.30),
}


def _blend(image: np.ndarray, value: float | np.ndarray, occupancy: np.ndarray) -> None:
    image += occupancy * (value - image)


def _modality(
    f: Field,
    name: str,
    anatomy: Anatomy,
    tumour: Tumour,
    bright: tuple[np.ndarray, np.ndarray],
    texture: np.ndarray,
    visible: float,
) -> np.ndarray:
    """One modality over the box, float32 in the scanner's units, 0 outside the brain."""
    mean = {t: m * f.rng.normal(1, 0.05) for t, m in zip(_TISSUES, _CONTRAST[name], strict=True)}
    image = np.full(f.shape, mean["white"], dtype=np.float32)
    _blend(image, mean["grey"], anatomy.grey)
    _blend(image, mean["csf"], anatomy.csf)
    _blend(image, mean["lesion"], bright[0])
    _blend(image, mean["vessel"], bright[1])
    fading = f.ramp(tumour.oedema - 0.5, 5.0) * np.float32(visible) * (1 + 1.5 * texture)
    _blend(image, mean["oedema"], np.clip(fading, 0, 1))
    _blend(image, mean["solid"], f.ramp(tumour.core, 2.0))
    _blend(image, mean["rim"], f.ramp(tumour.rim, 1.5) * np.float32(f.rng.uniform(0.65, 1.0)))
    _blend(image, mean["necrosis"], f.ramp(tumour.necrosis, 2.5))
    scale = f.rng.uniform(400, 1400)
    image *= np.exp(0.10 * f.smooth(110) + texture) * np.float32(scale)
    image += f.rng.standard_normal(f.shape, dtype=np.float32) * np.float32(scale * f.rng.uniform(0.02, 0.045))
    return np.where(anatomy.brain, np.clip(np.rint(image), 1, np.iinfo(np.int16).max), 0)


def _box(size: Sequence[int]) -> tuple[tuple[slice, slice, slice], list[np.ndarray]]:
    """The slices that can hold brain (skipping the rest saves most of the work), and their voxel centres in mm."""
    slices, axes = [], []
    for n, extent, centre, semi in zip(size, HEAD_MM, CENTRE_MM, (82.0, 98.0, 96.0), strict=True):
        mm = (np.arange(n, dtype=np.float32) + 0.5) * np.float32(extent / n)
        inside = np.flatnonzero(np.abs(mm - centre) < semi)
        slices.append(slice(int(inside[0]), int(inside[-1]) + 1))
        axes.append(mm[slices[-1]])
    return (slices[0], slices[1], slices[2]), axes


def draw_phantom(size: tuple[int, int, int], seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """One case; it depends on nothing but the arguments.

    Args:
        size: voxels (X, Y, Z), which always hold the whole head.
        seed: of the set.
        index: of the case in the set. One in ten has no enhancing tumour.

    Returns:
        image int16 (X, Y, Z, 4) with FLAIR, T1w, T1gd, T2w; label uint8 (X, Y, Z).
    """
    rng = np.random.default_rng((seed % 2**32, index))
    box, axes = _box(size)
    f = Field(rng, axes, float(np.mean([e / n for e, n in zip(HEAD_MM, size, strict=True)])))
    seat = head.draw_seat(rng)
    grid = np.meshgrid(*axes, indexing="ij", sparse=True)
    scale = rng.normal(1, 0.025, 3).tolist()
    p = [(g - c) / s + 3.0 * f.smooth(60) for g, c, s in zip(grid, CENTRE_MM, scale, strict=True)]
    away = sum((a - c) ** 2 for a, c in zip(p, seat.centre, strict=True))
    push = np.float32(0.30) * np.exp(-away / np.float32(2 * (1.3 * seat.core_mm) ** 2))
    anatomy = head.draw_anatomy(f, [a - push * (a - c) for a, c in zip(p, seat.centre, strict=True)])
    tumour = head.draw_tumour(f, p, seat, anatomy, enhances=(index + seed) % 10 != 9)
    bright = head.draw_distractors(f, p, anatomy)
    texture = 0.03 * f.smooth(5) + 0.03 * f.smooth(14)
    visible = rng.uniform(0.6, 1.0)
    image = np.zeros((*size, 4), dtype=np.int16, order="F")
    for channel, name in enumerate(_CONTRAST):
        image[(*box, channel)] = _modality(f, name, anatomy, tumour, bright, texture, visible)
    label = np.zeros(size, dtype=np.uint8, order="F")
    label[box] = tumour.label
    return image, label


def make_phantoms(
    folder: Path,
    cases: int = 10,
    size: tuple[int, int, int] = (240, 240, 155),
    seed: int = 0,
    spacing_mm: tuple[float, float, float] | None = None,
    workers: int | None = None,
) -> Path:
    """Write a set of phantoms as a Decathlon task; a finished set is left alone, an interrupted one is finished.

    Args:
        folder: the task folder, made if missing.
        cases: how many, named BRATS_001 and so on.
        size: voxels (X, Y, Z), at least 16 on each axis.
        seed: of the set. Case i of a seed is the same whatever `cases` is.
        spacing_mm: voxel size in the affine. None is 240 x 240 x 155 mm over `size`, so 1 mm at full size. Another
            value scales the head with it, so that it fills the field of view alike.
        workers: threads; None is one per core, at most 8 (a full-size case takes about 0.7 GB).

    Returns:
        folder.

    Raises:
        DataError: the folder holds other phantoms or other data; cases or size is too small.
    """
    folder = Path(folder)
    if cases < 1 or min(size) < _MIN_VOXELS:
        raise DataError(
            f"{cases} phantoms of {tuple(size)} voxels: needs at least 1 case, and {_MIN_VOXELS} on each axis"
        )
    spacing = tuple(float(s) for s in (spacing_mm or [mm / n for mm, n in zip(HEAD_MM, size, strict=True)]))
    parameters = {"format": FORMAT, "cases": cases, "size": list(size), "seed": seed, "spacing_mm": list(spacing)}
    _claim(folder, parameters)
    for each in (folder, *(path.parent for path in _paths(folder, ""))):
        remove_left_over(each)
    names = [f"BRATS_{i + 1:03d}" for i in range(cases)]
    missing = [i for i, name in enumerate(names) if not all(path.is_file() for path in _paths(folder, name))]
    if missing:
        threads = min(workers or cores(), 8, len(missing))
        with ThreadPoolExecutor(threads) as pool:  # NumPy and isal release the GIL
            jobs = pool.map(lambda i: _write_case(folder, names[i], size, spacing, seed, i), missing)
            log.info("synthetic cases: %s", folder)
            list(show_progress(jobs, "Making", len(missing), "synthetic case"))
    if not (folder / "dataset.json").is_file():
        write_text(folder / "dataset.json", json.dumps(_dataset_json(names), indent=2))
    return folder


def _claim(folder: Path, parameters: dict[str, object]) -> None:
    """Mark the folder with the parameters before its first file; refuse it if it holds anything else."""
    marker = folder / _MARKER
    if marker.is_file():
        present = json.loads(marker.read_text())
        if present != parameters:
            raise DataError(
                f"{folder} holds phantoms made with {present}, not with {parameters}: give another folder, or delete "
                "this one"
            )
        return
    if folder.exists() and not (folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())):
        raise DataError(f"{folder} is not empty and not a folder of phantoms (no {_MARKER}): give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(marker, json.dumps(parameters))


def _paths(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / "imagesTr" / f"{name}.nii.gz", folder / "labelsTr" / f"{name}.nii.gz"


def _write_case(
    folder: Path, name: str, size: tuple[int, int, int], spacing: Sequence[float], seed: int, index: int
) -> None:
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[1, 3] = (size[1] - 1) * spacing[1]  # the origin of BraTS: (0, 239, 0) at full size
    for path, array in zip(_paths(folder, name), draw_phantom(size, seed, index), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_nifti(path, array, affine)


def _dataset_json(names: Sequence[str]) -> dict[str, object]:
    """The fields of the real Task01, in its spelling."""
    return {
        "name": "BRATS",
        "description": "Synthetic gliomas: drawn, not scanned",
        "reference": "glioforge pipelines/phantom.py",
        "licence": "Apache-2.0",
        "release": "1.0",
        "tensorImageSize": "4D",
        "modality": {str(i): name for i, name in enumerate(_CONTRAST)},
        "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
        "numTraining": len(names),
        "numTest": 0,
        "training": [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names],
        "test": [],
    }
