"""Dice per region, and what is made of it.

Dice is 2 |P and T| / (|P| + |T|) on hard masks, per case and region. A region's Dice is the mean over the cases whose
truth has the region; mean Dice is the mean over the regions. A region that no case has is None ("n/a") and left out.
Beside it stand the number of empty truths and in how many of those something was predicted. Other definitions give
other numbers from the same masks: MONAI's `mean` averages within a case first, `ignore_empty=False` and the BraTS
challenge score an empty truth 1 if nothing is predicted and 0 otherwise (`empty_as_one`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from pipelines.labels import REGIONS


@dataclass(frozen=True)
class CaseDice:
    """Voxel counts of one case, per region in the order of `REGIONS`."""

    name: str
    intersection: tuple[int, ...]
    predicted: tuple[int, ...]
    truth: tuple[int, ...]

    @classmethod
    def of(cls, name: str, counts: torch.Tensor) -> CaseDice:
        """From what `count_voxels` gave; waits for it."""
        return cls(name, *(tuple(row) for row in counts.tolist()))

    def dice(self, empty_as_one: bool = False) -> tuple[float, ...]:
        """Dice per region; where the truth is empty NaN, or the challenge's 1 (nothing predicted) or 0."""

        def one(intersection: int, predicted: int, truth: int) -> float:
            if truth:
                return 2 * intersection / (predicted + truth)
            return float(predicted == 0) if empty_as_one else math.nan

        return tuple(map(one, self.intersection, self.predicted, self.truth))


def count_voxels(name: str, prediction_RXYZ: torch.Tensor, truth_RXYZ: torch.Tensor) -> torch.Tensor:
    """Voxels of the intersection, the prediction and the truth by region: int64 (3, R), on the masks' device.

    Args:
        name: of the case.
        prediction_RXYZ, truth_RXYZ: bool (R, X, Y, Z), one mask for each region.

    Raises:
        ValueError: masks of different shapes.
    """
    if prediction_RXYZ.shape != truth_RXYZ.shape:
        raise ValueError(
            f"prediction {tuple(prediction_RXYZ.shape)} and truth {tuple(truth_RXYZ.shape)} of {name} must have the "
            "same shape (regions, X, Y, Z)"
        )
    axes = (1, 2, 3)
    return torch.stack([(prediction_RXYZ & truth_RXYZ).sum(axes), prediction_RXYZ.sum(axes), truth_RXYZ.sum(axes)])


def case_dice(name: str, prediction_RXYZ: torch.Tensor, truth_RXYZ: torch.Tensor) -> CaseDice:
    """Count one case's voxels; arguments and errors as in `count_voxels`."""
    return CaseDice.of(name, count_voxels(name, prediction_RXYZ, truth_RXYZ))


def summarise(cases: list[CaseDice], empty_as_one: bool = False) -> dict[str, Any]:
    """The table that is logged and shown.

    Returns:
        "mean" and one entry for each region: Dice between 0 and 1, or None where no case has the region (with
        `empty_as_one`, every case counts); "cases"; and per region "empty_truths" and "false_positives" in them.
    """
    regions: dict[str, float | None] = {}
    for index, region in enumerate(REGIONS):
        values = [case.dice(empty_as_one)[index] for case in cases]
        values = [value for value in values if not math.isnan(value)]
        regions[region] = sum(values) / len(values) if values else None
    known = [value for value in regions.values() if value is not None]
    empty = {region: [case for case in cases if not case.truth[i]] for i, region in enumerate(REGIONS)}
    return {
        "mean": sum(known) / len(known) if known else None,
        **regions,
        "cases": len(cases),
        "empty_truths": {region: len(found) for region, found in empty.items()},
        "false_positives": {
            region: sum(case.predicted[i] > 0 for case in empty[region]) for i, region in enumerate(REGIONS)
        },
    }
