"""What a store promises: the right volumes, no work twice, nothing half-written, every faulty case named."""

from __future__ import annotations

import errno
import gzip
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from isal import isal_zlib
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from pipelines.basics.errors import DataError, StoreError
from pipelines.cases import Case, CaseSet
from pipelines.geometry import target_grid
from pipelines.labels import CODINGS, Coding
from pipelines.preparing import prepared_case
from pipelines.preparing.prepared_case import FOREGROUND_VOXELS, checksum, to_float16
from pipelines.preparing.store import Store, check_cases, prepare
from pipelines.resample import resample_image, resample_label
from pipelines.scans.nifti import RawCase, read_case
from pipelines.spacing import Spacing

SHAPE = (24, 21, 18)
AFFINE = np.array([[-1, 0, 0, 3], [0, -1, 0, 9], [0, 0, 1, -4], [0, 0, 0, 1]], float)
CODING = CODINGS["brats2023"]
SPACING = (1.5, 1.5, 2.0)


def write_case(folder: Path, name: str, seed: int, shape: tuple[int, ...] = SHAPE, labelled: bool = True) -> Case:
    rng = np.random.default_rng(seed)
    (folder / name).mkdir(parents=True)
    images = tuple(folder / name / f"{name}_{modality}.nii.gz" for modality in ("flair", "t1c"))
    for path in images:
        nib.save(nib.Nifti1Image(rng.integers(0, 1000, shape).astype(np.int16), AFFINE), path)
    label = folder / name / f"{name}_seg.nii.gz"
    if labelled:
        nib.save(nib.Nifti1Image(rng.integers(0, 4, shape).astype(np.uint8), AFFINE), label)
    return Case(name, images, None, label if labelled else None)


@pytest.fixture
def cases(tmp_path: Path) -> CaseSet:
    return CaseSet(tuple(write_case(tmp_path / "scans", f"case{i}", i) for i in range(3)), ("flair", "t1c"), CODING)


def state(folder: Path) -> dict[str, int]:
    """Every file of a folder, and when it was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def assert_whole(folder: Path, store: Store) -> None:
    assert not [name for name in os.listdir(folder) if ".tmp-" in name]
    for i in range(len(store)):
        assert_unchanged(store, i)


def record_of(folder: Path, name: str) -> Any:
    return json.loads(next(folder.glob(f"{name}-*.json")).read_text())["record"]


def assert_unchanged(store: Store, i: int) -> None:
    """Every array of a case is as it was written; nothing has to be prepared again."""
    for kind, file in record_of(store.folder, store.names[i])["files"].items():
        content = next(store.folder.glob(f"{store.names[i]}-*.{kind}.npy")).read_bytes()
        assert isal_zlib.crc32(content) == file["crc32"]


def test_volumes_are_those_of_decode_resample_and_orient(tmp_path: Path, cases: CaseSet) -> None:
    store = prepare(cases, tmp_path / "store", SPACING, workers=1)
    assert store.names == cases.names and len(store) == 3
    assert store.modalities == ("flair", "t1c") and store.coding is CODING and store.spacing_mm == SPACING
    for case in cases.cases:
        i = store.index(case.name)
        raw = read_case(case, CODING)
        assert raw.label is not None
        grid = target_grid(SHAPE, AFFINE, SPACING)
        image, label = store.image(i), store.label(i)
        np.testing.assert_array_equal(image, resample_image(raw.image, AFFINE, grid))
        np.testing.assert_array_equal(label, resample_label(raw.label, AFFINE, grid))
        assert image.dtype == np.float32 and isinstance(image, np.memmap) and not image.flags.writeable
        assert label is not None and label.dtype == np.uint8 and isinstance(label, np.memmap)
        assert store.shape(i) == image.shape[:3] == label.shape
        np.testing.assert_array_equal(store.affine(i), grid.affine)
        np.testing.assert_array_equal(store.source_affine(i), AFFINE)
    with pytest.raises(DataError, match="no case 'case7' among its 3"):
        store.index("case7")


def test_a_case_stored_with_its_axes_in_another_order_gives_the_same_volumes(tmp_path: Path, cases: CaseSet) -> None:
    case = cases.cases[0]
    assert case.label is not None
    expected = prepare(cases.select(["case0"]), tmp_path / "store", SPACING, workers=1)
    for path in (*case.images, case.label):
        image = nib.load(path)
        turn = ornt_transform(io_orientation(image.affine), axcodes2ornt("PIR"))
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine).as_reoriented(turn), path)
    store = prepare(cases.select(["case0"]), tmp_path / "store", SPACING, workers=1)
    assert not np.array_equal(store.source_affine(0), expected.source_affine(0))
    np.testing.assert_array_equal(store.image(0), expected.image(0))
    np.testing.assert_array_equal(store.label(0), expected.label(0))
    np.testing.assert_array_equal(store.affine(0), expected.affine(0))
    as_monai = prepare(cases.select(["case0"]), tmp_path / "store", Spacing(SPACING, "file"), workers=1)
    assert as_monai.shape(0) != store.shape(0) == expected.shape(0)


def test_a_label_is_resampled_by_its_own_affine_which_decides_its_ties(tmp_path: Path, cases: CaseSet) -> None:
    """A header that is off by 1e-4 mm, within the tolerance, must not move a label by half a voxel."""
    expected = np.array(prepare(cases, tmp_path / "store", SPACING, workers=1).label(0))
    path = cases.cases[0].label
    assert path is not None
    moved = AFFINE.copy()
    moved[:3, 3] += (1e-4, -1e-4, 1e-4)
    nib.save(nib.Nifti1Image(np.asarray(nib.load(path).dataobj), moved), path)
    np.testing.assert_array_equal(prepare(cases, tmp_path / "store", SPACING, workers=1).label(0), expected)


def test_processes_write_what_one_process_writes(tmp_path: Path, cases: CaseSet) -> None:
    alone = prepare(cases, tmp_path / "alone", SPACING, workers=1)
    together = prepare(cases, tmp_path / "together", SPACING, workers=2)
    files = sorted(p.name for p in alone.folder.iterdir() if p.name != "index.json")
    assert files == sorted(p.name for p in together.folder.iterdir() if p.name != "index.json")
    for name in files:
        assert (alone.folder / name).read_bytes() == (together.folder / name).read_bytes()


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


def test_each_spacing_and_choice_of_modalities_has_its_own_files(tmp_path: Path, cases: CaseSet) -> None:
    one = prepare(cases, tmp_path / "store", SPACING, workers=1)
    other = prepare(cases, tmp_path / "store", (2.0, 2.0, 2.0), workers=1)
    swapped = CaseSet(tuple(Case(c.name, c.images[::-1], None, c.label) for c in cases.cases), ("t1c", "flair"), CODING)
    third = prepare(swapped, tmp_path / "store", SPACING, workers=1)
    assert one.shape(0) != other.shape(0)
    np.testing.assert_array_equal(one.image(0), third.image(0)[..., ::-1])


def test_label_is_checked_again_under_another_coding(tmp_path: Path, cases: CaseSet) -> None:
    prepare(cases, tmp_path / "store", SPACING, workers=1)
    other = CaseSet(cases.cases, cases.modalities, CODINGS["brats2018"])
    with pytest.raises(DataError, match="do not fit the coding brats2018"):
        prepare(other, tmp_path / "store", SPACING, workers=1)


@pytest.mark.parametrize("damage", ["no_json", "half_json", "no_image", "half_label", "no_index", "bad_index"])
def test_missing_and_truncated_files_are_prepared_again(tmp_path: Path, cases: CaseSet, damage: str) -> None:
    folder = tmp_path / "store"
    whole = prepare(cases, folder, SPACING, workers=1)
    expected = {path.name: path.read_bytes() for path in folder.glob("case*")}
    kind, part = damage.split("_")
    suffix = {"json": ".json", "image": ".image.npy", "label": ".label.npy", "index": "index.json"}[part]
    path = next(folder.glob(f"*{suffix}") if part != "index" else folder.glob(suffix))
    if kind == "no":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    again = prepare(cases, folder, SPACING, workers=1)
    assert {path.name: path.read_bytes() for path in folder.glob("case*")} == expected
    np.testing.assert_array_equal(again.image(0), whole.image(0))


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


def prepare_until_killed(cases: CaseSet, folder: Path, moves: int) -> None:
    """Prepare, in a process that is killed as it is about to move its n-th file into place."""
    replace, left = os.replace, iter(range(moves - 1, -1, -1))

    def replace_or_die(source: Path, target: Path) -> None:
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replace_or_die  # type: ignore[assignment]
    prepare(cases, folder, SPACING, workers=1)


@pytest.mark.parametrize("moves", [1, 4, 6, 8])  # 4 files a case: its first, its .json, within the second, the last
def test_a_killed_run_resumes_where_it_stopped(tmp_path: Path, cases: CaseSet, moves: int) -> None:
    folder, cases = tmp_path / "store", cases.select(["case0", "case1"])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipelines.preparing.store"])
    process = context.Process(target=prepare_until_killed, args=(cases, folder, moves))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = state(folder)
    assert len(left) == moves and len([name for name in left if ".tmp-" in name]) == 1
    store = prepare(cases, folder, SPACING, workers=1)
    assert_whole(folder, store)
    if moves > 4:
        assert {name: state(folder)[name] for name in left if name.startswith("case0")} == {
            name: time_ns for name, time_ns in left.items() if name.startswith("case0")
        }
    expected = prepare(cases, tmp_path / "other", SPACING, workers=1)
    for i in range(2):
        np.testing.assert_array_equal(store.image(i), expected.image(i))


def test_two_jobs_may_fill_one_folder_at_once(tmp_path: Path, cases: CaseSet) -> None:
    stores: list[Store] = []
    jobs = [
        threading.Thread(target=lambda: stores.append(prepare(cases, tmp_path / "store", SPACING, workers=1)))
        for _ in range(4)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(stores) == 4
    for store in stores:
        assert_whole(tmp_path / "store", store)


def test_temporary_files_of_dead_runs_are_removed_and_of_living_ones_kept(tmp_path: Path, cases: CaseSet) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = os.uname().nodename
    dead, alive = (folder / f".a.image.npy.tmp-{host}-{pid}-{'0' * 32}" for pid in (ended.pid, os.getpid()))
    far, old = (folder / f".a.image.npy.tmp-another-1-{digit * 32}" for digit in "12")
    for path in (dead, alive, far, old):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    for _ in range(2):  # where there is something to prepare, and where there is nothing
        prepare(cases, folder, SPACING, workers=1)
        assert (dead.exists(), alive.exists(), far.exists(), old.exists()) == (False, True, True, False)
        dead.write_bytes(b"half")
        old.write_bytes(b"half")
        os.utime(old, (0, 0))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A full disk for this process: writing beyond `size` bytes fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_is_one_clear_error_and_leaves_nothing_half_written(tmp_path: Path, cases: CaseSet) -> None:
    folder = tmp_path / "store"
    large = write_case(tmp_path / "scans", "large", 5, (40, 40, 40))
    more = CaseSet((*cases.cases[:1], large, *cases.cases[1:]), cases.modalities, CODING)
    with (
        files_of_at_most(50_000),
        pytest.raises(StoreError, match=r"no space left.*large-.*npy.*needs about 0\.5 MB") as error,
    ):
        prepare(more, folder, SPACING, workers=1)
    assert str(folder) in str(error.value) and "--data.store_dir" in str(error.value)
    needed = resample_image(read_case(large, CODING).image, AFFINE, target_grid((40, 40, 40), AFFINE, SPACING)).nbytes
    assert error.value.needed > 3 * needed  # this case and the two after it
    assert [path.name for path in folder.iterdir() if "large" in path.name or ".tmp-" in path.name] == []
    assert len(list(folder.glob("case0-*.json"))) == 1
    assert_whole(folder, prepare(more, folder, SPACING, workers=1))


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


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path, cases: CaseSet) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file/store: not writable \(Not a directory\).*--data\.store_dir"):
        prepare(cases, tmp_path / "file" / "store", SPACING, workers=1)


def test_read_only_store_is_one_clear_error_and_may_still_be_read(
    tmp_path: Path, cases: CaseSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "store"
    prepare(cases.select(["case0"]), folder, SPACING, workers=1)
    opened = os.open

    def read_only(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_CREAT and folder in Path(path).parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", read_only)
    before = state(folder)
    with pytest.raises(StoreError, match=r"store: not writable \(Read-only file system\).*--data\.store_dir"):
        prepare(cases, folder, SPACING, workers=1)
    assert prepare(cases.select(["case0"]), folder, SPACING, workers=1).image(0).any()
    assert state(folder) == before


def test_every_faulty_case_is_named_and_the_others_are_done(tmp_path: Path, cases: CaseSet) -> None:
    cases.cases[0].images[1].write_bytes(gzip.compress(b""))
    assert cases.cases[2].label is not None
    cases.cases[2].label.unlink()
    with pytest.raises(DataError, match="2 of 3 cases can't be prepared") as error:
        prepare(cases, tmp_path / "store", SPACING, workers=1)
    text = str(error.value)
    assert f"case0: {cases.cases[0].images[1]}: empty gzip" in text
    assert f"case2: {cases.cases[2].label}: there is no such file" in text
    assert len(prepare(cases.select(["case1"]), tmp_path / "store", SPACING)) == 1


def test_check_reports_all_faults_in_order_and_writes_nothing(tmp_path: Path, cases: CaseSet) -> None:
    cases.cases[2].images[0].write_bytes(b"")
    cases.cases[0].images[1].unlink()
    before = sorted(tmp_path.rglob("*"))
    faults = check_cases(cases, 1, SPACING)
    assert [fault.path for fault in faults] == [cases.cases[0].images[1], cases.cases[2].images[0]]
    assert sorted(tmp_path.rglob("*")) == before


def test_check_reports_volumes_smaller_than_the_crop(cases: CaseSet) -> None:
    shape = target_grid(SHAPE, AFFINE, SPACING).shape
    assert check_cases(cases, 1, SPACING, shape) == []
    faults = check_cases(cases, 1, SPACING, (shape[0], shape[1] + 1, shape[2]))
    assert len(faults) == 3
    assert f"prepared volume {shape} is smaller than the crop" in str(faults[0])
    assert "--data.crop_size_voxels" in faults[0].remedy and "--data.pad" in faults[0].remedy


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


@pytest.mark.parametrize("kind", ["image", "label", "foreground"])
@pytest.mark.parametrize("damage", ["a bit", "its header", "half the file", "no file"])
def test_damaged_array_is_found_when_it_is_first_read_and_made_again(
    tmp_path: Path, cases: CaseSet, kind: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = prepare(cases, tmp_path / "store", SPACING, workers=1)
    path = next((tmp_path / "store").glob(f"case1-*.{kind}.npy"))
    content = path.read_bytes()
    if damage == "no file":
        path.unlink()
    elif damage == "half the file":
        path.write_bytes(content[: len(content) // 2])
    else:
        place = -3 if damage == "a bit" else content.index(b"False")
        path.write_bytes(content[:place] + b"\x07" + content[place:][1:])
    read = {"image": store.image, "label": store.label, "foreground": store.foreground}[kind]
    read(0)
    assert not caplog.records
    expected = np.load(io.BytesIO(content))
    np.testing.assert_array_equal(read(1), expected)
    assert path.read_bytes() == content
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert str(path) in caplog.text and "preparing case case1 again" in caplog.text
    caplog.clear()
    read(1)
    assert not caplog.records


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


def test_damaged_array_of_scans_that_changed_or_went_is_an_error_that_names_both(
    tmp_path: Path, cases: CaseSet
) -> None:
    store = prepare(cases, tmp_path / "store", SPACING, workers=1)
    path = next((tmp_path / "store").glob("case1-*.image.npy"))
    path.unlink()
    scan = cases.cases[1].images[0]
    scan.write_bytes(cases.cases[0].images[0].read_bytes())
    with pytest.raises(DataError, match=rf"{path.name}: the file is gone, and the scans of case1 have changed since"):
        store.image(1)
    scan.unlink()
    with pytest.raises(DataError, match=rf"{path.name}.*can't be made again: .*{scan.name}"):
        store.image(1)


def test_faulty_cases_are_skipped_only_on_request(
    tmp_path: Path, cases: CaseSet, caplog: pytest.LogCaptureFixture
) -> None:
    cases.cases[1].images[0].write_bytes(b"no scan")
    with pytest.raises(DataError, match=cases.cases[1].images[0].name):
        prepare(cases, tmp_path / "store", SPACING, workers=1)
    for _ in range(2):  # the second time the others are there already
        caplog.clear()
        store = prepare(cases, tmp_path / "store", SPACING, workers=1, skip_faulty=True)
        assert store.names == tuple(name for name in cases.names if name != "case1")
        assert "skipped: case case1" in caplog.text and cases.cases[1].images[0].name in caplog.text
    whole = prepare(cases.select(store.names), tmp_path / "store", SPACING, workers=1)
    for i in range(len(store)):
        np.testing.assert_array_equal(store.image(i), whole.image(i))
    with pytest.raises(DataError, match="1 of 1 cases"):
        prepare(cases.select(["case1"]), tmp_path / "store", SPACING, workers=1, skip_faulty=True)


def test_float16_halves_the_bytes_and_each_voxel_is_within_half_a_thousandth(tmp_path: Path, cases: CaseSet) -> None:
    exact = prepare(cases, tmp_path / "store", SPACING, workers=1)
    compact = prepare(cases, tmp_path / "store", SPACING, workers=1, dtype="float16")
    assert compact.voxels(0)[0].dtype == np.float16
    assert compact.voxels(0)[0].nbytes == exact.image(0).nbytes / 2
    for i in range(len(exact)):
        image, expected = compact.image(i), exact.image(i)
        assert image.dtype == np.float32
        tiny = np.abs(expected).max(axis=(0, 1, 2)) * 2.0**-29  # half the smallest number beside the peak, 2^15 at most
        assert (np.abs(image - expected) <= np.maximum(np.abs(expected) * 2.0**-11, tiny)).all()
        np.testing.assert_array_equal(image == 0, expected == 0)
        np.testing.assert_array_equal(np.asarray(compact.label(i)), np.asarray(exact.label(i)))


def test_float16_takes_any_range_and_keeps_tiny_voxels_apart_from_zero() -> None:
    image = np.array([[1e9, 3e-12], [-1e-11, 2e-12], [0, 0], [1e-25, 1e-12]], np.float32).reshape(4, 1, 1, 2)
    compact, scale = to_float16(image)
    back = compact.astype(np.float32) * np.array(scale, np.float32)
    assert np.isfinite(back).all()
    np.testing.assert_array_equal(np.sign(back), np.sign(image))
    np.testing.assert_allclose(back[..., 1], image[..., 1], rtol=2.0**-11)
    assert back[0, 0, 0, 0] == pytest.approx(1e9, rel=2.0**-11)


def test_record_holds_what_a_reader_needs(tmp_path: Path, cases: CaseSet) -> None:
    prepare(cases, tmp_path / "store", SPACING, workers=1)
    record = record_of(tmp_path / "store", "case0")
    assert record["label_values"] == [0, 1, 2, 3] and record["modalities"] == ["flair", "t1c"]
    assert record["source_shape"] == list(SHAPE) and record["spacing_mm"] == list(SPACING)


def test_a_senseless_spacing_and_no_cases_are_refused(tmp_path: Path, cases: CaseSet) -> None:
    with pytest.raises(ValueError, match="spacing_mm"):
        prepare(cases, tmp_path / "store", (1.0, -1.0, 1.0), workers=1)
    with pytest.raises(DataError, match="no cases to prepare"):
        prepare(CaseSet((), ("flair",), CODING), tmp_path / "store")
