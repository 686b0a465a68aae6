"""Scans are known by their content: unchanged ones are neither opened nor prepared again, changed ones are."""

from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from test_store import AFFINE, CODING, SHAPE, SPACING, state, three_cases

from pipelines.layouts.cases import Case, CaseSet
from pipelines.preparing import prepared_case
from pipelines.preparing.store import prepare


@pytest.fixture
def cases(tmp_path: Path) -> CaseSet:
    return three_cases(tmp_path)


def refuse(*_: Any) -> Any:
    raise AssertionError("not to be called")


def test_second_run_opens_no_scan_and_writes_nothing(
    tmp_path: Path, cases: CaseSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(cases, tmp_path / "store", SPACING, workers=1)
    before = state(tmp_path / "store")
    monkeypatch.setattr(prepared_case, "hash_file", refuse)
    assert len(prepare(cases, tmp_path / "store", SPACING)) == 3
    assert state(tmp_path / "store") == before


@pytest.mark.parametrize("how", ["written to", "replaced"])
def test_a_changed_scan_of_the_same_size_and_time_is_prepared_again(tmp_path: Path, cases: CaseSet, how: str) -> None:
    path = cases.cases[0].images[0]
    path.write_bytes(gzip.decompress(path.read_bytes()))
    before = np.array(prepare(cases, tmp_path / "store", SPACING, workers=1).image(0))
    content, old = bytearray(path.read_bytes()), path.stat()
    content[-4000:] = content[-4000:][::-1]
    if how == "replaced":
        path.unlink()
        (tmp_path / "takes the inode").touch()
    path.write_bytes(content)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (old.st_size, old.st_mtime_ns)
    after = prepare(cases, tmp_path / "store", SPACING, workers=1).image(0)
    assert (after != before).any()


@pytest.mark.parametrize("how", [shutil.copytree, shutil.move])
def test_a_data_set_that_was_copied_or_moved_is_not_prepared_again(
    tmp_path: Path, cases: CaseSet, how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(cases, tmp_path / "store", SPACING, workers=1)
    how(tmp_path / "scans", tmp_path / "elsewhere")

    def there(path: Path) -> Path:
        return tmp_path / "elsewhere" / path.relative_to(tmp_path / "scans")

    found = [Case(case.name, tuple(map(there, case.images)), None, there(case.label or Path())) for case in cases.cases]
    moved = CaseSet(tuple(found), cases.modalities, CODING)
    monkeypatch.setattr(prepared_case, "read_case", refuse)
    assert len(prepare(moved, tmp_path / "store", SPACING, workers=1)) == 3
    monkeypatch.setattr(prepared_case, "hash_file", refuse)
    assert len(prepare(moved, tmp_path / "store", SPACING, workers=1)) == 3


def test_new_content_is_prepared_and_a_new_date_is_not(tmp_path: Path, cases: CaseSet) -> None:
    folder = tmp_path / "store"
    before = np.array(prepare(cases, folder, SPACING, workers=1).image(0))
    first = state(folder)
    os.utime(cases.cases[1].images[0])
    prepare(cases, folder, SPACING, workers=1)
    assert {**state(folder), "index.json": 0} == {**first, "index.json": 0}
    path = cases.cases[0].images[0]
    steps = np.broadcast_to(np.arange(7, 7 + SHAPE[0], dtype=np.int16)[:, None, None], SHAPE)
    nib.save(nib.Nifti1Image(steps, AFFINE), path)
    store = prepare(cases, folder, SPACING, workers=1)
    assert len(state(folder)) == len(first) + 4
    assert store.image(0)[..., 0].min() == 7 and not np.array_equal(before, store.image(0))
