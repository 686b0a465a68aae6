"""Crops of volumes wherever they are, their statistics, and the choice of residence."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.basics.errors import DataError
from pipelines.layouts.cases import find_cases
from pipelines.loading import volumes
from pipelines.loading.loader_options import LoaderOptions, Residence
from pipelines.loading.sampling import copy_crop
from pipelines.loading.volumes import (
    LoadedVolumes,
    MappedVolumes,
    StagedVolumes,
    choose_residence,
    nonzero_mean_std,
    plan_blocks,
)
from pipelines.phantom import make_phantoms
from pipelines.preparing.store import Store, prepare

SIZE = (10, 9, 6)
CUDA = torch.device("cuda")


@pytest.fixture(scope="module", params=["float32", "float16"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("volumes")
    cases = find_cases(make_phantoms(folder / "Task", cases=2, size=(40, 40, 30), workers=1))
    return prepare(cases, folder / "store", (8.0, 8.0, 8.0), workers=1, dtype=request.param)


@pytest.fixture
def unlocked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ordinary memory in place of page-locked memory, which needs a GPU; the bytes of each block that was asked for."""
    sizes: list[int] = []

    def page_locked(nbytes: int) -> torch.Tensor:
        sizes.append(nbytes)
        return torch.full((nbytes,), 255, dtype=torch.uint8)

    monkeypatch.setattr(volumes, "page_locked", page_locked)
    return sizes


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [SIZE, (64, 9, 40), (11, 64, 64)], ids=["inside", "padded", "padded, odd"])
def test_loaded_volumes_give_the_crops_of_mapped_ones(
    store: Store, size: tuple[int, int, int], flip: bool, pinned: bool, unlocked: list[int]
) -> None:
    mapped, loaded = MappedVolumes(store), LoadedVolumes(store, [0, 1, 0], torch.device("cpu"), pinned)
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


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [SIZE, (64, 9, 40)], ids=["inside", "padded"])
def test_staged_volumes_give_the_crops_of_mapped_ones(
    store: Store, size: tuple[int, int, int], flip: bool, unlocked: list[int]
) -> None:
    mapped, staged = MappedVolumes(store), StagedVolumes(store, torch.device("cpu"))
    image, label = mapped.new_buffers(2, size)
    image_staged, label_staged = staged.new_buffers(2, size)
    for case in (0, 1):
        mapped.crop(case, (0, 1, 0), image[case], label[case], flip)
        staged.crop(case, (0, 1, 0), image_staged[case], label_staged[case], flip)
    np.testing.assert_array_equal(image_staged.numpy(), image)
    np.testing.assert_array_equal(label_staged.numpy(), label)
    assert unlocked == [image[0].nbytes, label[0].nbytes] * 2  # new memory for each: PyTorch knows when it is free


def test_a_gpu_never_waits_for_a_staged_crop(
    store: Store, unlocked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[bool] = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda out, part, non_blocking=False: copies.append(non_blocking))
    staged = StagedVolumes(store, torch.device("cpu"))
    image, label = staged.new_buffers(1, SIZE)
    staged.crop(0, (0, 0, 0), image[0], label[0])
    assert copies == [True, True]


@pytest.mark.parametrize(("device", "kind"), [(CUDA, StagedVolumes), (torch.device("cpu"), MappedVolumes)])
def test_mapped_volumes_are_staged_for_a_gpu_only(store: Store, device: torch.device, kind: type) -> None:
    assert type(volumes.map_volumes(store, device)) is kind


@pytest.mark.gpu
@pytest.mark.parametrize("residence", ["gpu", "pinned", "mapped"])
def test_crops_on_a_gpu_are_those_of_mapped_volumes(store: Store, residence: Residence) -> None:
    mapped = MappedVolumes(store)
    loaded = volumes.open_volumes(store, [0, 1], LoaderOptions(CUDA, residence=residence), "volumes")
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


# ---------- page-locked memory

BRATS, AT_1_MM = 34 * 10**6, 152 * 10**6  # bytes of a case of four modalities, at 1.5 x 1.5 x 2 mm and at 1 mm


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ([BRATS] * 388, 1.02),
        ([AT_1_MM] * 388, 1.03),
        ([AT_1_MM] * 40, 1.10),
        ([BRATS + 77 * n for n in range(100)], 1.05),
        ([2**25] * 8, 1.0),
        ([1, 3 * 2**20, 1], 2.01),
        ([7], 75),
        ([], 0),
    ],
)
def test_volumes_share_few_blocks_that_pytorch_does_not_round_up(sizes: list[int], most: float) -> None:
    blocks = plan_blocks(sizes)
    assert all(size.bit_count() == 1 for size in blocks.sizes)
    assert len(blocks.sizes) <= len(sizes) and len(blocks.sizes) <= 16
    assert sum(blocks.sizes) <= most * sum(sizes)
    end = dict.fromkeys(range(len(blocks.sizes)), 0)
    for size, (block, first) in zip(sizes, blocks.places, strict=True):
        assert first >= end[block] and first % volumes.ALIGNMENT == 0
        end[block] = first + size
        assert end[block] <= blocks.sizes[block]
    assert all(end.values())  # no block is empty


def test_what_is_counted_as_page_locked_is_what_is_locked(
    store: Store, unlocked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, int]] = []

    def choose(needed: dict[str, int], *_: Any) -> str:
        asked.append(needed)
        return "pinned"

    monkeypatch.setattr(volumes, "choose_residence", choose)
    volumes.open_volumes(store, [0, 1, 1], LoaderOptions(torch.device("cpu")), "volumes")
    assert asked == [{"gpu": store.nbytes([0, 1]), "pinned": sum(unlocked)}]
    assert sum(unlocked) >= store.nbytes([0, 1])


# ---------- residence


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with 50 GB free, in a node with 100 GB free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50 * 10**9, 80 * 10**9))
    monkeypatch.setattr(volumes.psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * 10**9))


def choose(gigabytes: float, residence: Any = "auto", ranks: int = 1, device: torch.device = CUDA, **more: Any) -> str:
    needed = dict.fromkeys(("gpu", "pinned"), int(gigabytes * 1e9))
    return choose_residence(needed, LoaderOptions(device, ranks_on_node=ranks, residence=residence, **more))


@pytest.mark.parametrize(
    ("gigabytes", "ranks", "expected"),
    [(20.0, 1, "gpu"), (20.1, 1, "pinned"), (50.0, 1, "pinned"), (50.1, 1, "mapped"), (25.1, 2, "mapped")],
)
def test_volumes_go_to_the_first_residence_that_fits(
    machine: None, gigabytes: float, ranks: int, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert choose(gigabytes, ranks=ranks) == expected
    assert f"{gigabytes:.1f} GB of volumes" in caplog.text  # the log gives size, choice and limits
    assert {"gpu": "on the GPU (", "pinned": "in page-locked memory (", "mapped": "mapped from"}[
        expected
    ] in caplog.text


def test_page_locked_blocks_must_fit_not_only_the_volumes(machine: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    options = LoaderOptions(CUDA)
    assert choose_residence({"gpu": 40 * 10**9, "pinned": 50 * 10**9}, options) == "pinned"
    assert "50.0 GB of volumes: in page-locked memory" in caplog.text
    assert choose_residence({"gpu": 40 * 10**9, "pinned": 51 * 10**9}, options) == "mapped"


@pytest.mark.parametrize(
    ("other_needs", "other_limits", "expected"),
    [
        (1, {}, "gpu"),
        (1, {"gpu": 0}, "pinned"),  # the other rank's GPU is full
        (1, {"gpu": 0, "pinned": 0}, "mapped"),
        (1, {"pinned": 0}, "gpu"),
        (21 * 10**9, {}, "pinned"),  # it has more cases to validate on
        (60 * 10**9, {}, "mapped"),
    ],
)
def test_all_ranks_of_a_node_choose_what_fits_each_of_them(
    machine: None, other_needs: int, other_limits: dict[str, int], expected: str
) -> None:
    def gather(value: Any) -> list[Any]:
        needed, limits = value
        return [value, (dict.fromkeys(needed, other_needs), limits | other_limits)]

    assert choose(10, gather_on_node=gather) == expected


def test_a_requested_residence_that_another_rank_cannot_take_is_refused_by_all(machine: None) -> None:
    with pytest.raises(DataError, match=r"residence gpu: 10\.0 GB of volumes, and 1\.0 GB may be taken"):
        choose(10, "gpu", gather_on_node=lambda value: [value, (value[0], value[1] | {"gpu": 10**9})])


def test_a_requested_residence_is_used_or_refused_with_size_and_limit(machine: None) -> None:
    assert choose(1, "mapped") == "mapped"
    assert choose(1, "pinned", ranks=8) == "pinned"
    with pytest.raises(DataError, match=r"residence gpu: 30\.0 GB .* 20\.0 GB may be taken .*: use auto"):
        choose(30, "gpu")
    with pytest.raises(DataError, match=r"residence gpu needs a GPU"):
        choose(1, "gpu", device=torch.device("cpu"))
    with pytest.raises(ValueError, match="'disk' must be one of auto, gpu, pinned, mapped"):
        choose(1, "disk")
    assert choose(10**6, device=torch.device("cpu")) == "mapped"
