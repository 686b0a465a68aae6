"""Scores of many cases: Dice and HD95 by region and case, and the tables made of them.

Dice is that of `engine.metrics`. HD95 is MONAI's: of the distances from the surface of one mask to that of the other,
in mm, the 95th percentile, the larger of the two directions. It exists where both masks do; a region that was missed
altogether has none and is counted beside it.
"""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance
from rich.table import Table

from engine.metrics import SCORED, CaseDice, Score, case_dice, summarise
from engine.progress import percent
from pipelines.basics.atomic import write_texts
from pipelines.basics.tables import table_text
from pipelines.basics.text import markdown as shown
from pipelines.labels import REGIONS

WORST = 5


def definition(scored: Score) -> str:
    """What the scores are, in words."""
    return (
        f"Dice (%) per case and region on {SCORED[scored]}; a region's mean and median are over the cases whose truth "
        "has it, the mean Dice is the mean over the regions. HD95 (mm) over the cases where truth and prediction both "
        "have the region"
    )


@dataclass(frozen=True)
class CaseScores:
    """One case.

    Attributes:
        dice: its counts.
        hd95: mm by region, in the order of `REGIONS`; NaN where truth or prediction has none.
        warnings: what about the scan is not as in training.
    """

    dice: CaseDice
    hd95: tuple[float, ...]
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the case."""
        return self.dice.name

    @property
    def mean(self) -> float:
        """Mean Dice over the regions that the truth has; NaN where it has none."""
        known = [value for value in self.dice.dice() if not math.isnan(value)]
        return statistics.fmean(known) if known else math.nan


def score(name: str, prediction_RXYZ: np.ndarray, truth_RXYZ: np.ndarray, spacing_mm: Sequence[float]) -> CaseScores:
    """Score one case.

    Args:
        name: of the case.
        prediction_RXYZ, truth_RXYZ: bool (3, X, Y, Z): TC, WT, ET.
        spacing_mm: voxel size along X, Y and Z.

    Raises:
        ValueError: masks of different shapes.
    """
    masks = torch.from_numpy(prediction_RXYZ), torch.from_numpy(truth_RXYZ)
    dice = case_dice(name, *masks)
    return CaseScores(dice, tuple(hd95(*pair, spacing_mm) for pair in zip(prediction_RXYZ, truth_RXYZ, strict=True)))


def hd95(prediction_XYZ: np.ndarray, truth_XYZ: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """95th percentile of the Hausdorff distance in mm; NaN where one of the masks is empty."""
    if not (prediction_XYZ.any() and truth_XYZ.any()):
        return math.nan
    pair = (torch.from_numpy(mask)[None, None] for mask in (prediction_XYZ, truth_XYZ))
    with warnings.catch_warnings():  # MONAI calls its own function with an argument that it has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        distance = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=list(spacing_mm))
    return float(distance)


def summary(cases: Sequence[CaseScores], scored: Score = "label_map") -> dict[str, Any]:
    """What is made of the cases.

    Args:
        cases: the scores. scored: what the masks were that have them.

    Returns:
        "definition", in words, and "scored"; "cases", their number; "dice" and "hd95", with "mean" and "median" by
        region (None where no case has one), for Dice also over the regions ("mean"); "missed", "empty_truths" and
        "false_positives", numbers of cases by region; "worst", names and Dice of the cases with the lowest mean.
    """
    dice = {region: [case.dice.dice()[i] for case in cases] for i, region in enumerate(REGIONS)}
    distance = {region: [case.hd95[i] for case in cases] for i, region in enumerate(REGIONS)}
    counted = summarise([case.dice for case in cases])
    worst_first = sorted((case for case in cases if not math.isnan(case.mean)), key=lambda case: case.mean)
    return {
        "definition": definition(scored),
        "scored": scored,
        "cases": len(cases),
        "dice": {
            "mean": {"mean": counted["mean"], **{region: counted[region] for region in REGIONS}},
            "median": _over_regions({region: _known(statistics.median, dice[region]) for region in REGIONS}),
        },
        "hd95": {
            name: {region: _known(function, distance[region]) for region in REGIONS}
            for name, function in (("mean", statistics.fmean), ("median", statistics.median))
        },
        "missed": {
            region: sum(case.dice.truth[i] > 0 and case.dice.predicted[i] == 0 for case in cases)
            for i, region in enumerate(REGIONS)
        },
        "empty_truths": counted["empty_truths"],
        "false_positives": counted["false_positives"],
        "worst": [{"case": case.name, "dice": case.mean} for case in worst_first[:WORST]],
    }


def _known(function: Any, values: Iterable[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return function(known) if known else None


def _over_regions(by_region: dict[str, float | None]) -> dict[str, float | None]:
    known = [value for value in by_region.values() if value is not None]
    return {"mean": statistics.fmean(known) if known else None, **by_region}


def table_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table as text: head, then a row for each figure."""

    def distances(name: str) -> list[str]:
        return ["", *("n/a" if value is None else f"{value:.1f}" for value in found["hd95"][name].values())]

    rows: list[tuple[str, ...]] = [("", "mean", *REGIONS)]
    rows += [(f"Dice, {name} (%)", *map(percent, found["dice"][name].values())) for name in ("mean", "median")]
    rows += [(f"HD95, {name} (mm)", *distances(name)) for name in ("mean", "median")]
    for key, title in (
        ("missed", "missed"),
        ("empty_truths", "truth empty"),
        ("false_positives", "false positives"),
    ):
        rows.append((title, "", *(str(found[key][region]) for region in REGIONS)))
    return rows


def rich_table(found: dict[str, Any], title: str) -> Table:
    """The table for a terminal."""
    head, *rows = table_rows(found)
    table = Table(title=title)
    for column in head:
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    return table


def markdown(found: dict[str, Any], title: str) -> str:
    """The table, the worst cases and the definition as Markdown."""
    head, *rows = table_rows(found)
    lines = [
        f"# {shown(title)}",
        "",
        f"{found['cases']} cases.",
        "",
        _line(head),
        _line(["---", *["---:"] * len(head[1:])]),
    ]
    lines += [_line(row) for row in rows]
    lines += ["", "| worst cases | mean Dice (%) |", "| --- | ---: |"]
    lines += [_line((shown(each["case"]), percent(each["dice"]))) for each in found["worst"]]
    return "\n".join([*lines, "", f"{found['definition']}.", ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write(folder: Path, cases: Sequence[CaseScores], found: dict[str, Any], title: str) -> None:
    """Write `cases.csv`, `summary.json` and `table.md`: all, or where one can't be written those of before stay.

    Args:
        folder: made where it is missing. cases: in any order. found: from `summary`. title: of the Markdown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kinds = ("dice", "hd95_mm", "voxels_predicted", "voxels_truth")
    columns = ["case", "dice_mean", *(f"{kind}_{region}" for kind in kinds for region in REGIONS), "warnings"]
    rows = []
    for case in sorted(cases, key=lambda case: case.name):
        numbers = (case.mean, *case.dice.dice(), *case.hd95)
        counts = (*case.dice.predicted, *case.dice.truth)
        rounded = ("" if math.isnan(number) else round(number, 6) for number in numbers)
        rows.append(dict(zip(columns, [case.name, *rounded, *counts, "; ".join(case.warnings)], strict=True)))
    write_texts({
        folder / "cases.csv": table_text(columns, rows),
        folder / "summary.json": json.dumps(found, indent=1) + "\n",
        folder / "table.md": markdown(found, title),
    })  # fmt: skip
