"""Which files of BraTS folders are cases, and of which release; empty files stand for scans."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import ALL, brats_2018, brats_2023, decathlon, touch

from pipelines.basics.errors import DataError
from pipelines.layouts.cases import Case, find_cases, survey_cases
from pipelines.layouts.labels import CODINGS


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".NII.GZ"])
@pytest.mark.parametrize(
    ("case", "release"),
    [
        ("brats_2013_pat0001_1", "brats2013"),
        ("BraTS2016_x", "brats2013"),
        ("Brats17_TCIA_1", "brats2017"),
        ("Brats17_2013_10_1", "brats2017"),
        ("Brats18_CBICA_AAM_1", "brats2018"),
        ("BraTS20_Training_001", "brats2018"),
        ("BraTS2021_00000", "brats2018"),
    ],
)
def test_the_year_in_a_name_decides_between_releases_of_one_naming(
    tmp_path: Path, case: str, release: str, suffix: str
) -> None:
    folder = brats_2018(tmp_path, case, suffix)
    found = find_cases(tmp_path)
    images = tuple(folder / f"{case}_{part}{suffix}" for part in ("flair", "t1", "t1ce", "t2"))
    assert found.cases == (Case(case, images, None, folder / f"{case}_seg{suffix}", found.cases[0].patient),)
    assert found.modalities == ALL and found.coding == CODINGS[release]


def test_2017_and_2018_have_one_coding_and_may_be_mixed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for case in ("Brats17_TCIA_100_1", "Brats18_TCIA_100_1"):
        brats_2018(tmp_path, case)
    for release in (None, "brats2018", "brats2017"):
        found = find_cases(tmp_path, release)
        assert len(found.cases) == 2 and found.coding == CODINGS[release or "brats2018"]
    assert not caplog.text
    brats_2018(tmp_path, "brats_2013_pat0001_1")
    with pytest.raises(DataError, match="mixes releases"):
        find_cases(tmp_path)


@pytest.mark.parametrize("case", ["patient7", "BraTS_12", "BraTS_0018"])
def test_without_a_year_the_release_must_be_given(tmp_path: Path, case: str) -> None:
    brats_2018(tmp_path / "scans", case)
    with pytest.raises(DataError, match=rf"{case}.*--data.release brats2013.*brats2018"):
        find_cases(tmp_path / "scans")
    assert find_cases(tmp_path / "scans", release="brats2018").coding == CODINGS["brats2018"]
    assert find_cases(tmp_path / "scans", release="brats2013").coding == CODINGS["brats2013"]


def test_a_year_above_the_case_decides_and_grades_may_be_folders(tmp_path: Path) -> None:
    root = tmp_path / "MICCAI_BraTS_2018_Data_Training"
    brats_2018(root / "HGG", "a")
    brats_2018(root / "LGG", "b")
    found = find_cases(root)
    assert found.names == ("a", "b") and found.coding == CODINGS["brats2018"]


def test_the_root_may_be_one_case(tmp_path: Path) -> None:
    assert find_cases(brats_2023(tmp_path, "BraTS-GLI-00002-000")).names == ("BraTS-GLI-00002-000",)


def test_letter_case_and_hidden_files_do_not_matter(tmp_path: Path) -> None:
    case = "BraTS-GLI-00000-000"
    touch(tmp_path / case, *(f"{case}-{p}.nii.gz" for p in ("T2F", "t1N", "T1C", "t2W", "Seg")), f"._{case}-t2f.nii.gz")
    found = find_cases(tmp_path)
    assert [p.name for p in found.cases[0].images] == [f"{case}-{p}.nii.gz" for p in ("T2F", "t1N", "T1C", "t2W")]
    assert found.coding == CODINGS["brats2023"]


def test_the_misnamed_label_of_brats_2020_is_found(tmp_path: Path) -> None:
    folder = brats_2018(tmp_path, "BraTS20_Training_355", ".nii")
    (folder / "BraTS20_Training_355_seg.nii").rename(folder / "W39_1998.09.19_Segm.nii")
    assert find_cases(tmp_path).cases[0].label == folder / "W39_1998.09.19_Segm.nii"


def test_mixed_releases_are_counted_and_an_explicit_one_selects(tmp_path: Path) -> None:
    brats_2023(tmp_path, "BraTS-GLI-00000-000")
    brats_2018(tmp_path, "BraTS20_Training_001")
    brats_2018(tmp_path, "BraTS20_Training_002")
    with pytest.raises(DataError, match="mixes.*1 of brats2023, 2 of brats2018.*--data.release"):
        find_cases(tmp_path)
    assert find_cases(tmp_path, release="brats2018").names == ("BraTS20_Training_001", "BraTS20_Training_002")
    assert find_cases(tmp_path, release="brats2023").names == ("BraTS-GLI-00000-000",)
    with pytest.raises(DataError, match="no case fits release decathlon"):
        find_cases(tmp_path, release="decathlon")


@pytest.mark.parametrize(
    ("folder", "case", "release"),
    [
        ("BraTS2024-BraTS-GLI-TrainingData", "BraTS-GLI-00005-100", "brats2024"),
        ("training", "BraTS-GLI-00005-100", "brats2023"),
        ("BraTS-PEDs2024_Training", "BraTS-PED-00001-000", "brats2024-ped"),
        ("ASNR-MICCAI-BraTS2023-PED-Challenge-TrainingData", "BraTS-PED-00024-000", "brats2023"),
    ],
)
def test_the_year_of_a_folder_decides_from_2023_on(tmp_path: Path, folder: str, case: str, release: str) -> None:
    brats_2023(tmp_path / folder, case)
    assert find_cases(tmp_path / folder).coding == CODINGS[release]


def test_for_children_without_a_year_the_release_must_be_given(tmp_path: Path) -> None:
    brats_2023(tmp_path / "scans", "BraTS-PED-00024-000")
    with pytest.raises(DataError, match=r"PED-00024.*--data.release brats2023 \(2023\) or brats2024-ped \(2024 on\)"):
        find_cases(tmp_path / "scans")
    for release in ("brats2023", "brats2024-ped"):
        assert find_cases(tmp_path / "scans", release=release).coding == CODINGS[release]


def test_codes_of_2024_take_adults_of_2023_and_no_children(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    brats_2023(tmp_path, "BraTS-GLI-00005-100")
    assert find_cases(tmp_path, release="brats2024").coding == CODINGS["brats2024"]
    assert not caplog.text
    brats_2023(tmp_path, "BraTS-PED-00001-000")
    assert find_cases(tmp_path, release="brats2024").names == ("BraTS-GLI-00005-100",)


def test_an_explicit_release_overrides_what_all_names_say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    brats_2023(tmp_path, "renamed")
    with caplog.at_level(logging.WARNING):
        assert find_cases(tmp_path, release="brats2018").coding == CODINGS["brats2018"]
    assert "read as brats2018, as requested" in caplog.text


def test_two_files_of_one_kind_are_refused_by_name(tmp_path: Path) -> None:
    folder = brats_2018(tmp_path, "BraTS2021_00000")
    touch(folder, "BraTS2021_00000_flair.nii")
    with pytest.raises(DataError, match=r"BraTS2021_00000_flair.nii and BraTS2021_00000_flair.nii.gz.*flair"):
        find_cases(tmp_path)


def test_a_folder_without_cases_says_what_was_looked_for(tmp_path: Path) -> None:
    touch(tmp_path, "scan.nii.gz", "deep/er/than/this/x_flair.nii.gz")
    with pytest.raises(DataError, match=r"no cases found.*dataset.json.*_flair/_t1/_t1ce/_t2.*-t2f"):
        find_cases(tmp_path)
    decathlon(tmp_path / "Task01_BrainTumour", [1])
    with pytest.raises(DataError, match="Did you mean .*Task01_BrainTumour"):
        find_cases(tmp_path)
    with pytest.raises(DataError, match="nowhere does not exist"):
        find_cases(tmp_path / "nowhere")


def test_scans_that_no_rule_knows_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for case in ("BraTS20_1", "BraTS20_2"):
        touch(tmp_path / case, *(f"{case}_{part}.nii.gz" for part in ("flair", "t1", "t1xx", "t2", "seg", "DWI")))
    touch(tmp_path / "strange", "scan.nii.gz")
    assert find_cases(tmp_path).modalities == ("flair", "t1", "t2")
    assert "5 scans are not used" in caplog.text and "t1xx (2), DWI (2), scan (1)" in caplog.text.replace(
        "DWI (2), t1xx (2)", "t1xx (2), DWI (2)"
    )
    with pytest.raises(DataError, match="t1c"):
        find_cases(tmp_path, modalities=["t1c"])
    touch(tmp_path / "BraTS20_2", "BraTS20_2_t1ce.nii.gz")
    message = "BraTS20_1: modality t1c is missing; it has flair, t1, t2, and BraTS20_1_DWI.nii.gz, .*names match no"
    with pytest.raises(DataError, match=message):
        find_cases(tmp_path)


def test_a_brain_mask_is_not_a_label(tmp_path: Path) -> None:
    parts = ("FLAIR", "T1", "T1c", "T2", "tumor_segmentation", "brain_segmentation", "brain_parenchyma_segmentation")
    touch(tmp_path / "UCSF-PDGM-0004_nifti", *(f"UCSF-PDGM-0004_{part}.nii.gz" for part in parts))
    label = find_cases(tmp_path, "brats2018").cases[0].label
    assert label and label.name == "UCSF-PDGM-0004_tumor_segmentation.nii.gz"


def test_folders_named_like_the_file_in_them_are_read_as_it(tmp_path: Path) -> None:
    case = tmp_path / "BraTS2021_00495"
    for part in ("flair", "t1", "t1ce", "t2"):
        touch(case, f"BraTS2021_00495_{part}.nii/00000057_brain_{part}.nii")
    touch(case, "BraTS2021_00495_seg.nii/00000057_final_seg.nii", "BraTS2021_00495_t1.nii/._00000057_brain_t1.nii")
    found = find_cases(tmp_path)
    assert found.coding == CODINGS["brats2018"] and found.names == ("BraTS2021_00495",)
    assert found.cases[0].images[2] == case / "BraTS2021_00495_t1ce.nii/00000057_brain_t1ce.nii"
    assert found.cases[0].label == case / "BraTS2021_00495_seg.nii/00000057_final_seg.nii"


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ((), "_t1.nii: is a folder named like a scan and holds 0"),
        (("a.nii", "b.nii"), "_t1.nii: is a folder named like a scan and holds 2"),
        (("brain_t2.nii",), "brain_t2.nii: is t2 by name, but its folder says t1"),
    ],
)
def test_a_folder_named_like_a_file_must_hold_that_scan_alone(
    tmp_path: Path, inside: tuple[str, ...], message: str
) -> None:
    touch(tmp_path / "BraTS2021_1", "BraTS2021_1_flair.nii", "BraTS2021_1_seg.nii")
    (tmp_path / "BraTS2021_1" / "BraTS2021_1_t1.nii").mkdir()
    touch(tmp_path / "BraTS2021_1" / "BraTS2021_1_t1.nii", *inside)
    with pytest.raises(DataError, match=message):
        find_cases(tmp_path)


def test_files_may_be_named_by_their_modality_alone(tmp_path: Path) -> None:
    touch(tmp_path / "exam7", "t1c.nii.gz", "t1n.nii.gz", "t2f.nii.gz", "t2w.nii.gz", "seg.nii.gz")
    found = find_cases(tmp_path)
    assert found.names == ("exam7",) and found.modalities == ALL and found.coding == CODINGS["brats2023"]
    touch(tmp_path / "old" / "exam8", "CT1.nii.gz", "FLAIR.nii.gz", "T1.nii.gz", "T2.nii.gz", "seg.nii.gz")
    with pytest.raises(DataError, match=r"--data.release brats2013 \(until 2016\) or brats2018 \(2017 to 2022\)"):
        find_cases(tmp_path / "old")


def test_names_of_the_virtual_skeleton_database_are_2013s(tmp_path: Path) -> None:
    names = [f"VSD.Brain.XX.O.{part}.nii" for part in ("MR_Flair.54512", "MR_T1.54513", "MR_T1c.54514", "MR_T2.54515")]
    touch(tmp_path / "HGG" / "case1", *names, "VSD.Brain_3more.XX.O.OT.54517.nii")
    found = find_cases(tmp_path)
    assert found.modalities == ALL and found.coding == CODINGS["brats2013"] and found.cases[0].label


def test_cases_may_lie_three_levels_deep_and_time_points_belong_to_their_patients(tmp_path: Path) -> None:
    for patient in ("Patient-001", "Smith"):
        for time in ("week-000-1", "week-044"):
            touch(tmp_path / "site" / patient / time, "t1n.nii.gz", "t2f.nii.gz", "seg.nii.gz")
    found = find_cases(tmp_path)
    assert found.names == ("Patient-001_week-000-1", "Patient-001_week-044", "Smith_week-000-1", "Smith_week-044")
    assert found.patients == {"Patient-001": found.names[:2], "Smith": found.names[2:]}


def test_bids_folders_are_named_by_patient_and_session(tmp_path: Path) -> None:
    for session in ("ses-01", "ses-02"):
        parts = ("ce-gd_T1w", "T1w", "T2w", "FLAIR", "seg")
        touch(tmp_path / "sub-07" / session / "anat", *(f"sub-07_{session}_{part}.nii.gz" for part in parts))
    found = find_cases(tmp_path, "brats2018")
    assert found.names == ("sub-07_ses-01", "sub-07_ses-02") and found.modalities == ALL
    assert list(found.patients) == ["sub-07"]


# Links, folders and names that can't be used


def test_a_broken_link_is_named_as_such(tmp_path: Path) -> None:
    folder = brats_2018(tmp_path, "BraTS2021_00000")
    for part, target in (("t1", "/gone/t1.nii.gz"), ("t2", "../.git/annex/objects/Xx/Yy/SHA256--1.nii.gz")):
        path = folder / f"BraTS2021_00000_{part}.nii.gz"
        path.unlink()
        path.symlink_to(target)
    (tmp_path / "BraTS2021_00001").symlink_to("/gone/BraTS2021_00001")
    (tmp_path / "README").symlink_to(".git/annex/objects/Xx/Yy/MD5E-s9--0/MD5E-s9--0")  # never that of a folder
    with pytest.raises(DataError) as caught:
        find_cases(tmp_path)
    text = str(caught.value)
    assert "2 of 2 cases are faulty" in text and "BraTS2021_00001: is a link to /gone/BraTS2021_00001, which" in text
    assert "_t1.nii.gz: is a link to /gone/t1.nii.gz, which does not exist" in text
    assert "_t2.nii.gz: is a git-annex link to a file that is not here" in text and "git annex get" in text
    assert "is missing" not in text.split("t2.nii.gz")[0] and "no cases" not in text


def test_links_to_scans_and_to_folders_are_followed_and_never_round_in_circles(tmp_path: Path) -> None:
    brats_2018(tmp_path / "elsewhere", "BraTS2021_00000")
    root = tmp_path / "root"
    root.mkdir()
    (root / "BraTS2021_00000").symlink_to(tmp_path / "elsewhere" / "BraTS2021_00000")
    (root / "round").symlink_to(root)
    assert find_cases(root).names == ("BraTS2021_00000",)
    (root / "self").symlink_to("self")
    survey = survey_cases(root)
    assert survey.usable.names == ("BraTS2021_00000",)
    assert [str(fault) for fault in survey.faults] == [
        f"{root / 'self'}: is a link to self, which does not exist. Put the file there, or correct the link."
    ]


def test_folders_named_like_scans_that_lead_into_themselves_are_looked_into_once(tmp_path: Path) -> None:
    """Each of two such links would double the ways at every step."""
    folder = brats_2018(tmp_path, "BraTS2021_00000")
    for part in ("t1", "t2"):
        (folder / f"BraTS2021_00000_{part}.nii.gz").unlink()
        (folder / f"BraTS2021_00000_{part}.nii.gz").symlink_to(".")
    (fault, other) = survey_cases(tmp_path).faults
    assert "_t1.nii.gz: is a folder named like a scan and holds 3" in str(fault) and "_t2.nii.gz" in str(other)


def test_a_scan_that_is_not_a_file_is_a_fault(tmp_path: Path) -> None:
    folder = brats_2018(tmp_path, "BraTS2021_00000")
    (folder / "BraTS2021_00000_t1.nii.gz").unlink()
    os.mkfifo(folder / "BraTS2021_00000_t1.nii.gz")
    (fault,) = survey_cases(tmp_path, "brats2018").faults  # and not that t1 is missing
    assert "_t1.nii.gz: is a pipe, not a regular file" in str(fault)


def test_a_folder_that_cannot_be_read_is_a_fault_and_the_others_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        brats_2018(tmp_path, f"BraTS2021_0000{number}")
    scandir, shut = os.scandir, {tmp_path / "BraTS2021_00001"}

    def scandir_without_permission(path: Path) -> Any:
        if path in shut:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scandir_without_permission)
    survey = survey_cases(tmp_path)
    assert survey.usable.names == ("BraTS2021_00000", "BraTS2021_00002") and survey.total == 3
    (fault,) = survey.faults
    assert fault.path == tmp_path / "BraTS2021_00001" and "can't be read (Permission denied)" in fault.problem
    (tmp_path / "lost+found").mkdir()  # at the root of a disk, closed to users
    shut.add(tmp_path / "lost+found")
    assert survey_cases(tmp_path).total == 3
    shut.add(tmp_path)
    with pytest.raises(DataError, match=r"no cases found.*\n.*can't be read \(Permission denied\)"):
        find_cases(tmp_path)


# Real scans


def test_the_real_folder_mixes_releases_and_each_can_be_chosen(real_data: Path) -> None:
    with pytest.raises(DataError, match="mixes releases.*brats2023.*brats2013"):
        find_cases(real_data)
    old = find_cases(real_data, release="brats2013")
    assert old.modalities == ("flair", "t1c") and len(old.cases) == 5
    assert all(case.label and case.label.name == "OTMultiClass.nii.gz" for case in old.cases)
    new = find_cases(real_data, release="brats2023")
    assert new.names == ("BraTS-GLI-00000-000",) and new.modalities == ALL
    assert new.cases[0].images[3].name == "BraTS-GLI-00000-000-t2W.nii.gz"
    assert find_cases(real_data, release="brats2023", labelled=False).cases[1].label is None
