"""Sample a scan on the grid of `geometry`, with MONAI's rounding; and bring predictions back to the file.

Linear for images, nearest for labels, with "border" padding, at M @ index, M = inv(affine) @ spaced affine.

Positions are computed with MONAI's rounding: the affine normalised to [-1, 1] in float64, torch's affine_grid, then
grid_sample's own arithmetic. Exact positions would be worse, because the rounding decides which voxels the z-score
counts (1e-14 off an integer leaves about 1e-11 in zero voxels beside the head, and its mask is "not zero"), and which
label a sample takes (from 1 to 1.5 mm three quarters lie halfway between voxels).

In BraTS files, whose axes run along those of the scanner, M is diagonal whatever the orientation, so sampling is
separable:

- An image is interpolated axis by axis (Z and Y slice by slice in cache, X after a transposition, a few slices at a
  time), with positions in float64, weights and sums in float32: within 2e-7 of the image's range of MONAI, and zero
  where MONAI's is.
- A label map takes index vectors, from grid_sample on a ramp of indices: no voxel differs.

Rotated or sheared axes leave off-diagonal elements in M. Even 1e-16 decides ties of a label, and which voxels beside
the head are zero, so everything is then sampled by grid_sample on the full grid, in float64, as slowly as by MONAI.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import affine_grid, grid_sample

from pipelines.scans.geometry import Grid, oriented, turned_grid

_SLICES = 8  # interpolated at a time: 5 MB of rows, which malloc hands out again without page faults
_BLOCK = 16  # side of a transposition's blocks; 16 floats are a cache line: 189 ms where a plain copy takes 540


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
    if grid.is_spaced(shape, affine):
        return channels_last(oriented(image_XYZC, grid.orientation))
    image_CZYX = np.ascontiguousarray(image_XYZC.transpose(3, 2, 1, 0))
    if weights is None:
        matrix = np.linalg.solve(affine, grid.spaced_affine)
        spaced_CXYZ = _sample_full(image_CZYX.transpose(0, 3, 2, 1), matrix, grid.spaced_shape, "bilinear")
        return np.ascontiguousarray(oriented(spaced_CXYZ.transpose(1, 2, 3, 0), grid.orientation))
    spaced_XYZC = _interpolate(image_CZYX, weights)
    return np.ascontiguousarray(spaced_XYZC.transpose(*grid.permutation, 3))


def resample_label(label_XYZ: np.ndarray, affine: np.ndarray, grid: Grid) -> np.ndarray:
    """Resample and orient a label map, by MONAI's nearest neighbour: no voxel differs from it.

    Args:
        label_XYZ: uint8 (X, Y, Z) in file orientation, any memory order.
        affine: (4, 4), voxel index to mm, of the label's own file.
        grid: from `label_grid`, or `target_grid` of this shape and affine: its last bit decides ties.

    Returns:
        uint8 (X', Y', Z') in RAS, C order.
    """
    label_XYZ, affine = grid.turned(label_XYZ, affine)
    shape = label_XYZ.shape
    if grid.is_spaced(shape, affine):
        return np.ascontiguousarray(oriented(label_XYZ, grid.orientation))
    matrix = np.linalg.solve(affine, grid.spaced_affine)
    if not _is_diagonal(matrix):
        spaced = _sample_full(label_XYZ[None], matrix, grid.spaced_shape, "nearest")[0]
        return np.ascontiguousarray(oriented(spaced, grid.orientation).astype(np.uint8))
    theta = _normalised(matrix, shape, grid.spaced_shape)
    indices = [_nearest_indices(theta, axis, shape[axis], grid.spaced_shape[axis]) for axis in range(3)]
    for axis in grid.flipped:
        indices[axis] = indices[axis][::-1]
    return np.ascontiguousarray(label_XYZ[np.ix_(*indices)].transpose(grid.permutation))


class BackToFile:
    """From a prepared grid to the file's own, linearly, as MONAI inverts Orientation and Spacing.

    Where the axes are independent, this is a product with one matrix per axis, of two numbers per row. Otherwise it is
    grid_sample on the full grid, in float64, as in `resample_image`.

    Args:
        grid: from `target_grid` of this shape and affine.
        shape, affine: (X, Y, Z) and (4, 4), voxel index to mm, of the file.
        device: where volumes are.
    """

    def __init__(
        self, grid: Grid, shape: Sequence[int], affine: np.ndarray, device: torch.device | str = "cpu"
    ) -> None:
        shape, affine = turned_grid(shape, affine, grid.turn)
        self.grid, self.shape = grid, shape
        self._matrix = np.linalg.solve(grid.spaced_affine, affine)
        self._is_same = grid.is_spaced(shape, affine)
        self._along: list[torch.Tensor] = []
        if not self._is_same and _is_diagonal(self._matrix):
            positions = _axis_positions(self._matrix, grid.spaced_shape, shape)
            sizes = zip(positions, grid.spaced_shape, strict=True)
            self._along = [Weights.at(at, n).matrix(n).to(device) for at, n in sizes]

    def __call__(self, volume_XYZ: torch.Tensor) -> torch.Tensor:
        """Float32 (X', Y', Z') on the prepared grid to float32 (X, Y, Z) of the file, on the same device."""
        spaced = _undo_turn(volume_XYZ, self.grid.orientation)
        if self._along:
            spaced = _product(self._along, spaced)
        elif not self._is_same:
            sampled = _sample_full(spaced.cpu().numpy()[None], self._matrix, self.shape, "bilinear")[0]
            spaced = torch.from_numpy(sampled).to(volume_XYZ.device)
        return self._as_in_file(spaced)

    def above(self, volume_XYZ: torch.Tensor, threshold: float) -> torch.Tensor:
        """Where the result for a volume is above a threshold, bool (X, Y, Z), on the same device.

        Only voxels beside one that is above it can be, so the rest, most of a head, is not computed.
        """
        if not self._along:
            return self(volume_XYZ) > threshold
        spaced = _undo_turn(volume_XYZ, self.grid.orientation)
        mask = torch.zeros([len(matrix) for matrix in self._along], dtype=torch.bool, device=spaced.device)
        high = spaced >= threshold - 1e-6  # two weights may add up to a little more than 1
        touched = [high.any(second).any(first) for first, second in ((1, 2), (0, 2), (0, 1))]
        rows = [_extent(matrix[:, part].any(1)) for matrix, part in zip(self._along, touched)]
        if all(part.stop for part in rows):
            columns = [_extent(matrix[part].any(0)) for matrix, part in zip(self._along, rows)]
            parts = [matrix[row, column] for matrix, row, column in zip(self._along, rows, columns)]
            mask[tuple(rows)] = _product(parts, spaced[tuple(columns)]) > threshold
        return self._as_in_file(mask)

    def _as_in_file(self, turned_XYZ: torch.Tensor) -> torch.Tensor:
        turn = self.grid.turn
        return (turned_XYZ if turn is None else _undo_turn(turned_XYZ, turn)).contiguous()


def _product(along: Sequence[torch.Tensor], volume_XYZ: torch.Tensor) -> torch.Tensor:
    """A volume multiplied by a matrix (outputs, size) along each axis."""
    x, y, z = along
    rows = (x @ volume_XYZ.reshape(len(volume_XYZ), -1)).view(len(x), *volume_XYZ.shape[1:])
    return y @ (rows @ z.t())


def _extent(is_in: torch.Tensor) -> slice:
    """From the first to the last that is true; slice(0, 0) if none is."""
    found = is_in.nonzero()
    return slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)


def _undo_turn(volume_XYZ: torch.Tensor, orientation: np.ndarray) -> torch.Tensor:
    """The inverse of `oriented`, a permuted and flipped copy."""
    flipped = np.flatnonzero(orientation[:, 1] == -1).tolist()
    return volume_XYZ.permute(orientation[:, 0].astype(int).tolist()).flip(flipped)


def axis_weights(shape: Sequence[int], affine: np.ndarray, grid: Grid) -> list[Weights] | None:
    """The weights along each axis of the file as turned; None where the axes are not independent.

    `shape` is (X, Y, Z); `affine` and `grid` are as in `resample_image`.
    """
    shape, affine = turned_grid(shape, affine, grid.turn)
    positions = [torch.arange(n, dtype=torch.float64) for n in shape]
    if not grid.is_spaced(shape, affine):
        matrix = np.linalg.solve(affine, grid.spaced_affine)
        if not _is_diagonal(matrix):
            return None
        positions = _axis_positions(matrix, shape, grid.spaced_shape)
    return [Weights.at(positions[axis], shape[axis], axis in grid.flipped) for axis in range(3)]


@dataclass(frozen=True)
class Weights:
    """Linear interpolation along one axis: input[low] * low_weight + input[high] * high_weight.

    Positions carry the rounding of MONAI's normalised grid, here and there 1e-14 off an integer. It must stay: it turns
    zero voxels beside the head into 1e-11, and the z-score of the non-zero voxels then counts them (6321 voxels, 1.9 %,
    of BraTS-GLI-00000-000). Two float32 weights keep it on both sides; one weight near 1 would lose it.
    """

    low: torch.Tensor
    high: torch.Tensor
    low_weight: torch.Tensor
    high_weight: torch.Tensor

    @staticmethod
    def at(position: torch.Tensor, size: int, flipped: bool = False) -> Weights:
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


def _axis_positions(matrix: np.ndarray, shape: Sequence[int], shape_out: Sequence[int]) -> list[torch.Tensor]:
    """Where along each axis of the input the voxels of the output lie, float64, in grid_sample's own arithmetic.

    `matrix` (4, 4) takes an index of the output to one of the input; it is diagonal apart from the translation.
    """
    theta = _normalised(matrix, shape, shape_out)
    positions = []
    for axis, n in enumerate(shape):
        points = _points_along(theta, axis, shape_out[axis])[..., 2 - axis].flatten()
        positions.append((((points + 1) * n - 1) / 2).clamp(0, n - 1))
    return positions


def _points_along(theta: torch.Tensor, axis: int, size_out: int) -> torch.Tensor:
    """Torch's sampling points (1, ..., 3) of a line of output voxels along one axis."""
    size = [1, 1, 1, 1, 1]
    size[2 + axis] = size_out
    return affine_grid(theta[:, :3], size, align_corners=False)


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
    """The input voxel of each output voxel along one axis, by torch's own arithmetic: a ramp is sampled."""
    ramp = torch.arange(size, dtype=torch.float64).reshape([size if each == 2 + axis else 1 for each in range(5)])
    points = _points_along(theta, axis, size_out)
    taken = grid_sample(ramp, points, mode="nearest", padding_mode="border", align_corners=False)
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
