"""What the name of a file tells, and what is said of files that are none."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from datasets import ALL

from pipelines.layouts.names import SPELLINGS, canonical_modalities, file_fault, modality_of


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("BraTS2021_00000_flair.nii.gz", "flair"),
        ("BraTS-GLI-00000-000-t2f.nii.gz", "flair"),
        ("sub-01_T2-FLAIR.nii", "flair"),
        ("case_t2_flair.nii.gz", "flair"),
        ("Flair_subtrMeanDivStd.nii.gz", "flair"),
        ("VSD.Brain.XX.O.MR_Flair.54512.nii", "flair"),
        ("case_t1.nii.gz", "t1"),
        ("T1N.NII.GZ", "t1"),
        ("sub-01_T1w.nii.gz", "t1"),
        ("case t1.nii", "t1"),
        ("case_t1Gd.nii.gz", "t1c"),
        ("case_T1c.nii.gz", "t1c"),
        ("case-t1gd.nii.gz", "t1c"),
        ("case-T1CE.nii", "t1c"),
        ("case_t1_post.nii.gz", "t1c"),
        ("CT1.nii.gz", "t1c"),
        ("t1c.nii.gz", "t1c"),
        ("sub-01_ce-gadolinium_T1w.nii.gz", "t1c"),
        ("case_t2.nii.gz", "t2"),
        ("BraTS-GLI-00000-000-t2W.nii.gz", "t2"),
        ("case_seg.nii.gz", None),
        ("brainmask.nii.gz", None),
        ("BRATS_001.nii.gz", None),
        ("caset1.nii.gz", None),
        ("case_t1_bias.nii.gz", None),
        ("case_t1.mha", None),
        ("._case_t1.nii.gz", None),
    ],
)
def test_a_files_name_tells_its_modality_in_any_usual_spelling(name: str, modality: str | None) -> None:
    assert modality_of(Path("t1") / name) == modality


def test_spellings_of_one_modality_are_of_no_other() -> None:
    spelled = [spelling for spellings in SPELLINGS.values() for spelling in spellings]
    assert tuple(SPELLINGS) == ALL and len(set(spelled)) == len(spelled)
    assert canonical_modalities(["T2F", "t1n", "t1-ce", "T2w"]) == ALL


def test_the_documentation_lists_the_spellings_that_there_are() -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "data.md").read_text()
    for modality, spellings in SPELLINGS.items():
        listed = re.search(rf"^    {modality} +([^\n,]+)", text, re.MULTILINE)
        assert listed and tuple(listed[1].split()) == spellings


def test_a_link_into_a_closed_folder_is_not_called_a_link_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(path: Path) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(path))

    link = tmp_path / "a.nii"
    link.symlink_to("closed/a.nii")
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", closed)
        fault = file_fault(link, "is gone", "Put it back")
    assert fault and "can't be read (Permission denied)" in fault.problem
