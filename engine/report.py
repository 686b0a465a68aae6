"""What a person looks at after a run: pictures, and one page that holds them all.

    curves.png      loss, mean Dice and the Dice of the three regions, by epoch
    samples.png     the modalities of one training crop, and its regions
    prediction.png  a validation case: scan, truth, prediction
    report.html     the pictures, the table and the configuration, in one file without links

Slices are axial and shown as radiologists do: the patient's right on the left, anterior at the top.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import yaml

from engine.progress import percent
from pipelines.labels import REGIONS

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

COLOURS = {"TC": "#e69f00", "WT": "#56b4e9", "ET": "#d55e00"}  # of Okabe and Ito: told apart by every eye
CAPTIONS = {
    "curves.png": "Training loss and validation Dice by epoch",
    "prediction.png": "A validation case, with the best weights",
    "samples.png": "A training crop, as the network sees it",
}
SCAN_TITLES = {"flair": "FLAIR", "t1": "T1", "t1c": "T1 contrast", "t2": "T2"}


def draw_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Loss and Dice by epoch.

    Args:
        history: rows of `log.csv`, in order of epoch. path: the PNG.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    epochs = [row["epoch"] for row in history]
    left.plot(epochs, [row["loss"] for row in history], color="black", label="Dice + CE")
    left.plot(epochs, [row["dice_loss"] for row in history], color="#0072b2", lw=1, label="Dice term")
    left.plot(epochs, [row["ce_loss"] for row in history], color="#cc79a7", lw=1, label="cross-entropy")
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    validated = [row for row in history if "val_mean" in row]
    lines = {"mean": "black", **COLOURS}
    for name, colour in lines.items():
        points = [(row["epoch"], 100 * row[f"val_{name}"]) for row in validated if row[f"val_{name}"] is not None]
        if points:
            label = f"{name} {points[-1][1]:.1f}"
            right.plot(*zip(*points), color=colour, marker="o", ms=3, lw=2 if name == "mean" else 1.2, label=label)
    right.set(xlabel="epoch", ylabel="validation Dice (%)", ylim=(0, 100))
    for axes in (left, right):
        axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def draw_sample(image_CXYZ: np.ndarray, regions_RXYZ: np.ndarray, modalities: Sequence[str], path: Path) -> None:
    """One training crop: each modality, then the regions on the first of them.

    Args:
        image_CXYZ: as the network sees it, float32 (C, X, Y, Z). regions_RXYZ: bool (3, X, Y, Z).
        modalities: names of the C channels. path: the PNG.
    """
    z = _fullest_slice(regions_RXYZ)
    figure, axes = plt.subplots(
        1, len(modalities) + 1, figsize=(2.6 * (len(modalities) + 1), 3.4), layout="constrained"
    )
    for axis, channel, name in zip(axes, image_CXYZ, modalities):
        _show(axis, channel[..., z], title=SCAN_TITLES.get(name, name))
    _show(axes[-1], image_CXYZ[0][..., z], regions_RXYZ[..., z], "regions")
    _legend(figure)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


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
    figure, rows = plt.subplots(len(slices), 3, figsize=(8.4, 2.9 * len(slices)), layout="constrained", squeeze=False)
    for row, z in zip(rows, slices):
        _show(row[0], scan_XYZ[..., z], title="scan")
        _show(row[1], scan_XYZ[..., z], truth_RXYZ[..., z], "truth")
        _show(row[2], scan_XYZ[..., z], prediction_RXYZ[..., z], "prediction")
        row[0].set_ylabel(f"slice {z}")
    scores = "  ".join(f"{region} {percent(None if np.isnan(d) else d)}" for region, d in zip(REGIONS, dice))
    figure.suptitle(f"{name}   Dice {scores}", fontsize=11)
    _legend(figure)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def write_html(run_dir: Path, config: dict[str, Any], summary: dict[str, Any], pictures: Sequence[str]) -> Path:
    """Write `report.html` from what lies in the run folder.

    Args:
        run_dir: of the run. config: as plain values. summary: as in `metrics.json`.
        pictures: names of PNG files in `run_dir`, keys of `CAPTIONS`.
    """
    figures = "\n".join(
        f'<figure><figcaption class="note">{CAPTIONS[name]}</figcaption><img alt="{name}" src="data:image/png;base64,'
        f'{base64.b64encode((run_dir / name).read_bytes()).decode()}"></figure>'
        for name in pictures
    )
    title = f"glioforge: {run_dir.name}"
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
img {{ max-width: 100%; }}
figure {{ margin: 1.5rem 0; }}
pre {{ overflow-x: auto; background: #f5f5f5; padding: 1rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; }} .note {{ color: #555; font-size: .9rem; }}
@media (max-width: 30rem) {{ th, td {{ padding: .3rem .4rem; }} h1 {{ font-size: 1.4rem; }} }}
@media print {{ pre {{ white-space: pre-wrap; }} }}
</style></head><body>
<h1>{html.escape(title)}</h1>
{_dice_table(summary)}
<p class="note">{html.escape(summary["definition"])}. Validated on: {summary["validated_on"].replace("_", " ")}.</p>
{figures}
<h2>Configuration</h2>
<pre>{html.escape(yaml.safe_dump(config, sort_keys=False, default_flow_style=None))}</pre>
</body></html>
"""
    path = run_dir / "report.html"
    path.write_text(page)
    return path


def _dice_table(summary: dict[str, Any]) -> str:
    def row(title: str, scores: dict[str, Any]) -> str:
        if scores["epoch"] is None:
            return ""
        cells = "".join(f"<td>{percent(scores.get(name))}</td>" for name in ("mean", *REGIONS))
        return f"<tr><td>{title}, epoch {scores['epoch']}</td>{cells}<td>{scores.get('cases', 0)}</td></tr>"

    empty = [
        f"{region}: {count} of the cases have none; false positives in {summary['last']['false_positives'][region]}"
        for region, count in summary["last"].get("empty_truths", {}).items()
        if count
    ]
    head = "".join(f"<th>{name}</th>" for name in ("mean", *REGIONS))
    return (
        f"<table><tr><th>validation Dice (%)</th>{head}<th>cases</th></tr>"
        f"{row('best', summary['best'])}{row('last', summary['last'])}</table>"
        f'<p class="note">{html.escape("; ".join(empty))}</p>'
    )


def _fullest_slice(regions_RXYZ: np.ndarray) -> int:
    area = regions_RXYZ.any(axis=0).sum(axis=(0, 1))
    return int(area.argmax()) if area.any() else regions_RXYZ.shape[-1] // 2


def _show(axis: Axes, slice_XY: np.ndarray, regions_RXY: np.ndarray | None = None, title: str = "") -> None:
    """Draw one axial slice in grey, black outside the head; a voxel of several regions has the innermost's colour."""
    values, counts = np.unique(slice_XY, return_counts=True)
    outside = slice_XY == values[counts.argmax()]  # the one value that repeats: 0, or what jitter made of it
    inside = slice_XY[~outside]
    low, high = np.percentile(inside, [1, 99]) if inside.size else (0.0, 1.0)
    grey = np.clip((slice_XY - low) / max(float(high - low), 1e-6), 0, 1)
    picture = np.repeat(np.where(outside, 0, grey)[..., None], 3, axis=-1)
    if regions_RXY is not None:
        plain = picture.copy()
        for region in ("WT", "TC", "ET"):
            mask = regions_RXY[REGIONS.index(region)]
            picture[mask] = 0.4 * plain[mask] + 0.6 * np.array(to_rgb(COLOURS[region]))
    axis.imshow(picture.transpose(1, 0, 2), origin="lower", interpolation="nearest")
    axis.invert_xaxis()
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=10)


def _legend(figure: Any) -> None:
    names = {"WT": "whole tumour", "TC": "tumour core", "ET": "enhancing tumour"}
    handles = [Line2D([], [], marker="s", ls="", color=COLOURS[key], label=text) for key, text in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's values on the host."""
    return tensor.detach().cpu().numpy()
