"""The graph from raw volume to crop: the store with its loader is the oracle, and MONAI's transforms.

Small phantoms with a background of zeros, in the orientations that files come in, one of them rotated, one sheared.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import monai.transforms as mt
import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.eulerangles import euler2mat

from pipelines.basics.errors import CaseError, DataError
from pipelines.cases import Case, CaseSet
from pipelines.geometry import target_grid
from pipelines.labels import CODINGS, Coding, regions_from_labels
from pipelines.loading import raw, raw_loader
from pipelines.loading.augment import Augment
from pipelines.loading.loaders import TrainLoader
from pipelines.loading.raw import RawImage, resample_case
from pipelines.loading.raw_loader import CaseReader, Decoded, RawLoader
from pipelines.phantom import draw_phantom
from pipelines.preparing.store import Store, prepare
from pipelines.reference import case_to_dict, prepare_steps
from pipelines.resample import axis_weights, resample_image
from pipelines.scans.nifti import RawCase, read_case, read_grid
from pipelines.spacing import Spacing

SPACING = (1.5, 1.5, 2.0)
CROP = (24, 20, 12)
SIZE = (60, 58, 40)
CODING = CODINGS["brats2023"]
IMAGE_TOLERANCE = 1e-5  # of the image's range


def affine_of(axes: list[list[float]]) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.array(axes, float).T
    affine[:3, 3] = (-13.5, 21.25, 7.0)
    return affine


ROTATION = euler2mat(0.2, -0.3, 0.1)
AFFINES = {
    "ras": affine_of([[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    "lps": affine_of([[-1, 0, 0], [0, -1, 0], [0, 0, 1]]),
    "permuted": affine_of([[0, 0, 1], [1, 0, 0], [0, -1, 0]]),
    "anisotropic": affine_of([[0, -0.9375, 0], [0, 0, 0.9375], [-1.7, 0, 0]]),
    "coarse": affine_of([[-2.5, 0, 0], [0, 2.0, 0], [0, 0, 2.75]]),
    "as_wanted": affine_of([[-1.5, 0, 0], [0, 1.5, 0], [0, 0, -2]]),
    "rotated": affine_of((ROTATION.T * [[1], [1], [1.25]]).tolist()),
    "sheared": affine_of([[-1, 0, 0], [0.12, -1, 0], [0, 0.05, 1.2]]),
}


def write_case(folder: Path, name: str, affine: np.ndarray, seed: int) -> Case:
    folder.mkdir(parents=True, exist_ok=True)
    image_XYZC, label = draw_phantom(SIZE, seed, 0)
    images = []
    for channel, modality in ((0, "flair"), (2, "t1c")):
        images.append(folder / f"{name}_{modality}.nii.gz")
        nib.save(nib.Nifti1Image(image_XYZC[..., channel].astype(np.int16), affine), images[-1])
    nib.save(nib.Nifti1Image(label.astype(np.uint8), affine), folder / f"{name}_seg.nii.gz")
    return Case(name, tuple(images), None, folder / f"{name}_seg.nii.gz")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> CaseSet:
    folder = tmp_path_factory.mktemp("scans")
    found = [write_case(folder, name, affine, seed) for seed, (name, affine) in enumerate(AFFINES.items())]
    return CaseSet(tuple(found), ("flair", "t1c"), CODING)


@pytest.fixture(scope="module")
def store(cases: CaseSet, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return prepare(cases, tmp_path_factory.mktemp("store"), SPACING, workers=1)


def assert_close(image: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray, tolerance: float) -> None:
    difference = np.abs(np.asarray(image, np.float64) - np.asarray(expected, np.float64))
    assert difference.max() <= tolerance * np.ptp(np.asarray(expected))


# ---------- the crops


@pytest.mark.parametrize("name", AFFINES)
def test_crops_are_those_of_store_and_train_loader(cases: CaseSet, store: Store, name: str) -> None:
    settings: dict[str, Any] = {
        "crop_size": CROP,
        "batch_size": 2,
        "seed": 5,
        "crops_per_case": 6,
        "foreground_prob": 0.5,
    }
    prepared, direct = TrainLoader(store, [name], **settings), RawLoader(cases, [name], **settings)
    assert {draw.flip for step in range(3) for draw in direct.draws_of(1, step)} == {False, True}
    pairs = zip(prepared.epoch(1), direct.epoch(1), strict=True)
    for step, ((expected, expected_label), (image, label)) in enumerate(pairs):
        assert direct.draws_of(1, step) == prepared.draws_of(1, step)
        assert image.dtype == torch.float32 and image.is_contiguous(memory_format=torch.channels_last_3d)
        assert_close(image, expected, IMAGE_TOLERANCE)
        assert torch.equal(label, expected_label) and label.any()


def test_extra_augmentations_are_those_of_the_train_loader(cases: CaseSet, store: Store) -> None:
    extras = Augment(affine_prob=0.5, noise_prob=0.5, gamma_prob=0.5, dropout_prob=0.3)
    settings: dict[str, Any] = {"crop_size": CROP, "batch_size": 2, "crops_per_case": 2, "extras": extras}
    prepared, direct = TrainLoader(store, store.names, **settings), RawLoader(cases, cases.names, **settings)
    for (expected, expected_label), (image, label) in zip(prepared.epoch(0), direct.epoch(0), strict=True):
        assert_close(image, expected, IMAGE_TOLERANCE)
        assert torch.equal(label, expected_label)


@pytest.mark.parametrize("name", AFFINES)
def test_the_z_score_counts_the_voxels_that_it_counts_in_the_store(cases: CaseSet, store: Store, name: str) -> None:
    settings: dict[str, Any] = {"crop_size": CROP, "batch_size": 2, "crops_per_case": 4, "augment": False}
    pairs = zip(
        TrainLoader(store, [name], **settings).epoch(0), RawLoader(cases, [name], **settings).epoch(0), strict=True
    )
    zeros = 0
    for (expected, _), (image, _) in pairs:
        assert torch.equal(image == 0, expected == 0)
        zeros += int((image == 0).sum())
    assert zeros > 1000


def test_crops_are_monais(cases: CaseSet) -> None:
    loader = RawLoader(cases, cases.names, CROP, 1, augment=False, spacing=Spacing(SPACING, "file"))
    normalise = mt.NormalizeIntensity(nonzero=True, channel_wise=True)
    by_name = {case.name: case for case in cases.cases}
    for step, (image, label) in enumerate(loader.epoch(0)):
        (name,), (draw,) = loader.names_of(0, step), loader.draws_of(0, step)
        volumes = mt.Compose(prepare_steps(CODING, SPACING))(case_to_dict(by_name[name]))
        crop = mt.SpatialCrop(roi_start=draw.start, roi_end=np.add(draw.start, CROP))
        assert_close(image[0], normalise(crop(volumes["image"]).clone()).numpy(), IMAGE_TOLERANCE)
        regions = regions_from_labels(label[0].numpy(), CODING)
        np.testing.assert_array_equal(regions, crop(volumes["label"]).numpy())


def test_volumes_smaller_than_the_crop_are_padded_as_from_the_store(cases: CaseSet, store: Store) -> None:
    settings: dict[str, Any] = {
        "crop_size": (44, 20, 33),
        "batch_size": 2,
        "pad": True,
        "foreground_prob": 0.5,
        "crops_per_case": 2,
    }
    prepared, direct = TrainLoader(store, store.names, **settings), RawLoader(cases, cases.names, **settings)
    for (expected, expected_label), (image, label) in zip(prepared.epoch(0), direct.epoch(0), strict=True):
        assert_close(image, expected, IMAGE_TOLERANCE)
        assert torch.equal(label, expected_label)
    with pytest.raises(DataError, match=r"case .* voxels, fewer than the crop of \(44, 20, 33\)"):
        RawLoader(cases, cases.names, (44, 20, 33), 2)


# ---------- the resampling


def test_a_store_may_be_filled_by_the_graph(
    cases: CaseSet, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw, "resample_case", lambda case, grid, device: resample_case(case, grid, "cpu"))
    filled = prepare(cases, tmp_path / "store", SPACING, workers=1, device="gpu")
    for i in range(len(store)):
        assert_close(filled.image(i), store.image(i), IMAGE_TOLERANCE)
        np.testing.assert_array_equal(filled.image(i) != 0, store.image(i) != 0)


@pytest.mark.parametrize("name", AFFINES)
def test_whole_volumes_are_resampled_as_by_geometry(cases: CaseSet, name: str) -> None:
    case = read_case(cases.select([name]).cases[0], CODING)
    grid = target_grid(SIZE, case.affine, SPACING)
    expected = resample_image(case.image, case.affine, grid)
    image = resample_case(case, grid, device="cpu")
    assert image.dtype == np.float32 and image.flags.c_contiguous
    assert_close(image, expected, IMAGE_TOLERANCE)
    np.testing.assert_array_equal(image != 0, expected != 0)


def test_only_rotated_and_sheared_images_are_resampled_when_they_are_decoded(cases: CaseSet) -> None:
    for name in AFFINES:
        case = read_case(cases.select([name]).cases[0], CODING)
        grid = target_grid(SIZE, case.affine, SPACING)
        dependent = name in ("rotated", "sheared")
        assert (axis_weights(SIZE, case.affine, grid) is None) == dependent
        image = RawImage.of(case.image, case.affine, grid)
        assert np.shares_memory(image.image_CZYX, case.image) == (not dependent)
        assert image.shape == grid.shape


def test_a_crop_takes_only_the_part_of_the_volume_that_it_needs(cases: CaseSet) -> None:
    case = read_case(cases.select(["lps"]).cases[0], CODING)
    image = RawImage.of(case.image, case.affine, target_grid(SIZE, case.affine, SPACING))
    box = image.window((3, 4, 5), (8, 10, 6)).box
    assert np.shares_memory(box, case.image)
    assert np.all(np.array(box.shape[:0:-1]) <= np.array([8 * 1.5, 10 * 1.5, 6 * 2.0]) + 2)


def test_grid_of_a_file_is_read_from_its_head(cases: CaseSet, tmp_path: Path) -> None:
    path = cases.cases[1].images[0]
    content = path.read_bytes()
    head = tmp_path / "head.nii.gz"
    head.write_bytes(content[: len(content) // 2])
    shape, affine = read_grid(head)
    assert shape == SIZE
    np.testing.assert_array_equal(affine, nib.load(path).affine)
    head.write_bytes(b"")
    with pytest.raises(CaseError, match=r"head.nii.gz: empty file"):
        read_grid(head)


# ---------- order and resumption


def test_a_step_asked_for_directly_equals_the_step_after_running_through(cases: CaseSet) -> None:
    walked, jumped = (RawLoader(cases, cases.names, CROP, 2, seed=7, crops_per_case=2) for _ in range(2))
    list(walked.epoch(0))
    expected = list(walked.epoch(1))[3:]
    got = list(jumped.epoch(1, first_step=3))
    assert len(got) == len(expected) == len(jumped) - 3
    for (image, label), (image_walked, label_walked) in zip(got, expected):
        assert torch.equal(image, image_walked) and torch.equal(label, label_walked)
    assert jumped.state_dict() == walked.state_dict()


def test_an_epoch_that_is_left_leaves_no_batch_in_the_next(cases: CaseSet) -> None:
    loader = RawLoader(cases, cases.names, CROP, 2)
    next(loader.epoch(0))
    for (image, label), (expected, expected_label) in zip(
        loader.epoch(4), RawLoader(cases, cases.names, CROP, 2, threads=1).epoch(4), strict=True
    ):
        assert torch.equal(image, expected) and torch.equal(label, expected_label)


def test_two_ranks_get_the_very_samples_of_one(cases: CaseSet) -> None:
    names = cases.names[:4]
    one = list(RawLoader(cases, names, CROP, 4).epoch(2))
    halves = [list(RawLoader(cases, names, CROP, 2, rank=r, world_size=2).epoch(2)) for r in range(2)]
    for step, (image, label) in enumerate(one):
        for r, half in enumerate(halves):
            assert torch.equal(image[r::2], half[step][0]) and torch.equal(label[r::2], half[step][1])


# ---------- decoding


def test_nothing_is_decoded_before_the_first_batch(cases: CaseSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_loader, "read_case", None)
    assert len(RawLoader(cases, cases.names, CROP, 2)) == 4


@pytest.mark.parametrize("batch_size", [1, 2])
def test_at_most_batch_size_and_two_decoded_cases_are_in_memory(
    cases: CaseSet, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    lock, alive, most = threading.Lock(), [0], [0]
    original = raw_loader.read_case

    def count(by: int) -> None:
        with lock:
            alive[0] += by
            most[0] = max(most[0], alive[0])

    def counted(case: Case, coding: Coding) -> RawCase:
        count(1)
        decoded = original(case, coding)
        weakref.finalize(decoded.image.base, count, -1)  # the buffer, of which everything that is kept is a view
        return decoded

    gc.disable()  # the bound must hold by itself
    try:
        monkeypatch.setattr(raw_loader, "read_case", counted)
        names = [name for name in cases.names if name not in ("rotated", "sheared")]
        loader = RawLoader(cases, names, CROP, batch_size, threads=3, crops_per_case=2, foreground_prob=0.5)
        for epoch, first_step in ((0, 0), (3, 1), (1, 0)):
            for _, _ in zip(range(4), loader.epoch(epoch, first_step)):
                pass
    finally:
        gc.enable()
    assert most[0] == batch_size + 2


def test_cases_ahead_are_decoded_once_and_dropped_when_others_are_wanted() -> None:
    made: list[int] = []

    def decode(case: int) -> Decoded:
        made.append(case)
        return case  # type: ignore[return-value]

    reader = CaseReader(decode, capacity=3, threads=1)
    assert [reader.get(wanted) for wanted in ([4, 5, 4, 6, 7], [5, 6, 7], [7, 5, 5])] == [4, 5, 7]
    assert made == [4, 5, 6, 7]
    assert reader.get([4, 5]) == 4 and made == [4, 5, 6, 7, 4]


def test_a_case_in_the_making_that_is_no_longer_wanted_is_waited_for() -> None:
    running: set[int] = set()
    beside: list[set[int]] = []

    def decode(case: int) -> Decoded:
        beside.append(set(running))
        running.add(case)
        time.sleep(0.3 if case == 1 else 0)
        running.remove(case)
        return case  # type: ignore[return-value]

    reader = CaseReader(decode, capacity=2, threads=2)
    assert reader.get([0, 1]) == 0 and reader.get([2, 3]) == 2
    assert not any(1 in others for others in beside)


def test_a_case_that_can_not_be_decoded_is_named_and_read_anew(tmp_path: Path) -> None:
    found = [write_case(tmp_path, f"case{i}", AFFINES["lps"], i) for i in range(3)]
    cases = CaseSet(tuple(found), ("flair", "t1c"), CODING)
    loader = RawLoader(cases, cases.names, CROP, 1)
    bad = found[1].images[1]
    content = bad.read_bytes()
    bad.write_bytes(content[:-9])
    with pytest.raises(CaseError, match=r"case1_t1c.nii.gz: truncated gzip") as caught:
        list(loader.epoch(0))
    assert caught.value.path == bad
    bad.write_bytes(content)
    assert len(list(loader.epoch(1))) == 3
    bad.write_bytes(b"")
    found[0].images[0].write_bytes(b"no scan")
    with pytest.raises(CaseError, match=r"case0_flair.nii.gz: not a NIfTI file"):
        RawLoader(cases, cases.names, CROP, 1)


def test_a_case_without_label_is_refused_by_name(cases: CaseSet) -> None:
    first, second = cases.cases[:2]
    unlabelled = CaseSet((first, Case(second.name, second.images, None, None)), cases.modalities, CODING)
    with pytest.raises(DataError, match=f"case {second.name} has no label"):
        RawLoader(unlabelled, unlabelled.names, CROP, 1)


# ---------- GPU


@pytest.mark.gpu
def test_the_gpu_graph_gives_what_the_cpu_graph_gives(cases: CaseSet) -> None:
    cpu, gpu = (RawLoader(cases, cases.names, CROP, 2, device=device) for device in ("cpu", "gpu"))
    for (image, label), (image_gpu, label_gpu) in zip(cpu.epoch(0), gpu.epoch(0), strict=True):
        assert image_gpu.is_cuda
        assert_close(image_gpu.cpu(), image, IMAGE_TOLERANCE)
        assert torch.equal(label_gpu.cpu(), label)


@pytest.mark.gpu
@pytest.mark.parametrize("name", AFFINES)
def test_the_gpu_resamples_whole_volumes_as_the_cpu_does(cases: CaseSet, name: str) -> None:
    case = read_case(cases.select([name]).cases[0], CODING)
    grid = target_grid(SIZE, case.affine, SPACING)
    expected = resample_image(case.image, case.affine, grid)
    image = resample_case(case, grid, device="gpu")
    assert_close(image, expected, IMAGE_TOLERANCE)
    np.testing.assert_array_equal(image != 0, expected != 0)
