"""Which files are the cases of each layout, what is said where names leave something open, and MONAI's split.

The finder reads names alone, so empty files stand for scans here.
"""

from __future__ import annotations

import csv
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from monai.apps import DecathlonDataset
from monai.data.utils import partition_dataset

from pipelines.cases import Case, CaseSet, DataError, find_cases, split_cases, survey_cases
from pipelines.labels import CODINGS
from pipelines.layouts import SPELLINGS, canonical_modalities, modality_of

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


# Decathlon


def test_decathlon_cases_keep_the_order_of_dataset_json_and_name_their_channels(tmp_path: Path) -> None:
    found = find_cases(decathlon(tmp_path, [457, 306, 206]))
    assert found.names == ("BRATS_457", "BRATS_306", "BRATS_206")
    assert found.modalities == ALL and found.coding == CODINGS["decathlon"]
    image, label = tmp_path / "imagesTr/BRATS_457.nii.gz", tmp_path / "labelsTr/BRATS_457.nii.gz"
    assert found.cases[0] == Case("BRATS_457", (image,), (0, 1, 2, 3), label)


def test_decathlon_modalities_are_found_by_name_in_any_order(tmp_path: Path) -> None:
    decathlon(tmp_path, [1], modality={"0": "T2w", "1": "T1gd", "2": "FLAIR"})
    assert find_cases(tmp_path).cases[0].channels == (2, 1, 0)
    assert find_cases(tmp_path).modalities == ("flair", "t1c", "t2")
    assert find_cases(tmp_path, modalities=["T1gd", "flair"]).cases[0].channels == (1, 2)


def test_decathlon_test_images_are_cases_only_where_no_label_is_needed(tmp_path: Path) -> None:
    decathlon(tmp_path, [1, 2])
    assert find_cases(tmp_path).names == ("BRATS_001", "BRATS_002")
    unlabelled = find_cases(tmp_path, labelled=False)
    assert unlabelled.names == ("BRATS_001", "BRATS_002", "BRATS_900") and unlabelled.cases[2].label is None


@pytest.mark.parametrize("part", ["imagesTr", "labelsTr"])
def test_a_file_that_dataset_json_lists_and_is_not_there_is_named(tmp_path: Path, part: str) -> None:
    missing = decathlon(tmp_path, [1, 2]) / part / "BRATS_002.nii.gz"
    missing.unlink()
    with pytest.raises(DataError, match=rf"{missing}: case BRATS_002: listed in .*dataset.json"):
        find_cases(tmp_path)


def test_hidden_entries_of_dataset_json_are_ignored(tmp_path: Path) -> None:
    entry = {"image": "./imagesTr/BRATS_001.nii.gz", "label": "./labelsTr/BRATS_001.nii.gz"}
    hidden = {key: value.replace("BRATS", "._BRATS") for key, value in entry.items()}
    decathlon(tmp_path, [1], training=[hidden, entry])
    assert find_cases(tmp_path).names == ("BRATS_001",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modality": {"0": "CT"}}, "modality 0 is 'CT'"),
        ({"labels": {"0": "background", "1": "liver"}}, "dataset.json.*'liver'.*release"),
        ({"training": []}, "no case"),
        ({"training": ["./imagesTr/BRATS_001.nii.gz"]}, "must be"),
        ({"training": [{"image": ["a.nii.gz", "b.nii.gz"]}]}, "must be"),
        ({"modality": ["FLAIR", "T1w"]}, "modality .*missing or another thing.*list"),
        ({"modality": {"first": "FLAIR"}}, "modality first is 'FLAIR'"),
        ({"modality": {"0": 1}}, "modality 0 is 1"),
        ({"labels": ["background", "edema"]}, "labels is missing or another thing"),
    ],
)
def test_a_dataset_json_that_is_no_brain_tumour_task_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        find_cases(decathlon(tmp_path, [1], **changes))


def test_a_broken_dataset_json_is_named(tmp_path: Path) -> None:
    (decathlon(tmp_path, [1]) / "dataset.json").write_text('{"modality": ')
    with pytest.raises(DataError, match="dataset.json is not valid JSON"):
        find_cases(tmp_path)


def test_regions_tutorial_swaps_the_coding_of_decathlon(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="tutorial"):
        assert find_cases(decathlon(tmp_path, [1]), regions="tutorial").coding.regions[2] == (2,)
    with pytest.raises(ValueError, match="'turorial'"):
        find_cases(tmp_path, regions="turorial")  # type: ignore[arg-type]


# Names


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


# BraTS folders


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".NII.GZ"])
@pytest.mark.parametrize(
    ("case", "release"),
    [
        ("Brats17_TCIA_1", "brats2013"),
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
    assert found.cases == (Case(case, images, None, folder / f"{case}_seg{suffix}"),)
    assert found.modalities == ALL and found.coding == CODINGS[release]


@pytest.mark.parametrize("case", ["patient7", "BraTS_12", "BraTS_0018"])
def test_without_a_year_the_release_is_asked_for(tmp_path: Path, case: str) -> None:
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


def test_any_subset_of_modalities_in_any_order(tmp_path: Path) -> None:
    brats_2023(tmp_path, "BraTS-GLI-00002-000")
    found = find_cases(tmp_path, modalities=["t2w", "flair"])
    assert found.modalities == ("t2", "flair")
    assert [p.name[20:] for p in found.cases[0].images] == ["t2w.nii.gz", "t2f.nii.gz"]


@pytest.mark.parametrize("modalities", [[], ["pet"], ["t1", "T1w"]])
def test_modalities_that_are_unknown_or_repeated_are_refused(tmp_path: Path, modalities: list[str]) -> None:
    with pytest.raises(DataError, match="flair, t1, t1c, t2"):
        find_cases(brats_2023(tmp_path, "BraTS-GLI-00002-000"), modalities=modalities)


def test_a_missing_modality_is_an_error_in_every_case_that_lacks_it(tmp_path: Path) -> None:
    for number in range(4):
        brats_2023(tmp_path, f"BraTS-GLI-0000{number}-000")
    for number in (1, 3):
        (tmp_path / f"BraTS-GLI-0000{number}-000" / f"BraTS-GLI-0000{number}-000-t2w.nii.gz").unlink()
    with pytest.raises(DataError, match=r"00001-000: modality t2 is missing; it has flair, t1, t1c") as caught:
        find_cases(tmp_path)
    assert "00003-000" in str(caught.value) and "00002-000" not in str(caught.value)
    assert len(find_cases(tmp_path, modalities=["flair", "t1c"]).cases) == 4


def test_a_modality_that_no_case_has_is_one_error(tmp_path: Path) -> None:
    decathlon(tmp_path, range(30), modality={"0": "FLAIR", "1": "T1w"})
    with pytest.raises(DataError, match="no case has t2; they have flair, t1: .*--data.modalities") as caught:
        find_cases(tmp_path, modalities=["flair", "t2"])
    assert "BRATS" not in str(caught.value)


def test_every_fault_of_every_case_is_listed_at_once(tmp_path: Path) -> None:
    for number in range(30):
        brats_2023(tmp_path / "many", f"BraTS-GLI-{number:05d}-000")
    gone = sorted((tmp_path / "many").rglob("*-t2w.nii.gz"))[:25]
    for path in gone:
        path.unlink()
    twins = tmp_path / "many" / "BraTS-GLI-00029-000"
    touch(twins, "BraTS-GLI-00029-000-t2f.nii")
    brats_2023(tmp_path / "many" / "again", "BraTS-GLI-00028-000")
    survey = survey_cases(tmp_path / "many")
    assert survey.total == 31 and len(survey.faults) == 27
    assert set(survey.usable.names) == {f"BraTS-GLI-{number:05d}-000" for number in (25, 26, 27, 28)}
    with pytest.raises(DataError, match="many: 27 of 31 cases are faulty") as caught:
        find_cases(tmp_path / "many")
    text = str(caught.value)
    for path in (*(path.parent for path in gone), twins):
        assert text.count(f"\n  {path}: ") == 1
    assert "case BraTS-GLI-00028-000: another case has this name" in text
    assert text.count("Add the file, move the case away, or train") == 1


def test_every_listed_file_that_is_not_there_is_named_at_once(tmp_path: Path) -> None:
    decathlon(tmp_path, [1, 2, 3])
    gone = [tmp_path / name for name in ("imagesTr/BRATS_001.nii.gz", "labelsTr/BRATS_001.nii.gz")]
    gone.append(tmp_path / "labelsTr/BRATS_003.nii.gz")
    for path in gone:
        path.unlink()
    survey = survey_cases(tmp_path)
    assert [fault.path for fault in survey.faults] == gone
    assert survey.usable.names == ("BRATS_002",) and survey.total == 3
    (tmp_path / "list.json").write_text(
        json.dumps([{"name": name, "flair": f"{name}.nii.gz", "label": "labelsTr/BRATS_002.nii.gz"} for name in "ab"])
    )
    faults = survey_cases(tmp_path / "list.json", release="brats2018").faults
    assert [fault.path for fault in faults] == [tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"]


def test_cases_without_label_are_left_out_said_and_kept_for_prediction(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    brats_2023(tmp_path, "BraTS-GLI-00000-000")
    folder = brats_2023(tmp_path, "BraTS-GLI-00001-000")
    (folder / "BraTS-GLI-00001-000-seg.nii.gz").unlink()
    with caplog.at_level(logging.WARNING):
        assert find_cases(tmp_path).names == ("BraTS-GLI-00000-000",)
    assert "BraTS-GLI-00001-000" in caplog.text
    assert find_cases(tmp_path, labelled=False).cases[1].label is None
    with pytest.raises(DataError, match="none of its 1 cases has a label"):
        find_cases(folder)


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


def test_of_children_without_a_year_the_release_is_asked_for(tmp_path: Path) -> None:
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
    assert "read as brats2018" in caplog.text


def test_two_files_of_one_kind_are_refused_by_name(tmp_path: Path) -> None:
    folder = brats_2018(tmp_path, "BraTS2021_00000")
    touch(folder, "BraTS2021_00000_flair.nii")
    with pytest.raises(DataError, match=r"BraTS2021_00000_flair.nii and BraTS2021_00000_flair.nii.gz.*flair"):
        find_cases(tmp_path)


def test_two_cases_of_one_name_are_refused(tmp_path: Path) -> None:
    for grade in ("HGG", "LGG"):
        brats_2018(tmp_path / grade, "Brats18_1")
    with pytest.raises(
        DataError, match=r"LGG/Brats18_1: case Brats18_1: another case has this name \(.*HGG/Brats18_1\)"
    ):
        find_cases(tmp_path)


def test_a_folder_without_cases_says_what_was_looked_for(tmp_path: Path) -> None:
    touch(tmp_path, "scan.nii.gz", "deep/er/than/this/x_flair.nii.gz")
    with pytest.raises(DataError, match=r"no cases found.*dataset.json.*_flair/_t1/_t1ce/_t2.*-t2f"):
        find_cases(tmp_path)
    decathlon(tmp_path / "Task01_BrainTumour", [1])
    with pytest.raises(DataError, match="Did you mean .*Task01_BrainTumour"):
        find_cases(tmp_path)
    with pytest.raises(DataError, match="nowhere is not there"):
        find_cases(tmp_path / "nowhere")


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


# Lists


def test_csv_and_json_lists_give_the_same_cases(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{c}/{f}.nii.gz" for c in "ab" for f in ("x", "y")), "a/seg.nii.gz", "b/seg.nii.gz")
    records = [{"name": c, "T1ce": f"{c}/y.nii.gz", "FLAIR": f"{c}/x.nii.gz", "label": f"{c}/seg.nii.gz"} for c in "ba"]
    with (tmp_path / "list.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)
    (tmp_path / "list.json").write_text(json.dumps(records))
    found = find_cases(tmp_path / "list.csv", release="brats2018")
    assert found == find_cases(tmp_path / "list.json", release="brats2018")
    assert found.names == ("b", "a") and found.modalities == ("flair", "t1c")
    assert found.cases[0].images == (tmp_path / "b/x.nii.gz", tmp_path / "b/y.nii.gz")


def test_a_json_list_may_hold_4d_images(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "a_seg.nii.gz")
    cases = [{"name": "a", "image": "a.nii.gz", "label": "a_seg.nii.gz"}]
    (tmp_path / "list.json").write_text(json.dumps({"modalities": ["t1", "t2", "t1ce", "flair"], "cases": cases}))
    found = find_cases(tmp_path / "list.json", release="brats2018", modalities=["flair", "t1"])
    assert found.cases == (Case("a", (tmp_path / "a.nii.gz",), (3, 0), tmp_path / "a_seg.nii.gz"),)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "lists no cases"),
        ([{"flair": "x.nii.gz"}], "no name"),
        ([{"name": "a", "flair": "gone.nii.gz"}], "gone.nii.gz: case a: .*not there"),
        ([{"name": "a", "flairr": "x.nii.gz"}], "case a has flairr"),
        ([{"name": "a", "image": "x.nii.gz"}], "case a has image.*modalities"),
        ([{"name": "a", "flair": "x.nii.gz", "t2f": "y.nii.gz"}], "flair x.*t2f y.*two for one modality"),
        ([{"name": "a", "flair": "x.nii.gz", "t1": "x.nii.gz"}], "flair x.*t1 x.*a file is given twice"),
        (3, "lists no cases"),
        ({"modalities": "t1", "cases": {"a": {}}}, "lists no cases"),
    ],
)
def test_faulty_lists_are_refused_by_record(tmp_path: Path, records: Any, message: str) -> None:
    touch(tmp_path, "x.nii.gz", "y.nii.gz")
    (tmp_path / "list.json").write_text(json.dumps(records))
    with pytest.raises(DataError, match=message):
        find_cases(tmp_path / "list.json", release="brats2018")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_rows_of_a_list_are_separated_as_spreadsheets_do(tmp_path: Path, separator: str) -> None:
    touch(tmp_path, "a, left.nii.gz", "s.nii.gz")
    rows = (("Name", "T1w", "label"), ("0", '"a, left.nii.gz"', "s.nii.gz"), ())
    (tmp_path / "list.csv").write_bytes("\r\n".join(map(separator.join, rows)).encode("utf-8-sig"))
    found = find_cases(tmp_path / "list.csv", release="brats2018")
    assert found.cases == (Case("0", (tmp_path / "a, left.nii.gz",), None, tmp_path / "s.nii.gz"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name,t1\né,x.nii.gz".encode("latin-1"), "not in UTF-8.*save it as"),
        (b"name,t1\na,x.nii.gz,y.nii.gz", "a, x.nii.gz, y.nii.gz are 3 fields.*names 2"),
        (b"name,t1,T1\na,x.nii.gz,y.nii.gz", "columns name, t1, t1: name each once"),
        (b"", "lists no cases"),
    ],
)
def test_a_faulty_csv_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        find_cases(tmp_path / "list.csv", release="brats2018")


def test_lists_ask_for_the_release(tmp_path: Path) -> None:
    touch(tmp_path, "list.csv", "list.txt")
    with pytest.raises(DataError, match="--data.release"):
        find_cases(tmp_path / "list.csv")
    with pytest.raises(DataError, match=r"\.json or \.csv"):
        find_cases(tmp_path / "list.txt", release="brats2018")


# Split


def some_cases(count: int) -> CaseSet:
    cases = tuple(Case(f"case{i}", (Path(f"{i}.nii"),), None, None) for i in range(count))
    return CaseSet(cases, ("flair",), CODINGS["brats2018"])


@pytest.mark.parametrize(("count", "fraction", "seed"), [(20, 0.2, 0), (33, 0.2, 7), (11, 0.35, 12345), (5, 0.2, 0)])
def test_the_split_is_that_of_monais_decathlon_dataset(tmp_path: Path, count: int, fraction: float, seed: int) -> None:
    numbers = np.random.default_rng(count).permutation(count)
    root = decathlon(tmp_path / "Task01_BrainTumour", [int(n) for n in numbers], numTraining=count, numTest=1)
    info = json.loads((root / "dataset.json").read_text())
    described = {key: "x" for key in ("name", "description", "reference", "licence", "tensorImageSize")}
    (root / "dataset.json").write_text(json.dumps(info | described))
    train, val = split_cases(find_cases(root), fraction, seed)
    for section, names in (("training", train), ("validation", val)):
        theirs = DecathlonDataset(
            tmp_path, "Task01_BrainTumour", section, transform=lambda x: x, seed=seed, val_frac=fraction, cache_num=0
        )
        assert tuple(Path(item["image"]).name.split(".")[0] for item in theirs.data) == names
    assert len(val) == int(count * fraction)
    shutil.rmtree(root)


def test_a_few_cases_still_leave_one_to_validate() -> None:
    train, val = split_cases(some_cases(3), 0.2)
    assert len(train) == 2 and len(val) == 1
    assert split_cases(some_cases(3), 0.0) == (split_cases(some_cases(3), 0.0)[0], ())


def test_named_cases_override_the_rule() -> None:
    cases = some_cases(4)
    assert split_cases(cases, val_cases=["case2"]) == (("case0", "case1", "case3"), ("case2",))
    assert split_cases(cases, train_cases=["case3", "case1"]) == (("case3", "case1"), ("case0", "case2"))
    assert split_cases(cases, train_cases=["case3"], val_cases=["case0"]) == (("case3",), ("case0",))


def test_training_on_a_validation_case_is_allowed_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="case0"):
        assert split_cases(some_cases(1), train_cases=["case0"], val_cases=["case0"]) == (("case0",), ("case0",))


def test_impossible_splits_are_refused() -> None:
    with pytest.raises(DataError, match="no case is left to train on: 1 in all"):
        split_cases(some_cases(1))
    with pytest.raises(DataError, match="--data.val_fraction 1.5"):
        split_cases(some_cases(3), 1.5)
    with pytest.raises(DataError, match="--data.val_cases: there is no case 'case11'.*Did you mean case1"):
        split_cases(some_cases(3), val_cases=["case11"])
    with pytest.raises(DataError, match="'case1' is named 2 times"):
        split_cases(some_cases(3), train_cases=["case1", "case1"])


@pytest.mark.parametrize(("count", "folds", "seed"), [(20, 5, 0), (33, 5, 7), (11, 2, 12345), (7, 7, 0)])
def test_folds_are_those_of_monais_partition_dataset(count: int, folds: int, seed: int) -> None:
    cases = some_cases(count)
    splits = [split_cases(cases, seed=seed, folds=folds, fold=fold) for fold in range(folds)]
    theirs = partition_dataset(cases.names, num_partitions=folds, shuffle=True, seed=seed)
    assert [list(val) for _, val in splits] == theirs
    for train, val in splits:
        assert {*train, *val} == {*cases.names} and len(train) + len(val) == count


def test_each_case_validates_in_one_fold_and_sizes_differ_by_at_most_one() -> None:
    cases = some_cases(13)
    held_out = [split_cases(cases, folds=5, fold=fold)[1] for fold in range(5)]
    assert sorted(name for names in held_out for name in names) == sorted(cases.names)
    assert sorted(map(len, held_out)) == [2, 2, 3, 3, 3]
    assert split_cases(cases, seed=1, folds=5, fold=0)[1] != held_out[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold": 0}, "--data.fold 0 needs --data.folds"),
        ({"folds": 5}, "--data.folds 5 without --data.fold: .*0 to 4"),
        ({"folds": 5, "fold": 5}, "--data.folds 5 with --data.fold 5: .*0 to 4"),
        ({"folds": 5, "fold": -1}, "--data.fold -1: .*0 to 4"),
        ({"folds": 1, "fold": 0}, "--data.folds 1 must be at least 2"),
        ({"folds": 8, "fold": 0}, "--data.folds 8 must be at most the number of cases, 7"),
        ({"folds": 2, "fold": 0, "val_cases": ["case1"]}, "--data.folds 2 and --data.val_cases are two ways"),
        ({"folds": 2, "fold": 0, "train_cases": ["case1"]}, "--data.folds 2 and --data.train_cases are two ways"),
    ],
)
def test_folds_that_there_are_not_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_cases(some_cases(7), **options)


def test_select_keeps_the_order_asked_for() -> None:
    assert some_cases(3).select(["case2", "case0"]).names == ("case2", "case0")
    with pytest.raises(DataError, match="no case 'x'"):
        some_cases(3).select(["x"])
