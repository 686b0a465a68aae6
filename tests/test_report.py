"""Pictures hold what they claim: read back pixel by pixel, not only written."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np

from engine.report import draw_curves, draw_prediction, draw_sample, write_html

ROW = {"epoch": 1, "step": 2, "loss": 1.5, "dice_loss": 1.0, "ce_loss": 0.5}
SUMMARY = {
    "definition": "Dice <per case>",
    "validated_on": "center_crop",
    "last": {"epoch": 2, "mean": 0.5, "TC": None, "WT": 0.613, "ET": 0.1, "cases": 3,
             "empty_truths": {"TC": 3, "WT": 0, "ET": 1}, "false_positives": {"TC": 2, "WT": 0, "ET": 0}},
    "best": {"epoch": None, "mean": None},
}  # fmt: skip


def colours(path: Path) -> set[tuple[int, int, int]]:
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    return {tuple(pixel) for pixel in pixels.reshape(-1, 3)[::7].tolist()}


def masks(shape: tuple[int, int, int]) -> np.ndarray:
    regions = np.zeros((3, *shape), bool)
    regions[1, 4:12, 4:12, 2:7] = True
    regions[0, 6:10, 6:10, 3:6] = True
    regions[2, 7:9, 7:9, 4:6] = True
    return regions


def test_curves_survive_a_region_that_no_case_has(tmp_path: Path) -> None:
    validated = ROW | {"epoch": 2, "val_mean": 0.5, "val_TC": None, "val_WT": 0.6, "val_ET": 0.4}
    draw_curves([ROW, validated], tmp_path / "curves.png")
    found = colours(tmp_path / "curves.png")
    assert (86, 180, 233) in found and (230, 159, 0) not in found  # WT drawn, TC not


def test_a_sample_shows_every_modality_and_region(tmp_path: Path) -> None:
    image = np.random.default_rng(0).normal(size=(2, 16, 16, 8)).astype(np.float32)
    draw_sample(image, masks((16, 16, 8)), ("flair", "t1c"), tmp_path / "samples.png")
    draw_sample(image, np.zeros((3, 16, 16, 8), bool), ("flair", "t1c"), tmp_path / "plain.png")
    coloured = {c for c in colours(tmp_path / "samples.png") - colours(tmp_path / "plain.png") if max(c) - min(c) > 40}
    assert coloured


def test_a_prediction_is_drawn_for_empty_truths_and_dark_scans_too(tmp_path: Path) -> None:
    scan, empty = np.zeros((16, 16, 8), np.float32), np.zeros((3, 16, 16, 8), bool)
    draw_prediction("dark", scan, empty, empty, [float("nan")] * 3, tmp_path / "prediction.png")
    assert (tmp_path / "prediction.png").stat().st_size > 0


def test_the_page_is_one_file_with_the_table_and_escapes_what_it_shows(tmp_path: Path) -> None:
    draw_curves([ROW], tmp_path / "curves.png")
    page = write_html(tmp_path, {"data": {"root": "<folder>"}}, SUMMARY, ["curves.png"]).read_text()
    assert "<td>61.3</td>" in page and "<td>n/a</td>" in page
    assert "&lt;folder&gt;" in page and "Dice &lt;per case&gt;" in page and "<folder>" not in page
    assert "TC: 3 of the cases have none; false positives in 2" in page
    assert 'src="data:image/png' in page and "href" not in page
