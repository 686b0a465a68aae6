"""The loader of raw scans, beside the loader of the store and MONAI; and how it reads ahead."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import monai.transforms as mt
import numpy as np
import pytest
import torch
from test_loaders import options_of
from test_raw import AFFINES, CODING, CROP, SPACING, assert_close, write_case, write_cases

from benchmarks.monai_chain import case_to_dict, prepare_steps
from pipelines.basics.errors import CaseError, DataError
from pipelines.layouts.cases import Case, CaseSet
from pipelines.layouts.labels import Coding, regions_from_labels
from pipelines.loading import raw_loader
from pipelines.loading.augment import Augment
from pipelines.loading.loaders import TrainLoader
from pipelines.loading.raw_loader import DecodedCase, RawLoader, ReadAhead
from pipelines.preparing.store import Store, prepare
from pipelines.scans.geometry import Spacing
from pipelines.scans.nifti import RawCase


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> CaseSet:
    return write_cases(tmp_path_factory.mktemp("scans"))


@pytest.fixture(scope="module")
def store(cases: CaseSet, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return prepare(cases, tmp_path_factory.mktemp("store"), SPACING, workers=1)


def both(
    cases: CaseSet, store: Store, names: Sequence[str], crop_size: tuple[int, int, int] = CROP, **settings: Any
) -> tuple[TrainLoader, RawLoader]:
    """The loader of the store and that of the scans, with the same options."""
    options = options_of(crop_size, **settings)
    return TrainLoader(store, names, *options), RawLoader(cases, names, *options)


# ---------- the crops


@pytest.mark.parametrize("name", AFFINES)
def test_crops_are_those_of_store_and_train_loader(cases: CaseSet, store: Store, name: str) -> None:
    prepared, direct = both(cases, store, [name], seed=5, crops_per_case=6, foreground_prob=0.5)
    assert {draw.flip for step in range(3) for draw in direct.draws_of(1, step)} == {False, True}
    pairs = zip(prepared.epoch(1), direct.epoch(1), strict=True)
    for step, ((expected, expected_label), (image, label)) in enumerate(pairs):
        assert direct.draws_of(1, step) == prepared.draws_of(1, step)
        assert image.dtype == torch.float32 and image.is_contiguous(memory_format=torch.channels_last_3d)
        assert_close(image, expected)
        assert torch.equal(label, expected_label) and label.any()


def test_extra_augmentations_are_those_of_the_train_loader(cases: CaseSet, store: Store) -> None:
    extras = Augment(affine_prob=0.5, noise_prob=0.5, gamma_prob=0.5, dropout_prob=0.3)
    prepared, direct = both(cases, store, store.names, crops_per_case=2, extras=extras, rank=1, world_size=2)
    for (expected, expected_label), (image, label) in zip(prepared.epoch(0), direct.epoch(0), strict=True):
        assert_close(image, expected)
        assert torch.equal(label, expected_label)


@pytest.mark.parametrize("name", AFFINES)
def test_the_z_score_counts_the_voxels_that_it_counts_in_the_store(cases: CaseSet, store: Store, name: str) -> None:
    prepared, direct = both(cases, store, [name], crops_per_case=4, augment=False)
    zeros = 0
    for (expected, _), (image, _) in zip(prepared.epoch(0), direct.epoch(0), strict=True):
        assert torch.equal(image == 0, expected == 0)
        zeros += int((image == 0).sum())
    assert zeros > 1000


def test_crops_are_monais(cases: CaseSet) -> None:
    loader = RawLoader(cases, cases.names, *options_of(CROP, 1, augment=False), spacing=Spacing(SPACING, "file"))
    normalise = mt.NormalizeIntensity(nonzero=True, channel_wise=True)
    by_name = {case.name: case for case in cases.cases}
    for step, (image, label) in enumerate(loader.epoch(0)):
        (name,), (draw,) = loader.names_of(0, step), loader.draws_of(0, step)
        volumes = mt.Compose(prepare_steps(CODING, SPACING))(case_to_dict(by_name[name]))
        crop = mt.SpatialCrop(roi_start=draw.start, roi_end=np.add(draw.start, CROP))
        assert_close(image[0], normalise(crop(volumes["image"]).clone()).numpy())
        regions = regions_from_labels(label[0].numpy(), CODING)
        np.testing.assert_array_equal(regions, crop(volumes["label"]).numpy())


def test_volumes_smaller_than_the_crop_are_padded_as_from_the_store(cases: CaseSet, store: Store) -> None:
    crop = (44, 20, 33)
    prepared, direct = both(cases, store, store.names, crop, pad=True, foreground_prob=0.5, crops_per_case=2)
    for (expected, expected_label), (image, label) in zip(prepared.epoch(0), direct.epoch(0), strict=True):
        assert_close(image, expected)
        assert torch.equal(label, expected_label)
    with pytest.raises(DataError, match=r"case .* voxels, fewer than the crop of \(44, 20, 33\)"):
        RawLoader(cases, cases.names, *options_of(crop))


def test_steps_asked_for_directly_are_those_after_running_through(cases: CaseSet) -> None:
    """Whatever was read ahead for an epoch that was left."""
    walked, jumped = (
        RawLoader(cases, cases.names, *options_of(CROP, seed=7, crops_per_case=2, threads=threads))
        for threads in (2, 1)
    )
    next(jumped.epoch(4))
    expected = list(walked.epoch(1))[3:]
    for (image, label), (image_walked, label_walked) in zip(jumped.epoch(1, first_step=3), expected, strict=True):
        assert torch.equal(image, image_walked) and torch.equal(label, label_walked)


# ---------- decoding


def test_nothing_is_decoded_before_the_first_batch(cases: CaseSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_loader, "read_case", None)
    assert len(RawLoader(cases, cases.names, *options_of(CROP, 2))) == 4


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
        loader = RawLoader(
            cases, names, *options_of(CROP, batch_size, threads=3, crops_per_case=2, foreground_prob=0.5)
        )
        for epoch, first_step in ((0, 0), (3, 1), (1, 0)):
            for _, _ in zip(range(4), loader.epoch(epoch, first_step)):
                pass
    finally:
        gc.enable()
    assert most[0] == batch_size + 2


def test_cases_ahead_are_decoded_once_and_dropped_when_others_are_wanted() -> None:
    made: list[int] = []

    def decode(case: int) -> DecodedCase:
        made.append(case)
        return case  # type: ignore[return-value]

    reader = ReadAhead(decode, capacity=3, threads=1)
    assert [reader.get(wanted) for wanted in ([4, 5, 4, 6, 7], [5, 6, 7], [7, 5, 5])] == [4, 5, 7]
    assert made == [4, 5, 6, 7]
    assert reader.get([4, 5]) == 4 and made == [4, 5, 6, 7, 4]


def test_an_unfinished_case_that_is_no_longer_wanted_is_waited_for() -> None:
    running: set[int] = set()
    beside: list[set[int]] = []

    def decode(case: int) -> DecodedCase:
        beside.append(set(running))
        running.add(case)
        time.sleep(0.3 if case == 1 else 0)
        running.remove(case)
        return case  # type: ignore[return-value]

    reader = ReadAhead(decode, capacity=2, threads=2)
    assert reader.get([0, 1]) == 0 and reader.get([2, 3]) == 2
    assert not any(1 in others for others in beside)


def test_a_case_that_cannot_be_decoded_is_named_and_read_again_next_time(tmp_path: Path) -> None:
    found = [write_case(tmp_path, f"case{i}", AFFINES["lps"], i) for i in range(3)]
    cases = CaseSet(tuple(found), ("flair", "t1c"), CODING)
    loader = RawLoader(cases, cases.names, *options_of(CROP, 1))
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
        RawLoader(cases, cases.names, *options_of(CROP, 1))


def test_a_case_without_label_is_refused_by_name(cases: CaseSet) -> None:
    first, second = cases.cases[:2]
    unlabelled = CaseSet((first, Case(second.name, second.images, None, None)), cases.modalities, CODING)
    with pytest.raises(DataError, match=f"case {second.name} has no label"):
        RawLoader(unlabelled, unlabelled.names, *options_of(CROP, 1))


# ---------- GPU


@pytest.mark.gpu
def test_the_gpu_gives_what_the_cpu_gives(cases: CaseSet) -> None:
    cpu, gpu = (
        RawLoader(cases, cases.names, *options_of(CROP, device=torch.device(device))) for device in ("cpu", "cuda")
    )
    for (image, label), (image_gpu, label_gpu) in zip(cpu.epoch(0), gpu.epoch(0), strict=True):
        assert image_gpu.is_cuda
        assert_close(image_gpu.cpu(), image)
        assert torch.equal(label_gpu.cpu(), label)
