"""Data sets of empty files: finders read names alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

TASK01 = {
    "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
    "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
}
ALL = ("flair", "t1", "t1c", "t2")


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def brats_2018(folder: Path, case: str, suffix: str = ".nii.gz") -> Path:
    return touch(folder / case, *(f"{case}_{part}{suffix}" for part in ("flair", "t1", "t1ce", "t2", "seg")))


def brats_2023(folder: Path, case: str) -> Path:
    return touch(folder / case, *(f"{case}-{part}.nii.gz" for part in ("t1n", "t1c", "t2w", "t2f", "seg")))


def decathlon(folder: Path, numbers: Sequence[int], **changes: object) -> Path:
    """A task folder whose cases are in the given order, with macOS's companions and an unlabelled test case."""
    files = [f"BRATS_{n:03d}.nii.gz" for n in numbers]
    touch(folder, *(f"{part}/{hidden}{f}" for f in files for part in ("imagesTr", "labelsTr") for hidden in ("", "._")))
    touch(folder, "imagesTs/BRATS_900.nii.gz")
    training = [{"image": f"./imagesTr/{f}", "label": f"./labelsTr/{f}"} for f in files]
    info = TASK01 | {"training": training, "test": ["./imagesTs/BRATS_900.nii.gz"]} | changes
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder
