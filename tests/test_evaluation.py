"""Scores: MONAI's metrics on the same masks, and the tables made of them."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric, HausdorffDistanceMetric

from engine import evaluation
from engine.evaluation import CaseScores
from pipelines.basics.tables import read_table

TOLERANCES = {"Dice": 1e-6, "HD95 (mm)": 1e-5, "table (mm)": 1e-6}

SPACING = (1.0, 1.5, 2.0)


def masks(seed: int) -> np.ndarray:
    """bool (3, X, Y, Z): a ball for each region."""
    at = np.random.default_rng(seed).uniform(8, 12, (3, 3))
    grid = np.stack(np.meshgrid(*(np.arange(20.0),) * 3, indexing="ij"))
    return np.stack([((grid - centre[:, None, None, None]) ** 2).sum(0) < 25 for centre in at])


@pytest.fixture
def cases() -> list[CaseScores]:
    """Four: two plain ones, one whose truth has no ET, one whose TC was missed and truth has no ET either."""
    truths, predictions = [masks(i) for i in range(4)], [masks(i) for i in range(10, 14)]
    truths[2][2] = truths[3][2] = False
    predictions[3][0] = predictions[3][2] = False
    return [
        evaluation.score(f"case{i}", prediction, truth, SPACING)
        for i, (prediction, truth) in enumerate(zip(predictions, truths))
    ]


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
def test_dice_and_hd95_are_monais() -> None:
    prediction, truth = masks(0), masks(1)
    found = evaluation.score("case", prediction, truth, SPACING)
    pair = [torch.from_numpy(mask)[None].float() for mask in (prediction, truth)]
    dice, distance = DiceMetric(), HausdorffDistanceMetric(include_background=True, percentile=95)
    np.testing.assert_allclose(found.dice.dice(), dice(*pair)[0], atol=TOLERANCES["Dice"])
    np.testing.assert_allclose(found.hd95, distance(*pair, spacing=SPACING)[0], atol=TOLERANCES["HD95 (mm)"])
    assert max(found.hd95) > 1


def test_a_region_that_only_one_mask_has_has_no_distance(cases: list[CaseScores]) -> None:
    assert [math.isnan(value) for value in cases[2].hd95] == [False, False, True]
    assert [math.isnan(value) for value in cases[3].hd95] == [True, False, True]


def test_the_summary_takes_each_region_over_the_cases_that_have_it(cases: list[CaseScores]) -> None:
    found = evaluation.summary(cases)
    dice = np.array([case.dice.dice() for case in cases])
    assert found["dice"]["mean"]["ET"] == pytest.approx(dice[:2, 2].mean())
    assert found["dice"]["mean"]["TC"] == pytest.approx(dice[:, 0].mean()) and dice[3, 0] == 0
    assert found["dice"]["median"]["WT"] == pytest.approx(np.median(dice[:, 1]))
    assert found["dice"]["mean"]["mean"] == pytest.approx(
        np.mean([found["dice"]["mean"][region] for region in ("TC", "WT", "ET")])
    )
    distance = np.array([case.hd95 for case in cases])
    assert found["hd95"]["mean"]["TC"] == pytest.approx(np.nanmean(distance[:, 0]))
    assert found["hd95"]["median"]["WT"] == pytest.approx(np.nanmedian(distance[:, 1]))
    assert found["missed"] == {"TC": 1, "WT": 0, "ET": 0}
    assert found["empty_truths"] == {"TC": 0, "WT": 0, "ET": 2}
    assert found["false_positives"] == {"TC": 0, "WT": 0, "ET": 1}
    means = [each["dice"] for each in found["worst"]]
    assert found["worst"][0]["case"] == "case3" and means == sorted(means)


def test_no_truth_at_all_is_not_a_score() -> None:
    found = evaluation.summary([evaluation.score("empty", masks(0), np.zeros_like(masks(0)), SPACING)])
    assert found["dice"]["mean"] == {"mean": None, "TC": None, "WT": None, "ET": None} and found["worst"] == []
    assert "n/a" in evaluation.markdown(found, "title")


def test_names_are_escaped_in_every_table(cases: list[CaseScores], tmp_path: Path) -> None:
    names = ["=1+1", "caf\udce9", "a|b\n<i>", "$x_1$"]
    renamed = [replace(one, dice=replace(one.dice, name=name)) for one, name in zip(cases, names)]
    evaluation.write(tmp_path, renamed, evaluation.summary(renamed), "runs/<b>")
    assert {row["case"] for row in read_table(tmp_path / "cases.csv")} == set(names)
    assert not any(line.startswith("=") for line in (tmp_path / "cases.csv").read_text().splitlines())
    assert {each["case"] for each in json.loads((tmp_path / "summary.json").read_text())["worst"]} == set(names)
    text = (tmp_path / "table.md").read_text()
    assert text.startswith(r"# runs/\<b>")
    for cell in ("| =1+1 |", r"| caf\\udce9 |", r"| a\|b\\n\<i> |", r"| \$x_1\$ |"):
        assert cell in text


def test_if_one_table_cannot_be_written_the_old_ones_stay(
    cases: list[CaseScores], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = evaluation.summary(cases[:2])
    evaluation.write(tmp_path, cases[:2], found, "before")
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    monkeypatch.setattr(evaluation, "markdown", lambda *_: "\ud800")  # no file in UTF-8 takes it
    with pytest.raises(UnicodeEncodeError):
        evaluation.write(tmp_path, cases, evaluation.summary(cases), "after")
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before and len(before) == 3


def test_tables_hold_every_case_and_figure(cases: list[CaseScores], tmp_path: Path) -> None:
    found = evaluation.summary(cases)
    evaluation.write(tmp_path / "new", cases[::-1], found, "a title")
    with (tmp_path / "new" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == [f"case{i}" for i in range(4)]
    assert rows[3]["hd95_mm_TC"] == rows[3]["dice_ET"] == "" and rows[3]["dice_TC"] == "0.0"
    assert float(rows[0]["hd95_mm_WT"]) == pytest.approx(cases[0].hd95[1], abs=TOLERANCES["table (mm)"])
    assert int(rows[1]["voxels_truth_TC"]) == cases[1].dice.truth[0]
    assert json.loads((tmp_path / "new" / "summary.json").read_text()) == found
    text = (tmp_path / "new" / "table.md").read_text()
    head, table = evaluation.HEAD, evaluation.table_rows(found)
    assert text.startswith("# a title\n") and all(f"| {' | '.join(row)} |" in text for row in (head, *table))
    assert f"{100 * found['dice']['mean']['WT']:.1f}" in table[0] and "case3" in text
