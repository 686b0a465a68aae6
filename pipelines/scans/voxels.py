"""Checks of a case's voxels: finite, not all the same, and label values of the coding."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.basics.errors import CaseError
from pipelines.layouts.labels import CODINGS, Coding
from pipelines.scans.nifti_header import WITHOUT_IT

LABEL_TOLERANCE = 1e-3


def check_image(path: Path, array_XYZ: np.ndarray, which: str = "", maybe_infinite: bool = True) -> None:
    """Check one modality.

    Args:
        path: its file, for messages. which: " in channel 2", where the file has several.
        array_XYZ: its voxels, in Fortran order. maybe_infinite: False if they were integers.

    Raises:
        CaseError: NaN or Inf voxels, or all voxels are the same.
    """
    if maybe_infinite:
        _check_finite(path, array_XYZ, which)
    first = array_XYZ[0, 0, 0]
    if not any((slab != first).any() for slab in array_XYZ.T):  # ends at the first slab that holds something
        problem = f"an empty scan: all {array_XYZ.size} voxels{which} are {first:g}"
        raise CaseError(path, problem, f"Put the scan itself there, {WITHOUT_IT}")


def _check_finite(path: Path, array_XYZ: np.ndarray, which: str) -> None:
    bad = ~np.isfinite(array_XYZ)
    if not bad.any():
        return
    position = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
    problem = f"{int(bad.sum())} voxels{which} are NaN or Inf, the first at {position}; all must be finite numbers"
    raise CaseError(path, problem, f"Repair the file (0 is the usual background), {WITHOUT_IT}")


def to_labels(path: Path, array: np.ndarray, coding: Coding) -> np.ndarray:
    """A label map as uint8.

    Args:
        path: its file, for messages.
        array: as in the file, scaled.
        coding: the values that it may hold.

    Raises:
        CaseError: a value that is not an integer or not in the coding.
    """
    labels = _exact_uint8(array)
    if labels is None and array.dtype.kind == "f":
        _check_finite(path, array, "")
        rounded = np.rint(array)
        error = np.abs(array - rounded)
        if error.max() > LABEL_TOLERANCE:
            problem = f"label value {array.flat[error.argmax()]:.6g} is not an integer"
            raise CaseError(path, problem, "Use the original label map, or resample it with nearest neighbour")
        array, labels = rounded, _exact_uint8(rounded)
    allowed = coding.values
    if labels is not None and sum(int(np.count_nonzero(labels == value)) for value in allowed) == labels.size:
        return labels
    found = [int(v) for v in np.unique(array)]
    listing = ", ".join(map(str, found[:10])) + (f", ... ({len(found)} values)" if len(found) > 10 else "")
    problem = f"label values {listing} do not fit the coding {coding.release}, which has {', '.join(map(str, allowed))}"
    raise CaseError(path, problem, _coding_remedy(found, coding))


def _exact_uint8(array: np.ndarray) -> np.ndarray | None:
    """The array as uint8; None where that changes a value."""
    with np.errstate(invalid="ignore"):  # NaN and huge values turn into other numbers
        labels = array.astype(np.uint8, order="K")
    return labels if np.array_equal(labels, array) else None


def _coding_remedy(found: list[int], coding: Coding) -> str:
    """What to do about label values outside the coding: every coding that has them, the likeliest first.

    A coding is likelier if fewer of its values were not found, then if more of the found ones mean what they mean in
    the requested coding, then if it is later. The remedy says which tissue each coding makes of the values outside.
    """
    outside = [value for value in found if value not in coding.values]
    fits = [other for other in reversed(CODINGS.values()) if set(found) <= set(other.values)]
    if not fits:
        return "No coding has all these values: correct the label map"

    def unlikeliness(other: Coding) -> tuple[int, int]:
        shared = sum(other.tissues.get(value) == coding.tissues.get(value) for value in found)
        return len(set(other.values) - set(found)), -shared

    offers = []
    for other in sorted(fits, key=unlikeliness):
        meanings = ", ".join(f"{value} is {other.tissues[value]}" for value in outside)
        offers.append(f"{other.release} ({meanings})")
    advice = "Correct the label map, or choose the --data.release that its documentation names"
    return f"{advice}; the values alone don't say which: {', '.join(offers)}"
