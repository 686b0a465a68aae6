"""What the names of files and cases say, which can't be used, and the order of a case's files."""

from __future__ import annotations

import os
import re
from itertools import permutations
from pathlib import Path

import pytest
from datasets import ALL

from pipelines.layouts.names import (
    SPELLINGS,
    canonical_modalities,
    case_name_of,
    in_order,
    modality_of,
    name_fault,
    patient_of,
)


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
def test_a_files_name_says_its_modality_in_any_usual_spelling(name: str, modality: str | None) -> None:
    assert modality_of(Path("t1") / name) == modality


def test_no_spelling_belongs_to_two_modalities() -> None:
    spelled = [spelling for spellings in SPELLINGS.values() for spelling in spellings]
    assert tuple(SPELLINGS) == ALL and len(set(spelled)) == len(spelled)
    assert canonical_modalities(["T2F", "t1n", "t1-ce", "T2w"]) == ALL


def test_the_documentation_lists_every_spelling() -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "data.md").read_text()
    for modality, spellings in SPELLINGS.items():
        listed = re.search(rf"^    {modality} +([^\n,]+)", text, re.MULTILINE)
        assert listed and tuple(listed[1].split()) == spellings


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("BraTS-GLI-02062-101", "BraTS-GLI-02062"),
        ("BraTS-MEN-RT-0012-1", "BraTS-MEN-RT-0012"),
        ("BraTS-GoAT-00012", None),
        ("brats_tcia_pat153_0109", "brats_tcia_pat153"),
        ("brats_2013_pat0001_1", "brats_2013_pat0001"),
        ("Brats18_TCIA01_190_1", "Brats18_TCIA01_190"),
        ("Brats17_CBICA_AAB_1", "Brats17_CBICA_AAB"),
        ("BraTS20_Training_001", None),
        ("BraTS2021_00000", None),
        ("UPENN-GBM-00001_21", "UPENN-GBM-00001"),
        ("UCSF-PDGM-0289_FU003d_nifti", "UCSF-PDGM-0289"),
        ("UCSF-PDGM-0289_nifti", "UCSF-PDGM-0289"),
        ("sub-control_ses-1", "sub-control"),
        ("PatientID_0003_Timepoint_1", "PatientID_0003"),
        ("Patient-001_week-000-1", "Patient-001"),
        ("100002_time2", "100002"),
        ("PGBM-001_2011-03-19", "PGBM-001"),
        ("PGBM-001_20110319", "PGBM-001"),
        ("cohort_tp_001", None),
        ("case7", None),
    ],
)
def test_the_name_of_a_case_with_a_time_point_says_the_patient(name: str, patient: str | None) -> None:
    assert patient_of(name) == patient


@pytest.mark.parametrize(
    ("files", "name"),
    [
        (("case_flair", "case_t1", "case_t1ce", "case_t2"), "case"),
        (("BraTS-GLI-00000-000-t2f", "BraTS-GLI-00000-000-t1c"), "BraTS-GLI-00000-000"),
        (("BraTS-GLI-00000-000-t1n", "BraTS-GLI-00000-000-t1c"), "BraTS-GLI-00000-000"),
        (("BraTS-GLI-00000-000-t2f", "BraTS-GLI-00000-000-t2w"), "BraTS-GLI-00000-000"),
        (("t1", "t1ce", "t2"), "patient7"),
        (("Flair_subtrMeanDivStd", "T1c_subtrMeanDivStd"), "patient7"),
        (("patient_t1", "patient_t2"), "patient"),
        (("start1", "start2"), "start"),
        (("case_t1",), "case_t1"),
    ],
)
def test_files_of_a_case_give_it_the_name_that_they_share(files: tuple[str, ...], name: str) -> None:
    """The t that t1c and t2f share is no part of it: cases of `t1.nii.gz` and `t2.nii.gz` were all named t."""
    assert case_name_of([Path("patient7") / f"{file}.nii.gz" for file in files]) == name


def test_a_name_that_tables_and_file_systems_cannot_hold_is_refused() -> None:
    assert not name_fault("BraTS2021_00000") and not name_fault("\u5bb6" * 66, 200)
    for name in ("M\udcfcller", "a\x1b[31m", "a\nb", "a\tb"):
        assert "is not plain text in UTF-8" in name_fault(name)
    assert "has 201 bytes; files are named after it: at most 200" in name_fault("\u5bb6" * 67, 200)


def files(*names: str) -> list[Path]:
    return [Path(name) for name in names]


@pytest.mark.parametrize(
    "named",
    [
        ("a-t2f.nii.gz", "a-t1n.nii.gz", "a-t1c.nii.gz", "a-t2w.nii.gz"),
        ("a_FLAIR.nii", "a_t1.nii", "a_t1Gd.nii", "a_T2.nii"),
        ("flair.nii.gz", "t1.nii.gz", "t1ce.nii.gz", "t2.nii.gz"),
    ],
)
def test_names_that_say_their_modality_override_the_order(named: tuple[str, ...]) -> None:
    for given in permutations(named):
        assert in_order(files(*given), ALL) == tuple(files(*named))


def test_of_more_files_than_needed_the_needed_ones_are_taken_by_name() -> None:
    given = files("a-t1c.nii.gz", "a-t1n.nii.gz", "a-t2f.nii.gz", "a-t2w.nii.gz")
    assert in_order(given, ("flair", "t1c")) == (given[2], given[0])


def test_names_that_say_nothing_are_taken_in_order_or_as_given() -> None:
    given = files("1.nii", "2.nii", "3.nii", "4.nii")
    assert in_order(given, ALL) == tuple(given)
    assert in_order(given, ALL, ("t2w", "t1ce", "T1", "FLAIR")) == tuple(reversed(given))
    assert in_order(given[:2], ("t1c",), ("t1", "t1c")) == (given[1],)


@pytest.mark.parametrize(
    ("named", "given", "says"),
    [
        (("a_t1.nii", "a_flair.nii"), ("flair", "t1"), "a_t1.nii is given as flair, but its name says t1"),
        (("a_t1.nii", "scan.nii"), None, "a_t1.nii is given as flair, but its name says t1"),
        (("a_t1.nii", "b_t1.nii"), None, "a_t1.nii and b_t1.nii are both t1 by name"),
        (("a_t2.nii", "a_t1.nii"), None, r"no flair among a_t2.nii, a_t1.nii \(t2, t1\): the network needs flair, t1"),
        (("1.nii", "2.nii", "3.nii"), None, r"3 files \(1.nii, 2.nii, 3.nii\) for 2 modalities: give .* flair, t1"),
        (("a_t1.nii", "a_flair.nii", "a_seg.nii"), None, "3 files .*; no modality in a_seg.nii"),
        (("1.nii", "2.nii"), ("t1", "pd"), "name at least one of flair"),
    ],
)
def test_files_that_contradict_their_order_or_each_other_are_refused(
    named: tuple[str, ...], given: tuple[str, ...] | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in named:
        Path(name).write_text(name)
    with pytest.raises(ValueError, match=says):
        in_order(files(*named), ("flair", "t1"), given)


def test_a_file_given_twice_is_refused_under_any_name(tmp_path: Path) -> None:
    scan = tmp_path / "scan_flair.nii"
    scan.write_text("")
    (tmp_path / "symbolic_t1.nii").symlink_to(scan)
    os.link(scan, tmp_path / "hard_t1.nii")
    for other in ("symbolic_t1.nii", "hard_t1.nii"):
        with pytest.raises(ValueError, match=f"{other} is the same file as .*scan_flair.nii"):
            in_order([scan, tmp_path / other], ("flair", "t1"))
    with pytest.raises(ValueError, match="scan_flair.nii is given twice"):
        in_order([scan, scan], ("flair", "t1"))
