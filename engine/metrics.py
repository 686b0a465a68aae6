"""Dice per region, and the summary over cases.

What is scored is the written label map. A network predicts the three regions independently (probability > 0.5), so a
voxel of ET may lie outside TC. A label map holds one tissue per voxel, so in it ET lies within TC and TC within WT.
Its regions (`written_regions`) are scored everywhere; scoring the overlapping masks instead is an option (`masks`),
used for the published tutorial's figures. On a real scan the two can be 10 points of Dice apart.

Dice is 2 |P and T| / (|P| + |T|) on hard masks, per case and region. A region's Dice is the mean over the cases whose
truth has the region; mean Dice is the mean over the regions. A region that no case has is None ("n/a") and excluded
from the mean. Empty truths, and false positives in them, are counted separately. Other definitions give other numbers
from the same masks: MONAI's `mean` averages within a case first; `ignore_empty=False` and the BraTS challenge score an
empty truth 1 if nothing is predicted and 0 otherwise (`empty_as_one`).
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pipelines.layouts.labels import REGIONS, Coding

Score = Literal["label_map", "masks"]
SCORED: dict[Score, str] = {
    "label_map": "the written label map (probability > 0.5; ET counts as TC, TC as WT)",
    "masks": "the network's overlapping masks (probability > 0.5), not a label map",
}


def definition(score: Score) -> str:
    """How Dice is defined here, in words."""
    return (
        f"Dice per case and region on {SCORED[score]}; a region's Dice is the mean over the cases whose truth "
        "has it; the mean is over regions"
    )


def written_regions(masks_RXYZ: torch.Tensor, coding: Coding) -> torch.Tensor:
    """The regions of the label map that `engine.inference.compose_labels` makes of overlapping masks.

    Args:
        masks_RXYZ: bool (3, X, Y, Z): TC, WT, ET. coding: of the label map.

    Returns:
        bool (3, X, Y, Z), on the masks' device: ET within TC within WT.
    """
    core, whole, enhancing = masks_RXYZ
    core = core | enhancing
    if coding.regions[0] == coding.regions[2]:  # enhancing is the only core tissue, so core is written as enhancing
        enhancing = core
    return torch.stack([core, whole | core, enhancing])


def scored_regions(masks_RXYZ: torch.Tensor, coding: Coding, score: Score) -> torch.Tensor:
    """The masks to score; arguments as in `written_regions`."""
    return written_regions(masks_RXYZ, coding) if score == "label_map" else masks_RXYZ


@dataclass(frozen=True)
class CaseDice:
    """Voxel counts of one case, per region in the order of `REGIONS`."""

    name: str
    intersection: tuple[int, ...]
    predicted: tuple[int, ...]
    truth: tuple[int, ...]

    @classmethod
    def of(cls, name: str, counts: torch.Tensor) -> CaseDice:
        """From the result of `count_voxels`; waits for the device."""
        return cls(name, *(tuple(row) for row in counts.tolist()))

    def dice(self, empty_as_one: bool = False) -> tuple[float, ...]:
        """Dice per region; for an empty truth NaN, or with `empty_as_one` 1 if nothing is predicted and 0 otherwise."""

        def one(intersection: int, predicted: int, truth: int) -> float:
            if truth:
                return 2 * intersection / (predicted + truth)
            return float(predicted == 0) if empty_as_one else math.nan

        return tuple(map(one, self.intersection, self.predicted, self.truth))

    def mean(self) -> float:
        """Mean Dice over the regions that the truth has; NaN if it has none."""
        known = [value for value in self.dice() if not math.isnan(value)]
        return statistics.fmean(known) if known else math.nan


def count_voxels(name: str, prediction_RXYZ: torch.Tensor, truth_RXYZ: torch.Tensor) -> torch.Tensor:
    """Voxel counts of intersection, prediction and truth per region: int64 (3, R), on the masks' device.

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
    """Dice over cases.

    Returns:
        "mean" and one entry per region: Dice between 0 and 1, or None if no case has the region (with `empty_as_one`,
        every case counts); "cases", their number; per region "empty_truths" and the "false_positives" in them.
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
