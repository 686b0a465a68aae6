"""CSV and JSON lists of cases; empty files stand for scans."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import touch

from pipelines.basics.errors import DataError
from pipelines.layouts.cases import Case, find_cases


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
        ([{"flair": "x.nii.gz"}], "entry 1: .* has no name"),
        ([{"name": "a", "flair": "x.nii.gz"}, 7], "entry 2 is 7 and must be a record"),
        ([{"name": "a", "flair": "x.nii.gz"}, None], "entry 2 is None and must be a record"),
        ([{"name": "a", "flair": 5}], "entry 1: 'flair' is 5 and must be text in quotes"),
        ([{"name": "a", "flair": ["x.nii.gz"]}], r"'flair' is \['x.nii.gz'\] and must be text"),
        ([{"name": "a", "flair": "x.nii.gz", "label": {"a": 1}}], "'label' is {'a': 1} and must be text"),
        ([{"name": "a", "flair": "x.nii.gz", "label": float("nan")}], "'label' is nan and must be text"),
        ([{"name": "a", "flair": "x.nii.gz", "seg": True}], "'seg' is True and must be text"),
        ([{"name": 1.5, "flair": "x.nii.gz"}], "'name' is 1.5 and must be text"),
        ([{"name": None, "flair": "x.nii.gz"}], "has no name"),
        ([{"name": "a", "flair": "x\0.nii.gz"}], r"'flair': x\\x00.nii.gz is not plain text"),
        ([{"name": "a\ud800", "flair": "x.nii.gz"}], r"'name': a\\ud800 is not plain text"),
        ([{"name": "a", "flair": "x" * 300}], r"can't be read \(File name too long\)"),
        ([{"name": "a" * 300, "flair": "x.nii.gz", "label": "y.nii.gz"}], "has 300 bytes"),
        ([{"name": "a", "flair": "x" * 5000}], r"'flair' is 'x+\.\.\., 5000 characters; no path has over 4096"),
        ([{"name": "a", "flair": "."}], "is a folder"),
        ([{"name": "a", "seg": "x.nii.gz"}], "no case has an image"),
        ({"modalities": 5, "cases": []}, "modalities is 5 and must be a list"),
        ({"modalities": [None], "cases": []}, "modalities is None and must be text"),
        ({"modalities": ["CT"], "cases": []}, "list.json: modalities .*CT"),
        ({"cases": None}, "lists no cases"),
        (None, "lists no cases"),
        ([{"name": "a", "flair": "gone.nii.gz"}], "gone.nii.gz: case a: .*does not exist"),
        ([{"name": "a", "flairr": "x.nii.gz"}], "case a has flairr"),
        ([{"name": "a", "image": "x.nii.gz"}], "case a has image.*modalities"),
        ([{"name": "a", "flair": "x.nii.gz", "t2f": "y.nii.gz"}], "flair x.*t2f y.*two for one modality"),
        ([{"name": "a", "flair": "x.nii.gz", "t1": "./x.nii.gz"}], "flair x.*t1 ./x.*a file is given twice"),
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
        (b"name,t1\na,x.nii.gz,y.nii.gz", "line 2: 'a, x.nii.gz, y.nii.gz' has 3 fields.*row 2 columns"),
        (b"name,t1,T1\na,x.nii.gz,y.nii.gz", "columns name, t1, t1: name each once"),
        (b"", "lists no cases"),
        (b"\n \n", "lists no cases"),
        (b"name,t1\n", "lists no cases"),
        (b'name,t1\n\na,x.nii.gz\nb,"x.nii.gz\nc,x.nii.gz\n', "list.csv, line 4: unexpected end of data: .*quotes"),
        (b'name,t1\na,x.nii.gz\nb,"x.nii"gz\n', "list.csv, line 3: .* expected after"),
        (b"name,t1\na," + b"x" * 200_000, "list.csv, line 2: field larger than field limit"),
        (b'name,t1\n"a\nb",x.nii.gz\nc,y.nii.gz,z', r"list.csv, line 4: 'c, y.nii.gz, z' has 3 fields"),
        (b"name,t1\na,x\0.nii.gz", r"list.csv, line 2: 't1': x\\x00.nii.gz is not plain text"),
        ("name,t1\na,x.nii.gz".encode("utf-16"), "not in UTF-8"),
        (b"name,t1,\na,x.nii.gz,y.nii.gz", "line 2: 'y.nii.gz' is in a column without a name"),
        (b"t1\nx.nii.gz", "list.csv, line 2: .* has no name"),
        (b"name,t1\n,x.nii.gz", "list.csv, line 2: .* has no name"),
    ],
)
def test_a_faulty_csv_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        find_cases(tmp_path / "list.csv", release="brats2018")


def test_lists_ask_for_the_release(tmp_path: Path) -> None:
    touch(tmp_path, "list.csv", "list.txt", "x.nii.gz")
    (tmp_path / "list.csv").write_text("name,t1,label\na,x.nii.gz,y.nii.gz\n")
    with pytest.raises(DataError, match="--data.release"):
        find_cases(tmp_path / "list.csv")
    with pytest.raises(DataError, match=r"\.json or \.csv"):
        find_cases(tmp_path / "list.txt", release="brats2018")


def test_a_csv_may_have_pandas_index_and_empty_rows(tmp_path: Path) -> None:
    touch(tmp_path, "x.nii.gz", "s.nii.gz")
    for first in ("", "Unnamed: 0"):
        rows = f"\n{first},name,T1n,seg,\n,,,,\n0,00001,x.nii.gz,s.nii.gz\n\n , ,,,\n"
        (tmp_path / "list.csv").write_text(rows)
        found = find_cases(tmp_path / "list.csv", "brats2018")
        assert found.cases == (Case("00001", (tmp_path / "x.nii.gz",), None, tmp_path / "s.nii.gz"),)


def test_a_list_gives_patients_and_modalities_in_any_spelling(tmp_path: Path) -> None:
    touch(tmp_path, "x.nii.gz", "y.nii.gz", "s.nii.gz")
    (tmp_path / "list.csv").write_text("name,T2-FLAIR,T1_Gd,label,Patient\n1,x.nii.gz,y.nii.gz,s.nii.gz,07\n")
    record = {"name": 1, "t2f": "x.nii.gz", "t1ce": "y.nii.gz", "segmentation": "s.nii.gz", "patient": "07"}
    (tmp_path / "list.json").write_text(json.dumps([record]))
    found = find_cases(tmp_path / "list.csv", "brats2018")
    images = (tmp_path / "x.nii.gz", tmp_path / "y.nii.gz")
    assert found.cases == (Case("1", images, None, tmp_path / "s.nii.gz", "07"),)
    assert find_cases(tmp_path / "list.json", "brats2018") == found


def test_a_list_without_labels_needs_no_release(tmp_path: Path) -> None:
    touch(tmp_path, "x.nii.gz")
    (tmp_path / "list.csv").write_text("name,t1\na,x.nii.gz\n")
    assert find_cases(tmp_path / "list.csv", labelled=False).names == ("a",)
