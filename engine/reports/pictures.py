"""The pictures of a run.

    curves.png      loss, mean Dice and the Dice of the three regions, by epoch
    samples.png     the modalities of one training crop, and its regions
    prediction.png  a validation case: scan, truth, prediction
    best-1.png ...  a case in three planes, truth and prediction as outlines; worst-1.png ... likewise

Slices are shown as radiologists do: the patient's right on the left, anterior at the top of an axial slice and on the
left of a sagittal one. Each picture is a figure of its own, which leaves matplotlib's settings and windows alone.
"""

from __future__ import annotations

import contextlib
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine.progress import dice_text
from pipelines.basics.atomic import replacing
from pipelines.basics.lazy import Lazy
from pipelines.basics.text import printable
from pipelines.layouts.labels import REGIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

matplotlib, colors, figures, lines, patheffects, ticker = (
    Lazy(f"matplotlib{part}") for part in ("", ".colors", ".figure", ".lines", ".patheffects", ".ticker")
)
COLOURS = {"TC": "#e69f00", "WT": "#56b4e9", "ET": "#d55e00"}  # of Okabe and Ito: distinct to colour-blind readers too
NAMES = {"WT": "whole tumour", "TC": "tumour core", "ET": "enhancing tumour"}  # outermost first
SCAN_TITLES = {"flair": "FLAIR", "t1": "T1", "t1c": "T1 contrast", "t2": "T2"}
DPI = 160  # at some 6 inches wide, text is legible on a phone too
MARGIN = 2  # voxels around the head
LINE = 60  # characters of a name above a picture
TRUTH: dict[str, Any] = {"linewidths": 1.2, "linestyles": "solid"}
PREDICTION: dict[str, Any] = {"linewidths": 0.9, "linestyles": "dashed"}


def draw_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss and Dice by epoch.

    Args:
        history: rows of `log.csv`, in order of epoch. path: the PNG.
    """
    with picture(path, 6, 7) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        for name, label, style in (
            ("loss", "Dice + CE", {"color": "black"}),
            ("dice_loss", "Dice term", {"color": "#0072b2", "lw": 1}),
            ("ce_loss", "cross-entropy", {"color": "#cc79a7", "lw": 1}),
        ):
            above.plot(*points(history, name), label=label, **style)
        for name, colour in {"mean": "black", **COLOURS}.items():
            epochs, dice = points(history, f"val_{name}", 100)
            if dice:
                width = 2 if name == "mean" else 1.2
                below.plot(epochs, dice, color=colour, marker="o", ms=3, lw=width, label=f"{name} {dice[-1]:.1f}")
        finish_curves(above, below)
        above.set_xlim(history[0]["epoch"] - 0.5, history[-1]["epoch"] + 0.5)
        for axes in (above, below):
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False)


def draw_sample(image_CXYZ: np.ndarray, regions_RXYZ: np.ndarray, modalities: Sequence[str], path: Path) -> None:
    """One training crop: each modality, then the regions on the first of them.

    Args:
        image_CXYZ: as the network sees it, float32 (C, X, Y, Z). regions_RXYZ: bool (3, X, Y, Z).
        modalities: names of the C channels. path: the PNG.
    """
    z = _fullest_slice(regions_RXYZ)
    columns = min(len(modalities) + 1, 3)
    rows = len(modalities) // columns + 1
    with picture(path, 2.2 * columns, 2.4 * rows + 0.3) as figure:
        axes = iter(figure.subplots(rows, columns).flat)
        for channel, name in zip(image_CXYZ, modalities):
            draw_slice(next(axes), channel[..., z], title=SCAN_TITLES.get(name, name))
        draw_slice(next(axes), image_CXYZ[0][..., z], regions_RXYZ[..., z], "regions")
        for axis in axes:
            axis.axis("off")
        add_region_legend(figure)


def draw_prediction(
    name: str,
    scan_XYZ: np.ndarray,
    truth_RXYZ: np.ndarray,
    prediction_RXYZ: np.ndarray,
    dice: Sequence[float],
    path: Path,
) -> None:
    """A validation case in three axial slices through its tumour: scan, truth, prediction. Arguments as `draw_case`."""
    slices = tumour_slices(truth_RXYZ)
    with picture(path, 6.6, 2.25 * len(slices) + 0.5) as figure:
        rows = figure.subplots(len(slices), 3, squeeze=False)
        for row, z in zip(rows, slices):
            for axis, regions in zip(row, (None, truth_RXYZ, prediction_RXYZ)):
                draw_slice(axis, scan_XYZ[..., z], None if regions is None else regions[..., z])
            row[0].set_ylabel(f"slice {z}")
        for axis, title in zip(rows[0], ("scan", "truth", "prediction")):
            axis.set_title(title, fontsize=10)
        figure.suptitle(f"{wrapped(name)}\nDice {dice_text(dice)}", fontsize=11)
        add_region_legend(figure)


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

    The three share one scale in mm and are cropped to head and outlines. If the truth has no tumour, the slices are
    those with most predicted tumour, or else the middle ones.

    Args:
        name: of the case. scan_XYZ: one modality. truth_RXYZ, prediction_RXYZ: bool (3, X, Y, Z).
        dice: of the three regions, NaN where the truth is empty. spacing_mm: of the voxels along X, Y and Z.
        path: the PNG.
    """
    box = _filled_box(scan_XYZ, truth_RXYZ, prediction_RXYZ)
    scan_XYZ, truth_RXYZ, prediction_RXYZ = (volume[..., *box] for volume in (scan_XYZ, truth_RXYZ, prediction_RXYZ))
    width, depth, height = np.multiply(scan_XYZ.shape, spacing_mm)
    scale = 5.5 / (width + depth)  # inches per mm
    tumour_RXYZ = truth_RXYZ if truth_RXYZ.any() else prediction_RXYZ
    with picture(path, 5.5, scale * (depth + height) + 1) as figure:
        axes = figure.subplots(2, 2, width_ratios=[width, depth], height_ratios=[depth, height])
        planes = (("axial", 2, "R", axes[0, 0]), ("coronal", 1, "R", axes[1, 0]), ("sagittal", 0, "A", axes[1, 1]))
        for plane, across, left, axis in planes:
            index = _fullest_slice(tumour_RXYZ, across)
            scan, truth, prediction = (
                np.take(volume, index, volume.ndim - 3 + across) for volume in (scan_XYZ, truth_RXYZ, prediction_RXYZ)
            )
            draw_slice(axis, scan, title=f"{plane}, slice {box[across].start + index}")
            x, y = np.delete(spacing_mm, across)
            axis.set_aspect(y / x)
            axis.text(0.02, 0.98, left, color="white", fontsize=9, va="top", transform=axis.transAxes)
            for masks, style in ((truth, TRUTH), (prediction, PREDICTION)):
                _outline(axis, masks, style)
        _outline_legend(axes[0, 1])
        figure.suptitle(f"{wrapped(name)}\nDice {dice_text(dice)}", fontsize=11)


def _filled_box(scan_XYZ: np.ndarray, *masks_RXYZ: np.ndarray) -> tuple[slice, slice, slice]:
    """The part of a volume that holds masks and head (all that differs from the first corner), with a margin."""
    filled = (scan_XYZ != scan_XYZ[0, 0, 0]) | np.concatenate(masks_RXYZ).any(axis=0)
    filled |= not filled.any()
    indices = (np.flatnonzero(filled.any(axis=other)) for other in ((1, 2), (0, 2), (0, 1)))
    x, y, z = (slice(max(int(found[0]) - MARGIN, 0), int(found[-1]) + MARGIN + 1) for found in indices)
    return x, y, z


def _outline(axis: Axes, regions_RXY: np.ndarray, style: dict[str, Any]) -> None:
    """Outline each region of a slice, with a dark rim that keeps it legible on any grey."""
    for region in NAMES:
        mask = regions_RXY[REGIONS.index(region)]
        if mask.any() and not mask.all():
            outline = axis.contour(mask.T.astype(float), [0.5], colors=[COLOURS[region]], **style)
            outline.set_path_effects([patheffects.withStroke(linewidth=style["linewidths"] + 0.6, foreground="black")])


def _outline_legend(axis: Axes) -> None:
    """Colours of the regions, and how truth and prediction are drawn, in place of a plot."""
    handles = [lines.Line2D([], [], lw=4, color=COLOURS[key], label=f"{text} ({key})") for key, text in NAMES.items()]
    for style, label in ((TRUTH, "truth"), (PREDICTION, "prediction")):
        handles.append(lines.Line2D([], [], color="black", lw=style["linewidths"], ls=style["linestyles"], label=label))
    axis.axis("off")
    axis.legend(handles=handles, loc="center", frameon=False, fontsize=10, handlelength=3)


def _fullest_slice(regions_RXYZ: np.ndarray, across: int = 2) -> int:
    """Index along a spatial axis (0 sagittal, 1 coronal, 2 axial) of the slice with most voxels of any region."""
    within = tuple({0, 1, 2} - {across})
    area = regions_RXYZ.any(axis=0).sum(axis=within)
    return int(area.argmax()) if area.any() else regions_RXYZ.shape[1 + across] // 2


def tumour_slices(regions_RXYZ: np.ndarray) -> list[int]:
    """Three axial slices through the tumour, at the quartiles of its extent; the middle slice if there is none."""
    extent = np.flatnonzero(regions_RXYZ.any(axis=(0, 1, 2)))
    if not len(extent):
        return [regions_RXYZ.shape[3] // 2]
    return np.quantile(extent, [0.25, 0.5, 0.75]).astype(int).tolist()


def draw_slice(axis: Axes, slice_XY: np.ndarray, regions_RXY: np.ndarray | None = None, title: str = "") -> None:
    """Draw a slice of an image in RAS order in grey, black outside the head, as radiologists see it.

    Args:
        axis: to draw on; its ticks are removed.
        slice_XY: an axial slice; coronal (X, Z) and sagittal (Y, Z) slices are oriented correctly too.
        regions_RXY: bool (3, X, Y), laid over it; a voxel in several regions has the innermost one's colour.
        title: above it.
    """
    values, counts = np.unique(slice_XY, return_counts=True)
    outside = slice_XY == values[counts.argmax()]  # the one value that repeats: 0, or what jitter made of it
    inside = slice_XY[~outside]
    low, high = np.percentile(inside, [1, 99]) if inside.size else (0.0, 1.0)
    grey = np.clip((slice_XY - low) / max(float(high - low), 1e-6), 0, 1)
    pixels = np.repeat(np.where(outside, 0, grey)[..., None], 3, axis=-1)
    if regions_RXY is not None:
        plain = pixels.copy()
        for region in NAMES:
            mask = regions_RXY[REGIONS.index(region)]
            pixels[mask] = 0.4 * plain[mask] + 0.6 * np.array(colors.to_rgb(COLOURS[region]))
    axis.imshow(pixels.transpose(1, 0, 2), origin="lower", interpolation="nearest")
    axis.invert_xaxis()
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=10)


def points(history: Sequence[Mapping[str, Any]], column: str, scale: float = 1) -> tuple[list[float], list[float]]:
    """Epochs and values of a column of `log.csv`, where it has one."""
    known = [row for row in history if row.get(column) is not None]
    return [row["epoch"] for row in known], [scale * row[column] for row in known]


def finish_curves(above: Axes, below: Axes) -> None:
    """Label and scale the axes of training loss and, below them, validation Dice in percent, once all is drawn."""
    above.set(ylabel="training loss", ylim=(0, None))
    below.set(xlabel="epoch", ylabel="validation Dice (%)", ylim=(0, 100))
    for axes in (above, below):
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)


def wrapped(name: str) -> str:
    """A name on lines that are no wider than a picture."""
    return "\n".join(textwrap.wrap(printable(name), LINE, break_on_hyphens=False))


def add_region_legend(figure: Figure) -> None:
    """Name the colours of the regions below the figure."""
    handles = [lines.Line2D([], [], marker="s", ls="", color=COLOURS[key], label=text) for key, text in NAMES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)


@contextlib.contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure to draw on, `width` x `height` inches, written as PNG when the block ends. Raises OSError."""
    # A name may contain $ and is not a formula, whatever the user's matplotlibrc says.
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}):
        figure = figures.Figure(figsize=(width, height), layout="constrained")
        yield figure
        with replacing(path, "wb") as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # shown as a box; the report has the name
            figure.savefig(file, dpi=DPI, bbox_inches="tight")


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's values on the host; bfloat16, which NumPy does not know, becomes float32."""
    values = tensor.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
