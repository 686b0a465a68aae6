"""Pictures of finished runs beside each other.

curves.png       validation Dice and training loss of all runs
predictions.png  one validation case: truth, then what each model makes of it
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator

from engine.config import Config
from engine.data import existing_root, list_cases, make_val_loader, prepared
from engine.metrics import CaseDice, case_dice, scored_regions
from engine.progress import percent
from engine.reports.comparison import VALIDATION_CASES, Row, Run, differences
from engine.reports.pictures import as_numpy, caption, legend, plt, save, show_slice
from engine.sliding_window import sliding_window_logits
from engine.trained import descriptive_config, load_trained
from kernels.dice_ce import region_masks
from models import NETWORKS
from pipelines.labels import REGIONS

SLICES = 3


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Validation Dice and training loss of all runs by epoch; seeds of a model share its colour."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(6, 7.6), layout="constrained", sharex=True)
    for row in rows:
        for index, run in enumerate(row.runs):
            style: dict[str, Any] = {"color": NETWORKS[row.model].colour, "alpha": 1.0 if len(row.runs) == 1 else 0.6}
            label = None if index else f"{NETWORKS[row.model].title}, best {row.cell('mean')}"
            dice = [(r["epoch"], 100 * r["val_mean"]) for r in run.history if r.get("val_mean") is not None]  # type: ignore[operator]
            loss = [(r["epoch"], r["loss"]) for r in run.history if r["loss"] is not None]
            above.plot([epoch for epoch, _ in loss], [value for _, value in loss], lw=1.2, **style)
            below.plot(
                [epoch for epoch, _ in dice], [value for _, value in dice], marker="o", ms=3, label=label, **style
            )
    above.set(ylabel="training loss", ylim=(0, None))
    below.set(xlabel="epoch", ylabel="validation, mean Dice (%)", ylim=(0, 100))
    for axes in (above, below):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False)
    save(figure, path)


@dataclass(frozen=True)
class Predictions:
    """One validation case, and what each model makes of it.

    Attributes:
        name: of the case. scan_XYZ: its first modality. truth_RXYZ: bool (3, X, Y, Z).
        of_models: by model, the regions, bool (3, X, Y, Z), and their counts.
    """

    name: str
    scan_XYZ: np.ndarray
    truth_RXYZ: np.ndarray
    of_models: dict[str, tuple[np.ndarray, CaseDice]]


def can_share_a_case(runs: Sequence[Run]) -> bool:
    """Whether the runs see the same validation cases in the same way."""
    decisive = [name for name in differences(runs)
                if name in (VALIDATION_CASES, "--train.validation", "--train.score")
                or name.startswith("--data.")]  # fmt: skip
    return bool(runs[0].cases) and not decisive


def predict_example(rows: Sequence[Row], device: torch.device, store_dir: Path | None = None) -> Predictions:
    """The first seed of each model, with its best weights, on the same validation case.

    Args:
        rows: whose runs `can_share_a_case`. device: where the networks run.
        store_dir: where the case is prepared; None: in the cache. A run's own may be in anybody's folder.

    Raises:
        ValueError: the scans are not there any more.
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
        with torch.no_grad():
            if _is_full(trained.config):
                logits = sliding_window_logits(trained.network, image, trained.config.data.crop_size_voxels)
            else:
                logits = trained.network(image)
        masks = scored_regions((logits > 0)[0], trained.coding, row.runs[0].config.train.score)  # sigmoid(x) > 0.5
        found[row.model] = (as_numpy(masks), case_dice(name, masks, truth))
    assert truth is not None
    return Predictions(name, as_numpy(image[0, 0]), as_numpy(truth), found)


def _is_full(config: Config) -> bool:
    return config.train.validation == "full_volume"


def draw_predictions(predictions: Predictions, path: Path) -> None:
    """Truth in the first row, a model in each of the others; axial slices through the tumour."""
    truth = predictions.truth_RXYZ
    extent = np.flatnonzero(truth.any(axis=(0, 1, 2)))
    slices = np.quantile(extent if len(extent) else [truth.shape[3] // 2], np.linspace(0, 1, SLICES + 2)[1:-1])
    shown = {"truth": ("truth", truth)}
    for model, (masks, counts) in predictions.of_models.items():
        dice = [percent(None if math.isnan(value) else value) for value in counts.dice()]
        scores = "  ".join(f"{region} {value}" for region, value in zip(REGIONS, dice))
        shown[model] = (f"{NETWORKS[model].title}   Dice {scores}", masks)
    size = (2.2 * SLICES, 2.65 * len(shown) + 0.5)
    figure, rows = plt.subplots(len(shown), SLICES, figsize=size, layout="constrained", squeeze=False)
    for row, (title, masks) in zip(rows, shown.values()):
        for axis, z in zip(row, slices.astype(int)):
            show_slice(axis, predictions.scan_XYZ[..., z], masks[..., z])
            axis.set_xlabel(f"slice {z}", fontsize=8)
        row[SLICES // 2].set_title(title, fontsize=10)
    figure.suptitle(caption(predictions.name), fontsize=11)
    legend(figure)
    save(figure, path)
