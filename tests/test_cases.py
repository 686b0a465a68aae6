"""Cases of a data set with every fault named, and their split: MONAI's, by patient."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import brats_2018, brats_2023, decathlon, touch
from monai.apps import DecathlonDataset
from monai.data.utils import partition_dataset

from pipelines.basics.errors import DataError
from pipelines.basics.text import escape_controls
from pipelines.layouts.cases import Case, CaseSet, find_cases, split_cases, survey_cases
from pipelines.layouts.labels import CODINGS


def test_finding_cases_imports_no_package_that_takes_seconds() -> None:
    code = (
        "import sys, pipelines.layouts.cases, pipelines.scans.geometry, pipelines.preparing.processes\n"
        "heavy = {'torch', 'monai', 'nibabel', 'scipy', 'nvidia', 'triton', 'deepspeed'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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


def test_cases_without_label_are_skipped_with_a_warning_and_kept_for_prediction(
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


def test_two_cases_of_one_name_are_refused(tmp_path: Path) -> None:
    for grade in ("HGG", "LGG"):
        brats_2018(tmp_path / grade, "Brats18_1")
    with pytest.raises(
        DataError, match=r"LGG/Brats18_1: case Brats18_1: another case has this name \(.*HGG/Brats18_1\)"
    ):
        find_cases(tmp_path)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (os.fsdecode(b"BraTS2021_M\xfcller"), "BraTS2021_M\\udcfcller is not plain text in UTF-8"),
        ("BraTS2021_a\x1b[31m", "BraTS2021_a\\x1b[31m is not plain text"),
        ("BraTS2021_a\nb", "BraTS2021_a\\nb is not plain text"),
        (f"BraTS2021_{'x' * 220}", "has 230 bytes; files are named after it: at most 200"),
        (f"BraTS2021_{'é' * 101}", "has 212 bytes"),
    ],
)
def test_a_name_that_files_and_tables_cannot_have_is_a_fault_of_its_case(tmp_path: Path, case: str, said: str) -> None:
    brats_2018(tmp_path, "BraTS2021_00000")
    touch(tmp_path / case, *(f"{part}.nii.gz" for part in ("flair", "t1", "t1ce", "t2", "seg")))
    survey = survey_cases(tmp_path)
    assert survey.usable.names == ("BraTS2021_00000",) and survey.total == 2
    (fault,) = survey.faults
    assert said in str(fault)
    for text in (str(fault), str(fault.path), fault.problem, str(pickle.loads(pickle.dumps(fault)))):
        assert escape_controls(text) == text
    with pytest.raises(DataError, match="1 of 2 cases are faulty") as caught:
        find_cases(tmp_path)
    str(caught.value).encode()


def test_a_root_that_is_not_utf8_is_refused_at_once(tmp_path: Path) -> None:
    root = tmp_path / os.fsdecode(b"M\xfcller")
    brats_2018(root, "BraTS2021_00000")
    with pytest.raises(DataError, match=r"M\\udcfcller is not plain text in UTF-8.*rename that folder"):
        find_cases(root)


# Splits


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


def test_training_on_a_validation_case_is_allowed_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert split_cases(some_cases(1), train_cases=["case0"], val_cases=["case0"]) == (("case0",), ("case0",))
    assert "case0: both trained on and validated" in caplog.text and "patient" not in caplog.text


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
def test_folds_that_do_not_exist_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_cases(some_cases(7), **options)


# Patients


def time_points(*counts: int) -> CaseSet:
    """Patients with so many cases each, one after the other."""
    cases = tuple(
        Case(f"p{patient}-{time}", (Path("x.nii"),), None, None, f"p{patient}")
        for patient, count in enumerate(counts)
        for time in range(count)
    )
    return CaseSet(cases, ("flair",), CODINGS["brats2023"])


@pytest.mark.parametrize("options", [{"val_fraction": 0.3}, {"folds": 3, "fold": 0}, {"folds": 3, "fold": 2}])
@pytest.mark.parametrize("seed", range(5))
def test_all_time_points_of_a_patient_are_on_one_side(options: dict[str, Any], seed: int) -> None:
    cases = time_points(3, 1, 2, 1, 1, 4, 2, 1)
    train, val = split_cases(cases, seed=seed, **options)
    assert sorted(train + val) == sorted(cases.names)
    assert not {name.split("-")[0] for name in train} & {name.split("-")[0] for name in val}


def test_patients_of_one_case_each_are_split_as_their_cases() -> None:
    cases, patients = some_cases(17), time_points(*[1] * 17)
    several: tuple[dict[str, Any], ...] = ({"seed": 3}, {"seed": 4, "folds": 5, "fold": 1})
    for options in several:
        expected = [[int(name[4:]) for name in names] for names in split_cases(cases, **options)]
        assert [[int(name[1:-2]) for name in names] for names in split_cases(patients, **options)] == expected


def test_each_patient_validates_in_one_fold() -> None:
    cases = time_points(3, 1, 2, 1, 1)
    held_out = [split_cases(cases, folds=5, fold=fold)[1] for fold in range(5)]
    assert sorted(held_out) == sorted(cases.patients.values())
    with pytest.raises(DataError, match=r"--data.folds 6 must be at most the number of patients \(8 cases\), 5"):
        split_cases(cases, folds=6, fold=0)
    with pytest.raises(DataError, match=r"3 in all, of 1 patient\(s\), 3 for validation"):
        split_cases(time_points(3))


def test_splitting_the_time_points_of_a_patient_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    cases = time_points(2, 2, 1)
    assert split_cases(cases, val_cases=["p1-0", "p2-0"])[0] == ("p0-0", "p0-1", "p1-1")
    assert "patient p1: some time points are trained on and others validated" in caplog.text
    caplog.clear()
    split_cases(cases, val_cases=["p1-0", "p1-1"])
    assert not caplog.text


def test_cases_that_a_data_set_lists_for_validation_validate(caplog: pytest.LogCaptureFixture) -> None:
    cases = replace(some_cases(5), held_out=("case4", "case1"))
    with caplog.at_level(logging.INFO):
        assert split_cases(cases) == (("case0", "case2", "case3"), ("case4", "case1"))
    assert "the 2 cases that the data set lists for it" in caplog.text
    assert split_cases(cases, val_cases=["case0"])[1] == ("case0",)
    assert split_cases(cases, folds=5, fold=0) == split_cases(some_cases(5), folds=5, fold=0)


def test_decathlons_split_is_monais_whatever_its_cases_are_called(tmp_path: Path) -> None:
    names = [f"BraTS-GLI-{patient:05d}-{time:03d}" for patient in range(5) for time in range(3)]
    entries = [{"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"} for name in names]
    touch(tmp_path, *(path for entry in entries for path in entry.values()))
    plain = CaseSet(tuple(Case(name, (Path("x"),), None, None) for name in names), ("t1",), CODINGS["decathlon"])
    assert split_cases(find_cases(decathlon(tmp_path, [], training=entries))) == split_cases(plain)


def test_select_keeps_the_order_asked_for() -> None:
    assert some_cases(3).select(["case2", "case0"]).names == ("case2", "case0")
    with pytest.raises(DataError, match="no case 'x'"):
        some_cases(3).select(["x"])
