"""A spacing is three positive numbers; MONAI's Spacing, then Orientation("RAS"), is the oracle of its grid."""

from __future__ import annotations

import math
import warnings
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientation, Spacing
from nibabel.eulerangles import euler2mat
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from pipelines.scans.geometry import Spacing as VoxelSize
from pipelines.scans.geometry import as_spacing, label_grid, target_grid, voxel_size_mm
from pipelines.scans.resample import resample_label

TOLERANCE_MM = 1e-9


def monai_chain(volume_CXYZ: np.ndarray, affine: np.ndarray, spacing: tuple[float, ...], mode: str) -> MetaTensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        steps = Compose([Spacing(spacing, mode=mode), Orientation("RAS")])
        return steps(MetaTensor(torch.from_numpy(volume_CXYZ).float(), affine=torch.from_numpy(affine)))


def axis_affine(order: tuple[int, ...], signs: tuple[int, ...], voxel: tuple[float, ...]) -> np.ndarray:
    """File axis i runs along world axis order[i]."""
    affine = np.eye(4)
    affine[:3, :3] = 0.0
    for axis in range(3):
        affine[order[axis], axis] = signs[axis] * voxel[axis]
    affine[:3, 3] = (-13.5, 21.25, 7.0)
    return affine


def rotated(angles: tuple[float, ...], voxel: tuple[float, ...]) -> np.ndarray:
    affine = np.eye(4)
    rotation = euler2mat(*angles)
    affine[:3, :3] = rotation @ np.diag(voxel)
    affine[:3, 3] = (3.0, -40.0, 11.5)
    return affine


def sheared() -> np.ndarray:
    affine = rotated((0.1, -0.05, 0.2), (1.0, 1.0, 1.5))
    affine[:3, :3] = affine[:3, :3] @ np.array([[1, 0.15, 0], [0, 1, -0.1], [0, 0, 1]])
    return affine


AFFINES = {
    "ras_1mm": (axis_affine((0, 1, 2), (1, 1, 1), (1, 1, 1)), (1.5, 1.5, 2.0)),
    "lps_1mm": (axis_affine((0, 1, 2), (-1, -1, 1), (1, 1, 1)), (1.5, 1.5, 2.0)),
    "permuted": (axis_affine((2, 0, 1), (1, -1, 1), (1, 1, 1)), (1.5, 1.5, 2.0)),
    "permuted_flipped_anisotropic": (axis_affine((1, 2, 0), (-1, 1, -1), (0.9375, 0.9375, 3.0)), (1.5, 1.5, 2.0)),
    "upsampled": (axis_affine((0, 2, 1), (-1, -1, -1), (1.2, 2.0, 1.7)), (0.8, 1.0, 1.0)),
    "unchanged": (axis_affine((1, 0, 2), (-1, 1, 1), (1, 1, 1)), (1.0, 1.0, 1.0)),
    "changed_within_tolerance": (axis_affine((0, 1, 2), (-1, -1, 1), (1.0005, 1, 1)), (1.0, 1.0, 1.0)),
    "oblique": (rotated((0.2, -0.3, 0.1), (1, 1, 1)), (1.5, 1.5, 2.0)),
    "oblique_far": (rotated((1.9, 0.4, -2.4), (0.7, 1.1, 2.5)), (1.5, 1.5, 2.0)),
    "nearly_aligned": (rotated((1e-9, -2e-9, 1e-9), (1, 1, 1)), (1.5, 1.5, 2.0)),
    "oblique_anisotropic": (rotated((0.1, -0.3, 0.2), (1, 1, 1.25)), (1.5, 1.5, 2.0)),
    "oblique_rounded": (rotated((0.0, 0.0, 0.3), (1.5, 1.5, 1.25)).astype(np.float32).astype(float), (1.5, 1.5, 2.0)),
    "one_axis_within_tolerance": (axis_affine((0, 1, 2), (-1, -1, 1), (1.5004, 1.5, 1.0)), (1.5, 1.5, 2.0)),
    "sheared": (sheared(), (1.5, 1.5, 2.0)),
}
SHAPE = (37, 32, 29)


@pytest.mark.parametrize("name", AFFINES)
def test_grid_is_monais(name: str) -> None:
    affine, spacing = AFFINES[name]
    expected = monai_chain(np.zeros((1, *SHAPE), np.float32), affine, spacing, "nearest")
    grid = target_grid(SHAPE, affine, spacing)
    assert grid.shape == expected.shape[1:]
    np.testing.assert_allclose(grid.affine, expected.affine.numpy(), atol=TOLERANCE_MM)
    first = grid.to_source(affine) @ [0, 0, 0, 1]
    np.testing.assert_allclose(affine @ first, expected.affine.numpy() @ [0, 0, 0, 1], atol=TOLERANCE_MM)


def test_label_beside_an_image_has_its_own_affine_and_the_shape_of_the_image() -> None:
    grid = target_grid((41, 40, 30), np.eye(4), (1.5, 1.5, 2.0))
    affine = np.diag([0.98, 1.0, 1.0, 1.0])  # 27 voxels of 1.5 mm, not 28
    own = label_grid(grid, (41, 40, 30), affine, (1.5, 1.5, 2.0))
    assert target_grid((41, 40, 30), affine, (1.5, 1.5, 2.0)).shape != grid.shape
    assert own.shape == own.spaced_shape == grid.shape
    assert resample_label(np.ones((41, 40, 30), np.uint8), affine, own).shape == grid.shape


ORIENTATIONS = ["".join(codes) for axes in permutations(("RL", "AP", "SI")) for codes in product(*axes)]
RAS_AFFINE = axis_affine((0, 1, 2), (1, 1, 1), (1.0, 1.25, 0.75))


def stored_as(codes: str, volume_XYZ: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same scan with its axes in another order and direction, and its affine."""
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(codes))
    return apply_orientation(volume_XYZ, turn), affine @ inv_ornt_aff(turn, volume_XYZ.shape)


def test_spacing_along_the_axes_of_the_file_is_another_grid_where_they_are_in_another_order() -> None:
    volume, affine = stored_as("PIR", np.zeros(SHAPE), RAS_AFFINE)
    mm = (1.0, 1.0, 2.0)
    for spacing, expected in ((VoxelSize(mm, "file"), (2.0, 1.0, 1.0)), (VoxelSize(mm), mm)):
        np.testing.assert_allclose(np.diag(target_grid(volume.shape, affine, spacing).affine)[:3], expected)


@pytest.mark.parametrize(("degrees", "shape"), [(40, (25, 11, 15)), (50, (22, 13, 15))])
def test_the_spacing_of_an_oblique_file_is_that_of_the_nearest_axes(degrees: float, shape: tuple[int, ...]) -> None:
    """Of 37 x 32 x 29 voxels of 1 mm, turned about S: beyond 45 degrees the file's first axis is A, the second R."""
    grid = target_grid(SHAPE, rotated((np.radians(degrees), 0.0, 0.0), (1, 1, 1)), VoxelSize((1.5, 3.0, 2.0)))
    assert grid.shape == shape
    np.testing.assert_allclose(np.linalg.norm(grid.affine[:3, :3], axis=0), (1.5, 3.0, 2.0))


def test_voxel_sizes_follow_the_axes_of_the_patient() -> None:
    for codes in ORIENTATIONS:
        affine = stored_as(codes, np.zeros(SHAPE), RAS_AFFINE)[1]
        np.testing.assert_allclose(voxel_size_mm(affine), (1.0, 1.25, 0.75))


def test_order_is_spacing_then_orientation() -> None:
    """The other order begins at the other end of a flipped axis: origin -238.5 against -239 mm on a BraTS scan."""
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[1, 3] = 239.0
    assert target_grid((240, 240, 155), affine, (1.5, 1.5, 2.0)).affine[0, 3] == -238.5


@pytest.mark.parametrize("mm", [(1.5, 0, 2), (1.5, -1, 2), (1.5, math.nan, 2), (math.inf, 1, 2), (1.5, 2), ()])
def test_a_spacing_that_is_not_three_positive_numbers_is_refused(mm: Any) -> None:
    for make in (VoxelSize, as_spacing):
        with pytest.raises(ValueError, match=r"spacing_mm \(.*\) must be three positive numbers"):
            make(mm)


def test_three_numbers_are_along_the_axes_that_the_caller_says() -> None:
    assert as_spacing((1, 1, 2)) == VoxelSize((1.0, 1.0, 2.0)) and as_spacing((1, 1, 2), "file").axes == "file"
    assert as_spacing(VoxelSize(), "file") == VoxelSize((1.5, 1.5, 2.0), "patient")
    assert str(VoxelSize((1, 1, 2), "file")) == "1 x 1 x 2 mm along the axes of the file"
    assert str(VoxelSize()) == "1.5 x 1.5 x 2 mm along R, A, S"
