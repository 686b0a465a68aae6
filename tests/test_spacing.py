"""A spacing is three positive numbers of mm, along the patient's axes or the file's."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pipelines.scans.geometry import Spacing, file_spacing, patient_spacing


@pytest.mark.parametrize("mm", [(1.5, 0, 2), (1.5, -1, 2), (1.5, math.nan, 2), (math.inf, 1, 2), (1.5, 2), ()])
def test_a_spacing_that_is_not_three_positive_numbers_is_refused(mm: Any) -> None:
    for make in (Spacing, patient_spacing, file_spacing):
        with pytest.raises(ValueError, match=r"spacing_mm \(.*\) must be three positive numbers"):
            make(mm)


def test_three_numbers_are_along_the_axes_that_the_caller_says() -> None:
    assert patient_spacing((1, 1, 2)) == Spacing((1.0, 1.0, 2.0)) and file_spacing((1, 1, 2)).axes == "file"
    assert file_spacing(Spacing()) == patient_spacing(Spacing()) == Spacing((1.5, 1.5, 2.0), "patient")
    assert str(Spacing((1, 1, 2), "file")) == "1 x 1 x 2 mm along the axes of the file"
    assert str(Spacing()) == "1.5 x 1.5 x 2 mm along R, A, S"
