"""The files of one prepared case: what they hold, and when they are made again. Scans are known by their content."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from test_store import (
    AFFINE,
    CODING,
    SHAPE,
    SPACING,
    assert_unchanged,
    files_of_at_most,
    record_of,
    state,
    three_cases,
    write_case,
)

from pipelines.basics.errors import DataError, StoreError
from pipelines.layouts.cases import Case, CaseSet
from pipelines.layouts.labels import Coding
from pipelines.preparing import prepared_case
from pipelines.preparing.prepared_case import FOREGROUND_VOXELS, checksum, to_float16
from pipelines.preparing.store import prepare
from pipelines.scans.nifti import RawCase, read_case

TOLERANCES = {"float16": 2.0**-11}  # of each voxel


@pytest.fixture
def cases(tmp_path: Path) -> CaseSet:
    return three_cases(tmp_path)


def test_a_label_is_resampled_by_its_own_affine_which_decides_its_ties(tmp_path: Path, cases: CaseSet) -> None:
    """A header that is off by 1e-4 mm, within the tolerance, must not move a label by half a voxel."""
    expected = np.array(prepare(cases, tmp_path / "store", SPACING, workers=1).label(0))
    path = cases.cases[0].label
    assert path is not None
    moved = AFFINE.copy()
    moved[:3, 3] += (1e-4, -1e-4, 1e-4)
    nib.save(nib.Nifti1Image(np.asarray(nib.load(path).dataobj), moved), path)
    np.testing.assert_array_equal(prepare(cases, tmp_path / "store", SPACING, workers=1).label(0), expected)


def test_a_scan_that_is_replaced_while_it_is_prepared_is_a_fault_of_its_case(
    tmp_path: Path, cases: CaseSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cases.cases[1].images[0]

    def read_and(change: Any, case: Case, coding: Coding) -> RawCase:
        raw = read_case(case, coding)
        if case.name == "case1":
            change(path)
        return raw

    monkeypatch.setattr(prepared_case, "read_case", partial(read_and, partial(shutil.copy, cases.cases[0].images[0])))
    with pytest.raises(DataError, match=rf"1 of 3 .*\n  case1: {path}: was changed while it was prepared"):
        prepare(cases, tmp_path / "store", SPACING, workers=1)
    monkeypatch.setattr(prepared_case, "read_case", partial(read_and, os.utime))  # another time alone is no change
    assert len(prepare(cases, tmp_path / "store", SPACING, workers=1)) == 3


@pytest.mark.parametrize(
    "name", ["x" * 230, os.fsdecode(b"M\xfcller"), "\N{BRAIN}" * 60, "..", "", "a/../../b", "$1_2$", "a\nb", "\x1b[31m"]
)
def test_a_case_may_have_any_name(tmp_path: Path, cases: CaseSet, name: str, caplog: pytest.LogCaptureFixture) -> None:
    named = CaseSet((replace(cases.cases[0], name=name), cases.cases[1]), cases.modalities, CODING)
    for _ in range(2):  # made, and read
        store = prepare(named, tmp_path / "store", SPACING, workers=1)
        assert store.names == (name, "case1") and store.index(name) == 0
        assert store.image(0).any()
    files = list((tmp_path / "store").iterdir())
    assert len(files) == 9 and all(len(path.name) < 200 and path.name.isascii() for path in files)
    assert {
        json.loads(path.read_text())["record"]["name"] for path in files if path.suffix == ".json" and "-" in path.name
    } == {name, "case1"}
    next(path for path in files if "case1" not in path.name and ".image" in path.name).unlink()
    assert prepare(named, tmp_path / "store", SPACING, workers=1).image(0).any()


def test_names_with_the_same_first_hundred_letters_have_different_files(tmp_path: Path, cases: CaseSet) -> None:
    alike = tuple(replace(case, name="x" * 200 + case.name) for case in cases.cases)
    store = prepare(CaseSet(alike, cases.modalities, CODING), tmp_path / "store", SPACING, workers=1)
    plain = prepare(cases, tmp_path / "store", SPACING, workers=1)
    for i in range(3):
        np.testing.assert_array_equal(store.image(i), plain.image(i))


@pytest.mark.parametrize("damaged", [b"\xff\xfe", b"[]", b'{"record": 1}', "another affine"])
def test_a_damaged_record_does_not_count_as_a_case(tmp_path: Path, cases: CaseSet, damaged: bytes | str) -> None:
    folder, cases = tmp_path / "store", cases.select(["case0"])
    expected = prepare(cases, folder, SPACING, workers=1).affine(0)
    path = next(folder.glob("case0-*.json"))
    whole = path.read_bytes()
    if isinstance(damaged, str):
        number = json.dumps(expected[0, 3]).encode()
        assert number in whole
        damaged = whole.replace(number, b"1" + number[1:])
    assert damaged != whole
    path.write_bytes(damaged)
    np.testing.assert_array_equal(prepare(cases, folder, SPACING, workers=1).affine(0), expected)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("kind", ["label.npy", "foreground.npy", "json"])
def test_a_case_unfinished_when_the_disk_is_full_leaves_none_of_its_files(
    tmp_path: Path, cases: CaseSet, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, replacing = tmp_path / "store", prepared_case.replacing

    @contextmanager
    def replacing_or_full(path: Path, *args: Any) -> Iterator[Any]:
        is_full = path.name.startswith("case1-") and path.name.endswith(kind)
        with files_of_at_most(10) if is_full else nullcontext(), replacing(path, *args) as file:
            yield file

    monkeypatch.setattr(prepared_case, "replacing", replacing_or_full)
    with pytest.raises(StoreError, match=rf"no space left \(.*\), writing case1-.*{kind}"):
        prepare(cases, folder, SPACING, workers=1)
    assert sorted({path.name.split("-")[0] for path in folder.iterdir()}) == ["case0", "index.json"]


def test_foreground_is_evenly_spaced_voxels_of_the_tumour(tmp_path: Path) -> None:
    many = write_case(tmp_path / "scans", "many", 0, (40, 40, 40))
    none = write_case(tmp_path / "scans", "none", 1)
    unlabelled = write_case(tmp_path / "scans", "unlabelled", 2, labelled=False)
    assert none.label is not None
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), AFFINE), none.label)
    store = prepare(CaseSet((many, none, unlabelled), ("flair", "t1c"), CODING), tmp_path / "store", SPACING, workers=1)
    label, voxels = store.label(0), store.foreground(0)
    assert label is not None and np.count_nonzero(label) > FOREGROUND_VOXELS
    assert voxels.shape == (FOREGROUND_VOXELS, 3) and voxels.dtype == np.int32
    assert np.all(label[tuple(voxels.T)] > 0) and len(np.unique(voxels, axis=0)) == FOREGROUND_VOXELS
    every = np.argwhere(label > 0)
    assert np.abs(voxels.mean(axis=0) - every.mean(axis=0)).max() < 0.1
    assert store.foreground(1).shape == store.foreground(2).shape == (0, 3)
    assert store.label(1) is not None and store.label(2) is None
    for i in range(3):
        assert_unchanged(store, i)


def test_a_changed_bit_anywhere_in_an_array_changes_its_checksum(tmp_path: Path, cases: CaseSet) -> None:
    """In each byte of the header, which is byte order, type, shape and memory order, and here and there in the data."""
    prepare(cases.select(["case0"]), tmp_path / "store", SPACING, workers=1)
    for kind, file in record_of(tmp_path / "store", "case0")["files"].items():
        path = next((tmp_path / "store").glob(f"case0-*.{kind}.npy"))
        content = path.read_bytes()
        assert checksum(path) == file["crc32"]
        for place in [*range(129), len(content) // 2, len(content) - 1]:
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            path.write_bytes(damaged)
            assert checksum(path) != file["crc32"]


def test_float16_halves_the_bytes_and_each_voxel_is_within_half_a_thousandth(tmp_path: Path, cases: CaseSet) -> None:
    exact = prepare(cases, tmp_path / "store", SPACING, workers=1)
    compact = prepare(cases, tmp_path / "store", SPACING, workers=1, dtype="float16")
    assert compact.voxels(0)[0].dtype == np.float16
    assert compact.voxels(0)[0].nbytes == exact.image(0).nbytes / 2
    for i in range(len(exact)):
        image, expected = compact.image(i), exact.image(i)
        assert image.dtype == np.float32
        tiny = np.abs(expected).max(axis=(0, 1, 2)) * 2.0**-29  # half the smallest number beside the peak, 2^15 at most
        assert (np.abs(image - expected) <= np.maximum(np.abs(expected) * TOLERANCES["float16"], tiny)).all()
        np.testing.assert_array_equal(image == 0, expected == 0)
        np.testing.assert_array_equal(np.asarray(compact.label(i)), np.asarray(exact.label(i)))


def test_float16_takes_any_range_and_keeps_tiny_voxels_apart_from_zero() -> None:
    image = np.array([[1e9, 3e-12], [-1e-11, 2e-12], [0, 0], [1e-25, 1e-12]], np.float32).reshape(4, 1, 1, 2)
    compact, scale = to_float16(image)
    back = compact.astype(np.float32) * np.array(scale, np.float32)
    assert np.isfinite(back).all()
    np.testing.assert_array_equal(np.sign(back), np.sign(image))
    np.testing.assert_allclose(back[..., 1], image[..., 1], rtol=TOLERANCES["float16"])
    assert back[0, 0, 0, 0] == pytest.approx(1e9, rel=TOLERANCES["float16"])


def test_record_holds_what_a_reader_needs(tmp_path: Path, cases: CaseSet) -> None:
    prepare(cases, tmp_path / "store", SPACING, workers=1)
    record = record_of(tmp_path / "store", "case0")
    assert record["label_values"] == [0, 1, 2, 3] and record["modalities"] == ["flair", "t1c"]
    assert record["source_shape"] == list(SHAPE) and record["spacing_mm"] == list(SPACING)


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
