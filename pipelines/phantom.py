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
4. Intensities by tissue and modality, drawn anew for each case; texture, bias field, noise; background exactly 0.

What makes it more than thresholding: contrasts vary between cases, oedema fades out at its border, FLAIR and T2 also
show white-matter lesions and caps on the ventricles, T1c also vessels and choroid plexus, and T2 all CSF.

Labels are Decathlon's: 1 oedema, 2 non-enhancing core (with necrosis), 3 enhancing rim.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip
from rich.console import Console
from rich.progress import track

from pipelines.cases import DataError

log = logging.getLogger(__name__)

FORMAT = 1  # raise it whenever the same parameters give other voxels
HEAD_MM = (240.0, 240.0, 155.0)
_CENTRE_MM = (119.5, 124.0, 76.0)
_SEMI_AXES_MM = (64.0, 83.0, 71.0)
_MIN_VOXELS = 16
_GZIP_LEVEL = 1
_MARKER = "phantom.json"

_TISSUES = ("csf", "grey", "white", "oedema", "necrosis", "solid", "rim", "lesion", "vessel")
# Mean of each tissue, relative to a case's scale, in the order of _TISSUES.
_CONTRAST = {
    "FLAIR": (0.16, 0.66, 0.55, 1.02, 0.60, 0.86, 0.92, 0.95, 0.40),
    "T1w": (0.22, 0.58, 0.78, 0.54, 0.36, 0.50, 0.56, 0.64, 0.50),
    "T1gd": (0.23, 0.58, 0.76, 0.54, 0.34, 0.56, 1.30, 0.62, 1.25),
    "T2w": (1.20, 0.66, 0.48, 0.98, 1.12, 0.84, 0.80, 0.86, 0.30),
}


@dataclass
class _Field:
    """Smooth random fields on a box of the head's grid.

    `axes` are the voxel centres in mm along x, y, z; `voxel_mm` is the mean voxel edge, the least width of a ramp.
    """

    rng: np.random.Generator
    axes: tuple[np.ndarray, np.ndarray, np.ndarray]
    voxel_mm: float
    shape: tuple[int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.shape = (len(self.axes[0]), len(self.axes[1]), len(self.axes[2]))

    def smooth(self, cell_mm: float) -> np.ndarray:
        """A field of mean 0 and deviation about 1 that varies over cell_mm: B-splines, applied one axis at a time."""
        weights = [_bspline_matrix(axis, extent, cell_mm) for axis, extent in zip(self.axes, HEAD_MM, strict=True)]
        grid = self.rng.standard_normal([w.shape[1] for w in weights], dtype=np.float32)
        for weight in weights:  # contract the first axis and put the new one last: x, y, z are in order after three
            grid = np.tensordot(grid, weight, axes=(0, 1))
        return grid / np.float32(0.47930**1.5)  # 151/315, the mean sum of squared cubic B-spline weights, per axis

    def ramp(self, depth_mm: np.ndarray, width_mm: float = 0.0) -> np.ndarray:
        """Occupancy from 0 to 1 by the signed depth inside a surface, over a width of at least a voxel."""
        return np.clip(depth_mm * np.float32(1 / max(width_mm, self.voxel_mm)) + np.float32(0.5), 0, 1)


def _bspline_matrix(axis_mm: np.ndarray, extent_mm: float, cell_mm: float) -> np.ndarray:
    """Cubic B-spline weights (len(axis), nodes) float32 of nodes cell_mm apart."""
    position = axis_mm / cell_mm + 1
    distance = np.abs(position[:, None] - np.arange(int(np.ceil(extent_mm / cell_mm)) + 3))
    inner = 2 / 3 - distance**2 + distance**3 / 2
    outer = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, inner, outer).astype(np.float32)


def _ellipsoid(p: Sequence[np.ndarray], centre: Sequence[float], semi_axes: Sequence[float]) -> np.ndarray:
    """Depth in mm, about, inside an ellipsoid: positive inside."""
    square = sum(((a - c) / s) ** 2 for a, c, s in zip(p, centre, semi_axes, strict=True))
    return (1 - np.sqrt(square)) * np.float32(min(semi_axes))


@dataclass
class _Anatomy:
    """Occupancies from 0 to 1 over the box, and what the tumour needs to know.

    Args:
        brain: bool mask.
        csf, grey: occupancies; white matter is the rest of the brain.
        ventricle, surface: depth in mm inside the ventricles, and below the brain's surface.
        pial: distance in mm to the nearest surface, sulci included.
        choroid: occupancy of the choroid plexus.
    """

    brain: np.ndarray
    csf: np.ndarray
    grey: np.ndarray
    ventricle: np.ndarray
    surface: np.ndarray
    pial: np.ndarray
    choroid: np.ndarray


def _anatomy(f: _Field, p: Sequence[np.ndarray]) -> _Anatomy:
    """The healthy brain at coordinates p (x to the left, y to the back, z up; mm from the centre)."""
    x, y, z = p
    a, b, c = _SEMI_AXES_MM
    wide = a * (1 + 0.07 * np.clip(y / b, -1, 1))  # brains are wider at the back, flat below
    height = np.where(z > 0, np.float32(c), np.float32(0.80 * c))
    radius = np.sqrt((x / wide) ** 2 + (y / b) ** 2 + (z / height) ** 2)
    cerebrum = (1 - radius) * np.float32(75) + 1.5 * f.smooth(16)
    cerebellum = _ellipsoid((np.abs(x), y, z), (20, 45, -42), (32, 30, 24))
    stem = _ellipsoid(p, (0, 18, -58), (13, 13, 34))
    surface = np.maximum(np.maximum(cerebrum, cerebellum), stem)

    sheet = np.abs(f.smooth(12)) * np.float32(7.5)  # mm, about, to a sulcus
    sulcus = np.minimum(sheet, np.abs(f.smooth(9)) * np.float32(5.5) + 1) + 0.4 * np.clip(surface - 15, 0, None)
    fissure = np.abs(x) + 0.6 * np.clip(44 - np.hypot(y, z + 6), 0, None)  # the callosum joins the hemispheres
    pial = np.minimum(np.minimum(surface, sulcus), fissure)

    side = np.abs(x)
    spread = f.rng.uniform(0.75, 1.3)
    bend = 0.0045 * (y - 4) ** 2
    horn = _ellipsoid((side - 10 - 0.8 * bend, y - 4, z - 9 + 0.6 * bend), (0, 0, 0), (6.5 * spread, 38, 11 * spread))
    third = _ellipsoid(p, (0, 8, -8), (2.2 * spread, 14, 11))
    ventricle = np.maximum(horn + 0.5 * f.smooth(14), third)
    nuclei = np.maximum(
        _ellipsoid((side, y, z), (12, 12, -4), (9, 14, 9)), _ellipsoid((side, y, z), (26, -4, -4), (6, 18, 10))
    )
    csf = np.maximum(f.ramp(0.6 - pial), f.ramp(ventricle))
    cortex = f.ramp(3.3 + 0.5 * f.smooth(10) - pial, 1.2)
    grey = np.maximum(cortex, 0.75 * f.ramp(nuclei, 2.0)) * (1 - csf)
    choroid = f.ramp(_ellipsoid((side, y, z), (16, 24, 4), (3, 6, 3)) + 0.8 * f.smooth(6)) * f.ramp(ventricle)
    return _Anatomy(surface > 0, csf, grey, ventricle, surface, pial, choroid)


@dataclass
class _Tumour:
    """Depths in mm of the nested tumour, positive inside, and its label map."""

    oedema: np.ndarray
    core: np.ndarray
    rim: np.ndarray
    necrosis: np.ndarray
    label: np.ndarray


@dataclass(frozen=True)
class _Seat:
    """Where a tumour sits: centre in mm from the head's centre, radii in mm of the core and of the whole."""

    centre: list[float]
    core_mm: float
    whole_mm: float
    stretch: list[float]


def _seat(rng: np.random.Generator) -> _Seat:
    """A random seat, in a hemisphere's white matter or near its cortex."""
    side = 1 if rng.random() < 0.5 else -1
    centre = np.array([side * rng.uniform(20, 44), rng.uniform(-50, 46), rng.uniform(-18, 38)])
    reach = np.sqrt(np.sum((centre / _SEMI_AXES_MM) ** 2))
    centre *= min(1.0, 0.72 / reach)
    core = rng.uniform(11, 22)
    stretch = np.exp(rng.uniform(-0.2, 0.2, 3))
    return _Seat(centre.tolist(), core, core * rng.uniform(1.35, 1.9), stretch.tolist())


def _tumour(f: _Field, p: Sequence[np.ndarray], seat: _Seat, anatomy: _Anatomy, enhances: bool) -> _Tumour:
    """The tumour at coordinates p, in the brain and out of the ventricles."""
    distance = np.sqrt(sum(((a - c) / s) ** 2 for a, c, s in zip(p, seat.centre, seat.stretch, strict=True)))
    rough = f.smooth(18) * np.float32(0.28) + f.smooth(8) * np.float32(0.09)
    room = np.minimum(anatomy.surface - 2, 1.5 - anatomy.ventricle)
    core = seat.core_mm * (1 + rough) - distance
    margin = np.minimum(core + 2.5, room)  # oedema all around, but at the surface and the ventricles
    core = np.minimum(core, room)
    fingers = f.smooth(24) * np.float32(0.24) + f.smooth(9) * np.float32(0.10)
    oedema = seat.whole_mm * (1 + fingers) - distance - np.float32(0.14 * seat.whole_mm) * anatomy.grey
    oedema = np.maximum(np.minimum(oedema, room - 1.5 * anatomy.csf), margin)
    shell = np.float32(f.rng.uniform(3, 6.5)) * (1 + 0.6 * f.smooth(11))
    rim = np.minimum(core, shell - core) if enhances else np.full_like(core, -1e3)
    necrosis = core - np.maximum(shell, 2) - f.rng.uniform(0, 3) - np.clip(2 * f.smooth(12), -1, 3)
    label = (oedema > 0).astype(np.uint8)
    label[core > 0] = 2
    label[(core > 0) & (rim > 0)] = 3
    label[~anatomy.brain] = 0
    return _Tumour(oedema, core, rim, necrosis, label)


def _distractors(f: _Field, p: Sequence[np.ndarray], anatomy: _Anatomy) -> tuple[np.ndarray, np.ndarray]:
    """Occupancies of what is bright and no tumour: white-matter lesions with ventricular caps, and vessels."""
    spots = np.full(f.shape, -1e3, dtype=np.float32)
    for _ in range(f.rng.integers(2, 9)):
        side = 1 if f.rng.random() < 0.5 else -1
        centre = (side * f.rng.uniform(16, 42), f.rng.uniform(-48, 52), f.rng.uniform(-8, 40))
        spots = np.maximum(spots, _ellipsoid(p, centre, f.rng.uniform(2.0, 6.5, 3).tolist()))
    caps = f.rng.uniform(-2, 0.5) + anatomy.ventricle + 1.5 * np.clip(f.smooth(15), -2, 2)
    lesion = np.maximum(f.ramp(spots, 2.0), f.ramp(np.minimum(caps, 6.0), 3.0)) * (1 - anatomy.grey - anatomy.csf)
    first, second = f.smooth(26), f.smooth(26)
    tube = 1.4 - np.hypot(first, second) * np.float32(16)  # two fields are both zero along curves
    sinus = 2.6 - np.hypot(p[0], anatomy.surface - 2.5) + np.clip(0.2 * p[2], None, 0)
    vessel = np.maximum(f.ramp(np.minimum(tube, 8 - anatomy.pial)), f.ramp(sinus))
    return lesion, np.maximum(vessel, anatomy.choroid)


def _blend(image: np.ndarray, value: float | np.ndarray, occupancy: np.ndarray) -> None:
    image += occupancy * (value - image)


def _modality(
    f: _Field,
    name: str,
    anatomy: _Anatomy,
    tumour: _Tumour,
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
    """The slices that can hold brain (the rest is zero, and most of the work saved), and their voxel centres in mm."""
    slices, axes = [], []
    for n, extent, centre, semi in zip(size, HEAD_MM, _CENTRE_MM, (82.0, 98.0, 96.0), strict=True):
        mm = (np.arange(n, dtype=np.float32) + 0.5) * np.float32(extent / n)
        inside = np.flatnonzero(np.abs(mm - centre) < semi)
        slices.append(slice(int(inside[0]), int(inside[-1]) + 1))
        axes.append(mm[slices[-1]])
    return (slices[0], slices[1], slices[2]), axes


def draw_phantom(size: tuple[int, int, int], seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """One case: a function of its arguments alone.

    Args:
        size: voxels (X, Y, Z); the whole head is always in them.
        seed: of the set.
        index: of the case in the set. One in every ten has no enhancing tumour.

    Returns:
        image int16 (X, Y, Z, 4) with FLAIR, T1w, T1gd, T2w; label uint8 (X, Y, Z).
    """
    rng = np.random.default_rng((seed % 2**32, index))
    box, axes = _box(size)
    f = _Field(rng, (axes[0], axes[1], axes[2]), float(np.mean([e / n for e, n in zip(HEAD_MM, size, strict=True)])))
    seat = _seat(rng)
    grid = np.meshgrid(*axes, indexing="ij", sparse=True)
    scale = rng.normal(1, 0.025, 3).tolist()
    p = [(g - c) / s + 3.0 * f.smooth(60) for g, c, s in zip(grid, _CENTRE_MM, scale, strict=True)]
    away = sum((a - c) ** 2 for a, c in zip(p, seat.centre, strict=True))
    push = np.float32(0.30) * np.exp(-away / np.float32(2 * (1.3 * seat.core_mm) ** 2))
    anatomy = _anatomy(f, [a - push * (a - c) for a, c in zip(p, seat.centre, strict=True)])
    tumour = _tumour(f, p, seat, anatomy, enhances=(index + seed) % 10 != 9)
    bright = _distractors(f, p, anatomy)
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
    """Write a set of phantoms as a Decathlon task; do nothing where it is there, finish it where it was interrupted.

    Args:
        folder: the task folder, made where it is not there.
        cases: how many, named BRATS_001 and on.
        size: voxels (X, Y, Z), at least 16 on each axis.
        seed: of the set. Case i of a seed is the same whatever `cases` is.
        spacing_mm: voxel size to state in the affine. None is the head's 240 x 240 x 155 mm over `size`, so 1 mm at
            full size. Another value scales the head with it: it always fills the field of view alike.
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
    names = [f"BRATS_{i + 1:03d}" for i in range(cases)]
    missing = [i for i, name in enumerate(names) if not all(path.is_file() for path in _paths(folder, name))]
    if missing:
        threads = min(workers or len(os.sched_getaffinity(0)), 8, len(missing))
        with ThreadPoolExecutor(threads) as pool:  # NumPy and isal let go of the GIL
            jobs = pool.map(lambda i: _write_case(folder, names[i], size, spacing, seed, i), missing)
            console = Console(stderr=True)
            if not console.is_terminal:
                log.info("making %d synthetic cases: %s", len(missing), folder)
            hidden = not console.is_terminal
            for _ in track(jobs, "Synthetic cases", total=len(missing), console=console, disable=hidden):
                pass
    if not (folder / "dataset.json").is_file():
        _write_atomic(folder / "dataset.json", json.dumps(_dataset_json(names), indent=2).encode())
    return folder


def _claim(folder: Path, parameters: dict[str, object]) -> None:
    """Mark the folder with the parameters before its first file; refuse it where it holds anything else."""
    marker = folder / _MARKER
    if marker.is_file():
        present = json.loads(marker.read_text())
        if present != parameters:
            raise DataError(
                f"{folder} holds phantoms made with {present}, and {parameters} are asked for: give another folder, "
                "or delete this one"
            )
        return
    if folder.exists() and not (folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())):
        raise DataError(f"{folder} is not empty and no folder of phantoms (no {_MARKER} in it): give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    _write_atomic(marker, json.dumps(parameters).encode())


def _paths(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / "imagesTr" / f"{name}.nii.gz", folder / "labelsTr" / f"{name}.nii.gz"


def _write_case(
    folder: Path, name: str, size: tuple[int, int, int], spacing: Sequence[float], seed: int, index: int
) -> None:
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[1, 3] = (size[1] - 1) * spacing[1]  # the origin of BraTS: (0, 239, 0) at full size
    for path, array in zip(_paths(folder, name), draw_phantom(size, seed, index), strict=True):
        image = nib.Nifti1Image(array, affine)
        image.header.set_xyzt_units("mm")
        image.set_sform(affine, code=1)
        image.set_qform(affine, code=1)
        _write_atomic(path, igzip.compress(image.to_bytes(), _GZIP_LEVEL, mtime=0))


def _write_atomic(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    partial.write_bytes(data)
    os.replace(partial, path)


def _dataset_json(names: Sequence[str]) -> dict[str, object]:
    """The fields of the real Task01, and their spelling."""
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
