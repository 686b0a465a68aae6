"""The grid of a prepared volume: the affine mathematics of MONAI's Spacing, then Orientation("RAS").

The order is the tutorial's: resampling starts at the file's first voxel, so orienting first gives another grid (on an
LPS scan an origin of -239 instead of -238.5 mm, and a third of noisy labels different). Steps, as in MONAI 1.6.1:

1. Spaced grid. The affine's axes keep their directions and get the new lengths (any shear is removed), except an axis
   whose own length is within 1e-3 mm of the new one. Its first voxel is the file's, and it spans the voxel centres:
   n' = round((n - 1) s / s' + 1). If neither affine nor shape change (by 1e-3), nothing is resampled.
2. Sampling (`pipelines.scans.resample`) at M @ index, M = inv(affine) @ spaced affine.
3. Orientation: flips and a permutation of the axes. They only move voxels, so here they are part of the sampling.

MONAI's spacing follows the file's axes, whatever they are in the patient: a scan stored as PIR gets the R spacing along
P. A `Spacing` follows the patient's (R, A, S). A file whose axes are in another order is first turned to LPS, which
only moves voxels, and so gives the very volume that it would give as LPS. Files with their axes in this order (LPS,
RAS, LAS, ...) are not turned and keep MONAI's grid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from pipelines.basics.lazy import Lazy

ornt = Lazy("nibabel.orientations")

SpacingAxes = Literal["patient", "file"]
AFFINE_TOLERANCE = 1e-3  # MONAI's AFFINE_TOL: a smaller change of the affine counts as none


@dataclass(frozen=True)
class Spacing:
    """Voxel size of a prepared volume.

    Args:
        mm: along three axes.
        axes: "patient": R, A and S, each assigned to the file's axis nearest to it by nibabel's `io_orientation` (the
            axis closest to one of the patient's chooses first; of two equally close, the first). "file": the file's
            first, second and third, as in MONAI.

    Raises:
        ValueError: a size that is not positive.
    """

    mm: tuple[float, float, float] = (1.5, 1.5, 2.0)
    axes: SpacingAxes = "patient"

    def __post_init__(self) -> None:
        if len(self.mm) != 3 or not all(math.isfinite(s) and s > 0 for s in self.mm):
            raise ValueError(f"spacing_mm {tuple(self.mm)} must be three positive numbers of mm; 1.5 1.5 2.0 is usual")
        x, y, z = (float(s) for s in self.mm)
        object.__setattr__(self, "mm", (x, y, z))  # 1 and 1.0 give a store the same key

    def __str__(self) -> str:
        along = "R, A, S" if self.axes == "patient" else "the axes of the file"
        return f"{' x '.join(f'{s:g}' for s in self.mm)} mm along {along}"


DEFAULT_SPACING = Spacing()


def as_spacing(value: Spacing | Sequence[float], axes: SpacingAxes = "patient") -> Spacing:
    """A spacing as it is, or one of three numbers along `axes`. Raises ValueError as `Spacing`."""
    return value if isinstance(value, Spacing) else Spacing(tuple(value), axes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a prepared volume lie."""

    shape: tuple[int, int, int]  # (X, Y, Z) in RAS
    affine: np.ndarray  # (4, 4) float64, voxel index to mm (RAS+)
    spaced_shape: tuple[int, int, int]  # before orientation: axes as in the file once it is turned
    spaced_affine: np.ndarray
    orientation: np.ndarray  # (3, 2), for each of these axes its axis in RAS, and -1 where it is flipped (nibabel's)
    turn: np.ndarray | None = None  # (3, 2), likewise from the axes of the file to LPS; None: the file is not turned

    @property
    def permutation(self) -> tuple[int, int, int]:
        """For each RAS axis, the axis of the file as turned."""
        x, y, z = np.argsort(self.orientation[:, 0]).tolist()
        return x, y, z

    @property
    def flipped(self) -> tuple[int, ...]:
        """Axes of the file as turned that are flipped."""
        return tuple(np.flatnonzero(self.orientation[:, 1] == -1).tolist())

    def to_source(self, affine: np.ndarray) -> np.ndarray:
        """(4, 4): voxel index of this grid to voxel index of a volume with that affine."""
        return np.linalg.inv(affine) @ self.affine

    def is_spaced(self, shape: Sequence[int], affine: np.ndarray) -> bool:
        """Whether a file, as turned, has the voxels of this grid already, so that nothing is resampled."""
        return _is_same_grid(shape, affine, self.spaced_shape, self.spaced_affine)

    def turned(self, volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A volume (X, Y, Z, ...) in file orientation and its affine, as they are resampled; the volume is a view."""
        turned_affine = turned_grid(volume.shape[:3], affine, self.turn)[1]
        return volume if self.turn is None else oriented(volume, self.turn), turned_affine


def voxel_size_mm(affine: np.ndarray) -> list[float]:
    """Length of a voxel along the file's axes nearest to R, A and S; affine (4, 4) is the file's."""
    return np.linalg.norm(affine[:3, np.argsort(ornt.io_orientation(affine)[:, 0])], axis=0).tolist()


def target_grid(shape: Sequence[int], affine: np.ndarray, spacing: Spacing | Sequence[float]) -> Grid:
    """The grid of MONAI's `Spacing`, then `Orientation("RAS")`, for a file that is turned first where needed.

    Args:
        shape: (X, Y, Z) of the file.
        affine: (4, 4), voxel index to mm (RAS+), of the file.
        spacing: voxel size; three numbers are along the axes of the *file* (as in MONAI).

    Raises:
        ValueError: a spacing that is not positive.
    """
    spacing, affine = as_spacing(spacing, "file"), np.asarray(affine, np.float64)
    axes = ornt.io_orientation(affine)
    is_turned = spacing.axes == "patient" and not np.array_equal(axes[:, 0], range(3))
    return _grid_of(shape, affine, spacing, ornt.ornt_transform(axes, ornt.axcodes2ornt("LPS")) if is_turned else None)


def _grid_of(shape: Sequence[int], affine: np.ndarray, spacing: Spacing, turn: np.ndarray | None) -> Grid:
    shape, affine = turned_grid(shape, affine, turn)
    own_mm = np.sqrt(np.sum(affine[:3, :3] ** 2, axis=0))
    wanted_mm = np.asarray(spacing.mm, np.float64)
    # float32 in a header turns a rotated 2.5 mm into 2.50000003: resampling by it would smear head into background.
    spaced_affine = _with_spacing(affine, np.where(np.abs(own_mm - wanted_mm) <= AFFINE_TOLERANCE, own_mm, wanted_mm))
    spaced_shape, spaced_affine[:3, 3] = _extent(shape, affine, spaced_affine)
    if _is_same_grid(shape, affine, spaced_shape, spaced_affine):
        spaced_affine = affine
    orientation = ornt.ornt_transform(ornt.io_orientation(spaced_affine), ornt.axcodes2ornt("RAS"))
    return Grid(*turned_grid(spaced_shape, spaced_affine, orientation), spaced_shape, spaced_affine, orientation, turn)


def turned_grid(
    shape: Sequence[int], affine: np.ndarray, turn: np.ndarray | None
) -> tuple[tuple[int, int, int], np.ndarray]:
    """Shape and affine of a volume after a turn (nibabel's orientation); None: it is not turned."""
    x, y, z = shape if turn is None else (shape[axis] for axis in np.argsort(turn[:, 0]))
    return (x, y, z), affine if turn is None else affine @ ornt.inv_ornt_aff(turn, shape)


def _with_spacing(affine: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """The affine with columns of these lengths, without shear and translation (MONAI's `zoom_affine`)."""
    axes = affine[:3, :3]
    stretch = np.linalg.cholesky(axes.T @ axes).T
    rotation = axes @ np.linalg.inv(stretch)
    spaced = np.eye(4)
    spaced[:3, :3] = rotation @ np.diag(np.sign(np.diag(stretch)) * spacing)
    return spaced


def _extent(
    shape: Sequence[int], affine: np.ndarray, spaced_affine: np.ndarray
) -> tuple[tuple[int, int, int], np.ndarray]:
    """Shape that covers the voxel centres, and position in mm of its first voxel (MONAI's `compute_shape_offset`)."""
    size = np.array(shape, dtype=float)
    corners = np.array(list(zip(*itertools.product(*((0.0, n - 1.0) for n in size), (1.0,)), strict=True)))
    corners_out = (np.linalg.solve(spaced_affine, affine) @ corners)[:3]
    x, y, z = (int(n) for n in np.round(np.ptp(corners_out, axis=1) + 1.0))
    for corner_out, corner_mm in zip(corners_out.T, (affine @ corners)[:3].T, strict=True):
        if np.allclose(corners_out.min(axis=1) - corner_out, 0.0, rtol=AFFINE_TOLERANCE):
            return (x, y, z), corner_mm
    # A sheared volume has no corner that is lowest on all axes: the centres are aligned.
    centre_mm = affine[:3, :3] @ (size / 2.0) + affine[:3, 3]
    return (x, y, z), centre_mm - spaced_affine[:3, :3] @ (np.array([x, y, z]) / 2.0)


def _is_same_grid(
    shape: Sequence[int], affine: np.ndarray, spaced_shape: Sequence[int], spaced_affine: np.ndarray
) -> bool:
    if tuple(shape) != tuple(spaced_shape):
        return False
    pairs = (affine, spaced_affine), (np.linalg.solve(affine, spaced_affine), np.eye(4))
    return any(np.allclose(a, b, rtol=1e-5, atol=AFFINE_TOLERANCE) for a, b in pairs)


def label_grid(grid: Grid, shape: Sequence[int], label_affine: np.ndarray, spacing: Spacing | Sequence[float]) -> Grid:
    """The grid of a label beside an image on `grid`: its own affine, which decides its ties, and the image's shape.

    MONAI too resamples each by its own affine; the two may differ by rounding.
    """
    own = _grid_of(shape, np.asarray(label_affine, np.float64), as_spacing(spacing, "file"), grid.turn)
    return replace(own, shape=grid.shape, spaced_shape=grid.spaced_shape)


def oriented(volume: np.ndarray, orientation: np.ndarray) -> np.ndarray:
    """Flip and permute the first three axes, as nibabel's `apply_orientation`; a view."""
    # An axis of one voxel needs no flip; np.flip would give it a negative stride, which torch refuses.
    flipped = [axis for axis in np.flatnonzero(orientation[:, 1] == -1).tolist() if volume.shape[axis] > 1]
    return np.flip(volume, tuple(flipped)).transpose(*np.argsort(orientation[:, 0]), *range(3, volume.ndim))
