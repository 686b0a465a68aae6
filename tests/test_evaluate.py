"""What `launch/evaluate.py` says of scans, folders and itself, and that ranks do not change it."""

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
from commands import free_port
from test_predict import ROOT, one_rank, run, run_evaluate, scans  # noqa: F401  # fixtures

from launch import evaluate


def case_rows(output: Path) -> list[dict[str, str]]:
    with (output / "cases.csv").open() as file:
        return list(csv.DictReader(file))


def copied(scans: Path, folder: Path, name: str = "task") -> Path:  # noqa: F811
    shutil.copytree(scans, folder / name)
    return folder / name


def test_a_scan_unlike_the_training_data_is_scored_with_a_warning(
    run: Path,  # noqa: F811
    scans: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    path = copied(scans, tmp_path) / "imagesTr" / "BRATS_002.nii.gz"
    source = nib.load(path)
    nib.save(nib.Nifti1Image(np.zeros(source.shape, np.float32), source.affine), path)
    assert run_evaluate("--runs", run, "--root", tmp_path / "task", "--output", tmp_path / "out") == 0
    assert "BRATS_002: flair holds nothing but zeros" in capsys.readouterr().err
    warned = {row["case"]: row["warnings"] for row in case_rows(tmp_path / "out")}
    assert "t2 holds nothing" in warned["BRATS_002"] and warned["BRATS_001"] == ""


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
    with mock.patch.object(evaluate, "score_cases") as work, pytest.raises(ValueError, match="a_file, can't be writ"):
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


def test_two_ranks_find_what_one_does(run: Path, scans: Path, tmp_path: Path) -> None:  # noqa: F811
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
    assert "left out: " in done.stderr and "BRATS_003.nii.gz: damaged gzip" in done.stderr
    for name in ("cases.csv", "summary.json", "table.md"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    assert any(float(row["hd95_mm_WT"] or 0) > 0 for row in case_rows(tmp_path / "two"))
