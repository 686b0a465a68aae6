"""Which batches loaders give, on small random volumes that went through the real store.

The oracle is MONAI's transform where there is one, NumPy in float64 elsewhere. Parity on real scans, with MONAI's own
random draws, is in test_monai_chain.py; what the loader of raw scans adds is in test_raw_loader.py.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import monai.transforms as mt
import nibabel as nib
import numpy as np
import pytest
import torch
from test_dali import numpy_z_score

from pipelines.basics.errors import DataError
from pipelines.layouts.cases import find_cases
from pipelines.loading import loaders
from pipelines.loading.augment import Augment
from pipelines.loading.dali import Stream
from pipelines.loading.loader_options import CropOptions, LoaderOptions, Residence
from pipelines.loading.loaders import TrainLoader, ValLoader
from pipelines.loading.sampling import CropDraw
from pipelines.loading.volumes import LoadedVolumes
from pipelines.preparing.store import Store, prepare

SPACING = (1.5, 1.5, 2.0)
CROP = (16, 12, 8)
TOLERANCES = {"image": 1e-5}  # absolute, of z-scored voxels
SHAPES = [(24, 20, 14), (23, 21, 15), (25, 19, 11), (24, 24, 16), (30, 17, 13), (22, 22, 12), (21, 23, 10), (28, 16, 9)]


def write_task(folder: Path, shapes: list[tuple[int, int, int]], labelled: bool = True) -> Path:
    """A Decathlon task of random two-channel int16 images, 40 % zeros, already at the spacing and in RAS."""
    rng = np.random.default_rng(0)
    affine = np.diag((*SPACING, 1.0))
    training = []
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
    for i, shape in enumerate(shapes):
        image = rng.integers(1, 3000, (*shape, 2)) * (rng.random((*shape, 2)) < 0.6)
        label = rng.integers(0, 4, shape) * (rng.random(shape) < 0.1)
        nib.save(nib.Nifti1Image(image.astype(np.int16), affine), folder / f"imagesTr/case_{i}.nii.gz")
        nib.save(nib.Nifti1Image(label.astype(np.uint8), affine), folder / f"labelsTr/case_{i}.nii.gz")
        entry = {"image": f"./imagesTr/case_{i}.nii.gz", "label": f"./labelsTr/case_{i}.nii.gz"}
        training.append(entry if labelled else {"image": entry["image"]})
    labels = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}
    meta = {"modality": {"0": "FLAIR", "1": "T1w"}, "labels": labels, "training": training, "test": []}
    (folder / "dataset.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("random")
    cases = find_cases(write_task(folder / "Task", SHAPES), modalities=("flair", "t1"))
    return prepare(cases, folder / "store", SPACING, workers=1)


def assert_close(image_CXYZ: torch.Tensor, expected_XYZC: np.ndarray) -> None:
    np.testing.assert_allclose(image_CXYZ.permute(1, 2, 3, 0), expected_XYZC, atol=TOLERANCES["image"])


def options_of(
    crop_size: tuple[int, int, int], batch_size: int = 2, **settings: Any
) -> tuple[CropOptions, LoaderOptions]:
    """The options of a loader; each of `settings` goes to the one that has it."""
    names = {field.name for field in fields(CropOptions)}
    crops = {name: settings.pop(name) for name in names & set(settings)}
    return CropOptions(crop_size, batch_size, **crops), LoaderOptions(**settings)


def crops_of(store: Store, crop_size: tuple[int, int, int], batch_size: int = 2, **settings: Any) -> TrainLoader:
    return TrainLoader(store, settings.pop("names", store.names), *options_of(crop_size, batch_size, **settings))


def batches(loader: TrainLoader, epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(loader.epoch(epoch))


def assert_same(a: list[tuple[torch.Tensor, torch.Tensor]], b: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    assert len(a) == len(b)
    for (image_a, label_a), (image_b, label_b) in zip(a, b):
        assert torch.equal(image_a, image_b)
        assert torch.equal(label_a, label_b)


# ---------- contents of a batch


def test_batch_is_crop_flip_z_score_scale_shift_of_the_named_case(store: Store) -> None:
    loader = crops_of(store, CROP, 2, seed=3, crops_per_case=3, foreground_prob=0.5)
    seen: Counter[str] = Counter()
    for step, (image, label) in enumerate(loader.epoch(1)):
        for b, (name, draw) in enumerate(zip(loader.names_of(1, step), loader.draws_of(1, step))):
            box = tuple(slice(a, a + n) for a, n in zip(draw.start, CROP))
            i = store.index(name)
            crop, truth = np.array(store.image(i)[box]), np.array(store.label(i)[box])  # type: ignore[index]
            if draw.flip:
                crop, truth = crop[::-1], truth[::-1]
            expected = numpy_z_score(crop) * (1 + draw.scale) + draw.shift
            assert_close(image[b], expected)
            np.testing.assert_array_equal(label[b].numpy(), truth)
            seen.update(flip=draw.flip, scale=draw.scale != 0, shift=draw.shift != 0)
    assert min(seen.values()) >= 5  # every step of the chain was exercised


def test_batches_are_channels_last_views_with_contract_shapes_and_types(store: Store) -> None:
    image, label = next(crops_of(store, CROP, 3).epoch(0))
    assert image.shape == (3, 2, *CROP)
    assert image.dtype == torch.float32
    assert image.is_contiguous(memory_format=torch.channels_last_3d)
    assert label.shape == (3, *CROP)
    assert label.dtype == torch.uint8


def test_yielded_tensors_keep_their_values_while_the_pipeline_runs_on(store: Store) -> None:
    kept, copies = [], []
    for pair in crops_of(store, CROP, 2, crops_per_case=4).epoch(0):
        kept.append(pair)
        copies.append((pair[0].clone(), pair[1].clone()))
    assert_same(kept, copies)


def test_without_augmentation_only_the_crop_is_random(store: Store) -> None:
    plain = crops_of(store, CROP, 2, augment=False)
    augmented = crops_of(store, CROP, 2)
    for step in range(len(plain)):
        assert plain.draws_of(0, step) == [CropDraw(d.start, False, 0.0, 0.0) for d in augmented.draws_of(0, step)]


# ---------- order


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_ranks_together_cover_every_sample_and_overlap_only_by_padding(
    store: Store, world_size: int, batch_size: int
) -> None:
    loaders = [
        crops_of(store, CROP, batch_size, rank=r, world_size=world_size, crops_per_case=2) for r in range(world_size)
    ]
    assert len({len(loader) for loader in loaders}) == 1
    names = [n for loader in loaders for step in range(len(loader)) for n in loader.names_of(4, step)]
    padded = len(names) - 2 * len(store)
    assert 0 <= padded < batch_size * world_size
    counts = Counter(names)
    assert set(counts) == set(store.names)
    assert sum(n - 2 for n in counts.values()) == padded
    assert min(counts.values()) == 2


def test_two_ranks_get_the_samples_of_one(store: Store) -> None:
    one = batches(crops_of(store, CROP, 4), 2)
    halves = [batches(crops_of(store, CROP, 2, rank=r, world_size=2), 2) for r in range(2)]
    for step, (image, label) in enumerate(one):
        for r, half in enumerate(halves):
            assert torch.equal(image[r::2], half[step][0])
            assert torch.equal(label[r::2], half[step][1])


def test_epoch_five_is_the_same_directly_and_after_running_through(store: Store) -> None:
    walked, jumped = (crops_of(store, CROP, 3, seed=7) for _ in range(2))
    for epoch in range(5):
        batches(walked, epoch)
    assert_same(batches(walked, 5), batches(jumped, 5))


def test_number_of_threads_changes_nothing(store: Store) -> None:
    one, three = (crops_of(store, CROP, 3, threads=threads) for threads in (1, 3))
    assert_same(batches(one, 0), batches(three, 0))


# ---------- abandoned epochs, resuming


@pytest.mark.parametrize("taken", [0, 1, 2, 3])
@pytest.mark.parametrize("following", [0, 1, 9])
def test_no_batch_of_an_abandoned_epoch_leaks_into_the_next(store: Store, taken: int, following: int) -> None:
    loader = crops_of(store, CROP, 2)
    left = loader.epoch(0)
    for _ in range(taken):
        next(left)
    assert_same(batches(loader, following), batches(crops_of(store, CROP, 2), following))


@pytest.mark.parametrize("taken", [0, 1, 3, 5])
def test_a_new_loader_resumes_from_the_state_of_another(store: Store, taken: int) -> None:
    def loader() -> TrainLoader:
        return crops_of(store, CROP, 2, seed=5, crops_per_case=3, foreground_prob=0.5)

    first, again = loader(), loader()
    expected = batches(first, 2)
    batch = first.epoch(2)
    for _ in range(taken):
        next(batch)
    state = json.loads(json.dumps(first.state_dict()))
    position = again.load_state_dict(state)
    assert position == ((2, taken) if taken else first.position)
    if taken:
        assert_same(list(again.epoch(*position)), expected[taken:])
    assert list(again.epoch(2, len(again))) == []  # stopped after the last batch


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"batch_size": 1, "world_size": 2}, 3),  # as many samples in a step
        ({"batch_size": 1}, 6),
        ({"batch_size": 4}, 1),  # samples 4 and 5 come again
        ({"batch_size": 1, "accumulate_steps": 4}, 4),  # the start of a step of four batches
    ],
)
def test_other_ranks_and_batch_sizes_resume_at_the_same_sample(store: Store, changed: dict, expected: int) -> None:
    arguments: dict = {"crop_size": CROP, "batch_size": 2, "seed": 5}
    first = crops_of(store, **arguments)
    batch = first.epoch(2)
    for _ in range(3):
        next(batch)
    again = crops_of(store, **(arguments | changed))
    assert again.load_state_dict(first.state_dict()) == (2, expected)


@pytest.mark.parametrize("accumulate_steps", [1, 2, 3])
def test_an_epoch_has_a_multiple_of_the_batches_of_a_step(store: Store, accumulate_steps: int) -> None:
    plain = crops_of(store, CROP, 3)
    loader = crops_of(store, CROP, 3, accumulate_steps=accumulate_steps)
    assert len(loader) % accumulate_steps == 0 and 0 <= len(loader) - len(plain) < accumulate_steps
    names = [loader.names_of(1, step) for step in range(len(loader))]
    assert names[: len(plain) - 1] == [plain.names_of(1, step) for step in range(len(plain) - 1)]
    assert len(batches(loader, 1)) == len(loader)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 6}, "'seed': 5"),
        ({"crop_size": (16, 12, 6)}, "'crop_size'"),
        ({"names": 7}, "'cases'"),
        ({"foreground_prob": 0.2}, "'foreground_prob': 0.0"),
        ({"augment": False}, "'augment': True"),
        ({"crops_per_case": 2}, "'samples': 8"),
    ],
)
def test_the_state_of_another_recipe_is_refused_by_name(store: Store, changed: dict, named: str) -> None:
    arguments: dict = {"crop_size": CROP, "batch_size": 2, "seed": 5}
    state = crops_of(store, **arguments).state_dict()
    if "names" in changed:
        changed = {"names": store.names[:7]}
    with pytest.raises(DataError, match=named):
        crops_of(store, **(arguments | changed)).load_state_dict(state)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_images_come_in_the_dtype_and_memory_format_asked_for(store: Store, memory_format: torch.memory_format) -> None:
    plain = crops_of(store, CROP, 2)
    loader = crops_of(store, CROP, 2, dtype=torch.bfloat16, memory_format=memory_format)
    for (image, label), (expected, expected_label) in zip(loader.epoch(0), plain.epoch(0), strict=True):
        assert image.is_contiguous(memory_format=memory_format)
        assert torch.equal(image, expected.to(torch.bfloat16))
        assert torch.equal(label, expected_label)


ALL = Augment(affine_prob=0.5, noise_prob=0.5, blur_prob=0.5, bias_field_prob=0.5, gamma_prob=0.5, dropout_prob=0.5)


def test_extra_augmentations_do_not_change_the_draws_of_crops_and_jitter(store: Store) -> None:
    plain, noisy = (
        crops_of(store, CROP, 2, seed=5, extras=extras)
        for extras in (Augment(), Augment(noise_prob=1.0, noise_std=1e-3, dropout_prob=0.5))
    )
    dropped = 0
    for step, ((image, label), (expected, expected_label)) in enumerate(zip(noisy.epoch(0), plain.epoch(0))):
        assert torch.equal(label, expected_label)
        for b, draw in enumerate(plain.draws_of(0, step)):
            for channel, wanted in zip(image[b], expected[b]):
                if (channel == channel[0, 0, 0]).all():  # a channel that is dropped is jittered still
                    dropped += 1
                    assert channel[0, 0, 0] == pytest.approx(draw.shift, abs=1e-6)
                else:
                    assert 0 < (channel - wanted).abs().max() < 0.02
    assert dropped


def test_extra_augmentations_are_drawn_by_epoch_and_position_alone(store: Store) -> None:
    def loader(threads: int = 1, rank: int = 0, world_size: int = 1) -> TrainLoader:
        return crops_of(
            store, CROP, 2 // world_size, seed=5, threads=threads, rank=rank, world_size=world_size,
            crops_per_case=2, extras=ALL,
        )  # fmt: skip

    expected = batches(loader(), 1)
    assert_same(batches(loader(threads=3), 1), expected)
    moved = loader()
    next(moved.epoch(0))
    assert_same(list(moved.epoch(1, 3)), expected[3:])
    shares = [batches(loader(rank=rank, world_size=2), 1) for rank in (0, 1)]
    assert_same([(torch.cat(images), torch.cat(labels)) for images, labels in (zip(*pair) for pair in zip(*shares))],
                expected)  # fmt: skip


def test_a_crop_is_z_scored_after_the_affine(store: Store) -> None:
    affine = Augment(affine_prob=1.0, affine_rotate_range_degrees=(0, 0, 0), affine_scale_range=(0.9, 0.9, 0.9))
    loader = crops_of(store, CROP, 2, augment=False, extras=affine)
    for image, _ in loader.epoch(0):
        for channel in image.flatten(0, 1):
            voxels = channel[channel != 0].double()
            if len(voxels) > 10:
                assert abs(voxels.mean()) < 1e-4 and abs(voxels.std(correction=0) - 1) < 1e-4


def test_an_iterator_of_an_earlier_epoch_raises_instead_of_mixing_batches(store: Store) -> None:
    loader = crops_of(store, CROP, 2)
    left = loader.epoch(0)
    next(left)
    next(loader.epoch(1))
    with pytest.raises(RuntimeError, match="epoch 0 was abandoned when another was started"):
        next(left)


def test_the_pipeline_is_built_once_for_all_epochs(store: Store) -> None:
    loader = crops_of(store, CROP, 4)
    pipeline = loader._stream.pipeline
    for epoch in range(3):
        batches(loader, epoch)
    assert loader._stream.pipeline is pipeline


# ---------- crops on the tumour


def test_loader_with_foreground_one_always_shows_tumour(store: Store) -> None:
    loader = crops_of(store, (8, 8, 8), 2, crops_per_case=3, foreground_prob=1.0)
    assert all((label > 0).flatten(1).any(1).all() for _, label in loader.epoch(0))


# ---------- sizes and padding


def test_a_volume_smaller_than_the_crop_is_refused_with_case_sizes_and_remedy(store: Store) -> None:
    for loader in (
        lambda: crops_of(store, (16, 12, 12)),
        lambda: ValLoader(store, store.names, (16, 12, 12)),
    ):
        with pytest.raises(
            DataError,
            match=r"case case_2 has \(25, 19, 11\) voxels.*\(16, 12, 12\).*_size_voxels \[16,12,9\].*--data.pad true",
        ):
            loader()


def test_the_suggested_crop_fits_all_cases_and_the_models(store: Store) -> None:
    with pytest.raises(DataError, match=r"--data.crop_size_voxels \[16,16,9\] fits all"):
        crops_of(store, (24, 20, 12), 2)


def test_padding_is_zero_and_symmetric_as_monais(store: Store) -> None:
    crop = (33, 26, 17)  # larger than every volume, by odd and even numbers
    pad = mt.SpatialPad(crop)
    for name, image, label in ValLoader(store, store.names, crop, LoaderOptions(pad=True)):
        i = store.index(name)
        padded = np.asarray(pad(np.array(store.image(i)).transpose(3, 0, 1, 2)))
        np.testing.assert_array_equal(label[0].numpy(), np.asarray(pad(np.array(store.label(i))[None]))[0])
        np.testing.assert_array_equal(image[0].numpy() != 0, padded != 0)
        assert_close(image[0], numpy_z_score(padded.transpose(1, 2, 3, 0)))


def test_training_crops_of_padded_volumes_are_crops_of_what_monai_pads(store: Store) -> None:
    crop = (16, 18, 12)  # larger than some volumes on some axes
    loader = crops_of(store, crop, 2, pad=True, foreground_prob=0.5, augment=False, crops_per_case=2)
    pad = mt.SpatialPad(crop)
    for step, (_, label) in enumerate(loader.epoch(0)):
        for b, (name, draw) in enumerate(zip(loader.names_of(0, step), loader.draws_of(0, step))):
            padded = np.asarray(pad(np.array(store.label(store.index(name)))[None]))[0]
            box = tuple(slice(a, a + n) for a, n in zip(draw.start, crop))
            np.testing.assert_array_equal(label[b].numpy(), padded[box])


def test_foreground_crops_of_padded_volumes_show_tumour(store: Store) -> None:
    loader = crops_of(store, (40, 8, 8), 2, pad=True, foreground_prob=1.0, crops_per_case=4)
    assert all((label > 0).flatten(1).any(1).all() for _, label in loader.epoch(0))


# ---------- validation


@pytest.mark.parametrize("crop", [(16, 12, 8), (15, 11, 9), (16, 13, 8), (20, 16, 9)])
def test_centre_crop_is_monais_for_odd_and_even_sizes(store: Store, crop: tuple[int, int, int]) -> None:
    centre = mt.CenterSpatialCrop(crop)
    normalise = mt.NormalizeIntensity(nonzero=True, channel_wise=True)
    for name, image, label in ValLoader(store, store.names, crop):
        i = store.index(name)
        expected = centre(torch.from_numpy(np.array(store.image(i)).transpose(3, 0, 1, 2)))
        np.testing.assert_array_equal(label[0].numpy(), np.asarray(centre(np.array(store.label(i))[None]))[0])
        np.testing.assert_allclose(image[0].numpy(), np.asarray(normalise(expected.clone())), atol=TOLERANCES["image"])


def test_full_volumes_come_one_by_one_in_their_own_shapes(store: Store) -> None:
    loader = ValLoader(store, store.names, None)
    for _ in range(2):
        found = list(loader)
        assert [name for name, _, _ in found] == list(store.names)
        for name, image, label in found:
            i = store.index(name)
            assert image.shape == (1, 2, *store.shape(i))
            np.testing.assert_array_equal(label[0].numpy(), store.label(i))
            assert_close(image[0], numpy_z_score(store.image(i)))


@pytest.mark.parametrize("world_size", [1, 3, 9])
def test_validation_cases_are_shared_out_without_padding(store: Store, world_size: int) -> None:
    ranks = [
        ValLoader(store, store.names, CROP, LoaderOptions(rank=r, world_size=world_size)) for r in range(world_size)
    ]
    assert [len(r) for r in ranks] == [len(store.names[r::world_size]) for r in range(world_size)]
    whole = {name: label for name, _, label in ValLoader(store, store.names, CROP)}
    found = [(name, label) for loader in ranks for name, _, label in loader]
    assert sorted(name for name, _ in found) == sorted(store.names)
    assert all(torch.equal(label, whole[name]) for name, label in found)


def test_an_abandoned_validation_pass_restarts_at_the_first_case(store: Store) -> None:
    loader = ValLoader(store, store.names, CROP)
    for _ in zip(range(3), loader):
        pass
    again, fresh = list(loader), list(ValLoader(store, store.names, CROP))
    for (name_a, image_a, label_a), (name_b, image_b, label_b) in zip(again, fresh, strict=True):
        assert name_a == name_b
        assert torch.equal(image_a, image_b)
        assert torch.equal(label_a, label_b)


# ---------- bad input


def test_a_case_without_label_is_refused_by_name(tmp_path: Path) -> None:
    cases = find_cases(
        write_task(tmp_path / "Task", SHAPES[:2], labelled=False), modalities=("flair", "t1"), labelled=False
    )
    unlabelled = prepare(cases, tmp_path / "store", SPACING, workers=1)
    with pytest.raises(DataError, match="case case_0 has no label"):
        crops_of(unlabelled, CROP, 1)


@pytest.mark.parametrize(
    ("crop", "names", "message"),
    [((16, 0, 8), None, "crop_size"), (CROP, (), "no cases"), (CROP, ("nobody",), "nobody")],
)
def test_empty_crops_and_unknown_cases_are_refused(
    store: Store, crop: tuple[int, int, int], names: tuple[str, ...] | None, message: str
) -> None:
    names = store.names if names is None else names
    for loader in (lambda: crops_of(store, crop, names=names), lambda: ValLoader(store, names, crop)):
        with pytest.raises(ValueError, match=message):
            loader()


# ---------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("residence", ["gpu", "pinned", "mapped"])
def test_the_gpu_gives_what_the_cpu_gives(store: Store, residence: Residence) -> None:
    cpu = crops_of(store, CROP, 2, crops_per_case=3)
    gpu = crops_of(store, CROP, 2, crops_per_case=3, device=torch.device("cuda"), residence=residence)
    for epoch in (0, 1):
        for (image, label), (image_gpu, label_gpu) in zip(cpu.epoch(epoch), gpu.epoch(epoch), strict=True):
            assert image_gpu.is_cuda
            assert image_gpu.is_contiguous(memory_format=torch.channels_last_3d)
            torch.testing.assert_close(image_gpu.cpu(), image, rtol=TOLERANCES["image"], atol=TOLERANCES["image"])
            assert torch.equal(label_gpu.cpu(), label)


class InMemory(LoadedVolumes):
    """With crops as NumPy arrays: DALI takes no tensors of PyTorch's where it sees no GPU."""

    def new_buffers(self, batch_size: int, size: tuple[int, int, int]) -> Any:
        return tuple(buffer.numpy() for buffer in super().new_buffers(batch_size, size))

    def crop(self, case: int, start: Sequence[int], image: Any, label: Any, flip: bool = False) -> None:
        super().crop(case, start, torch.from_numpy(image), torch.from_numpy(label), flip)


def test_validation_from_volumes_in_memory_gives_what_the_files_give(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU they are in its memory, so that no validation waits for files to be read; here in the host's."""
    loaded = InMemory(store, range(len(store.names)), torch.device("cpu"))
    expected = {crop: list(ValLoader(store, store.names, crop, normalise=False)) for crop in (None, CROP)}
    monkeypatch.setattr(loaders, "open_volumes", lambda *args: loaded)
    for crop, cases in expected.items():
        loader = ValLoader(store, store.names, crop, normalise=False)
        assert loader._volumes is loaded
        for _ in range(2):
            for case, (name, image, label) in zip(loader, cases, strict=True):
                assert case[0] == name and torch.equal(case[1], image) and torch.equal(case[2], label)


SIDE: Any = "the side stream"


@pytest.fixture
def as_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Loaders read as for a GPU, in a thread and on a side stream, which is only a name; returns the current stream."""
    here = threading.local()

    @contextmanager
    def stream(name: Any) -> Iterator[None]:
        before, here.stream = getattr(here, "stream", None), name
        yield
        here.stream = before

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(loaders, "side_stream", lambda device: SIDE)
    return lambda: getattr(here, "stream", None)


def test_batches_made_in_a_thread_are_those_made_without(store: Store, as_for_a_gpu: Any) -> None:
    settings: dict[str, Any] = {"seed": 5, "crops_per_case": 2, "foreground_prob": 0.5, "extras": ALL}
    threaded = crops_of(store, CROP, 2, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaders, "side_stream", lambda device: None)
        plain = crops_of(store, CROP, 2, **settings)
    assert_same(batches(threaded, 0), batches(plain, 0))
    left = threaded.epoch(1)
    next(left)  # and the epoch is abandoned
    position = threaded.load_state_dict(plain.state_dict() | {"epoch": 3, "samples": 6})
    assert position == (3, 3)
    assert_same(list(threaded.epoch(*position)), batches(plain, 3)[3:])
    assert_same(batches(threaded, 4), batches(plain, 4))


@pytest.mark.parametrize("kind", ["training", "validation"])
def test_crops_are_loaded_cut_and_handed_to_dali_on_one_stream_of_their_own(
    kind: str, store: Store, as_for_a_gpu: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So none is read before it is there, or overwritten while DALI copies it; the step's stream only takes results."""
    seen: dict[str, set[tuple[Any, bool]]] = {}

    def note(what: str) -> None:
        in_main = threading.current_thread() is threading.main_thread()
        seen.setdefault(what, set()).add((as_for_a_gpu(), in_main))

    class Noted(InMemory):
        def __init__(self, store: Store, cases: Sequence[int]) -> None:
            note("load")
            super().__init__(store, cases, torch.device("cpu"))

        def new_buffers(self, *args: Any) -> Any:
            note("new buffers")
            return super().new_buffers(*args)

        def crop(self, *args: Any, **keywords: Any) -> None:
            note("crop")
            super().crop(*args, **keywords)

    class NotedStream(Stream):
        def _next_part(self, index: int) -> Any:
            part = super()._next_part(index)
            note("hand to DALI")
            return part

        def _image(self, image_BCXYZ: torch.Tensor) -> torch.Tensor:
            note("result")
            return super()._image(image_BCXYZ)

    monkeypatch.setattr(loaders, "open_volumes", lambda store, cases, *_: Noted(store, cases))
    monkeypatch.setattr(loaders, "Stream", NotedStream)
    if kind == "training":
        batches(crops_of(store, CROP, 2), 0)
    else:
        list(ValLoader(store, store.names, CROP))
    assert seen["load"] == {(SIDE, True)}
    assert {stream for stream, _ in seen["new buffers"]} == {SIDE}
    assert seen["crop"] == {(SIDE, False)}  # in the thread
    assert seen["hand to DALI"] == {(SIDE, True)}
    assert seen["result"] == {(None, True)}


@pytest.mark.gpu
@pytest.mark.parametrize("residence", ["gpu", "pinned", "mapped"])
@pytest.mark.parametrize("crop", [None, CROP], ids=["full volume", "centre crop"])
def test_gpu_validation_gives_what_cpu_validation_gives(
    store: Store, crop: tuple[int, int, int] | None, residence: Residence
) -> None:
    options = LoaderOptions(torch.device("cuda"), residence=residence)
    here, there = ValLoader(store, store.names, crop), ValLoader(store, store.names, crop, options)
    assert (there.gpu_bytes > 0) == (residence == "gpu")
    for _ in range(2):
        for (name, image, label), (name_gpu, image_gpu, label_gpu) in zip(here, there, strict=True):
            assert name == name_gpu
            torch.testing.assert_close(image_gpu.cpu(), image, rtol=TOLERANCES["image"], atol=TOLERANCES["image"])
            assert torch.equal(label_gpu.cpu(), label)
