"""Pictures show what they claim: they are read back, not only written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from engine.reports.pictures import COLOURS, as_numpy, draw_case, draw_curves, draw_prediction, draw_sample, draw_slice
from pipelines.basics.text import printable

ROW = {"epoch": 1, "step": 2, "loss": 1.5, "dice_loss": 1.0, "ce_loss": 0.5}


def colours(path: Path) -> set[tuple[int, int, int]]:
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    return {tuple(pixel) for pixel in pixels.reshape(-1, 3)[::7].tolist()}


def masks(shape: tuple[int, int, int]) -> np.ndarray:
    regions = np.zeros((3, *shape), bool)
    regions[1, 4:12, 4:12, 2:7] = True
    regions[0, 6:10, 6:10, 3:6] = True
    regions[2, 7:9, 7:9, 4:6] = True
    return regions


def test_curves_survive_a_region_that_no_case_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = kept(monkeypatch)
    validated = ROW | {"epoch": 2, "val_mean": 0.5, "val_TC": None, "val_WT": 0.6, "val_ET": 0.4}
    draw_curves([ROW, validated], tmp_path / "curves.png")
    found = colours(tmp_path / "curves.png")
    assert (86, 180, 233) in found and (230, 159, 0) not in found  # WT drawn, TC not
    low, high = figures[0].axes[0].get_ylim()
    assert low == 0 and high > ROW["loss"]


def test_a_sample_shows_every_modality_and_region(tmp_path: Path) -> None:
    image = np.random.default_rng(0).normal(size=(2, 16, 16, 8)).astype(np.float32)
    draw_sample(image, masks((16, 16, 8)), ("flair", "t1c"), tmp_path / "samples.png")
    draw_sample(image, np.zeros((3, 16, 16, 8), bool), ("flair", "t1c"), tmp_path / "plain.png")
    coloured = {c for c in colours(tmp_path / "samples.png") - colours(tmp_path / "plain.png") if max(c) - min(c) > 40}
    assert coloured


def test_bfloat16_crops_can_be_drawn() -> None:
    np.testing.assert_array_equal(as_numpy(torch.tensor([1.5, -2.0], dtype=torch.bfloat16)), [1.5, -2.0])
    assert as_numpy(torch.tensor([True])).dtype == bool


def test_empty_truths_and_dark_scans_are_drawn(tmp_path: Path) -> None:
    scan, empty = np.zeros((16, 16, 8), np.float32), np.zeros((3, 16, 16, 8), bool)
    draw_prediction("dark", scan, empty, empty, [float("nan")] * 3, tmp_path / "prediction.png")
    assert (tmp_path / "prediction.png").stat().st_size > 0


NAMES = ("$1_2_$", r"$\\frac{$", "caf\udce9\n\x1b[31m", "\u5bb6 <b>", "x" * 230)


@pytest.mark.filterwarnings("error")
def test_a_name_above_a_picture_is_unchanged_and_no_wider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No formula, no TeX and no missing glyph fails, whatever a user's matplotlibrc says."""
    figures = kept(monkeypatch)
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    scan, empty = np.ones((16, 16, 8), np.float32), np.zeros((3, 16, 16, 8), bool)
    for name in NAMES:
        path = tmp_path / "one.png"
        draw_prediction(name, scan, empty, empty, [0.5] * 3, path)
        draw_case(name, scan, empty, empty, [0.5] * 3, (1, 1, 1), path)
        assert matplotlib.image.imread(path).shape[1] < 1300
        for figure in figures[-2:]:
            (*lines, dice) = figure.get_suptitle().split("\n")
            assert "".join(lines) == printable(name) and dice == "Dice TC 50.0  WT 50.0  ET 50.0"
            title = figure._suptitle  # type: ignore[attr-defined]
            assert not title.get_parse_math() and not title.get_usetex()
    assert matplotlib.rcParams["text.usetex"] and matplotlib.rcParams["text.parse_math"]


def test_drawing_leaves_the_process_its_backend_and_windows(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom engine.reports.pictures import draw_curves\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"draw_curves([{ROW}], Path(sys.argv[1]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "curves.png")], check=True)
    assert (tmp_path / "curves.png").stat().st_size > 0


def kept(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures as they were written."""
    figures: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, *args: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def outlines(figure: Figure, plane: str, region: str, dashed: bool) -> tuple[float, ...] | None:
    """Left, bottom, right and top of a region's outlines in a plane, in voxels; None if it has none."""
    axis = next(axis for axis in figure.axes if axis.get_title().startswith(plane))
    lines: Any
    for lines in axis.collections:  # contours of one colour and style each
        (_, dashes), colour = lines.get_linestyle()[0], lines.get_edgecolor()[0]
        if (dashes is not None) == dashed and to_hex(colour) == COLOURS[region]:
            points = np.concatenate([path.vertices for path in lines.get_paths()])
            return *points.min(0).tolist(), *points.max(0).tolist()
    return None


def test_a_case_is_outlined_in_three_planes_through_the_fullest_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = kept(monkeypatch)
    shape = (20, 24, 10)
    truth, prediction = np.zeros((2, 3, *shape), bool)
    truth[1, 4:9, 10:20, 2:8] = True  # fullest in each plane: its middle, where a voxel is added
    truth[1, 6, 9, 4] = True
    prediction[1, 5:11, 10:20, 3:8] = True
    scan = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    draw_case("one", scan, truth, prediction, [float("nan"), 0.5, float("nan")], (1.0, 1.0, 3.0), tmp_path / "one.png")
    (figure,) = figures
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["axial, slice 4", "coronal, slice 10", "sagittal, slice 6"]
    assert outlines(figure, "axial", "WT", dashed=False) == (3.5, 8.5, 8.5, 19.5)
    assert outlines(figure, "axial", "WT", dashed=True) == (4.5, 9.5, 10.5, 19.5)
    assert outlines(figure, "coronal", "WT", dashed=False) == (3.5, 1.5, 8.5, 7.5)
    assert outlines(figure, "sagittal", "WT", dashed=True) == (9.5, 2.5, 19.5, 7.5)
    assert outlines(figure, "axial", "ET", dashed=False) is None
    assert "TC n/a  WT 50.0  ET n/a" in figure.get_suptitle()
    assert (86, 180, 233) in colours(tmp_path / "one.png")


def test_the_planes_of_a_case_keep_the_proportions_of_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = kept(monkeypatch)
    scan, empty = np.zeros((16, 24, 8), np.float32), np.zeros((3, 16, 24, 8), bool)
    draw_case("dark", scan, empty, empty, [float("nan")] * 3, (1.5, 2.0, 3.0), tmp_path / "dark.png")
    boxes = {axis.get_title().split(",")[0]: axis.get_window_extent() for axis in figures[0].axes if axis.get_title()}
    assert list(boxes) == ["axial", "coronal", "sagittal"]
    pixels_per_mm = boxes["axial"].width / 24
    for plane, size_mm in {"axial": (24, 48), "coronal": (24, 24), "sagittal": (48, 24)}.items():
        assert np.divide(boxes[plane].size, pixels_per_mm) == pytest.approx(size_mm, rel=0.02), plane


def test_pictures_are_cropped_to_the_head_and_slices_keep_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = kept(monkeypatch)
    scan, truth, prediction = np.zeros((40, 40, 40), np.float32), *np.zeros((2, 3, 40, 40, 40), bool)
    scan[10:30, 8:30, 12:30] = 1 + np.random.default_rng(0).random((20, 22, 18))
    truth[1, 15:18, 15:18, 15:18] = True
    prediction[1, 15:33, 15:18, 15:18] = True  # reaches out of the head
    draw_case("one", scan, truth, prediction, [float("nan"), 0.5, float("nan")], (1, 1, 1), tmp_path / "one.png")
    shown = [axis for axis in figures[0].axes if axis.get_title()]
    planes = {axis.get_title(): np.asarray(axis.images[0].get_array()).shape[:2] for axis in shown}
    assert planes == {"axial, slice 15": (26, 27), "coronal, slice 15": (22, 27), "sagittal, slice 15": (22, 26)}
    assert outlines(figures[0], "axial", "WT", dashed=False) == (6.5, 8.5, 9.5, 11.5)


def test_if_the_truth_is_empty_slices_go_through_the_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = kept(monkeypatch)
    scan = np.random.default_rng(0).normal(size=(16, 16, 8)).astype(np.float32)
    empty = np.zeros((3, *scan.shape), bool)
    prediction = empty.copy()
    prediction[1, 3, 12, 6] = True
    draw_case("false", scan, empty, prediction, [float("nan")] * 3, (1, 1, 1), tmp_path / "false.png")
    titles = [axis.get_title() for axis in figures[0].axes if axis.get_title()]
    assert titles == ["axial, slice 6", "coronal, slice 12", "sagittal, slice 3"]


def test_the_patients_right_is_on_the_left_and_anterior_at_the_top() -> None:
    regions = np.zeros((3, 4, 6), bool)
    regions[1, 3, 5] = True  # RAS: the last voxel is the most right and the most anterior
    figure = Figure()
    axis = figure.subplots()
    draw_slice(axis, np.random.default_rng(0).normal(size=(4, 6)), regions)
    figure.draw_without_rendering()
    shown = np.asarray(axis.images[0].get_array())
    row, column = np.argwhere(np.ptp(shown, axis=-1) > 0.1)[0]
    place = axis.transAxes.inverted().transform(axis.transData.transform((column, row)))
    assert place[0] < 0.2 and place[1] > 0.8
