"""What the commands that use trained networks share: messages name options that they have."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_segment_cases import ORDER, brats_folder, make_run, one_rank, scans, sorted_files  # noqa: F401  # fixtures

from launch import evaluate, predict
from launch.network_options import with_own_options


def test_messages_name_options_of_training_as_the_command_does() -> None:
    for given, told in (
        ("give --data.release brats2018", "give --release brats2018"),
        ("--train.device cuda: no GPU", "--device cuda: no GPU"),
        ("--data.val_cases: there is no case 'x'", "data.val_cases of the run: there is no case 'x'"),
        ("choose another --output, --modalities, --root", "choose another --output, --modalities, --root"),
    ):
        assert with_own_options(given) == told


def test_no_message_names_an_option_that_the_command_does_not_have(
    scans: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Faults of a data set, of a label and of a device, which training meets too."""
    run = make_run(scans, tmp_path / "run", ORDER)
    source = brats_folder(tmp_path, "BraTS-GLI-00001-000", scans)
    folders = {name: tmp_path / "sets" / name for name in ("open", "lacking")}
    for path, end in zip(sorted_files(source), ("flair", "t1", "t1ce", "t2")):
        for name, folder in folders.items():
            (folder / "case1").mkdir(parents=True, exist_ok=True)
            if (name, end) != ("lacking", "t1ce"):
                shutil.copy(path, folder / "case1" / f"case1_{end}.nii.gz")
    label = scans / "labelsTr" / "BRATS_001.nii.gz"
    for folder in folders.values():
        shutil.copy(label, folder / "case1" / "case1_seg.nii.gz")
    commands: list[tuple[Any, list[object]]] = [
        (evaluate, ["--root", folders["open"]]),
        (evaluate, ["--root", folders["open"], "--release", "decathlon"]),
        (evaluate, ["--root", folders["lacking"]]),
        (evaluate, ["--device", "cuda"]),
        (predict, ["--input", folders["lacking"]]),
        (predict, ["--input", source, "--device", "cuda"]),
    ]
    for module, options in commands:
        if "cuda" in options and torch.cuda.is_available():
            continue
        given = ["--runs", run, "--output", tmp_path / "out", "--device", "cpu", *options]
        with contextlib.suppress(SystemExit):
            module.main(["--help"])
        there = set(re.findall(r"--[a-z][\w.]*", capsys.readouterr().out))
        assert module.main([*map(str, given)]) in (0, 1, 2)
        told = capsys.readouterr().err
        named = set(re.findall(r"--[a-z][\w.]*", told))
        assert named <= there, (told, named - there)
