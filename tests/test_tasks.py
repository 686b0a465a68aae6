"""What `dataset.json` of Decathlon and nnU-Net and MONAI's datalists describe; empty files stand for scans."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import ALL, brats_2018, decathlon, touch

from pipelines.basics.errors import DataError
from pipelines.layouts.cases import Case, find_cases, survey_cases
from pipelines.layouts.labels import CODINGS


def test_decathlon_cases_keep_the_order_of_dataset_json_and_name_their_channels(tmp_path: Path) -> None:
    found = find_cases(decathlon(tmp_path, [457, 306, 206]))
    assert found.names == ("BRATS_457", "BRATS_306", "BRATS_206")
    assert found.modalities == ALL and found.coding == CODINGS["decathlon"]
    image, label = tmp_path / "imagesTr/BRATS_457.nii.gz", tmp_path / "labelsTr/BRATS_457.nii.gz"
    assert found.cases[0] == Case("BRATS_457", (image,), (0, 1, 2, 3), label)


@pytest.mark.parametrize("kind", ["decathlon", "nnunet", "nnunet_listed", "list"])
def test_paths_of_a_data_set_given_by_a_relative_path_are_joined_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    root, image, label = Path("set"), Path("set/imagesTr/a_0000.nii.gz"), Path("set/labelsTr/a.nii.gz")
    touch(tmp_path, str(image), str(label))
    listed = {"image": "imagesTr/a_0000.nii.gz", "label": "labelsTr/a.nii.gz"}
    task = {
        "decathlon": {"modality": {"0": "FLAIR"}, "training": [listed]},
        "nnunet": {"channel_names": {"0": "FLAIR"}},
        "nnunet_listed": {
            "channel_names": {"0": "FLAIR"}, "dataset": {"a": {"images": [listed["image"]], "label": listed["label"]}}
        },
        "list": [{"name": "a", "flair": listed["image"], "label": listed["label"]}],
    }[kind]  # fmt: skip
    path = root / ("cases.json" if kind == "list" else "dataset.json")
    path.write_text(json.dumps(task))
    (case,) = find_cases(path if kind == "list" else root, release="decathlon").cases
    assert (case.images, case.label) == ((image,), label)


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
        ({"training": [{"image": ["a.nii.gz", "b.nii.gz"]}]}, "entry 1 of training: .* 2 images don't say"),
        ({"training": [{"image": []}]}, r"entry 1 of training is \{'image': \[\]\} and must be"),
        ({"training": [3]}, "entry 1 of training is 3 and must be"),
        ({"training": [{"image": "a.nii.gz"}, None]}, "entry 2 of training is None and must be"),
        ({"training": [{"image": "a.nii.gz", "label": 5}]}, "entry 1 of training: label is 5 and must be text"),
        ({"training": [{"image": "a.nii.gz", "label": ["b"]}]}, r"label is \['b'\] and must be text"),
        ({"training": [{"image": {"a": "b"}}]}, "must be"),
        ({"training": [{"image": "a.nii.gz", "name": float("nan")}]}, "name is nan and must be text"),
        ({"training": [{"image": "a\x00.nii.gz"}]}, r"image: a\\x00.nii.gz is not plain text"),
        ({"training": [{"image": "a\ud800.nii.gz"}]}, r"image: a\\ud800.nii.gz is not plain text"),
        ({"training": [{"image": "scan.mha"}]}, "image scan.mha is not a .nii or .nii.gz"),
        ({"training": {"a": 1}}, "training must be a list of cases"),
        ({"training": None}, "lists no case"),
        ({"modality": 3}, "modality must be {number: name}, not 3"),
        ({"modality": {"0": None}}, "modality 0 is None"),
        ({"modality": {"0": "FLAIR", "00": "T1w"}}, "modality 00 is 'T1w'"),
        ({"modality": {"9" * 5000: "FLAIR"}}, "is 'FLAIR'"),
        ({"modality": {"0": "FLAIR", "1": "t2f"}}, "modality 1 is 't2f'; each .* once"),
        ({"modality": {"first": "FLAIR"}}, "modality first is 'FLAIR'"),
        ({"modality": {"0": 1}}, "modality 0 is 1"),
        ({"labels": ["background", "edema"]}, "labels must be {value: name}, not"),
    ],
)
def test_a_dataset_json_that_is_not_a_brain_tumour_task_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        find_cases(decathlon(tmp_path, [1], **changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"modality": ', "dataset.json is not valid JSON"),
        (b"[]", "this file is neither"),
        (b"null", "this file is neither"),
        (b"{}", "this file is neither"),
    ],
)
def test_a_broken_dataset_json_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (decathlon(tmp_path, [1]) / "dataset.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        find_cases(tmp_path)


def test_lists_of_dataset_json_that_are_null_are_empty(tmp_path: Path) -> None:
    decathlon(tmp_path, [1], test=None, validation=None)
    assert find_cases(tmp_path, labelled=False).names == ("BRATS_001",)
    decathlon(tmp_path, [1], test=[None])
    assert find_cases(tmp_path).names == ("BRATS_001",)
    with pytest.raises(DataError, match="entry 1 of test is None"):
        find_cases(tmp_path, labelled=False)


def test_dataset_json_itself_may_be_the_root(tmp_path: Path) -> None:
    assert find_cases(decathlon(tmp_path, [3, 1]) / "dataset.json") == find_cases(tmp_path)


def test_regions_tutorial_swaps_the_coding_of_decathlon(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="tutorial"):
        assert find_cases(decathlon(tmp_path, [1]), regions="tutorial").coding.regions[2] == (2,)
    with pytest.raises(ValueError, match="'turorial'"):
        find_cases(tmp_path, regions="turorial")  # type: ignore[arg-type]


# MONAI's datalists


def datalist(folder: Path, cases: Sequence[str], **changes: object) -> Path:
    """As MONAI's tutorials list BraTS 2021: 3D files, without modality and labels."""
    for case in cases:
        brats_2018(folder / "TrainingData", case)
    entries = [
        {
            "fold": 0,
            "image": [f"TrainingData/{case}/{case}_{part}.nii.gz" for part in ("flair", "t1ce", "t1", "t2")],
            "label": f"TrainingData/{case}/{case}_seg.nii.gz",
        }
        for case in cases
    ]
    (folder / "folds.json").write_text(json.dumps({"training": entries} | changes))
    return folder / "folds.json"


def test_a_datalist_of_3d_files_takes_modalities_from_their_names(tmp_path: Path) -> None:
    path = datalist(tmp_path, ["BraTS2021_00002", "BraTS2021_00000"])
    found = find_cases(path, "brats2018")
    assert found.names == ("BraTS2021_00002", "BraTS2021_00000") and found.modalities == ALL
    folder = tmp_path / "TrainingData/BraTS2021_00000"
    images = tuple(folder / f"BraTS2021_00000_{part}.nii.gz" for part in ("flair", "t1", "t1ce", "t2"))
    assert found.cases[1] == Case("BraTS2021_00000", images, None, folder / "BraTS2021_00000_seg.nii.gz")
    with pytest.raises(DataError, match="folds.json does not say what its labels mean: give --data.release"):
        find_cases(path)
    labels = {"0": "background", "1": "NET", "2": "ED", "4": "ET"}
    assert find_cases(datalist(tmp_path, ["BraTS2021_00000"], labels=labels)).coding == CODINGS["brats2018"]


def test_a_datalist_may_hold_4d_files_and_lists_for_validation_and_testing(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{case}/{part}.nii.gz" for case in "abc" for part in ("image", "label")))
    content = {
        "modality": {"0": "T1", "1": "T2f"},
        "training": [{"image": "a/image.nii.gz", "label": "a/label.nii.gz", "patient": "p"}],
        "validation": [{"image": ["b/image.nii.gz"], "label": "b/label.nii.gz"}],
        "testing": [{"image": "c/image.nii.gz"}],
    }
    (tmp_path / "list.json").write_text(json.dumps(content))
    found = find_cases(tmp_path / "list.json", "brats2018")
    assert found.names == ("a_image", "b_image") and found.held_out == ("b_image",)
    assert found.cases[0] == Case("a_image", (tmp_path / "a/image.nii.gz",), (1, 0), tmp_path / "a/label.nii.gz", "p")
    unlabelled = find_cases(tmp_path / "list.json", "brats2018", labelled=False)
    assert unlabelled.names == ("a_image", "b_image", "c_image") and unlabelled.cases[2].label is None


def test_cases_of_a_datalist_are_grouped_by_patient(tmp_path: Path) -> None:
    path = datalist(tmp_path, ["BraTS-GLI-00001-000", "BraTS-GLI-00001-001"])
    assert [case.patient for case in find_cases(path, "brats2018").cases] == ["BraTS-GLI-00001"] * 2


def test_the_patient_that_a_dataset_json_states_counts(tmp_path: Path) -> None:
    entry = {"image": "imagesTr/BRATS_001.nii.gz", "label": "labelsTr/BRATS_001.nii.gz", "patient": "p"}
    assert find_cases(decathlon(tmp_path, [1], training=[entry])).cases[0].patient == "p"


@pytest.mark.parametrize(
    ("entry", "changes", "message"),
    [
        ({"image": ["a.nii.gz", "b.nii.gz"]}, {}, "2 images don't say what they are: .*modality"),
        ({"image": "a.nii.gz"}, {}, "1 images don't say what they are"),
        ({"image": ["x_t1.nii.gz", "x_t1w.nii.gz"]}, {}, "t1 x_t1.nii.gz, t1 x_t1w.nii.gz: .*two for one modality"),
        ({"image": ["x_t1.nii.gz", "x_t2.nii.gz"]}, {"modality": {"0": "T2", "1": "T1"}}, "t1, t2 by name, but"),
        ({"image": ["a.nii.gz", "b.nii.gz", "c.nii.gz"]}, {"modality": {"0": "T2", "1": "T1"}}, "3 images don't say"),
        ({"image": ["a.nii.gz", 3]}, {}, "image is 3 and must be text"),
    ],
)
def test_a_datalist_that_leaves_modalities_open_is_refused(
    tmp_path: Path, entry: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "list.json").write_text(json.dumps({"training": [entry]} | changes))
    with pytest.raises(DataError, match=f"entry 1 of training: .*{message}"):
        find_cases(tmp_path / "list.json", "brats2018")


# nnU-Net

NNUNET = {
    "channel_names": {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"},
    "labels": {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]},
    "regions_class_order": [1, 2, 3],
    "numTraining": 2,
    "file_ending": ".nii.gz",
}


def nnunet(folder: Path, cases: Sequence[str] = ("BraTS2021_00001", "BraTS2021_00000"), **changes: object) -> Path:
    touch(folder, *(f"imagesTr/{case}_{i:04d}.nii.gz" for case in cases for i in range(4)))
    touch(folder, *(f"labelsTr/{case}.nii.gz" for case in cases))
    touch(folder, *(f"imagesTs/BraTS2021_00009_{i:04d}.nii.gz" for i in range(4)))
    (folder / "dataset.json").write_text(json.dumps(NNUNET | changes))
    return folder


def test_nnunets_raw_folder_is_read(tmp_path: Path) -> None:
    found = find_cases(nnunet(tmp_path))
    assert found.names == ("BraTS2021_00000", "BraTS2021_00001") and found.modalities == ALL
    images = tuple(tmp_path / f"imagesTr/BraTS2021_00000_{i:04d}.nii.gz" for i in (3, 0, 1, 2))
    assert found.cases[0] == Case("BraTS2021_00000", images, None, tmp_path / "labelsTr/BraTS2021_00000.nii.gz")
    assert found.coding == CODINGS["decathlon"]
    unlabelled = find_cases(tmp_path, labelled=False)
    assert unlabelled.names[2] == "BraTS2021_00009" and unlabelled.cases[2].label is None


def test_nnunet_may_list_its_files(tmp_path: Path) -> None:
    touch(tmp_path, "x/t1.nii.gz", "x/c.nii.gz", "x/t2.nii.gz", "x/f.nii.gz", "x/s.nii.gz")
    images = ["x/t1.nii.gz", "x/c.nii.gz", "x/t2.nii.gz", "x/f.nii.gz"]
    nnunet(tmp_path, dataset={"case7": {"images": images, "label": "x/s.nii.gz"}})
    found = find_cases(tmp_path)
    assert found.names == ("case7",) and found.cases[0].images[0] == tmp_path / "x/f.nii.gz"


def test_files_of_nnunets_first_version_are_found_where_its_dataset_json_means_them(tmp_path: Path) -> None:
    decathlon(tmp_path, [1])
    (tmp_path / "imagesTr/BRATS_001.nii.gz").unlink()
    touch(tmp_path, *(f"imagesTr/BRATS_001_{i:04d}.nii.gz" for i in range(4)))
    case = find_cases(tmp_path).cases[0]
    assert case.channels is None and case.images[2] == tmp_path / "imagesTr/BRATS_001_0002.nii.gz"


def test_faults_of_nnunets_folder_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nnunet(tmp_path)
    (tmp_path / "imagesTr/BraTS2021_00000_0001.nii.gz").unlink()
    touch(tmp_path, "labelsTr/extra.nii.gz", "imagesTr/BraTS2021_00000_0007.nii.gz", "imagesTr/notes.nii.gz")
    survey = survey_cases(tmp_path)
    assert survey.usable.names == ("BraTS2021_00001",) and survey.total == 3
    assert "case BraTS2021_00000: modality t1c is missing" in str(survey.faults[0])
    assert "case extra has a label but no image in imagesTr/extra_0000.nii.gz" in str(survey.faults[1])
    assert "2 files are not used" in caplog.text and "BraTS2021_00000_0007, notes" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file_ending": ".mha"}, "file_ending is '.mha', must be .nii.gz or .nii"),
        ({"file_ending": None}, "file_ending is None"),
        ({"channel_names": {"0": "CT"}}, "channel_names 0 is 'CT'"),
        ({"channel_names": 4}, "channel_names must be {number: name}, not 4"),
        ({"labels": {"background": 0, "liver": 1}}, "label 1 is named 'liver'"),
        ({"labels": None}, "does not say what its labels mean"),
        ({"dataset": 3}, "dataset is 3 and must be"),
        ({"dataset": {"a": {"images": ["x.nii.gz"]}}}, "case 'a' of dataset is .*4 files"),
        ({"dataset": {"a": {"images": [1, 2, 3, 4]}}}, "images is 1 and must be text"),
    ],
)
def test_a_dataset_json_of_nnunet_that_cannot_be_read_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=f"dataset.json.*{message}"):
        find_cases(nnunet(tmp_path, **changes))
