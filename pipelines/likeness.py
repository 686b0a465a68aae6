"""What the scans look like that a network is trained on, and whether another one looks alike.

A network answers whatever it is given. What commonly goes wrong can be seen, though, in few numbers that do not depend
on the scale of the intensities, which the z-score takes away: the voxel size of the file, the share of voxels that are
not zero (a scan whose skull or background was not removed, or that was z-scored before), and the mean of these in
standard deviations (a channel of another kind, or one that is centred already).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pipelines.geometry import voxel_size_mm
from pipelines.store import Store

SCANS = 8  # that are looked at
FILLED = 0.95  # share of non-zero voxels above which a scan has no background of zero
OCCUPIED_SLACK = 0.2
CONTRAST_SLACK = 2.0
SPACING_FACTOR = 2.0


def looks_of(image_XYZC: np.ndarray, affine: np.ndarray) -> dict[str, list[float]]:
    """The numbers of one scan.

    Args:
        image_XYZC: prepared, not normalised. affine: (4, 4), voxel index to mm, of the file.

    Returns:
        "spacing_mm" along X, Y and Z of RAS; "occupied", the share of non-zero voxels, and "contrast", their mean over
        their deviation (0 where there are none, or all are alike), by channel.
    """
    occupied, contrast = [], []
    for channel in np.moveaxis(image_XYZC, -1, 0):
        values = channel[channel != 0]
        deviation = float(values.std()) if values.size else 0.0
        occupied.append(values.size / channel.size)
        contrast.append(float(values.mean()) / deviation if deviation > 0 else 0.0)
    return {"spacing_mm": voxel_size_mm(affine), "occupied": occupied, "contrast": contrast}


def looks_of_store(store: Store, names: Sequence[str]) -> dict[str, list[list[float]]]:
    """Range of each number over some of the named scans, evenly taken: [lowest, highest] by axis or channel."""
    chosen = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, SCANS).astype(int))] if names else []
    return ranges(looks_of(store.image(i), store.source_affine(i)) for i in map(store.index, chosen))


def ranges(looks: Iterable[dict[str, list[float]]]) -> dict[str, list[list[float]]]:
    """[lowest, highest] of each number of some scans; empty where there are none."""
    all_looks = list(looks)
    return {
        key: [[min(values), max(values)] for values in zip(*(each[key] for each in all_looks), strict=True)]
        for key in (all_looks[0] if all_looks else ())
    }


def filled(known: dict[str, Any], modalities: Sequence[str]) -> str | None:
    """What to tell of scans that have no background of zero, or None.

    Args:
        known: from `looks_of_store`, possibly empty. modalities: names of the channels.
    """
    names = [name for name, (low, _) in zip(modalities, known.get("occupied", ())) if low > FILLED]
    if not names:
        return None
    return (
        f"{', '.join(names)}: more than {100 * FILLED:.0f} % of the voxels of each scan are not zero, so the z-score "
        "counts the background with the brain, and networks may find tumours outside it: set the background to zero, "
        "by a brain mask, for better results"
    )


def unlike(look: dict[str, list[float]], known: dict[str, Any], modalities: Sequence[str]) -> list[str]:
    """What about a scan is not as it was in training, a line each.

    Args:
        look: from `looks_of`. known: from `looks_of_store`, possibly empty. modalities: names of the channels.
    """
    found = [f"{name} holds nothing but zeros" for name, share in zip(modalities, look["occupied"]) if share == 0]
    if not known:
        return found
    for axis, size, (low, high) in zip("XYZ", look["spacing_mm"], known["spacing_mm"]):
        if not low / SPACING_FACTOR <= size <= high * SPACING_FACTOR:
            found.append(f"voxels are {size:.3g} mm along {axis}, in training they were {_span(low, high)} mm")
    for name, share, (low, high) in zip(modalities, look["occupied"], known["occupied"]):
        if share and not low - OCCUPIED_SLACK <= share <= high + OCCUPIED_SLACK:
            found.append(
                f"{100 * share:.0f} % of {name} is not zero, in training {_span(100 * low, 100 * high, '.0f')} %: is "
                "it skull-stripped, with a background of zero?"
            )
    for name, share, ratio, (low, high) in zip(modalities, look["occupied"], look["contrast"], known["contrast"]):
        if share and not low - CONTRAST_SLACK <= ratio <= high + CONTRAST_SLACK:
            found.append(
                f"the mean of {name} is {ratio:.2g} deviations, in training {_span(low, high, '.2g')}: is it that "
                "modality, and as it came from the scanner?"
            )
    return found


def _span(low: float, high: float, spec: str = ".3g") -> str:
    one, other = format(low, spec), format(high, spec)
    return one if one == other else f"{one} to {other}"
