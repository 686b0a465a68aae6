"""Scores of many cases: Dice and HD95 per region and case, and their tables.

Dice is that of `engine.metrics`. HD95 is MONAI's: the 95th percentile of the distances from the surface of one mask to
that of the other, in mm, the larger of the two directions. It is defined where neither mask is empty; a region that was
missed altogether is counted separately.
"""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.metrics import SCORED, CaseDice, Score, case_dice, summarise
from pipelines.basics.atomic import write_texts
from pipelines.basics.lazy import Lazy
from pipelines.basics.tables import markdown_table, percent, table_text
from pipelines.basics.text import counted
from pipelines.basics.text import markdown as escaped
from pipelines.layouts.labels import REGIONS

monai_metrics = Lazy("monai.metrics")
WORST = 5
HEAD = ("", "mean", *REGIONS)


@dataclass(frozen=True)
class CaseScores:
    """One case.

    Attributes:
        dice: its voxel counts.
        hd95: mm per region, in the order of `REGIONS`; NaN where truth or prediction lacks the region.
        warnings: how the scan differs from the training data.
    """

    dice: CaseDice
    hd95: tuple[float, ...]
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the case."""
        return self.dice.name


def score(name: str, prediction_RXYZ: np.ndarray, truth_RXYZ: np.ndarray, spacing_mm: Sequence[float]) -> CaseScores:
    """Score one case.

    Args:
        prediction_RXYZ, truth_RXYZ: bool (3, X, Y, Z): TC, WT, ET.
        spacing_mm: voxel size along X, Y and Z.

    Raises:
        ValueError: masks of different shapes.
    """
    dice = case_dice(name, torch.from_numpy(prediction_RXYZ), torch.from_numpy(truth_RXYZ))
    return CaseScores(dice, tuple(hd95(*pair, spacing_mm) for pair in zip(prediction_RXYZ, truth_RXYZ, strict=True)))


def hd95(prediction_XYZ: np.ndarray, truth_XYZ: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """95th percentile of the Hausdorff distance in mm; NaN if a mask is empty."""
    if not (prediction_XYZ.any() and truth_XYZ.any()):
        return math.nan
    pair = (torch.from_numpy(mask)[None, None] for mask in (prediction_XYZ, truth_XYZ))
    with warnings.catch_warnings():  # MONAI calls its own function with an argument that it has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        distance = monai_metrics.compute_hausdorff_distance(
            *pair, include_background=True, percentile=95, spacing=list(spacing_mm)
        )
    return float(distance)


def summary(cases: Sequence[CaseScores], scored: Score = "label_map") -> dict[str, Any]:
    """Scores over all cases.

    Returns:
        "definition", in words, and "scored"; "cases", their number; "dice" and "hd95", with "mean" and "median" per
        region (None if no case has one), for Dice also over the regions ("mean"); "missed", "empty_truths" and
        "false_positives", numbers of cases per region; "worst", names and Dice of the cases with the lowest mean.
    """
    counted = summarise([case.dice for case in cases])
    dice = {region: [case.dice.dice()[i] for case in cases] for i, region in enumerate(REGIONS)}
    distance = {region: [case.hd95[i] for case in cases] for i, region in enumerate(REGIONS)}
    median = {region: _of_known(statistics.median, values) for region, values in dice.items()}
    worst = sorted((case.dice for case in cases if not math.isnan(case.dice.mean())), key=CaseDice.mean)[:WORST]
    return {
        "definition": (
            f"Dice (%) per case and region on {SCORED[scored]}; a region's mean and median are over the cases whose "
            "truth has it, the mean Dice is over the regions. HD95 (mm) is over the cases where truth and prediction "
            "both have the region"
        ),
        "scored": scored,
        "cases": len(cases),
        "dice": {
            "mean": {name: counted[name] for name in ("mean", *REGIONS)},
            "median": {"mean": _of_known(statistics.fmean, median.values()), **median},
        },
        "hd95": {
            name: {region: _of_known(function, values) for region, values in distance.items()}
            for name, function in (("mean", statistics.fmean), ("median", statistics.median))
        },
        "missed": {
            region: sum(case.dice.truth[i] > 0 and case.dice.predicted[i] == 0 for case in cases)
            for i, region in enumerate(REGIONS)
        },
        "empty_truths": counted["empty_truths"],
        "false_positives": counted["false_positives"],
        "worst": [{"case": dice.name, "dice": dice.mean()} for dice in worst],
    }


def _of_known(function: Callable[[list[float]], float], values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return function(known) if known else None


def table_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table below `HEAD`, as text; `found` is from `summary`."""
    counts = {"missed": "cases missed", "empty_truths": "cases with empty truth",
              "false_positives": "false positives (truth empty)"}  # fmt: skip
    rows = [(f"Dice, {name} (%)", *map(percent, found["dice"][name].values())) for name in ("mean", "median")]
    for name in ("mean", "median"):
        distances = ("n/a" if value is None else f"{value:.1f}" for value in found["hd95"][name].values())
        rows.append((f"HD95, {name} (mm)", "", *distances))
    return rows + [(title, "", *map(str, found[key].values())) for key, title in counts.items()]


def markdown(found: dict[str, Any], title: str) -> str:
    """Title, table, worst cases and definition as Markdown."""
    worst = [(escaped(each["case"]), percent(each["dice"])) for each in found["worst"]]
    count = f"{counted(found['cases'])}."
    tables = (markdown_table(HEAD, table_rows(found)), markdown_table(("worst cases", "mean Dice (%)"), worst))
    return "\n\n".join([f"# {escaped(title)}", count, *tables, f"{found['definition']}.\n"])


def write(folder: Path, cases: Sequence[CaseScores], found: dict[str, Any], title: str) -> None:
    """Write `cases.csv`, `summary.json` and `table.md`: all of them, or none if one can't be written.

    Args:
        folder: created if missing. cases: in any order. found: from `summary`. title: of the Markdown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kinds = ("dice", "hd95_mm", "voxels_predicted", "voxels_truth")
    columns = ["case", "dice_mean", *(f"{kind}_{region}" for kind in kinds for region in REGIONS), "warnings"]
    rows = []
    for case in sorted(cases, key=lambda case: case.name):
        numbers = (case.dice.mean(), *case.dice.dice(), *case.hd95)
        rounded = ("" if math.isnan(number) else round(number, 6) for number in numbers)
        cells = case.name, *rounded, *case.dice.predicted, *case.dice.truth, "; ".join(case.warnings)
        rows.append(dict(zip(columns, cells, strict=True)))
    write_texts({
        folder / "cases.csv": table_text(columns, rows),
        folder / "summary.json": json.dumps(found, indent=1) + "\n",
        folder / "table.md": markdown(found, title),
    })  # fmt: skip
