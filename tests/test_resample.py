"""MONAI's Spacing, then Orientation("RAS"), is the oracle: same image, same label map, same way back to the file."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientation, Orientationd, Spacing, Spacingd
from test_geometry import AFFINES, ORIENTATIONS, RAS_AFFINE, SHAPE, axis_affine, monai_chain, rotated, stored_as

from pipelines.layouts.cases import Case
from pipelines.layouts.labels import CODINGS, Coding
from pipelines.scans import resample
from pipelines.scans.geometry import Grid, label_grid, target_grid
from pipelines.scans.geometry import Spacing as VoxelSize
from pipelines.scans.nifti import read_case
from pipelines.scans.resample import BackToFile, channels_last, resample_image, resample_label

TOLERANCES = {
    "image": 2e-7,  # of its range
    "oriented": 1e-3,  # of values up to 1000
    "affine": 1e-12,  # mm
    "back": 1e-5,  # of values up to 1
    "back_turned": 1e-6,
}
KEYS = ("image", "label")
IN_ORDER = [codes for codes in ORIENTATIONS if codes[0] in "RL" and codes[1] in "AP"]


@pytest.mark.parametrize("name", AFFINES)
def test_images_match_monai_to_rounding(name: str) -> None:
    affine, spacing = AFFINES[name]
    image_XYZC = np.random.default_rng(1).uniform(-200, 1000, (*SHAPE, 3)).astype(np.float32)
    expected = monai_chain(np.moveaxis(image_XYZC, 3, 0), affine, spacing, "bilinear").numpy()
    got = resample_image(image_XYZC, affine, target_grid(SHAPE, affine, spacing))
    assert got.dtype == np.float32 and got.flags.c_contiguous
    assert np.abs(got - np.moveaxis(expected, 0, 3)).max() < TOLERANCES["image"] * np.ptp(image_XYZC)


@pytest.mark.parametrize("name", AFFINES)
def test_images_are_zero_exactly_where_monais_are(name: str) -> None:
    """The z-score counts what is not zero, and rounding puts 1e-12 into zero voxels beside the head, or does not."""
    affine, spacing = AFFINES[name]
    inside = np.linalg.norm(np.indices((96, 90, 77)).T - [47, 45, 40], axis=3).T < 33  # faces in all directions
    image_XYZC = (inside * np.random.default_rng(6).uniform(100, 1000, inside.shape)).astype(np.float32)[..., None]
    expected = np.moveaxis(monai_chain(np.moveaxis(image_XYZC, 3, 0), affine, spacing, "bilinear").numpy(), 0, 3)
    got = resample_image(image_XYZC, affine, target_grid(image_XYZC.shape[:3], affine, spacing))
    np.testing.assert_array_equal(got != 0, expected != 0)
    assert np.abs(got - expected).max() < TOLERANCES["image"] * np.ptp(image_XYZC)


@pytest.mark.parametrize("name", AFFINES)
def test_labels_match_monai_with_no_voxel_different(name: str) -> None:
    affine, spacing = AFFINES[name]
    label = np.random.default_rng(2).integers(0, 5, SHAPE).astype(np.uint8)
    expected = monai_chain(label[None], affine, spacing, "nearest").numpy()[0]
    got = resample_label(label, affine, target_grid(SHAPE, affine, spacing))
    assert got.dtype == np.uint8 and got.flags.c_contiguous
    assert np.count_nonzero(got != expected) == 0


def test_oblique_label_matches_monai_where_rounding_noise_decides() -> None:
    """Off-diagonals of 1e-16 decide thousands of ties: index vectors, which ignore them, are not enough here."""
    affine, shape = rotated((0.4, -0.2, 0.5), (1, 1, 1)), (90, 96, 70)
    label = np.random.default_rng(5).integers(0, 5, shape).astype(np.uint8)
    expected = monai_chain(label[None], affine, (1.5, 1.5, 2.0), "nearest").numpy()[0]
    got = resample_label(label, affine, target_grid(shape, affine, (1.5, 1.5, 2.0)))
    assert np.count_nonzero(got != expected) == 0


def test_label_ties_match_monai_for_every_length_of_an_axis() -> None:
    """Ties are decided by rounding, so each length is a case of its own; 1 to 1.5, 1 to 2 and 0.5 to 1.75 mm."""
    rng = np.random.default_rng(3)
    for n in [*range(2, 40), 64, 155, 181, 217, 240, 256, 512]:
        label = rng.integers(0, 256, (n, 3, 4)).astype(np.uint8)
        for voxel, spacing in (((1, 1, 1), (1.5, 1.5, 2)), ((1, 1, 1), (2, 2, 2)), ((0.5, 1, 1), (1.75, 1, 1))):
            affine = axis_affine((0, 1, 2), (-1, -1, 1), voxel)
            expected = monai_chain(label[None], affine, spacing, "nearest").numpy()[0]
            got = resample_label(label, affine, target_grid(label.shape, affine, spacing))
            assert np.array_equal(got, expected), (n, spacing)


def test_memory_order_makes_no_difference() -> None:
    affine, spacing = AFFINES["lps_1mm"]
    grid = target_grid(SHAPE, affine, spacing)
    image = np.random.default_rng(4).normal(size=(*SHAPE, 2)).astype(np.float32)
    np.testing.assert_array_equal(
        resample_image(image, affine, grid), resample_image(np.asfortranarray(image), affine, grid)
    )
    np.testing.assert_array_equal(channels_last(np.asfortranarray(image)), image)


def prepare_as(codes: str, spacing: VoxelSize, affine: np.ndarray = RAS_AFFINE) -> tuple[Grid, np.ndarray, np.ndarray]:
    """Grid, image and label of one scan that is stored so."""
    rng = np.random.default_rng(7)
    image, label = rng.uniform(0, 1000, SHAPE).astype(np.float32), rng.integers(0, 5, SHAPE).astype(np.uint8)
    (image, stored_affine), (label, _) = (stored_as(codes, volume, affine) for volume in (image, label))
    grid = target_grid(image.shape, stored_affine, spacing)
    own = label_grid(grid, label.shape, stored_affine, spacing)
    prepared = resample_image(image[..., None], stored_affine, grid)[..., 0]
    return grid, prepared, resample_label(label, stored_affine, own)


@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize(
    # Of the oblique one no length and no sample is halfway between two voxels, where the last bit of a product decides.
    "affine",
    [RAS_AFFINE, rotated((0.3, -0.2, 0.25), (1.1, 1.25, 0.7))],
    ids=["axial", "oblique"],
)
def test_a_scan_gives_one_volume_however_its_axes_are_stored(codes: str, affine: np.ndarray) -> None:
    """Axes in another order than the patient's: the volume of LPS. Axes in order: MONAI's grid, to the last bit."""
    spacing = VoxelSize((1.5, 1.5, 2.0))
    grid, image, label = prepare_as(codes, spacing, affine)
    if codes in IN_ORDER:
        expected = prepare_as(codes, VoxelSize(spacing.mm, "file"), affine)
        np.testing.assert_array_equal(grid.affine, expected[0].affine)
    else:
        expected = prepare_as("LPS", spacing, affine)
        np.testing.assert_allclose(grid.affine, expected[0].affine, atol=TOLERANCES["affine"])
    np.testing.assert_allclose(image, expected[1], atol=TOLERANCES["oriented"])
    assert np.count_nonzero(label != expected[2]) <= (0 if affine is RAS_AFFINE else 2)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_where_a_grid_reaches_the_last_voxel_every_orientation_gives_the_same(codes: str) -> None:
    spacing = VoxelSize((2.0, 1.25, 1.5))  # from 37 x 32 x 29 voxels of 1 x 1.25 x 0.75 mm
    (grid, image, _), (expected_grid, expected, _) = (prepare_as(each, spacing) for each in (codes, "RAS"))
    assert grid.shape == (19, 32, 15)
    np.testing.assert_allclose(grid.affine, expected_grid.affine, atol=TOLERANCES["affine"])
    np.testing.assert_allclose(image, expected, atol=TOLERANCES["oriented"])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("affine", [RAS_AFFINE, rotated((0.05, -0.07, 0.03), (1.0, 1.0, 3.0))])
def test_a_scan_of_one_slice_becomes_tensors_however_it_is_stored(axis: int, affine: np.ndarray) -> None:
    shape = [9, 8, 7]
    shape[axis] = 1
    for codes in ORIENTATIONS:
        stored, stored_affine = stored_as(codes, np.ones(shape, np.uint8), affine)
        stored = np.ascontiguousarray(stored.T).T  # as read from a file
        grid = target_grid(stored.shape, stored_affine, VoxelSize((1.5, 1.5, 2.0)))
        image = resample_image(stored[..., None], stored_affine, grid)
        label = resample_label(stored, stored_affine, grid)
        assert torch.from_numpy(image).shape[:3] == torch.from_numpy(label).shape == grid.shape


@pytest.mark.parametrize("codes", ["PIR", "RSA", "SLA", "LAS"])
def test_the_way_back_is_to_the_axes_of_the_file(codes: str) -> None:
    spacing, taken = VoxelSize((1.5, 1.5, 2.0)), "LPS" if codes not in IN_ORDER else codes
    probabilities = {}
    for each in (codes, taken):
        volume, affine = stored_as(each, np.zeros(SHAPE), RAS_AFFINE)
        grid = target_grid(volume.shape, affine, spacing)
        prepared = torch.rand(grid.shape, generator=torch.Generator().manual_seed(0))
        back = BackToFile(grid, volume.shape, affine)(prepared)
        assert back.shape == volume.shape and back.is_contiguous()
        probabilities[each] = stored_as("RAS", back.numpy(), affine)[0]
    np.testing.assert_allclose(probabilities[codes], probabilities[taken], atol=TOLERANCES["back_turned"])


@pytest.mark.parametrize("name", AFFINES)
def test_the_way_back_to_the_file_is_monais(name: str) -> None:
    affine, spacing = AFFINES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        chain = Compose([Spacing(spacing, mode="bilinear"), Orientation("RAS")])
        prepared = chain(MetaTensor(torch.zeros(1, *SHAPE), affine=torch.from_numpy(affine)))
        volume = torch.rand(prepared.shape[1:], generator=torch.Generator().manual_seed(0))
        prepared[0] = volume
        expected = np.asarray(chain.inverse(prepared))[0]
    found = BackToFile(target_grid(SHAPE, affine, spacing), SHAPE, affine)(volume)
    assert found.shape == SHAPE and found.is_contiguous()
    np.testing.assert_allclose(found.numpy(), expected, atol=TOLERANCES["back"])


def blobs(shape: Sequence[int], kind: str) -> torch.Tensor:
    """Probabilities: none above 0.5, a few voxels beside each other, a voxel in the corner, or any."""
    volume = 0.4 * torch.rand(*shape, generator=torch.Generator().manual_seed(0))
    x, y, z = (size // 2 for size in shape)
    if kind == "few":
        volume[x : x + 2, y : y + 3, z : z + 1] += 0.55
    elif kind == "corner":
        volume[-1, 0, -1] = 0.9
    elif kind == "any":
        volume *= 2
    return volume


@pytest.mark.parametrize("kind", ["none", "few", "corner", "any"])
@pytest.mark.parametrize("name", AFFINES)
def test_a_mask_on_the_way_back_is_where_the_volume_is_above_the_threshold(name: str, kind: str) -> None:
    affine, spacing = AFFINES[name]
    volume = blobs(target_grid(SHAPE, affine, spacing).shape, kind)
    back = BackToFile(target_grid(SHAPE, affine, spacing), SHAPE, affine)
    mask = back.above(volume, 0.5)
    assert mask.dtype == torch.bool and mask.is_contiguous()
    torch.testing.assert_close(mask, back(volume) > 0.5)
    assert kind in ("few", "corner") or mask.any() == (kind == "any")  # a file's voxels may not see a small blob


@pytest.mark.parametrize("codes", ["PIR", "RSA", "SLA", "LAS"])
def test_a_mask_comes_back_on_the_axes_of_the_file(codes: str) -> None:
    stored, affine = stored_as(codes, np.zeros(SHAPE), RAS_AFFINE)
    grid = target_grid(stored.shape, affine, VoxelSize((1.5, 1.5, 2.0)))
    volume, back = blobs(grid.shape, "few"), BackToFile(grid, stored.shape, affine)
    torch.testing.assert_close(back.above(volume, 0.5), back(volume) > 0.5)


def test_a_voxel_that_no_voxel_of_a_coarse_file_sees_is_no_mask() -> None:
    """Slices of 6 mm, prepared at 2 mm: two of three prepared voxels are in no slice."""
    affine = np.diag([1.0, 1.0, 6.0, 1.0])
    grid = target_grid(SHAPE, affine, VoxelSize((1.0, 1.0, 2.0)))
    volume, back = torch.zeros(grid.shape), BackToFile(grid, SHAPE, affine)
    for z in range(grid.shape[2]):
        volume[:] = 0
        volume[3, 3, z] = 1
        torch.testing.assert_close(back.above(volume, 0.5), back(volume) > 0.5)


def test_of_a_mask_only_the_part_beside_high_voxels_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    product = resample._product

    def counting(along: Any, volume: torch.Tensor) -> torch.Tensor:
        computed.append(prod(len(matrix) for matrix in along))
        return product(along, volume)

    monkeypatch.setattr(resample, "_product", counting)
    affine, spacing = RAS_AFFINE, VoxelSize((1.5, 1.5, 2.0))
    grid = target_grid(SHAPE, affine, spacing)
    back = BackToFile(grid, SHAPE, affine)
    back.above(blobs(grid.shape, "few"), 0.5)
    back.above(blobs(grid.shape, "none"), 0.5)
    assert len(computed) == 1 and computed[0] < 0.2 * prod(SHAPE)


def check_real_case(case: Case, coding: Coding) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        chain = Compose(
            [
                LoadImaged(KEYS),
                EnsureChannelFirstd(KEYS),
                Spacingd(KEYS, pixdim=(1.5, 1.5, 2.0), mode=("bilinear", "nearest")),
                Orientationd(KEYS, axcodes="RAS"),
            ]
        )
    expected = chain({"image": str(case.images[0]), "label": str(case.label)})
    raw = read_case(case, coding)
    assert raw.label is not None and raw.label_affine is not None
    grid = target_grid(raw.image.shape[:3], raw.affine, (1.5, 1.5, 2.0))
    image = resample_image(raw.image, raw.affine, grid)
    label = resample_label(raw.label, raw.label_affine, target_grid(raw.label.shape, raw.label_affine, (1.5, 1.5, 2.0)))
    reference = expected["image"].numpy()[0]
    np.testing.assert_array_equal(grid.affine, expected["image"].affine.numpy())
    assert np.abs(image[..., 0] - reference).max() < TOLERANCES["image"] * np.ptp(reference)
    assert np.count_nonzero(label != expected["label"].numpy()[0]) == 0
    assert np.count_nonzero(label) > 0


def test_real_brats_2023_scan_matches_monais_file_chain(real_data: Path) -> None:
    folder = real_data / "BraTS-GLI-00000-000"
    image, label = (folder / f"{folder.name}-{end}.nii.gz" for end in ("t1c", "seg"))
    check_real_case(Case(folder.name, (image,), None, label), CODINGS["brats2023"])


def test_real_brats_2013_scan_matches_monais_file_chain(real_data: Path) -> None:
    folder = real_data / "brats_2013_pat0001_1"
    image, label = folder / "Flair_subtrMeanDivStd.nii.gz", folder / "OTMultiClass.nii.gz"
    check_real_case(Case(folder.name, (image,), None, label), CODINGS["brats2013"])
