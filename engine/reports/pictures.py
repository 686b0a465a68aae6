"""The pictures of a run.

    curves.png      loss, mean Dice and the Dice of the three regions, by epoch
    samples.png     the modalities of one training crop, and its regions
    prediction.png  a validation case: scan, truth, prediction
    best-1.png ...  a case in three planes, truth and prediction as outlines; worst-1.png ... likewise

Slices are shown as radiologists do: the patient's right on the left, anterior at the top of an axial slice and on the
left of a sagittal one.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from engine.progress import percent
from pipelines.basics.atomic import replacing
from pipelines.basics.text import printable
from pipelines.labels import REGIONS

matplotlib.use("Agg")
matplotlib.rcParams.update({"text.parse_math": False, "text.usetex": False})  # a name may hold $, and is no formula
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.patheffects import withStroke  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

COLOURS = {"TC": "#e69f00", "WT": "#56b4e9", "ET": "#d55e00"}  # of Okabe and Ito: told apart by every eye
NAMES = {"WT": "whole tumour", "TC": "tumour core", "ET": "enhancing tumour"}  # from the outside in
SCAN_TITLES = {"flair": "FLAIR", "t1": "T1", "t1c": "T1 contrast", "t2": "T2"}
DPI = 160  # of figures some 6 inches wide, whose letters can be read on a phone too
MARGIN = 2  # voxels around the head
LINE = 60  # characters of a name above a picture
TRUTH: dict[str, Any] = {"linewidths": 1.2, "linestyles": "solid"}
PREDICTION: dict[str, Any] = {"linewidths": 0.9, "linestyles": "dashed"}


def draw_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Loss and Dice by epoch.

    Args:
        history: rows of `log.csv`, in order of epoch. path: the PNG.
    """
    figure, (above, below) = plt.subplots(2, 1, figsize=(6, 7), layout="constrained")
    epochs = [row["epoch"] for row in history]
    above.plot(epochs, [row["loss"] for row in history], color="black", label="Dice + CE")
    above.plot(epochs, [row["dice_loss"] for row in history], color="#0072b2", lw=1, label="Dice term")
    above.plot(epochs, [row["ce_loss"] for row in history], color="#cc79a7", lw=1, label="cross-entropy")
    above.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    validated = [row for row in history if "val_mean" in row]
    lines = {"mean": "black", **COLOURS}
    for name, colour in lines.items():
        points = [(row["epoch"], 100 * row[f"val_{name}"]) for row in validated if row[f"val_{name}"] is not None]
        if points:
            label = f"{name} {points[-1][1]:.1f}"
            below.plot(*zip(*points), color=colour, marker="o", ms=3, lw=2 if name == "mean" else 1.2, label=label)
    below.set(xlabel="epoch", ylabel="validation Dice (%)", ylim=(0, 100))
    for axes in (above, below):
        axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    save(figure, path)


def draw_sample(image_CXYZ: np.ndarray, regions_RXYZ: np.ndarray, modalities: Sequence[str], path: Path) -> None:
    """One training crop: each modality, then the regions on the first of them.

    Args:
        image_CXYZ: as the network sees it, float32 (C, X, Y, Z). regions_RXYZ: bool (3, X, Y, Z).
        modalities: names of the C channels. path: the PNG.
    """
    z = _fullest_slice(regions_RXYZ)
    count = len(modalities) + 1
    columns = min(count, 3)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.2 * columns, 2.4 * rows + 0.3), layout="constrained")
    for axis, channel, name in zip(axes.flat, image_CXYZ, modalities):
        show_slice(axis, channel[..., z], title=SCAN_TITLES.get(name, name))
    show_slice(axes.flat[count - 1], image_CXYZ[0][..., z], regions_RXYZ[..., z], "regions")
    for axis in axes.flat[count:]:
        axis.axis("off")
    legend(figure)
    save(figure, path)


def draw_prediction(
    name: str,
    scan_XYZ: np.ndarray,
    truth_RXYZ: np.ndarray,
    prediction_RXYZ: np.ndarray,
    dice: Sequence[float],
    path: Path,
) -> None:
    """A validation case in three axial slices through its tumour: scan, truth, prediction.

    Args:
        name: of the case. scan_XYZ: one modality. truth_RXYZ, prediction_RXYZ: bool (3, X, Y, Z).
        dice: of the three regions, NaN where the truth is empty. path: the PNG.
    """
    extent = np.flatnonzero(truth_RXYZ.any(axis=(0, 1, 2)))
    middle = scan_XYZ.shape[2] // 2
    slices = np.quantile(extent, [0.25, 0.5, 0.75]).astype(int) if len(extent) else np.array([middle])
    figure, rows = plt.subplots(
        len(slices), 3, figsize=(6.6, 2.25 * len(slices) + 0.5), layout="constrained", squeeze=False
    )
    for row, z in zip(rows, slices):
        for axis, regions in zip(row, (None, truth_RXYZ, prediction_RXYZ)):
            show_slice(axis, scan_XYZ[..., z], None if regions is None else regions[..., z])
        row[0].set_ylabel(f"slice {z}")
    for axis, title in zip(rows[0], ("scan", "truth", "prediction")):
        axis.set_title(title, fontsize=10)
    figure.suptitle(f"{caption(name)}\nDice {_scores(dice)}", fontsize=11)
    legend(figure)
    save(figure, path)


def draw_case(
    name: str,
    scan_XYZ: np.ndarray,
    truth_RXYZ: np.ndarray,
    prediction_RXYZ: np.ndarray,
    dice: Sequence[float],
    spacing_mm: Sequence[float],
    path: Path,
) -> None:
    """A case in the axial, coronal and sagittal slice with most tumour; truth and prediction are outlines on the scan.

    The three share one scale in mm; what is empty around head and outlines is left out. Without a tumour in the truth
    that of the prediction counts, else the middle.

    Args:
        name: of the case. scan_XYZ: one modality. truth_RXYZ, prediction_RXYZ: bool (3, X, Y, Z).
        dice: of the three regions, NaN where the truth is empty. spacing_mm: of the voxels along X, Y and Z.
        path: the PNG.
    """
    box = _filled_box(scan_XYZ, truth_RXYZ, prediction_RXYZ)
    scan_XYZ, truth_RXYZ, prediction_RXYZ = (volume[..., *box] for volume in (scan_XYZ, truth_RXYZ, prediction_RXYZ))
    width, depth, height = np.multiply(scan_XYZ.shape, spacing_mm)
    scale = 5.5 / (width + depth)  # inches per mm
    figure, axes = plt.subplots(
        2,
        2,
        figsize=(5.5, scale * (depth + height) + 1),
        width_ratios=[width, depth],
        height_ratios=[depth, height],
        layout="constrained",
    )
    tumour_RXYZ = truth_RXYZ if truth_RXYZ.any() else prediction_RXYZ
    planes = (("axial", 2, "R", axes[0, 0]), ("coronal", 1, "R", axes[1, 0]), ("sagittal", 0, "A", axes[1, 1]))
    for plane, across, left, axis in planes:
        index = _fullest_slice(tumour_RXYZ, across)
        scan, truth, prediction = (
            np.take(volume, index, volume.ndim - 3 + across) for volume in (scan_XYZ, truth_RXYZ, prediction_RXYZ)
        )
        show_slice(axis, scan, title=f"{plane}, slice {box[across].start + index}")
        x, y = np.delete(spacing_mm, across)
        axis.set_aspect(y / x)
        axis.text(0.02, 0.98, left, color="white", fontsize=9, va="top", transform=axis.transAxes)
        for masks, style in ((truth, TRUTH), (prediction, PREDICTION)):
            _outline(axis, masks, style)
    axes[0, 1].axis("off")
    axes[0, 1].legend(handles=_outline_handles(), loc="center", frameon=False, fontsize=10, handlelength=3)
    figure.suptitle(f"{caption(name)}\nDice {_scores(dice)}", fontsize=11)
    save(figure, path)


def _filled_box(scan_XYZ: np.ndarray, *masks_RXYZ: np.ndarray) -> tuple[slice, slice, slice]:
    """The part of a volume that holds head and masks, with a margin; all of it where it has no empty corner."""
    filled = scan_XYZ != scan_XYZ[0, 0, 0]
    for mask in masks_RXYZ:
        filled |= mask.any(axis=0)
    if not filled.any():
        filled[...] = True
    indices = (np.flatnonzero(filled.any(axis=other)) for other in ((1, 2), (0, 2), (0, 1)))
    x, y, z = (slice(max(int(found[0]) - MARGIN, 0), int(found[-1]) + MARGIN + 1) for found in indices)
    return x, y, z


def _scores(dice: Sequence[float]) -> str:
    return "  ".join(f"{region} {percent(None if np.isnan(d) else d)}" for region, d in zip(REGIONS, dice))


def _outline(axis: Axes, regions_RXY: np.ndarray, style: dict[str, Any]) -> None:
    """Outline each region of a slice that `show_slice` drew, with a dark rim that keeps it legible on any grey."""
    for region in NAMES:
        mask = regions_RXY[REGIONS.index(region)]
        if mask.any() and not mask.all():
            lines = axis.contour(mask.T.astype(float), [0.5], colors=[COLOURS[region]], **style)
            lines.set_path_effects([withStroke(linewidth=style["linewidths"] + 0.6, foreground="black")])


def _outline_handles() -> list[Line2D]:
    regions = [Line2D([], [], lw=4, color=COLOURS[key], label=f"{text} ({key})") for key, text in NAMES.items()]
    styles = [
        Line2D([], [], color="black", lw=style["linewidths"], ls=style["linestyles"], label=label)
        for style, label in ((TRUTH, "truth"), (PREDICTION, "prediction"))
    ]
    return regions + styles


def _fullest_slice(regions_RXYZ: np.ndarray, across: int = 2) -> int:
    """Index along a spatial axis (0 sagittal, 1 coronal, 2 axial) of the slice with most voxels of any region."""
    within = tuple({0, 1, 2} - {across})
    area = regions_RXYZ.any(axis=0).sum(axis=within)
    return int(area.argmax()) if area.any() else regions_RXYZ.shape[1 + across] // 2


def show_slice(axis: Axes, slice_XY: np.ndarray, regions_RXY: np.ndarray | None = None, title: str = "") -> None:
    """Draw a slice of an image in RAS order in grey, black outside the head, as radiologists see it.

    Args:
        axis: to draw on; ticks are taken away.
        slice_XY: an axial slice; coronal (X, Z) and sagittal (Y, Z) ones are shown rightly, too.
        regions_RXY: bool (3, X, Y), laid over it; a voxel of several regions has the innermost's colour. None: none.
        title: above it.
    """
    values, counts = np.unique(slice_XY, return_counts=True)
    outside = slice_XY == values[counts.argmax()]  # the one value that repeats: 0, or what jitter made of it
    inside = slice_XY[~outside]
    low, high = np.percentile(inside, [1, 99]) if inside.size else (0.0, 1.0)
    grey = np.clip((slice_XY - low) / max(float(high - low), 1e-6), 0, 1)
    picture = np.repeat(np.where(outside, 0, grey)[..., None], 3, axis=-1)
    if regions_RXY is not None:
        plain = picture.copy()
        for region in NAMES:
            mask = regions_RXY[REGIONS.index(region)]
            picture[mask] = 0.4 * plain[mask] + 0.6 * np.array(to_rgb(COLOURS[region]))
    axis.imshow(picture.transpose(1, 0, 2), origin="lower", interpolation="nearest")
    axis.invert_xaxis()
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=10)


def caption(name: str) -> str:
    """A name as it stands over a picture: as it is, on lines that are no wider than the picture."""
    return "\n".join(textwrap.wrap(printable(name), LINE, break_on_hyphens=False))


def legend(figure: Figure) -> None:
    """Name the colours of the regions below the figure."""
    handles = [Line2D([], [], marker="s", ls="", color=COLOURS[key], label=text) for key, text in NAMES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, and forget it. Raises OSError."""
    try:
        with replacing(path, "wb") as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for it; the report has the name
            figure.savefig(file, dpi=DPI, bbox_inches="tight")
    finally:
        plt.close(figure)


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's values on the host; of bfloat16, which NumPy does not know, in float32."""
    values = tensor.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
