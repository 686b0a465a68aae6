"""Which label codings are offered where the values of a label map are not of the one that is asked for."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from pipelines.basics.errors import CaseError
from pipelines.layouts.labels import CODINGS
from pipelines.scans.voxels import to_labels

SHAPE = (7, 6, 5)


def remedy(values: tuple[int, ...], release: str) -> str:
    with pytest.raises(CaseError, match="do not fit the coding") as caught:
        to_labels(Path("seg.nii.gz"), np.resize(np.array(values, np.uint8), SHAPE), CODINGS[release])
    return caught.value.remedy


def offered(values: tuple[int, ...], release: str) -> list[str]:
    return re.findall(r"([\w-]+) \([^)]*\)", remedy(values, release))


@pytest.mark.parametrize(
    ("values", "release"),
    [((0, 1, 2, 4), "brats2023"), ((0, 1, 2, 3), "brats2018"), ((0, 3, 4), "brats2018"), ((0, 2, 4), "decathlon")],
)
def test_every_coding_that_has_the_values_is_offered_and_no_other(values: tuple[int, ...], release: str) -> None:
    fits = {name for name, coding in CODINGS.items() if set(values) <= set(coding.values)}
    found = offered(values, release)
    assert set(found) == fits and len(found) == len(fits)
    assert "its documentation names; the values alone don't say which" in remedy(values, release)


def test_labels_of_2018_read_as_those_of_2023_are_offered_2018s_before_2024s() -> None:
    found = offered((0, 1, 2, 4), "brats2023")
    assert found.index("brats2018") < min(found.index(name) for name in ("brats2013", "brats2024", "brats2024-ped"))
    text = remedy((0, 1, 2, 4), "brats2023")
    assert "brats2018 (4 is enhancing)" in text and "brats2024 (4 is resection cavity)" in text
    assert "brats2024-ped (4 is oedema)" in text


def test_the_most_similar_of_the_codings_with_the_same_values_comes_first() -> None:
    assert offered((0, 1, 2, 3, 4), "brats2023")[:1] == ["brats2024"]
    assert offered((0, 1, 2, 3, 4), "brats2018")[:1] == ["brats2013"]


def test_for_values_of_no_coding_nothing_is_offered() -> None:
    assert remedy((0, 5), "brats2013") == "No coding has all these values: correct the label map"
