"""What all layouts have in common: files that must exist, codings that a file does not state, text that is no path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import decathlon

from pipelines.basics.errors import DataError
from pipelines.layouts.cases import survey_cases
from pipelines.layouts.found import listed_case, require_text, unstated_coding
from pipelines.layouts.labels import CODINGS


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


def test_a_broken_link_is_a_fault_of_the_case_that_lists_it(tmp_path: Path) -> None:
    (tmp_path / "x.nii.gz").symlink_to("gone.nii.gz")
    files = dict.fromkeys(("flair", "t1"), tmp_path / "x.nii.gz")  # a 4D file
    (fault,) = listed_case("a", tmp_path / "list.csv", files, None, None).faults
    assert str(fault).startswith(f"{tmp_path / 'x.nii.gz'}: is a link to gone.nii.gz, which does not exist")


def test_a_coding_that_a_file_does_not_state_must_be_given_only_where_there_are_labels() -> None:
    path = Path("list.csv")
    case = listed_case("a", path, {}, None, None)
    labelled = listed_case("b", path, {}, path, None)
    assert unstated_coding(path, [case], None) == CODINGS["decathlon"]
    assert unstated_coding(path, [case, labelled], CODINGS["brats2023"]) == CODINGS["brats2023"]
    with pytest.raises(DataError, match="list.csv does not say .*: give --data.release .decathlon, .*, or ask"):
        unstated_coding(path, [case, labelled], None, ", or ask")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "entry 1 is 5 and must be text in quotes"),
        (None, "entry 1 is None and must be text"),
        ("x" * 5000, "5000 characters; no path has over 4096"),
        ("a\0", r"entry 1: a\\x00 is not plain text in UTF-8"),
    ],
)
def test_a_value_that_is_not_text_is_refused_with_its_place(value: Any, message: str) -> None:
    assert require_text(" a.nii ", "entry 1") == "a.nii"
    with pytest.raises(DataError, match=message):
        require_text(value, "entry 1")
