"""Resampling in DALI, beside that of geometry.py.

Small phantoms with a background of zeros, in the orientations that files come in, one of them rotated, one sheared.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.eulerangles import euler2mat

from pipelines.basics.errors import CaseError
from pipelines.layouts.cases import Case, CaseSet
from pipelines.layouts.labels import CODINGS
from pipelines.loading.raw import ImageOnGrid, resample_case
from pipelines.phantom import draw_phantom
from pipelines.preparing.store import prepare
from pipelines.scans.geometry import target_grid
from pipelines.scans.nifti import read_case, read_grid
from pipelines.scans.resample import axis_weights, resample_image

SPACING = (1.5, 1.5, 2.0)
CROP = (24, 20, 12)
SIZE = (60, 58, 40)
CODING = CODINGS["brats2023"]
TOLERANCES = {"image": 1e-5}  # of the image's range
CPU = torch.device("cpu")


def affine_of(axes: list[list[float]]) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.array(axes, float).T
    affine[:3, 3] = (-13.5, 21.25, 7.0)
    return affine


ROTATION = euler2mat(0.2, -0.3, 0.1)
AFFINES = {
    "ras": affine_of([[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    "lps": affine_of([[-1, 0, 0], [0, -1, 0], [0, 0, 1]]),
    "permuted": affine_of([[0, 0, 1], [1, 0, 0], [0, -1, 0]]),
    "anisotropic": affine_of([[0, -0.9375, 0], [0, 0, 0.9375], [-1.7, 0, 0]]),
    "coarse": affine_of([[-2.5, 0, 0], [0, 2.0, 0], [0, 0, 2.75]]),
    "as_wanted": affine_of([[-1.5, 0, 0], [0, 1.5, 0], [0, 0, -2]]),
    "rotated": affine_of((ROTATION.T * [[1], [1], [1.25]]).tolist()),
    "sheared": affine_of([[-1, 0, 0], [0.12, -1, 0], [0, 0.05, 1.2]]),
}


def write_case(folder: Path, name: str, affine: np.ndarray, seed: int) -> Case:
    folder.mkdir(parents=True, exist_ok=True)
    image_XYZC, label = draw_phantom(SIZE, seed, 0)
    images = []
    for channel, modality in ((0, "flair"), (2, "t1c")):
        images.append(folder / f"{name}_{modality}.nii.gz")
        nib.save(nib.Nifti1Image(image_XYZC[..., channel].astype(np.int16), affine), images[-1])
    nib.save(nib.Nifti1Image(label.astype(np.uint8), affine), folder / f"{name}_seg.nii.gz")
    return Case(name, tuple(images), None, folder / f"{name}_seg.nii.gz")


def write_cases(folder: Path) -> CaseSet:
    """A case for each of `AFFINES`, of that name."""
    found = [write_case(folder, name, affine, seed) for seed, (name, affine) in enumerate(AFFINES.items())]
    return CaseSet(tuple(found), ("flair", "t1c"), CODING)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> CaseSet:
    return write_cases(tmp_path_factory.mktemp("scans"))


def assert_close(image: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray) -> None:
    difference = np.abs(np.asarray(image, np.float64) - np.asarray(expected, np.float64))
    assert difference.max() <= TOLERANCES["image"] * np.ptp(np.asarray(expected))


def test_a_store_may_be_filled_by_dali(cases: CaseSet, tmp_path: Path) -> None:
    store = prepare(cases, tmp_path / "cpu", SPACING, workers=1)
    filled = prepare(cases, tmp_path / "dali", SPACING, workers=1, resample=partial(resample_case, device=CPU))
    for i in range(len(store)):
        assert_close(filled.image(i), store.image(i))
        np.testing.assert_array_equal(filled.image(i) != 0, store.image(i) != 0)


@pytest.mark.parametrize("name", AFFINES)
def test_whole_volumes_are_resampled_as_by_geometry(cases: CaseSet, name: str) -> None:
    case = read_case(cases.select([name]).cases[0], CODING)
    grid = target_grid(SIZE, case.affine, SPACING)
    expected = resample_image(case.image, case.affine, grid)
    image = resample_case(case, grid, CPU)
    assert image.dtype == np.float32 and image.flags.c_contiguous
    assert_close(image, expected)
    np.testing.assert_array_equal(image != 0, expected != 0)


def test_only_rotated_and_sheared_images_are_resampled_when_they_are_decoded(cases: CaseSet) -> None:
    for name in AFFINES:
        case = read_case(cases.select([name]).cases[0], CODING)
        grid = target_grid(SIZE, case.affine, SPACING)
        dependent = name in ("rotated", "sheared")
        assert (axis_weights(SIZE, case.affine, grid) is None) == dependent
        image = ImageOnGrid.of(case.image, case.affine, grid)
        assert np.shares_memory(image.image_CZYX, case.image) == (not dependent)
        assert image.shape == grid.shape


def test_a_crop_takes_only_the_part_of_the_volume_that_it_needs(cases: CaseSet) -> None:
    case = read_case(cases.select(["lps"]).cases[0], CODING)
    image = ImageOnGrid.of(case.image, case.affine, target_grid(SIZE, case.affine, SPACING))
    box = image.crop((3, 4, 5), (8, 10, 6)).box
    assert np.shares_memory(box, case.image)
    assert np.all(np.array(box.shape[:0:-1]) <= np.array([8 * 1.5, 10 * 1.5, 6 * 2.0]) + 2)


def test_the_grid_of_a_file_is_read_from_its_header(cases: CaseSet, tmp_path: Path) -> None:
    path = cases.cases[1].images[0]
    content = path.read_bytes()
    head = tmp_path / "head.nii.gz"
    head.write_bytes(content[: len(content) // 2])
    shape, affine = read_grid(head)
    assert shape == SIZE
    np.testing.assert_array_equal(affine, nib.load(path).affine)
    head.write_bytes(b"")
    with pytest.raises(CaseError, match=r"head.nii.gz: empty file"):
        read_grid(head)


# ---------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", AFFINES)
def test_the_gpu_resamples_whole_volumes_as_the_cpu_does(cases: CaseSet, name: str) -> None:
    case = read_case(cases.select([name]).cases[0], CODING)
    grid = target_grid(SIZE, case.affine, SPACING)
    expected = resample_image(case.image, case.affine, grid)
    image = resample_case(case, grid, torch.device("cuda"))
    assert_close(image, expected)
    np.testing.assert_array_equal(image != 0, expected != 0)
