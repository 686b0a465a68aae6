"""The command `launch/prepare.py`: what it prints and writes, and its exit status."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from launch.prepare import main

SHAPE = (24, 21, 18)
ENDINGS = ("t2f", "t1n", "t1c", "t2w", "seg")
PREPARE = Path(__file__).resolve().parent.parent / "launch" / "prepare.py"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three cases of BraTS 2023, small."""
    monkeypatch.setenv("GLIOFORGE_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for name in ("BraTS-GLI-00010-000", "BraTS-GLI-00011-000", "BraTS-GLI-00012-000"):
        (tmp_path / "scans" / name).mkdir(parents=True)
        for end in ENDINGS:
            array = rng.integers(0, 4 if end == "seg" else 1000, SHAPE).astype(np.int16)
            affine = np.diag([-1.0, -1.0, 1.0, 1.0])
            nib.save(nib.Nifti1Image(array, affine), tmp_path / "scans" / name / f"{name}-{end}.nii.gz")
    return tmp_path / "scans"


def run(root: Path, *options: str, crop: str = "[8,8,8]") -> int:
    return main(["--data.root", str(root), "--data.crop_size_voxels", crop, "--data.workers", "1", *options])


def spoil(root: Path) -> tuple[Path, Path]:
    truncated = root / "BraTS-GLI-00010-000" / "BraTS-GLI-00010-000-t1c.nii.gz"
    truncated.write_bytes(truncated.read_bytes()[:-20])
    label = root / "BraTS-GLI-00012-000" / "BraTS-GLI-00012-000-seg.nii.gz"
    nib.save(nib.Nifti1Image(np.full(SHAPE, 4, np.int16), np.diag([-1.0, -1.0, 1.0, 1.0])), label)
    return truncated, label


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_it_prepares_prints_a_summary_and_does_nothing_the_second_time(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    assert run(root, "--data.store_dir", str(store)) == 0
    out = capsys.readouterr().out
    assert "3 cases of flair, t1, t1c, t2: 16 x 14 x 10 voxels at 1.5 x 1.5 x 2 mm" in out
    assert f"in {store}" in out and "s per case" in out
    before = files(store)
    assert run(root, "--data.store_dir", str(store)) == 0
    assert files(store) == before and len(before) == 3 * 4 + 1


def test_default_store_is_in_the_cache(root: Path, tmp_path: Path) -> None:
    assert run(root, "--data.modalities", "[flair,t1c]") == 0
    assert len(list((tmp_path / "cache" / "store").glob("*.image.npy"))) == 3


def test_faulty_cases_end_in_one_error_with_status_2(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncated, label = spoil(root)
    assert run(root) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 2 of 3 cases") and str(truncated) in error and str(label) in error


def test_check_reports_every_faulty_case_with_status_1_and_writes_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(root)
    before = files(tmp_path)
    assert run(root, "--check") == 1
    out = " ".join(capsys.readouterr().out.split())
    for text in (
        "00010-000-t1c.nii.gz",
        "truncated gzip",
        "Copy or",
        "00012-000-seg.nii.gz",
        "label values 4",
        "2 of 3",
    ):
        assert text in out
    assert "00011" not in out
    assert files(tmp_path) == before


def test_check_reports_faults_of_every_kind_at_once(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(root)
    for number in (20, 21):
        shutil.copytree(root / "BraTS-GLI-00011-000", root / f"BraTS-GLI-000{number}-000")
        for path in (root / f"BraTS-GLI-000{number}-000").iterdir():
            path.rename(path.with_name(path.name.replace("00011", f"000{number}")))
    (root / "BraTS-GLI-00020-000" / "BraTS-GLI-00020-000-t2w.nii.gz").unlink()
    twin = root / "BraTS-GLI-00021-000" / "BraTS-GLI-00021-000-t1n.nii.gz"
    shutil.copy(twin, twin.with_name("BraTS-GLI-00021-000-T1N.nii.gz"))
    assert run(root, "--check") == 1
    out = " ".join(capsys.readouterr().out.split())
    for text in ("truncated gzip", "cavity", "modality t2 is missing", "both t1", "4 of 5 cases are"):
        assert text in out
    assert "00011" not in out


def test_check_of_a_list_names_missing_files_along_with_damaged_ones(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(root)
    fields = dict(zip(("flair", "t1", "t1c", "t2", "label"), ENDINGS, strict=True))
    records = [
        {"name": folder.name} | {key: f"{folder.name}/{folder.name}-{end}.nii.gz" for key, end in fields.items()}
        for folder in sorted(root.iterdir())
    ]
    records[1] |= {"t1": "gone_t1.nii.gz", "label": "gone_seg.nii.gz"}
    (root / "list.json").write_text(json.dumps(records))
    assert run(root / "list.json", "--check", "--data.release", "brats2023") == 1
    out = " ".join(capsys.readouterr().out.split())
    for text in ("gone_t1.nii.gz", "gone_seg.nii.gz", "truncated gzip", "label values 4", "3 of 3 cases are faulty"):
        assert text in out


def test_check_where_every_case_lacks_something_ends_with_status_1(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, end in zip(sorted(root.iterdir()), ENDINGS, strict=False):
        (folder / f"{folder.name}-{end}.nii.gz").unlink()
    assert run(root, "--check") == 1
    assert "3 of 3 cases are faulty" in capsys.readouterr().out


def test_check_of_sound_cases_ends_with_status_0(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root, "--check") == 0
    assert "0 of 3 cases are faulty" in capsys.readouterr().out


def test_check_takes_cases_without_labels_as_prediction_does(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = sorted(root.iterdir())
    (first / f"{first.name}-seg.nii.gz").unlink()
    assert run(root, "--check") == 0
    out = capsys.readouterr().out
    assert "0 of 3 cases are faulty (flair, t1, t1c, t2; brats2023)" in out
    assert "2 of 3 cases have a label: without one a case can be segmented, but not trained on" in out
    for folder in (second, third):
        (folder / f"{folder.name}-seg.nii.gz").unlink()
    assert run(root, "--check", crop="[99,99,99]") == 0  # no crop is taken of what is not trained on
    out = capsys.readouterr().out
    assert "0 of 3 cases are faulty (flair, t1, t1c, t2)\nnone of 3 cases has a label" in out
    truncated = first / f"{first.name}-t1c.nii.gz"
    truncated.write_bytes(truncated.read_bytes()[:-20])
    assert run(root, "--check") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert truncated.name in out and "1 of 3 cases are faulty" in out


def test_check_of_unlabelled_scans_of_several_releases_asks_for_no_release(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sorted(root.iterdir())[0]
    for path in root.rglob("*-seg.nii.gz"):
        path.unlink()
    for path in first.iterdir():
        path.rename(path.with_name(path.name.replace("-t2f", "_flair").replace("-t1n", "_t1").replace("-t", "_t")))
    assert run(root, "--check") == 0
    assert "none of 3 cases has a label" in capsys.readouterr().out


def test_check_names_scans_that_match_no_rule(
    root: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for path in root.rglob("*-t1c.nii.gz"):
        path.rename(path.with_name(path.name.replace("-t1c", "-contrast")))
    assert run(root, "--check") == 0
    assert "0 of 3 cases are faulty (flair, t1, t2; " in capsys.readouterr().out
    assert "3 scans are not used" in caplog.text and "contrast (3)" in caplog.text


def test_check_names_folders_and_names_that_are_not_utf8(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = sorted(root.iterdir())[0]
    first.rename(root / os.fsdecode(b"BraTS-GLI-M\xfcller"))
    assert run(root, "--check") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "BraTS-GLI-M\\udcfcller is not plain text in UTF-8" in out and "1 of 3 cases are faulty" in out


def test_check_reports_volumes_smaller_than_the_crop_unless_they_are_padded(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, "--check", crop="[16,16,8]") == 1
    assert "--data.pad" in capsys.readouterr().out
    assert run(root, "--check", "--data.pad", "true", crop="[16,16,8]") == 0


def test_check_needs_scans_that_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 2
    assert "give --data.root" in capsys.readouterr().err


def test_typo_in_an_option_is_an_error(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root, "--data.spacing", "1,1,1") == 2
    assert "no option --data.spacing; did you mean --data.spacing_mm?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "status", "said"), [(signal.SIGTERM, 75, "stopped by SIGTERM; "), (signal.SIGINT, 130, "interrupted; ")]
)
def test_a_stopped_command_says_how_to_resume(
    number: signal.Signals, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.prepare.prepare", lambda config: signal.raise_signal(number))
    assert main([]) == status
    assert f"{said}run the same command to continue" in capsys.readouterr().err


def test_folder_without_cases_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 2
    assert "no cases found" in capsys.readouterr().err


def test_a_cache_that_cannot_be_made_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("GLIOFORGE_CACHE", str(tmp_path / "file" / "cache"))
    assert main(["--config", str(PREPARE.parent / "configs" / "demo.yaml")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_cases_whose_names_are_not_utf8_are_named_as_faulty(root: Path, tmp_path: Path) -> None:
    truncated, _ = spoil(root)
    for path in (*truncated.parent.iterdir(), truncated.parent):
        path.rename(path.with_name(path.name.replace("00010", os.fsdecode(b"M\xfcller"))))
    options = ["--data.root", str(root), "--data.crop_size_voxels", "[8,8,8]", "--data.workers", "1"]
    options += ["--data.store_dir", str(tmp_path / "store")]
    script = f"from launch.prepare import main; print(main([*{options}, '--check']), main({options}))"
    strict = os.environ | {"PYTHONPATH": str(PREPARE.parent.parent), "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, "-c", script], env=strict, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "2 of 3 cases are faulty" in done.stdout and "1 of 3 cases are faulty" in done.stderr
    assert done.stdout.endswith("1 2\n")
    rows = [line.split("│")[1].strip() for line in done.stdout.splitlines() if line.startswith("│")]
    assert r"M\udcfcller" in "".join(rows) and r"M\udcfcller" in done.stderr  # a row may be folded


def test_runs_as_a_script_from_any_folder_with_a_training_configuration(root: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"data:\n  root: {root}\n  crop_size_voxels: [8, 8, 8]\ntrain:\n  epochs: 3\n")
    command = [sys.executable, str(PREPARE), "--config", str(config), "--check", "--data.workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(PREPARE.parent.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 of 3 cases are faulty" in done.stdout
