"""Codings of the releases, their regions, and the tutorial's swap; MONAI's region class is the oracle for 2018."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from monai.transforms import ConvertToMultiChannelBasedOnBratsClasses

from pipelines.layouts.labels import (
    CODINGS,
    REGIONS,
    Release,
    coding_for_release,
    coding_from_dataset_json,
    regions_from_labels,
    tutorial_coding,
)

TASK01_LABELS = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}


@pytest.mark.parametrize(
    ("release", "tumour_core", "whole", "enhancing"),
    [
        ("decathlon", {2, 3}, {1, 2, 3}, {3}),
        ("brats2013", {1, 3, 4}, {1, 2, 3, 4}, {4}),
        ("brats2017", {1, 4}, {1, 2, 4}, {4}),
        ("brats2018", {1, 4}, {1, 2, 4}, {4}),
        ("brats2023", {1, 3}, {1, 2, 3}, {3}),
        ("brats2024", {1, 3}, {1, 2, 3}, {3}),
        ("brats2024-ped", {1, 2, 3}, {1, 2, 3, 4}, {1}),
    ],
)
def test_regions_hold_the_tissues_of_each_release(
    release: str, tumour_core: set[int], whole: set[int], enhancing: set[int]
) -> None:
    coding = coding_for_release(release)
    assert REGIONS == ("TC", "WT", "ET")
    assert [set(r) for r in coding.regions] == [tumour_core, whole, enhancing]
    assert coding.values == (0, *sorted(whole | ({4} if release == "brats2024" else set())))  # 4: the resection cavity


def test_regions_of_2018_match_monai_with_no_voxel_different() -> None:
    labels = np.random.default_rng(0).choice(np.array([0, 1, 2, 4], dtype=np.uint8), (9, 8, 7))
    monai = ConvertToMultiChannelBasedOnBratsClasses()(labels[None])
    ours = regions_from_labels(labels, CODINGS["brats2018"])
    assert ours.shape == (3, 9, 8, 7) and ours.dtype == bool
    assert np.array_equal(ours, np.asarray(monai, dtype=bool))


def test_every_coding_gives_the_same_regions_for_the_same_tissues() -> None:
    tissue = np.random.default_rng(1).integers(0, 4, (6, 5, 4))  # background, oedema, core, enhancing
    values = {
        "decathlon": (0, 1, 2, 3),
        "brats2013": (0, 2, 3, 4),
        "brats2017": (0, 2, 1, 4),
        "brats2018": (0, 2, 1, 4),
        "brats2023": (0, 2, 1, 3),
        "brats2024": (0, 2, 1, 3),
        "brats2024-ped": (0, 4, 2, 1),
    }
    expected = np.stack([tissue >= 2, tissue >= 1, tissue == 3])
    for release, codes in values.items():
        labels = np.array(codes, dtype=np.uint8)[tissue]
        assert np.array_equal(regions_from_labels(labels, CODINGS[release]), expected), release


def test_a_value_outside_the_coding_is_in_no_region() -> None:
    labels = np.array([3, 255], dtype=np.uint8)
    assert not regions_from_labels(labels, CODINGS["brats2018"]).any()


def test_labels_that_are_not_uint8_are_refused() -> None:
    with pytest.raises(ValueError, match="float32.*uint8"):
        regions_from_labels(np.zeros((2, 2, 2), np.float32), CODINGS["decathlon"])


def test_unknown_release_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'brats2012'.*decathlon, brats2013, brats2017, brats2018"):
        coding_for_release("brats2012")


def test_dataset_json_decides_by_name_not_by_value() -> None:
    assert coding_from_dataset_json(TASK01_LABELS) == CODINGS["decathlon"]
    swapped = {"0": "background", "3": "Oedema", "1": "non-enhancing_tumour", "2": "Enhancing Tumor"}
    assert coding_from_dataset_json(swapped).regions == ((1, 2), (1, 2, 3), (2,))
    treated = {**TASK01_LABELS, "4": "Resection cavity"}
    assert coding_from_dataset_json(treated).regions == CODINGS["decathlon"].regions
    joint = {
        "0": "background",
        "1": "necrotic and non-enhancing tumor",
        "2": "peritumoral edema",
        "4": "GD-enhancing tumor",
    }
    assert coding_from_dataset_json(joint).regions == CODINGS["brats2018"].regions


@pytest.mark.parametrize(
    ("labels", "release"),
    [
        ({"background": 0, "edema": 1, "non-enhancing tumor": 2, "enhancing tumour": 3}, "decathlon"),
        ({"background": 0, "NCR": 1, "ED": 2, "ET": 3}, "brats2023"),
        ({"background": 0, "NETC": 1, "SNFH": 2, "ET": 3, "RC": 4}, None),
        ({"background": 0, "NET": 1, "ED": 2, "ET": 4}, "brats2018"),
        ({"background": 0, "ET": 1, "NET": 2, "CC": 3, "ED": 4}, "brats2024-ped"),
        ({"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]}, "decathlon"),
        ({"background": [0], "WT": [4, 1, 2], "TC": [1, 4], "ET": 4}, "brats2018"),
    ],
)
def test_labels_as_nnunet_names_them_give_the_same_codings(labels: dict[str, Any], release: str | None) -> None:
    coding = coding_from_dataset_json(labels)
    if release is None:  # 2024's, but for the necrosis, which is not told apart
        assert coding.regions == CODINGS["brats2024"].regions and coding.values == CODINGS["brats2024"].values
    else:
        assert coding == CODINGS[release]


def test_every_release_may_be_asked_for() -> None:
    assert get_args(Release) == tuple(CODINGS)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"0": "edema", "1": "edema", "2": "enhancing"}, "label 0 is named 'edema', which is the background"),
        ({"1": "edema", "01": "enhancing"}, "label 1 is named 'enhancing', which is used twice"),
        ({"1": "edema", "2": None}, "label 2 is named None"),
        ({"1": {"a": 1}, "2": "enhancing"}, "label 1 is named"),
        ({"1": "edema", "9" * 5000: "enhancing"}, "'9999.*0 to 255"),
        ({"edema": True, "enhancing": 2}, "value True .*0 to 255"),
        ({"edema": 1.5, "enhancing": 2}, "value 1.5 .*0 to 255"),
        ({"edema": float("nan"), "enhancing": 2}, "value nan .*0 to 255"),
        ({"WT": [1, 2, 3], "TC": [1, 3], "liver": [4]}, "'liver' is not a scored region"),
        ({"WT": [1, 2, 3], "TC": [1, 3]}, "each within the one before"),
        ({"WT": [1, 2, 3], "TC": [1, 3], "ET": [2]}, "each within the one before"),
        ({"WT": [1, [2]], "TC": [1, 3], "ET": [2]}, "0 to 255"),
        ({}, "lack oedema, enhancing"),
        ({"0": "background", "1": "edema", "2": "liver"}, "label 2 is named 'liver'"),
        ({"0": "background", "1": "edema", "2": "non-enhancing"}, "lack enhancing"),
        ({"background": "0", "edema": "1"}, "'background'"),
        ({"0": "background", "300": "edema"}, "0 to 255"),
    ],
)
def test_dataset_json_labels_that_leave_regions_open_are_refused(labels: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        coding_from_dataset_json(labels)


def test_tutorial_swaps_enhancing_tumour_alone_and_warns_why() -> None:
    with pytest.warns(UserWarning, match="dataset.json says"):
        coding = tutorial_coding(coding_from_dataset_json(TASK01_LABELS))
    assert coding.regions == ((2, 3), (1, 2, 3), (2,))
    assert coding.values == CODINGS["decathlon"].values
    assert coding.release != "decathlon"


@pytest.mark.parametrize("release", ["brats2013", "brats2018", "brats2023"])
def test_tutorial_reading_of_other_releases_is_refused(release: str) -> None:
    with pytest.raises(ValueError, match=release):
        tutorial_coding(CODINGS[release])
