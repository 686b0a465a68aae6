"""Resample to a spacing and orient to RAS: the affine mathematics of MONAI's Spacing, then Orientation("RAS").

The order is the tutorial's: resampling starts at the file's first voxel, so orienting first gives another grid (on an
LPS scan an origin of -239 instead of -238.5 mm, and a third of noisy labels different). Steps, as in MONAI 1.6.1:

1. Spaced grid. The affine's axes keep their directions and get the new lengths (any shear is removed), each but where
   its own is the new one by 1e-3 mm; its first voxel is the file's, its extent that of the voxel centres,
   n' = round((n - 1) s / s' + 1). If neither affine nor shape change (by 1e-3), nothing is resampled.
2. Sampling, "border" padding: linear for images, nearest for labels, at M @ index, M = inv(affine) @ spaced affine.
3. Orientation: flips and a permutation of the axes. They only move voxels, so here they are folded into the sampling.

MONAI's spacing follows the file's axes, whatever they are in the patient: a scan stored as PIR gets the R spacing along
P. A `Spacing` follows the patient's (R, A, S): a file whose axes are in another order is turned to LPS first, which
moves voxels alone, and so gives the very volume that it would give as LPS. Files with their axes in this order (LPS,
RAS, LAS, ...) are not turned and keep MONAI's grid.

Positions are computed as MONAI computes them, with its rounding: the affine normalised to [-1, 1] in float64, torch's
affine_grid, then grid_sample's own arithmetic. Exact positions would be worse, because the rounding decides two things:
which voxels the z-score counts (1e-14 off an integer leaves about 1e-11 in zero voxels beside the head, and its mask is
"not zero"), and which label a sample takes (from 1 to 1.5 mm three quarters lie halfway between voxels).

In BraTS files, whose axes run along those of the scanner, M is diagonal whatever the orientation, so sampling is
separable:

- An image is interpolated axis by axis (Z and Y slice by slice in cache, X after a transposition, a few slices at a
  time), with positions in float64, weights and sums in float32: within 2e-7 of the image's range of MONAI, and zero
  where MONAI's is.
- A label map takes index vectors, from grid_sample on a ramp of indices: no voxel differs.

Rotated axes leave off-diagonal elements in M, of 1e-16 and up, sheared ones larger ones. Even the smallest decide ties
of a label, and which voxels beside the head are zero: all is sampled by grid_sample on the full grid then, in float64,
as MONAI does it and as slowly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from torch.nn.functional import affine_grid, grid_sample

AFFINE_TOLERANCE = 1e-3  # MONAI's AFFINE_TOL: a change of the affine below it is none
_SLICES = 8  # interpolated at a time: 5 MB of rows, which malloc gives out again without page faults
_BLOCK = 16  # side of a transposition's blocks; 16 floats are a cache line: 189 ms where a plain copy takes 540


SpacingAxes = Literal["patient", "file"]


@dataclass(frozen=True)
class Spacing:
    """Voxel size of a prepared volume.

    Args:
        mm: along three axes.
        axes: "patient": R, A and S, each taken by the file's axis nearest to it, as nibabel's `io_orientation` has them
            (the file's axes closest to one of the patient's choose first; of two as near, the first). "file": the
            file's first, second and third, as in MONAI.

    Raises:
        ValueError: a size that is not positive.
    """

    mm: tuple[float, float, float] = (1.5, 1.5, 2.0)
    axes: SpacingAxes = "patient"

    def __post_init__(self) -> None:
        if len(self.mm) != 3 or not all(np.isfinite(s) and s > 0 for s in self.mm):
            raise ValueError(f"spacing_mm {tuple(self.mm)} must be three positive numbers of mm; 1.5 1.5 2.0 is usual")
        x, y, z = (float(s) for s in self.mm)
        object.__setattr__(self, "mm", (x, y, z))  # whether written 1 or 1.0, the same to a store's key

    def __str__(self) -> str:
        along = "R, A, S" if self.axes == "patient" else "the axes of the file"
        return f"{' x '.join(f'{s:g}' for s in self.mm)} mm along {along}"


USUAL = Spacing()


def patient_spacing(value: Spacing | Sequence[float]) -> Spacing:
    """A spacing as it is; of three numbers alone that along R, A and S. Raises ValueError as `Spacing`."""
    return value if isinstance(value, Spacing) else Spacing(tuple(value))  # type: ignore[arg-type]


def _file_spacing(value: Spacing | Sequence[float]) -> Spacing:
    return value if isinstance(value, Spacing) else Spacing(tuple(value), "file")  # type: ignore[arg-type]


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a prepared volume lie.

    Args:
        shape: (X, Y, Z) in RAS.
        affine: (4, 4) float64, voxel index to mm (RAS+).
        spaced_shape, spaced_affine: the same before orientation, axes as in the file, once it is turned.
        orientation: (3, 2), for each of these axes its axis in RAS, and -1 where it is flipped (nibabel's).
        turn: (3, 2), the same for the axes of the file in LPS; None: the file is not turned.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    spaced_shape: tuple[int, int, int]
    spaced_affine: np.ndarray
    orientation: np.ndarray
    turn: np.ndarray | None = None

    @property
    def permutation(self) -> tuple[int, int, int]:
        """For each RAS axis, the axis of the file as turned."""
        x, y, z = np.argsort(self.orientation[:, 0])
        return int(x), int(y), int(z)

    @property
    def flipped(self) -> tuple[int, ...]:
        """Axes of the file as turned that are flipped."""
        return tuple(int(axis) for axis in np.flatnonzero(self.orientation[:, 1] == -1))

    def to_source(self, affine: np.ndarray) -> np.ndarray:
        """(4, 4): voxel index of this grid to voxel index of a volume with that affine."""
        return np.linalg.inv(affine) @ self.affine

    def turned(self, volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A volume (X, Y, Z, ...) in file orientation and its affine, as they are resampled; the volume is a view."""
        turned_affine = _turned(volume.shape[:3], affine, self.turn)[1]
        return volume if self.turn is None else _oriented(volume, self.turn), turned_affine


def voxel_size_mm(affine: np.ndarray) -> list[float]:
    """Length of a voxel along the file's axes nearest to R, A and S; affine (4, 4) is the file's."""
    return np.linalg.norm(affine[:3, np.argsort(io_orientation(affine)[:, 0])], axis=0).tolist()


def target_grid(shape: Sequence[int], affine: np.ndarray, spacing: Spacing | Sequence[float]) -> Grid:
    """The grid of MONAI's `Spacing`, then `Orientation("RAS")`, of a file that is turned first where that is needed.

    Args:
        shape: (X, Y, Z) of the file.
        affine: (4, 4), voxel index to mm (RAS+), of the file.
        spacing: voxel size; three numbers are along the axes of the *file* (as in MONAI).

    Raises:
        ValueError: a spacing that is not positive.
    """
    spacing, affine = _file_spacing(spacing), np.asarray(affine, np.float64)
    axes = io_orientation(affine)
    is_turned = spacing.axes == "patient" and not np.array_equal(axes[:, 0], range(3))
    return _grid_of(shape, affine, spacing, ornt_transform(axes, axcodes2ornt("LPS")) if is_turned else None)


def _grid_of(shape: Sequence[int], affine: np.ndarray, spacing: Spacing, turn: np.ndarray | None) -> Grid:
    shape, affine = _turned(shape, affine, turn)
    own_mm = np.sqrt(np.sum(affine[:3, :3] ** 2, axis=0))
    wanted_mm = np.asarray(spacing.mm, np.float64)
    # A header's float32 has 2.5 mm rotated as 2.50000003: resampling by that would smear the head into its background.
    spaced_affine = _with_spacing(affine, np.where(np.abs(own_mm - wanted_mm) <= AFFINE_TOLERANCE, own_mm, wanted_mm))
    spaced_shape, spaced_affine[:3, 3] = _extent(shape, affine, spaced_affine)
    if _is_same_grid(shape, affine, spaced_shape, spaced_affine):
        spaced_affine = affine
    orientation = ornt_transform(io_orientation(spaced_affine), axcodes2ornt("RAS"))
    final_affine = spaced_affine @ inv_ornt_aff(orientation, spaced_shape)
    x, y, z = (spaced_shape[int(axis)] for axis in np.argsort(orientation[:, 0]))
    return Grid((x, y, z), final_affine, spaced_shape, spaced_affine, orientation, turn)


def _turned(
    shape: Sequence[int], affine: np.ndarray, turn: np.ndarray | None
) -> tuple[tuple[int, int, int], np.ndarray]:
    """Shape and affine of a file as it is resampled."""
    x, y, z = shape
    if turn is None:
        return (x, y, z), affine
    first, second, third = np.argsort(turn[:, 0])
    return (shape[first], shape[second], shape[third]), affine @ inv_ornt_aff(turn, shape)


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
    ends = [(0.0, n - 1.0) for n in size]
    corners = np.stack(np.meshgrid(*ends, indexing="ij")).reshape(3, -1)
    corners = np.concatenate([corners, np.ones_like(corners[:1])])
    corners_out = (np.linalg.solve(spaced_affine, affine) @ corners)[:3]
    x, y, z = (int(n) for n in np.round(np.ptp(corners_out, axis=1) + 1.0))
    corners_mm = (affine @ corners)[:3]
    for index in range(corners.shape[1]):
        lowest = np.min(corners_out - corners_out[:, index : index + 1], axis=1)
        if np.allclose(lowest, 0.0, rtol=AFFINE_TOLERANCE):
            return (x, y, z), corners_mm[:, index]
    # A sheared volume has no corner that is lowest on all axes: the centres are aligned.
    centre_mm = affine[:3, :3] @ (size / 2.0) + affine[:3, 3]
    return (x, y, z), centre_mm - spaced_affine[:3, :3] @ (np.array([x, y, z]) / 2.0)


def _is_same_grid(
    shape: Sequence[int], affine: np.ndarray, spaced_shape: Sequence[int], spaced_affine: np.ndarray
) -> bool:
    if tuple(shape) != tuple(spaced_shape):
        return False
    change = np.linalg.solve(affine, spaced_affine)
    return any(
        np.allclose(a, b, rtol=1e-5, atol=AFFINE_TOLERANCE) for a, b in ((affine, spaced_affine), (change, np.eye(4)))
    )


def resample_image(image_XYZC: np.ndarray, affine: np.ndarray, grid: Grid) -> np.ndarray:
    """Resample and orient an image, linearly; samples outside take the nearest border voxel.

    Args:
        image_XYZC: (X, Y, Z, C) in file orientation, any memory order (Fortran order needs no copy), numbers.
        affine: (4, 4), voxel index to mm, of the file.
        grid: from `target_grid` of this shape and affine.

    Returns:
        float32 (X', Y', Z', C) in RAS, C order.
    """
    weights = axis_weights(image_XYZC.shape[:3], affine, grid)
    image_XYZC, affine = grid.turned(np.asarray(image_XYZC, np.float32), affine)
    shape = image_XYZC.shape[:3]
    if _is_same_grid(shape, affine, grid.spaced_shape, grid.spaced_affine):
        return channels_last(_oriented(image_XYZC, grid.orientation))
    image_CZYX = np.ascontiguousarray(image_XYZC.transpose(3, 2, 1, 0))
    if weights is None:
        matrix = np.linalg.solve(affine, grid.spaced_affine)
        spaced_CXYZ = _sample_full(image_CZYX.transpose(0, 3, 2, 1), matrix, grid.spaced_shape, "bilinear")
        return np.ascontiguousarray(_oriented(spaced_CXYZ.transpose(1, 2, 3, 0), grid.orientation))
    spaced_XYZC = _interpolate(image_CZYX, weights)
    return np.ascontiguousarray(spaced_XYZC.transpose(*grid.permutation, 3))


def axis_weights(shape: Sequence[int], affine: np.ndarray, grid: Grid) -> list[Weights] | None:
    """The weights of `resample_image` along each axis of the file as turned; None where these are not independent.

    Args:
        shape: (X, Y, Z) of the file.
        affine: (4, 4), voxel index to mm, of the file.
        grid: from `target_grid` of this shape and affine.
    """
    shape, affine = _turned(shape, affine, grid.turn)
    sizes = zip(shape, grid.spaced_shape, (axis in grid.flipped for axis in range(3)), strict=True)
    if _is_same_grid(shape, affine, grid.spaced_shape, grid.spaced_affine):
        return [Weights.at(torch.arange(n, dtype=torch.float64), n, flipped) for n, _, flipped in sizes]
    matrix = np.linalg.solve(affine, grid.spaced_affine)
    if not _is_diagonal(matrix):
        return None
    positions = _axis_positions(matrix, shape, grid.spaced_shape)
    return [Weights.at(at, n, flipped) for at, (n, _, flipped) in zip(positions, sizes, strict=True)]


def _axis_positions(matrix: np.ndarray, shape: Sequence[int], shape_out: Sequence[int]) -> list[torch.Tensor]:
    """Where along each axis of the input the voxels of the output lie, float64, in grid_sample's own arithmetic.

    Args:
        matrix: (4, 4), index of the output to index of the input, diagonal but for the translation.
    """
    theta = _normalised(matrix, shape, shape_out)
    positions = []
    for axis, n in enumerate(shape):
        size_out_3d = [1, 1, 1]
        size_out_3d[axis] = shape_out[axis]
        points = affine_grid(theta[:, :3], [1, 1, *size_out_3d], align_corners=False)[..., 2 - axis].flatten()
        positions.append((((points + 1) * n - 1) / 2).clamp(0, n - 1))
    return positions


class BackToFile:
    """From a prepared grid to the file's own, linearly, as MONAI inverts Orientation and Spacing.

    Args:
        grid: from `target_grid` of this shape and affine.
        shape: (X, Y, Z) of the file.
        affine: (4, 4), voxel index to mm, of the file.
        device: where volumes are.

    Along independent axes it is a product with one matrix an axis, two numbers in a row. Else grid_sample on the full
    grid, in float64, as `resample_image`.
    """

    def __init__(
        self, grid: Grid, shape: Sequence[int], affine: np.ndarray, device: torch.device | str = "cpu"
    ) -> None:
        shape, affine = _turned(shape, affine, grid.turn)
        self.grid, self.shape = grid, shape
        self._matrix = np.linalg.solve(grid.spaced_affine, affine)
        self._is_same = _is_same_grid(shape, affine, grid.spaced_shape, grid.spaced_affine)
        self._along: list[torch.Tensor] = []
        if not self._is_same and _is_diagonal(self._matrix):
            positions = _axis_positions(self._matrix, grid.spaced_shape, shape)
            weights = (Weights.at(at, n, False) for at, n in zip(positions, grid.spaced_shape, strict=True))
            self._along = [each.matrix(n).to(device) for each, n in zip(weights, grid.spaced_shape, strict=True)]

    def __call__(self, volume_XYZ: torch.Tensor) -> torch.Tensor:
        """Float32 (X', Y', Z') on the prepared grid to float32 (X, Y, Z) of the file, on the same device."""
        volume_XYZ = self._to_turned(volume_XYZ)
        if self.grid.turn is None:
            return volume_XYZ
        flipped = np.flatnonzero(self.grid.turn[:, 1] == -1).tolist()
        return volume_XYZ.permute([int(axis) for axis in self.grid.turn[:, 0]]).flip(flipped).contiguous()

    def _to_turned(self, volume_XYZ: torch.Tensor) -> torch.Tensor:
        axes = [int(axis) for axis in self.grid.orientation[:, 0]]
        spaced = volume_XYZ.permute(axes).flip(self.grid.flipped)
        if self._is_same:
            return spaced.contiguous()
        if not self._along:
            sampled = _sample_full(spaced.cpu().numpy()[None], self._matrix, self.shape, "bilinear")[0]
            return torch.from_numpy(sampled).to(volume_XYZ.device)
        x, y, z = self._along
        spaced = (x @ spaced.reshape(len(spaced), -1)).view(len(x), *spaced.shape[1:])
        return y @ (spaced @ z.t())


@dataclass(frozen=True)
class Weights:
    """Linear interpolation along one axis: input[low] * low_weight + input[high] * high_weight.

    Positions carry the rounding of MONAI's normalised grid, 1e-14 off an integer here and there. It must stay: a zero
    voxel beside the head becomes 1e-11 by it, and z-scoring the non-zero voxels then counts it (6321 voxels, 1.9 %, of
    BraTS-GLI-00000-000). Two float32 weights keep it on both sides, one weight near 1 would lose it.
    """

    low: torch.Tensor
    high: torch.Tensor
    low_weight: torch.Tensor
    high_weight: torch.Tensor

    @staticmethod
    def at(position: torch.Tensor, size: int, flipped: bool) -> Weights:
        """The weights at float64 positions in 0 .. size - 1, taken from the last to the first where `flipped`."""
        position = position.flip(0) if flipped else position
        low = position.floor()
        weights = (low + 1 - position).float(), (position - low).float()
        return Weights(low.long(), (low.long() + 1).clamp(max=size - 1), *weights)

    def matrix(self, size: int) -> torch.Tensor:
        """The same as a float32 matrix (outputs, size)."""
        rows = torch.arange(len(self.low))
        matrix = torch.zeros(len(rows), size)
        matrix[rows, self.low] = self.low_weight
        matrix[rows, self.high] += self.high_weight
        return matrix


def _interpolate(image_CZYX: np.ndarray, weights: Sequence[Weights]) -> np.ndarray:
    """float32 (C, Z, Y, X) to C-ordered (X', Y', Z', C)."""
    x, y, z = weights
    channels, _, _, width = image_CZYX.shape
    source = torch.from_numpy(image_CZYX)
    slices = list(zip(*(part.tolist() for part in (z.low, z.high, z.low_weight, z.high_weight)), strict=True))
    out = torch.empty(len(x.low), len(y.low), len(z.low), channels)
    for first in range(0, len(slices), _SLICES):
        part = slices[first : first + _SLICES]
        rows_YZCX = torch.empty(len(y.low), len(part), channels, width)
        for k, (low, high, low_weight, high_weight) in enumerate(part):
            for c in range(channels):
                slab = source[c, low] if high_weight == 0 else source[c, low] * low_weight
                if high_weight != 0:
                    slab.add_(source[c, high], alpha=high_weight)
                torch.mul(slab.index_select(0, y.low), y.low_weight[:, None], out=rows_YZCX[:, k, c])
                rows_YZCX[:, k, c].addcmul_(slab.index_select(0, y.high), y.high_weight[:, None])
        columns = rows_YZCX.view(-1, width).t().contiguous()
        spaced = columns.index_select(0, x.low).mul_(x.low_weight[:, None])
        spaced.addcmul_(columns.index_select(0, x.high), x.high_weight[:, None])
        out[:, :, first : first + _SLICES] = spaced.view(len(x.low), len(y.low), len(part), channels)
    return out.numpy()


def channels_last(volume_XYZC: np.ndarray) -> np.ndarray:
    """A C-ordered copy of a Fortran-ordered (X, Y, Z, C) array, block by block."""
    out = np.empty(volume_XYZC.shape, volume_XYZC.dtype)
    for x in range(0, out.shape[0], _BLOCK):
        for y in range(0, out.shape[1], _BLOCK):
            block = np.s_[x : x + _BLOCK, y : y + _BLOCK]
            out[block] = volume_XYZC[block]
    return out


def resample_label(label_XYZ: np.ndarray, affine: np.ndarray, grid: Grid) -> np.ndarray:
    """Resample and orient a label map, by MONAI's nearest neighbour: no voxel differs from it.

    Args:
        label_XYZ: uint8 (X, Y, Z) in file orientation, any memory order.
        affine: (4, 4), voxel index to mm, of the label's own file.
        grid: from `target_grid` of this shape and affine: ties are decided by its last bit.

    Returns:
        uint8 (X', Y', Z') in RAS, C order.
    """
    label_XYZ, affine = grid.turned(label_XYZ, affine)
    shape = label_XYZ.shape
    if _is_same_grid(shape, affine, grid.spaced_shape, grid.spaced_affine):
        return np.ascontiguousarray(_oriented(label_XYZ, grid.orientation))
    matrix = np.linalg.solve(affine, grid.spaced_affine)
    if not _is_diagonal(matrix):
        spaced = _sample_full(label_XYZ[None], matrix, grid.spaced_shape, "nearest")[0]
        return np.ascontiguousarray(_oriented(spaced, grid.orientation).astype(np.uint8))
    theta = _normalised(matrix, shape, grid.spaced_shape)
    indices = [_nearest_indices(theta, axis, shape[axis], grid.spaced_shape[axis]) for axis in range(3)]
    for axis in grid.flipped:
        indices[axis] = indices[axis][::-1]
    return np.ascontiguousarray(label_XYZ[np.ix_(*indices)].transpose(grid.permutation))


def label_grid(grid: Grid, shape: Sequence[int], label_affine: np.ndarray, spacing: Spacing | Sequence[float]) -> Grid:
    """The grid for a label beside an image on `grid`: its own affine, which decides its ties, and the image's shape.

    MONAI too resamples each by its own affine; the two may differ by rounding.
    """
    own = _grid_of(shape, np.asarray(label_affine, np.float64), _file_spacing(spacing), grid.turn)
    return replace(own, shape=grid.shape, spaced_shape=grid.spaced_shape)


def _oriented(volume: np.ndarray, orientation: np.ndarray) -> np.ndarray:
    """Flip and permute the first three axes, as nibabel's `apply_orientation`; a view."""
    # An axis of one voxel is as it was; np.flip would leave it a negative stride, which torch refuses.
    flipped = tuple(int(axis) for axis in np.flatnonzero(orientation[:, 1] == -1) if volume.shape[axis] > 1)
    return np.flip(volume, flipped).transpose(*np.argsort(orientation[:, 0]), *range(3, volume.ndim))


def _normalised(matrix: np.ndarray, shape: Sequence[int], shape_out: Sequence[int]) -> torch.Tensor:
    """(1, 4, 4) float64: `matrix` between coordinates in [-1, 1], axes in reverse order (MONAI's `AffineTransform`)."""

    def normalising(size: Sequence[int]) -> torch.Tensor:
        n = torch.tensor(tuple(size), dtype=torch.float64)
        out = torch.diag(torch.cat([2.0 / n, torch.ones(1, dtype=torch.float64)]))
        out[:3, 3] = 1.0 / n - 1.0
        return out[None]

    inverse = torch.from_numpy(np.linalg.inv(normalising(shape_out).numpy()))
    theta = normalising(shape) @ torch.from_numpy(matrix)[None] @ inverse
    theta[:, :3] = theta[:, [2, 1, 0]]
    theta[:, :, :3] = theta[:, :, [2, 1, 0]]
    return theta


def _nearest_indices(theta: torch.Tensor, axis: int, size: int, size_out: int) -> np.ndarray:
    """The voxel that each output voxel takes along one axis, by torch's own arithmetic: a ramp is sampled."""
    size_in_3d, size_out_3d = [1, 1, 1], [1, 1, 1]
    size_in_3d[axis], size_out_3d[axis] = size, size_out
    grid = affine_grid(theta[:, :3], [1, 1, *size_out_3d], align_corners=False)
    ramp = torch.arange(size, dtype=torch.float64).reshape(1, 1, *size_in_3d)
    taken = grid_sample(ramp, grid, mode="nearest", padding_mode="border", align_corners=False)
    return taken.flatten().to(torch.int64).numpy()


def _is_diagonal(matrix: np.ndarray) -> bool:
    return not np.count_nonzero(matrix[:3, :3] - np.diag(np.diag(matrix)[:3]))


def _sample_full(volume_CXYZ: np.ndarray, matrix: np.ndarray, shape_out: Sequence[int], mode: str) -> np.ndarray:
    """Sample every voxel at matrix @ index, in float64: float32 (C, *shape_out)."""
    theta = _normalised(matrix, volume_CXYZ.shape[1:], shape_out)
    points = affine_grid(theta[:, :3], [1, 1, *shape_out], align_corners=False)
    out = np.empty((len(volume_CXYZ), *shape_out), np.float32)
    for channel, result in zip(volume_CXYZ, out, strict=True):
        exact = torch.from_numpy(channel.astype(np.float64))[None, None]
        result[...] = grid_sample(exact, points, mode=mode, padding_mode="border", align_corners=False)[0, 0].numpy()
    return out
