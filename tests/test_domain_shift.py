"""Warnings of scans that differ from those of training, and no warnings of scans that do not."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from pipelines.layouts.cases import find_cases
from pipelines.phantom import make_phantoms
from pipelines.preparing.domain_shift import (
    background_warning,
    duplicate_channels,
    ranges,
    scan_statistics,
    shift_warnings,
)
from pipelines.scans.geometry import target_grid
from pipelines.scans.nifti import read_case
from pipelines.scans.resample import resample_image

AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])
ORDER = ("flair", "t1", "t1c", "t2")
REORDERED = "is each file the right modality"


def statistics_of(image_XYZC: np.ndarray) -> dict[str, list[float]]:
    return scan_statistics(image_XYZC, AFFINE)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    """(X, Y, Z, 4), in the order of `ORDER`."""
    cases = find_cases(make_phantoms(tmp_path_factory.mktemp("scans") / "task", 5, (48, 48, 32), workers=1))
    return [np.ascontiguousarray(read_case(case, cases.coding).image) for case in cases.cases]


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """float32 (X, Y, Z, 2), zero around a head."""
    image = np.random.default_rng(0).integers(100, 900, (30, 44, 21, 2)).astype(np.float32)
    image[:4], image[:, 40:] = 0, 0
    return image


def test_a_scan_that_differs_from_training_is_warned_of(image: np.ndarray) -> None:
    known = ranges([statistics_of(image), statistics_of(image * 3)])

    def found(image_XYZC: np.ndarray) -> list[str]:
        return shift_warnings(statistics_of(image_XYZC), known, ("t1c", "flair"))

    assert found(image) == [] and found(image * 1000) == []
    empty = image.copy()
    empty[..., 1] = 0
    assert found(empty) == ["flair holds nothing but zeros"]
    assert any("100 % of t1c is not zero" in line for line in found(image + 1))
    assert any("the mean of t1c is" in line for line in found(np.where(image > 0, image - 1000, 0)))


def test_only_larger_voxels_are_warned_of_and_once(image: np.ndarray) -> None:
    """Resampling makes up for smaller ones, and which axis of the file is the long one says nothing."""
    known = ranges([scan_statistics(image, np.diag([2.5, 2.5, 2.5, 1.0]))])

    def found(*spacing: float) -> list[str]:
        return shift_warnings(scan_statistics(image, np.diag([*spacing, 1.0])), known, ("t1c", "flair"))

    assert found(1, 1, 1) == found(0.5, 5, 0.5) == found(2.5, 2.5, 2.5) == []
    for spacing in ((1, 1, 6), (6, 6, 6), (6, 1, 1)):
        (line,) = found(*spacing)
        assert line.startswith("voxels are up to 6 mm long, in training they were up to 2.5 mm")


def test_channels_in_another_order_are_noticed_and_those_in_the_right_order_are_not(phantoms: list[np.ndarray]) -> None:
    """T1 and contrast-enhanced T1 can't be told apart: only their swap passes unnoticed."""
    passed: dict[tuple[int, ...], int] = dict.fromkeys(permutations(range(4)), 0)
    for left_out in range(len(phantoms)):
        known = ranges(statistics_of(image) for i, image in enumerate(phantoms) if i != left_out)
        for order in permutations(range(4)):
            given = np.ascontiguousarray(phantoms[left_out][..., order])
            if not any(REORDERED in line for line in shift_warnings(statistics_of(given), known, ORDER)):
                passed[order] += 1
    assert passed[0, 1, 2, 3] == len(phantoms)
    assert sum(passed.values()) - passed[0, 1, 2, 3] - passed[0, 2, 1, 3] <= 1  # of 110 in all
    assert all(passed[order] == 0 for order in ((3, 1, 2, 0), (0, 3, 2, 1), (0, 1, 3, 2)))  # T2 in another's place


def test_the_order_that_fits_is_named(phantoms: list[np.ndarray]) -> None:
    known = ranges(statistics_of(image) for image in phantoms[1:])
    given = np.ascontiguousarray(phantoms[0][..., [3, 1, 2, 0]])
    (line,) = shift_warnings(statistics_of(given), known, ORDER)
    assert line.startswith("t2 looks like flair, flair looks like t2 as training saw them: is each file")


def test_among_orders_that_fit_equally_well_the_smallest_change_is_named() -> None:
    """T1 and contrast-enhanced T1 differ by less than patients do, so they are not mentioned."""
    usual = {"spacing_mm": [1.0] * 3, "occupied": [0.2] * 4, "contrast": [3.0] * 4, "correlation": [0.3] * 6}
    known = ranges([usual | {"tail": [0.0, -0.5, -0.45, 1.0]}])
    (line,) = shift_warnings(usual | {"tail": [1.0, -0.46, -0.49, 0.0]}, known, ORDER)
    assert line.startswith("t2 looks like flair, flair looks like t2 as training saw them")


def test_real_scans_are_not_taken_for_reordered_ones(real_data: Path) -> None:
    """Two patients, each by the ranges of the other alone."""
    statistics, images = [], []
    for name in ("BraTS-GLI-00000-000", "BraTS-GLI-00001-000"):
        cases = find_cases(real_data / name, labelled=False)
        raw = read_case(cases.cases[0], cases.coding)
        images.append(resample_image(raw.image, raw.affine, target_grid(raw.image.shape[:3], raw.affine, (2, 2, 2))))
        statistics.append(scan_statistics(images[-1], raw.affine))
    for known, scan, image in ((statistics[0], statistics[1], images[1]), (statistics[1], statistics[0], images[0])):
        assert shift_warnings(scan, ranges([known]), ORDER) == []
        assert duplicate_channels(image, ranges([known]), ORDER) is None
        swapped = statistics_of(np.ascontiguousarray(image[..., [3, 1, 2, 0]]))
        assert any(REORDERED in line for line in shift_warnings(swapped, ranges([known]), ORDER))


def test_one_image_given_as_two_modalities_is_noticed_unless_training_had_that(phantoms: list[np.ndarray]) -> None:
    known = ranges(map(statistics_of, phantoms[1:]))
    twice = np.ascontiguousarray(phantoms[0][..., [0, 1, 1, 3]])
    for ranges_known in (known, {}):
        assert duplicate_channels(phantoms[0], ranges_known, ORDER) is None
        assert str(duplicate_channels(twice, ranges_known, ORDER)).startswith("t1 and t1c are the same image")
    of_such = ranges([statistics_of(twice)])
    assert duplicate_channels(twice, of_such, ORDER) is None
    assert shift_warnings(statistics_of(twice), of_such, ORDER) == []
    twice[..., 2] = twice[..., 1] * 3 + (twice[..., 1] > 0)  # saved with another scale
    assert duplicate_channels(twice, known, ORDER) is None
    found = shift_warnings(statistics_of(twice), known, ORDER)
    assert any("t1 and t1c are nearly the same image" in line for line in found)


def test_empty_channels_are_not_taken_for_duplicates(phantoms: list[np.ndarray]) -> None:
    image = phantoms[0].copy()
    image[..., :2] = 0
    assert duplicate_channels(image, {}, ORDER) is None
    assert all(np.isfinite(values).all() for values in statistics_of(image).values())


def test_weights_of_an_earlier_version_with_fewer_statistics_still_work(phantoms: list[np.ndarray]) -> None:
    scan = statistics_of(phantoms[0])
    known = {key: values for key, values in ranges([scan]).items() if key in ("spacing_mm", "occupied", "contrast")}
    assert shift_warnings(scan, known, ORDER) == [] and duplicate_channels(phantoms[0], known, ORDER) is None


def test_channels_without_a_background_of_zero_are_named() -> None:
    image = np.zeros((10, 10, 10, 2), np.float32)
    image[2:8, 2:8, 2:8] = 1.0
    assert background_warning(ranges([statistics_of(image)]), ("flair", "t1c")) is None
    assert background_warning({}, ("flair",)) is None
    image[..., 1] -= 0.4  # z-scored beforehand: its background is a constant
    advice = background_warning(ranges([statistics_of(image)]), ("flair", "t1c"))
    assert advice and advice.startswith("t1c: more than 95 %")
