"""What a store promises: the right volumes, no work twice, nothing half-written, every faulty case named."""

from __future__ import annotations

import errno
import gzip
import io
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from isal import isal_zlib
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from pipelines.basics.errors import DataError, StoreError
from pipelines.layouts.cases import Case, CaseSet
from pipelines.layouts.labels import CODINGS
from pipelines.preparing.store import Store, check_cases, prepare
from pipelines.scans.geometry import Spacing, target_grid
from pipelines.scans.nifti import read_case
from pipelines.scans.resample import resample_image, resample_label

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


def three_cases(folder: Path) -> CaseSet:
    return CaseSet(tuple(write_case(folder / "scans", f"case{i}", i) for i in range(3)), ("flair", "t1c"), CODING)


@pytest.fixture
def cases(tmp_path: Path) -> CaseSet:
    return three_cases(tmp_path)


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


def test_processes_write_what_one_process_writes(tmp_path: Path, cases: CaseSet) -> None:
    alone = prepare(cases, tmp_path / "alone", SPACING, workers=1)
    together = prepare(cases, tmp_path / "together", SPACING, workers=2)
    files = sorted(p.name for p in alone.folder.iterdir() if p.name != "index.json")
    assert files == sorted(p.name for p in together.folder.iterdir() if p.name != "index.json")
    for name in files:
        assert (alone.folder / name).read_bytes() == (together.folder / name).read_bytes()


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
    with pytest.raises(DataError, match=rf"{path.name}.*can't be prepared again: .*{scan.name}"):
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


def test_a_senseless_spacing_and_no_cases_are_refused(tmp_path: Path, cases: CaseSet) -> None:
    with pytest.raises(ValueError, match="spacing_mm"):
        prepare(cases, tmp_path / "store", (1.0, -1.0, 1.0), workers=1)
    with pytest.raises(DataError, match="no cases to prepare"):
        prepare(CaseSet((), ("flair",), CODING), tmp_path / "store")
