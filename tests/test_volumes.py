"""Crops of volumes wherever they are, their statistics, and the choice of residence."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipelines.basics.errors import DataError
from pipelines.layouts.cases import find_cases
from pipelines.loading import volumes
from pipelines.loading.sampling import copy_crop
from pipelines.loading.volumes import LoadedVolumes, MappedVolumes, choose_residence, nonzero_mean_std
from pipelines.phantom import make_phantoms
from pipelines.preparing.store import Store, prepare

SIZE = (10, 9, 6)
CUDA = torch.device("cuda")


@pytest.fixture(scope="module", params=["float32", "float16"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("volumes")
    cases = find_cases(make_phantoms(folder / "Task", cases=2, size=(40, 40, 30), workers=1))
    return prepare(cases, folder / "store", (8.0, 8.0, 8.0), workers=1, dtype=request.param)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [SIZE, (64, 9, 40), (11, 64, 64)], ids=["inside", "padded", "padded, odd"])
def test_loaded_volumes_give_the_crops_of_mapped_ones(store: Store, size: tuple[int, int, int], flip: bool) -> None:
    mapped, loaded = MappedVolumes(store), LoadedVolumes(store, [0, 1], torch.device("cpu"))
    image, label = mapped.new_buffers(1, size)
    image_loaded, label_loaded = loaded.new_buffers(1, size)
    for case, part in ((0, 0.3), (1, 1.0), (0, 0.0)):  # the last into buffers that have been used
        room = np.maximum(np.subtract(store.shape(case), size), 0)
        start = (room * part).astype(int).tolist()
        mapped.crop(case, start, image[0], label[0], flip)
        loaded.crop(case, start, image_loaded[0], label_loaded[0], flip)
        np.testing.assert_array_equal(image_loaded.numpy(), image)
        np.testing.assert_array_equal(label_loaded.numpy(), label)
        box = tuple(slice(a, a + n) for a, n in zip(start, size))
        if (np.array(size) <= store.shape(case)).all():
            expected = store.image(case)[box]
            np.testing.assert_array_equal(image[0], expected[::-1] if flip else expected)
        else:
            assert image.any() and (image == 0).all(axis=(0, 4)).sum() >= np.prod(size) - np.prod(store.shape(case))


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
def test_crops_on_a_gpu_are_those_of_mapped_volumes(store: Store, pinned: bool) -> None:
    mapped, loaded = MappedVolumes(store), LoadedVolumes(store, [0, 1], CUDA, pinned)
    for size in (SIZE, (64, 9, 40)):
        image, label = mapped.new_buffers(1, size)
        image_loaded, label_loaded = loaded.new_buffers(1, size)
        for flip in (False, True):
            mapped.crop(1, (0, 2, 0), image[0], label[0], flip)
            loaded.crop(1, (0, 2, 0), image_loaded[0], label_loaded[0], flip)
            np.testing.assert_array_equal(image_loaded.cpu().numpy(), image)
            np.testing.assert_array_equal(label_loaded.cpu().numpy(), label)


def test_copy_crop_overwrites_a_used_buffer() -> None:
    volume = np.ones((4, 6, 6, 1), np.uint8)
    out = np.full((6, 4, 4, 1), 9, np.uint8)
    copy_crop(volume, (0, 1, 2), out)
    np.testing.assert_array_equal(out[1:5], 1)
    np.testing.assert_array_equal(out[[0, 5]], 0)


@pytest.mark.parametrize(("mean", "std"), [(500.0, 100.0), (-0.3, 1.0), (30000.0, 2.0), (1e-6, 1e-7)])
def test_statistics_are_those_of_the_non_zero_voxels(mean: float, std: float) -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(mean, std, (13, 300, 7, 3)).astype(np.float32)
    image[rng.random(image.shape) < 0.6] = 0
    (found_mean,), (found_std,) = nonzero_mean_std(image[None])
    for c in range(3):
        voxels = image[..., c][image[..., c] != 0].astype(np.float64)
        assert found_mean[c] == pytest.approx(voxels.mean(), rel=1e-6)
        assert found_std[c] == pytest.approx(voxels.std(), rel=1e-6)


def test_statistics_of_empty_and_constant_channels_only_centre() -> None:
    image = np.zeros((5, 6, 7, 3), np.float32)
    image[1:4, ..., 1] = 0.1
    image[2, 2, 2, 2] = 7
    (mean,), (std,) = nonzero_mean_std(image[None])
    np.testing.assert_allclose(mean, [0, 0.1, 7])
    np.testing.assert_array_equal(std, 1)


# ---------- residence


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with 50 GB free, in a node with 100 GB free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50 * 10**9, 80 * 10**9))
    monkeypatch.setattr(volumes.psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * 10**9))


@pytest.mark.parametrize(
    ("gigabytes", "ranks", "expected"),
    [(20.0, 1, "gpu"), (20.1, 1, "pinned"), (50.0, 1, "pinned"), (50.1, 1, "mapped"), (25.1, 2, "mapped")],
)
def test_volumes_go_to_the_first_residence_that_fits(
    machine: None, gigabytes: float, ranks: int, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert choose_residence(int(gigabytes * 1e9), CUDA, "auto", ranks) == expected
    assert f"{gigabytes:.1f} GB of volumes" in caplog.text  # the log gives size, choice and limits
    assert {"gpu": "on the GPU (", "pinned": "in page-locked memory (", "mapped": "mapped from"}[
        expected
    ] in caplog.text


def test_a_requested_residence_is_used_or_refused_with_size_and_limit(machine: None) -> None:
    assert choose_residence(10**9, CUDA, "mapped", 1) == "mapped"
    assert choose_residence(10**9, CUDA, "pinned", 8) == "pinned"
    with pytest.raises(DataError, match=r"residence gpu: 30\.0 GB .* 20\.0 GB may be taken .*: use auto"):
        choose_residence(30 * 10**9, CUDA, "gpu", 1)
    with pytest.raises(DataError, match=r"residence gpu needs a GPU"):
        choose_residence(1, torch.device("cpu"), "gpu", 1)
    with pytest.raises(ValueError, match="'disk' must be one of auto, gpu, pinned, mapped"):
        choose_residence(1, CUDA, "disk", 1)  # type: ignore[arg-type]
    assert choose_residence(10**15, torch.device("cpu"), "auto", 1) == "mapped"
