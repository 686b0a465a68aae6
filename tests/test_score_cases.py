"""`launch/evaluate.py` as a user calls it, in this process and on two ranks."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
import torch
from commands import free_port
from test_segment_cases import ORDER, ROOT, labels_of, make_run, one_rank, run, run_evaluate, run_predict, scans  # noqa: F401  # fixtures

from engine.evaluation import CaseScores
from engine.metrics import SCORED, CaseDice, case_dice
from engine.weights_file import read_content, write_content
from launch import score_cases
from pipelines.layouts.cases import find_cases
from pipelines.layouts.labels import CODINGS, REGIONS, regions_from_labels, tutorial_coding
from pipelines.scans.nifti import read_nifti


def case_rows(output: Path) -> list[dict[str, str]]:
    with (output / "cases.csv").open() as file:
        return list(csv.DictReader(file))


def copied(scans: Path, folder: Path, name: str = "task") -> Path:  # noqa: F811
    shutil.copytree(scans, folder / name)
    return folder / name


def test_a_scan_unlike_the_training_data_is_scored_with_a_warning(
    scans: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    path = copied(scans, tmp_path) / "imagesTr" / "BRATS_002.nii.gz"
    source = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(source.dataobj) + np.float32(1), source.affine), path)
    known = {"spacing_mm": [[1.0, 9.0]] * 3, "occupied": [[0.1, 0.3]] * 4, "contrast": [[0.0, 9.0]] * 4}
    warning = make_run(scans, tmp_path / "run", ORDER, scans_known=known)
    assert run_evaluate("--runs", warning, "--root", tmp_path / "task", "--output", tmp_path / "out") == 0
    assert "BRATS_002: 100 % of flair is not zero, in training 10 to 30 %" in capsys.readouterr().err
    warned = {row["case"]: row["warnings"] for row in case_rows(tmp_path / "out")}
    assert "100 % of t2 is not zero" in warned["BRATS_002"] and warned["BRATS_001"] == ""


def test_what_evaluation_scores_is_the_file_that_prediction_writes(
    run: Path,  # noqa: F811
    scans: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Dice and voxels from the files that a challenge would get; the network's masks, which overlap, have others."""
    assert run_predict("--runs", run, "--input", scans, "--output", tmp_path / "files") == 0
    found = {}
    for score in ("label_map", "masks"):
        assert run_evaluate("--runs", run, "--root", scans, "--output", tmp_path / score, "--score", score) == 0
        found[score] = {row["case"]: row for row in case_rows(tmp_path / score)}
        summary = json.loads((tmp_path / score / "summary.json").read_text())
        assert summary["scored"] == score and SCORED[score] in summary["definition"]
        assert SCORED[score] in (tmp_path / score / "table.md").read_text()
    coding = CODINGS["decathlon"]
    for case in find_cases(scans).cases:
        assert case.label is not None
        written, truth = (
            torch.from_numpy(regions_from_labels(labels_of(path).astype(np.uint8), coding))
            for path in (tmp_path / "files" / f"{case.name}.nii.gz", case.label)
        )
        expected, row = case_dice(case.name, written, truth), found["label_map"][case.name]
        for region, dice, voxels in zip(REGIONS, expected.dice(), expected.predicted):
            assert int(row[f"voxels_predicted_{region}"]) == voxels
            assert float(row[f"dice_{region}"] or "nan") == pytest.approx(dice, abs=1e-6, nan_ok=True)
        assert row != found["masks"][case.name]


def test_a_tutorial_network_is_scored_on_other_data_as_its_files_would_be(
    run: Path,  # noqa: F811
    scans: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """What it calls ET is the core that does not enhance, there."""
    content = read_content(run / "checkpoints" / "best.pt")
    with pytest.warns(UserWarning, match="label 2 is scored"):
        coding = tutorial_coding(CODINGS["decathlon"])
    changes = {"release": coding.release, "tissues": coding.tissues, "regions": list(map(list, coding.regions))}
    write_content(tmp_path / "run" / "checkpoints" / "best.pt", content | changes)
    case = find_cases(scans).cases[0]
    files = [tmp_path / "set" / "x" / f"x-{name}.nii.gz" for name in ("t2f", "t1n", "t1c", "t2w", "seg")]
    files[0].parent.mkdir(parents=True)
    image, affine = read_nifti(case.images[0])
    assert case.label is not None
    truth = np.array([0, 2, 1, 3], np.uint8)[labels_of(case.label).astype(np.uint8)]
    for path, volume in zip(files, [*np.moveaxis(image, -1, 0), truth], strict=True):
        nib.save(nib.Nifti1Image(volume, affine), path)
    mine = ("--runs", tmp_path / "run", "--release", "brats2023")
    assert run_predict(*mine, "--input", tmp_path / "set", "--output", tmp_path / "files") == 0
    assert run_evaluate(*mine, "--root", tmp_path / "set", "--output", tmp_path / "out") == 0
    written, expected = (
        torch.from_numpy(regions_from_labels(labels, CODINGS["brats2023"]))
        for labels in (labels_of(tmp_path / "files" / "x.nii.gz").astype(np.uint8), truth)
    )
    (row,) = case_rows(tmp_path / "out")
    dice = [float(row[f"dice_{region}"]) for region in REGIONS]
    assert dice == pytest.approx(case_dice("x", written, expected).dice(), abs=1e-6) and written.any()


def test_a_warning_of_many_cases_is_one_line() -> None:
    cases = [CaseScores(CaseDice(name, *((0,) * 3,) * 3), (0.0,) * 3, ("dark", name)) for name in "abcde"]
    assert score_cases.warnings_of(cases)[:2] == ["a, b, c and 2 more: dark", "a: a"]
    assert score_cases.warnings_of(cases[:1]) == ["a: dark", "a: a"] and len(score_cases.warnings_of(cases)) == 6


def test_tables_do_not_leave_a_runs_folder_through_a_link(run: Path, scans: Path, tmp_path: Path) -> None:  # noqa: F811
    mine, precious = copied(run, tmp_path, "run"), tmp_path / "precious"
    precious.mkdir()
    (mine / "evaluation-source").symlink_to(precious)
    with pytest.raises(ValueError, match=f"evaluation-source is a link to {precious}, outside"):
        run_evaluate("--runs", mine)
    assert run_evaluate("--runs", mine, "--output", mine / "evaluation-source") == 0  # as its user says
    assert len(list(precious.iterdir())) == 3
    (mine / "evaluation-source").unlink()
    (mine / "evaluation-source").mkdir()
    for name in ("cases.csv", "summary.json", "table.md"):
        (precious / name).write_text("mine")
        (mine / "evaluation-source" / name).symlink_to(precious / name)
    assert run_evaluate("--runs", mine) == 0
    assert {path.read_text() for path in precious.iterdir()} == {"mine"}


def test_tables_of_another_data_set_or_grid_have_a_folder_of_their_own_and_say_what_they_are(
    run: Path,  # noqa: F811
    scans: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    mine = copied(run, tmp_path, "run")
    for options, name in (
        ((), "evaluation-source"),
        (("--root", scans), f"evaluation-source-{scans.name}"),
        (("--root", scans, "--on", "center_crop", "--flips"), f"evaluation-center_crop-{scans.name}-flips"),
    ):
        assert run_evaluate("--runs", mine, *options) == 0
        found = json.loads((mine / name / "summary.json").read_text())
        assert found["runs"] == [str(mine / "checkpoints" / "best.pt")]
        assert found["flips"] == ("--flips" in options) and found["grid"] in (mine / name / "table.md").read_text()
        assert (found["data"] == str(scans)) == bool(options) and found["cases"] == (3 if options else 1)
    assert len(list(mine.glob("evaluation-*"))) == 3


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    run: Path,  # noqa: F811
    scans: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    (tmp_path / "a_file").write_text("")
    command = ("--runs", run, "--root", scans, "--output", tmp_path / "a_file")
    with (
        mock.patch.object(score_cases, "score_cases") as work,
        pytest.raises(ValueError, match="a_file, can't be writ"),
    ):
        run_evaluate(*command)
    assert not work.called


def test_a_data_set_that_does_not_fit_is_refused_with_what_the_network_needs(
    run: Path,  # noqa: F811
    scans: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    path = copied(scans, tmp_path) / "dataset.json"
    about = json.loads(path.read_text())
    for changes, message in (
        ({"modality": {"0": "FLAIR", "1": "T1w", "2": "T1gd"}}, "no case has t2"),
        ({"training": [{"image": case["image"]} for case in about["training"]]}, "has a label map"),
    ):
        path.write_text(json.dumps(about | changes))
        with pytest.raises(ValueError, match=rf"(?s){message}.*network takes flair, t1, t1c, t2; --root gives"):
            run_evaluate("--runs", run, "--root", tmp_path / "task", "--output", tmp_path / "out")


def test_a_case_without_a_label_does_not_stop_the_others(
    run: Path,  # noqa: F811
    scans: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    root = copied(scans, tmp_path)
    (root / "labelsTr" / "BRATS_002.nii.gz").unlink()
    assert run_evaluate("--runs", run, "--root", root, "--output", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert said.count("skipped: ") == 1 and "labelsTr/BRATS_002.nii.gz" in said
    names = {path.name.removesuffix(".nii.gz") for path in (root / "labelsTr").iterdir()}
    assert names and {row["case"] for row in case_rows(tmp_path / "out")} == names


def test_two_ranks_give_the_tables_of_one(run: Path, scans: Path, tmp_path: Path) -> None:  # noqa: F811
    root = copied(scans, tmp_path)
    (root / "imagesTr" / "BRATS_003.nii.gz").write_bytes(b"\x1f\x8b damaged")
    command = ["--runs", str(run), "--root", str(root), "--device", "cpu", "--output"]
    assert run_evaluate(*command[:-3], "--output", tmp_path / "one") == 1
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port())
    done = subprocess.run(
        [*torchrun, str(ROOT / "launch" / "evaluate.py"), *command, str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "skipped: " in done.stderr and "BRATS_003.nii.gz: damaged gzip" in done.stderr
    for name in ("cases.csv", "summary.json", "table.md"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    assert any(float(row["hd95_mm_WT"] or 0) > 0 for row in case_rows(tmp_path / "two"))


@pytest.mark.parametrize("data", [{"root": None}, {"download": True}])
def test_evaluating_somebodys_weights_makes_and_fetches_nothing(
    data: dict[str, object],
    run: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    content = read_content(run / "checkpoints" / "best.pt")
    phantom = {"cases": 9_999, "size_voxels": [64, 64, 64]}
    config = content["config"] | {"data": content["config"]["data"] | {"root": str(tmp_path / "new")} | data}
    config["data"]["phantom"] |= phantom
    config["data"]["store_dir"] = str(tmp_path / "store")
    write_content(tmp_path / "given" / "best.pt", content | {"config": config})
    monkeypatch.setenv("GLIOFORGE_CACHE", str(tmp_path / "cache"))
    makers = [
        mock.patch(f"engine.data.{name}", side_effect=AssertionError) for name in ("download_task01", "make_phantoms")
    ]
    with makers[0], makers[1], pytest.raises(ValueError, match="--root gives"):
        run_evaluate("--runs", tmp_path / "given" / "best.pt", "--output", tmp_path / "out")
    made = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert [name for name in made if name != "cache"] == ["given", "given/best.pt"]
