"""What is noticed of a scan that is unlike those of training; and that scans like them are let alone."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from pipelines.cases import find_cases
from pipelines.domain_shift import filled, looks_of, ranges, same_image, unlike
from pipelines.geometry import target_grid
from pipelines.phantom import make_phantoms
from pipelines.resample import resample_image
from pipelines.scans.nifti import read_case

AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])
ORDER = ("flair", "t1", "t1c", "t2")
REORDERED = "is each file the modality that it is given as"


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


def test_a_scan_unlike_those_of_training_is_told_of(image: np.ndarray) -> None:
    known = ranges([looks_of(image, AFFINE), looks_of(image * 3, AFFINE)])

    def found(image_XYZC: np.ndarray) -> list[str]:
        return unlike(looks_of(image_XYZC, AFFINE), known, ("t1c", "flair"))

    assert found(image) == [] and found(image * 1000) == []
    empty = image.copy()
    empty[..., 1] = 0
    assert found(empty) == ["flair holds nothing but zeros"]
    assert any("100 % of t1c is not zero" in line for line in found(image + 1))
    assert any("the mean of t1c is" in line for line in found(np.where(image > 0, image - 1000, 0)))


def test_voxels_are_told_of_once_and_where_they_are_larger_alone(image: np.ndarray) -> None:
    """Resampling makes up for smaller ones, and which axis of the file is the long one says nothing."""
    known = ranges([looks_of(image, np.diag([2.5, 2.5, 2.5, 1.0]))])

    def found(*spacing: float) -> list[str]:
        return unlike(looks_of(image, np.diag([*spacing, 1.0])), known, ("t1c", "flair"))

    assert found(1, 1, 1) == found(0.5, 5, 0.5) == found(2.5, 2.5, 2.5) == []
    for spacing in ((1, 1, 6), (6, 6, 6), (6, 1, 1)):
        (line,) = found(*spacing)
        assert line.startswith("voxels are up to 6 mm long, in training they were up to 2.5 mm")


def test_channels_in_another_order_are_noticed_and_those_in_theirs_are_not(phantoms: list[np.ndarray]) -> None:
    """T1 and contrast-enhanced T1 can't be told apart: their swap alone passes without a word."""
    passed: dict[tuple[int, ...], int] = dict.fromkeys(permutations(range(4)), 0)
    for left_out in range(len(phantoms)):
        known = ranges(looks_of(image, AFFINE) for i, image in enumerate(phantoms) if i != left_out)
        for order in permutations(range(4)):
            given = np.ascontiguousarray(phantoms[left_out][..., order])
            if not any(REORDERED in line for line in unlike(looks_of(given, AFFINE), known, ORDER)):
                passed[order] += 1
    assert passed[0, 1, 2, 3] == len(phantoms)
    assert sum(passed.values()) - passed[0, 1, 2, 3] - passed[0, 2, 1, 3] <= 1  # of 110 in all
    assert all(passed[order] == 0 for order in ((3, 1, 2, 0), (0, 3, 2, 1), (0, 1, 3, 2)))  # T2 in another's place


def test_the_order_that_fits_is_named(phantoms: list[np.ndarray]) -> None:
    known = ranges(looks_of(image, AFFINE) for image in phantoms[1:])
    given = np.ascontiguousarray(phantoms[0][..., [3, 1, 2, 0]])
    (line,) = unlike(looks_of(given, AFFINE), known, ORDER)
    assert line.startswith("t2 looks like flair, flair looks like t2 as training saw them: is each file")


def test_of_orders_that_fit_alike_the_one_that_changes_least_is_named() -> None:
    """T1 and contrast-enhanced T1 differ by less than patients do, so nothing is said of them."""
    usual = {"spacing_mm": [1.0] * 3, "occupied": [0.2] * 4, "contrast": [3.0] * 4, "correlation": [0.3] * 6}
    known = ranges([usual | {"tail": [0.0, -0.5, -0.45, 1.0]}])
    (line,) = unlike(usual | {"tail": [1.0, -0.46, -0.49, 0.0]}, known, ORDER)
    assert line.startswith("t2 looks like flair, flair looks like t2 as training saw them")


def test_real_scans_are_not_taken_for_others(real_data: Path) -> None:
    """Of two patients, each by the ranges of the other alone, and of a network that saw synthetic scans."""
    looks, images = [], []
    for name in ("BraTS-GLI-00000-000", "BraTS-GLI-00001-000"):
        cases = find_cases(real_data / name, labelled=False)
        raw = read_case(cases.cases[0], cases.coding)
        images.append(resample_image(raw.image, raw.affine, target_grid(raw.image.shape[:3], raw.affine, (2, 2, 2))))
        looks.append(looks_of(images[-1], raw.affine))
    for known, look, image in ((looks[0], looks[1], images[1]), (looks[1], looks[0], images[0])):
        assert unlike(look, ranges([known]), ORDER) == [] and same_image(image, ranges([known]), ORDER) is None
        swapped = looks_of(np.ascontiguousarray(image[..., [3, 1, 2, 0]]), AFFINE)
        assert any(REORDERED in line for line in unlike(swapped, ranges([known]), ORDER))


def test_one_image_given_as_two_modalities_is_noticed_unless_training_was_so(phantoms: list[np.ndarray]) -> None:
    known = ranges(map(lambda image: looks_of(image, AFFINE), phantoms[1:]))
    twice = np.ascontiguousarray(phantoms[0][..., [0, 1, 1, 3]])
    for ranges_known in (known, {}):
        assert same_image(phantoms[0], ranges_known, ORDER) is None
        assert str(same_image(twice, ranges_known, ORDER)).startswith("t1 and t1c are one and the same image")
    of_such = ranges([looks_of(twice, AFFINE)])
    assert same_image(twice, of_such, ORDER) is None and unlike(looks_of(twice, AFFINE), of_such, ORDER) == []
    twice[..., 2] = twice[..., 1] * 3 + (twice[..., 1] > 0)  # saved with another scale
    assert same_image(twice, known, ORDER) is None
    assert any("t1 and t1c are nearly the same image" in line for line in unlike(looks_of(twice, AFFINE), known, ORDER))


def test_empty_channels_are_no_image_given_twice(phantoms: list[np.ndarray]) -> None:
    image = phantoms[0].copy()
    image[..., :2] = 0
    assert same_image(image, {}, ORDER) is None
    assert all(np.isfinite(values).all() for values in looks_of(image, AFFINE).values())


def test_weights_of_an_earlier_version_which_knew_fewer_numbers_still_serve(phantoms: list[np.ndarray]) -> None:
    look = looks_of(phantoms[0], AFFINE)
    known = {key: values for key, values in ranges([look]).items() if key in ("spacing_mm", "occupied", "contrast")}
    assert unlike(look, known, ORDER) == [] and same_image(phantoms[0], known, ORDER) is None


def test_scans_without_a_background_of_zero_are_told_of_by_name() -> None:
    image = np.zeros((10, 10, 10, 2), np.float32)
    image[2:8, 2:8, 2:8] = 1.0
    assert filled(ranges([looks_of(image, AFFINE)]), ("flair", "t1c")) is None and filled({}, ("flair",)) is None
    image[..., 1] -= 0.4  # z-scored beforehand: its background is a constant
    advice = filled(ranges([looks_of(image, AFFINE)]), ("flair", "t1c"))
    assert advice and advice.startswith("t1c: more than 95 %")
