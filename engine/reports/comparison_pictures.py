"""Pictures of finished runs side by side.

curves.png       validation Dice and training loss of all runs
predictions.png  one validation case: truth, then each model's prediction
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.data import existing_root, list_cases, make_val_loader, prepared
from engine.metrics import CaseDice, case_dice
from engine.progress import dice_text
from engine.ranks.distributed import Ranks
from engine.reports import pictures
from engine.reports.comparison import VALIDATION_CASES, ComparisonRow, FinishedRun, differing_settings
from engine.reports.pictures import as_numpy
from engine.trained import descriptive_config, load_trained
from engine.validation import Validator
from kernels.dice_ce import region_masks
from models import NETWORKS


def draw_curves(rows: Sequence[ComparisonRow], path: Path) -> None:
    """Training loss and validation Dice of all runs by epoch; seeds of a model share its colour."""
    with pictures.picture(path, 6, 7.6) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        for row in rows:
            style: dict[str, Any] = {"color": row.network.colour, "alpha": 1.0 if len(row.runs) == 1 else 0.6}
            label = f"{row.network.title}, best mean {row.cell('mean')}"
            for run in row.runs:
                above.plot(*pictures.points(run.history, "loss"), lw=1.2, **style)
                below.plot(*pictures.points(run.history, "val_mean", 100), marker="o", ms=3, label=label, **style)
                label = "_"  # one entry of the legend for all seeds
        pictures.finish_curves(above, below)
        below.set_ylabel("validation, mean Dice (%)")
        figure.legend(loc="outside lower center", frameon=False)


@dataclass(frozen=True)
class ExamplePredictions:
    """One validation case, its first modality and its truth, bool (3, X, Y, Z).

    `by_model` holds each model's predicted regions, bool (3, X, Y, Z), and their voxel counts.
    """

    name: str
    scan_XYZ: np.ndarray
    truth_RXYZ: np.ndarray
    by_model: dict[str, tuple[np.ndarray, CaseDice]]


def can_share_a_case(runs: Sequence[FinishedRun]) -> bool:
    """Whether the runs validate the same cases, processed in the same way."""
    decisive = ("--data.", "--train.validation", "--train.score", VALIDATION_CASES)
    return bool(runs[0].cases) and not any(name.startswith(decisive) for name in differing_settings(runs))


def predict_example(
    rows: Sequence[ComparisonRow], device: torch.device, store_dir: Path | None = None
) -> ExamplePredictions:
    """The first seed of each model, with its best weights, on the same validation case.

    Args:
        rows: whose runs `can_share_a_case`. device: where the networks run.
        store_dir: where the case is prepared; None: in the cache. The run's own may be in somebody else's folder.

    Raises:
        ValueError: the scans are no longer there.
    """
    first = rows[0].runs[0]
    assert first.example is not None
    config = descriptive_config(first.config)
    config = replace(config, data=replace(config.data, store_dir=store_dir))
    cases = list_cases(config.data, existing_root(config.data)).select([first.example])
    store = prepared(config.data, cases)
    ((name, image, labels),) = make_val_loader(config.data, config.train.validation, store, [first.example], device)
    found, truth = {}, None
    for row in rows:
        trained = load_trained(row.runs[0].path, device)
        truth = region_masks(labels, trained.coding.regions)[0]
        validator = Validator(row.runs[0].config, Ranks(0, 1, 0, device), trained.coding, None)
        masks = validator.masks(validator.logits(trained.network, image))
        found[row.model] = (as_numpy(masks), case_dice(name, masks, truth))
    assert truth is not None
    return ExamplePredictions(name, as_numpy(image[0, 0]), as_numpy(truth), found)


def draw_predictions(predictions: ExamplePredictions, path: Path) -> None:
    """Truth in the first row, one model in each of the others; axial slices through the tumour."""
    shown = [("truth", predictions.truth_RXYZ)] + [
        (f"{NETWORKS[model].title}   Dice {dice_text(counts.dice())}", masks)
        for model, (masks, counts) in predictions.by_model.items()
    ]
    slices = pictures.tumour_slices(predictions.truth_RXYZ)
    with pictures.picture(path, 6.6, 2.65 * len(shown) + 0.5) as figure:
        axes = figure.subplots(len(shown), len(slices), squeeze=False)
        for row, (title, masks) in zip(axes, shown):
            for axis, z in zip(row, slices):
                pictures.draw_slice(axis, predictions.scan_XYZ[..., z], masks[..., z])
                axis.set_xlabel(f"slice {z}", fontsize=8)
            row[len(slices) // 2].set_title(title, fontsize=10)
        figure.suptitle(pictures.wrapped(predictions.name), fontsize=11)
        pictures.add_region_legend(figure)
