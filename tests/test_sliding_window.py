"""Z-score of windows and the sliding window, against MONAI."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers.utils import _get_scan_interval, sliding_window_inference
from monai.transforms import NormalizeIntensity

from benchmarks.bench_inference import peak_bytes
from engine import sliding_window
from engine.sliding_window import sliding_window_logits, window_starts, window_weights, zscore_nonzero

Network = Callable[[torch.Tensor], torch.Tensor]
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def scan(shape: tuple[int, ...], batch: int = 1) -> torch.Tensor:
    """(B, C, X, Y, Z): a head that ends three voxels from one side, zeros around it, one empty channel."""
    generator = torch.Generator().manual_seed(0)
    image = 300 + 80 * torch.randn(batch, *shape, generator=generator)
    image[:, :, :3] = 0
    image[:, -1] = 0
    return image


def corner_scan(shape: tuple[int, ...], head: int) -> torch.Tensor:
    """As `scan`, but of zeros from voxel `head` of the first axis on."""
    image = scan(shape)
    image[:, :, head:] = 0
    return image


def network(channels: int = 2, regions: int = 3) -> torch.nn.Module:
    """Each logit sees its neighbours, and a window of zeros has logits of its own."""
    torch.manual_seed(0)
    return torch.nn.Conv3d(channels, regions, 3, padding=1)


def monais_zscore(windows: torch.Tensor) -> torch.Tensor:
    normalise = NormalizeIntensity(nonzero=True, channel_wise=True)
    return torch.stack([torch.as_tensor(normalise(window.clone())) for window in windows])


@torch.no_grad()
def monais_logits(
    net: Network, image: torch.Tensor, window: tuple[int, ...], overlap: float = 0.5, windows_at_once: int = 2,
    zscore: Network = monais_zscore,
) -> torch.Tensor:  # fmt: skip
    """MONAI's sliding window over windows z-scored by MONAI."""

    def predictor(windows: torch.Tensor) -> torch.Tensor:
        return net(zscore(windows)).float()

    found = sliding_window_inference(image, window, windows_at_once, predictor, overlap=overlap, mode="gaussian")
    return torch.as_tensor(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zscore_equals_monais(dtype: torch.dtype) -> None:
    image = scan((3, 12, 10, 8), batch=2).to(dtype)
    found = zscore_nonzero(image)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, monais_zscore(image.float()), **TOLERANCE)


def test_zscore_of_a_part_of_a_volume_goes_into_the_given_buffer() -> None:
    image = scan((3, 12, 10, 8))
    buffer = torch.full((2, 3, 6, 10, 4), torch.nan)
    part = image[:, :, 3:9, :, 2:6]
    assert zscore_nonzero(part, out=buffer[1:]).data_ptr() == buffer[1].data_ptr()
    torch.testing.assert_close(buffer[1:], zscore_nonzero(part.contiguous()), **TOLERANCE)
    assert buffer[0].isnan().all()


@pytest.mark.parametrize("value", [-0.4711, 0.1, 3.7, 100.3, 1234.567])
def test_a_constant_channel_becomes_zero_not_noise(value: float) -> None:
    assert zscore_nonzero(torch.full((1, 1, 48, 48, 48), value)).abs().max() < 1e-3


def test_the_deviation_of_millions_of_voxels_is_that_of_float64() -> None:
    image = 1000 + torch.randn(1, 1, 128, 256, 128, generator=torch.Generator().manual_seed(0))
    exact = image.double()
    expected = (exact - exact.mean()) / exact.std(correction=0)
    torch.testing.assert_close(zscore_nonzero(image).double(), expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("overlap", [0, 0.1, 0.25, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("window", [1, 5, 16])
def test_windows_are_where_monais_are(window: int, overlap: float) -> None:
    for size in range(window, 4 * window + 3):
        interval = _get_scan_interval((size,), (window,), 1, (overlap,))
        expected = [place[0].start for place in dense_patch_slices((size,), (window,), interval)]
        assert window_starts(size, window, overlap) == expected


@pytest.mark.parametrize(
    ("windows", "at_once", "sizes"),
    [(18, 8, [8, 8, 2]), (15, 8, [8, 4, 2, 1]), (8, 8, [8]), (3, 16, [2, 1]), (5, 2, [2, 2, 1]), (7, 3, [3, 3, 1])],
)
def test_calls_of_the_network_have_few_sizes(windows: int, at_once: int, sizes: list[int]) -> None:
    calls = [range(windows)[call] for call in sliding_window._calls(windows, at_once)]
    assert [len(call) for call in calls] == sizes
    assert [index for call in calls for index in call] == list(range(windows))


@pytest.mark.parametrize("windows_at_once", [1, 2, 4, 16])
def test_the_number_of_windows_in_a_call_changes_no_bit(windows_at_once: int) -> None:
    """Of a network that computes each window by itself: they are weighted and added in one order."""
    net, image = network(), scan((2, 37, 18, 13))

    def one_by_one(windows: torch.Tensor) -> torch.Tensor:
        return torch.cat([net(window[None]) for window in windows])

    expected = sliding_window_logits(one_by_one, image, (16, 16, 8), windows_at_once=3)
    assert torch.equal(sliding_window_logits(one_by_one, image, (16, 16, 8), windows_at_once=windows_at_once), expected)


@pytest.mark.parametrize("windows_at_once", [1, 3])
@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize(
    "size",
    [
        pytest.param((21, 18, 13), id="divided by nothing"),
        pytest.param((32, 32, 16), id="divided"),
        pytest.param((16, 16, 8), id="one window"),
        pytest.param((11, 13, 5), id="smaller"),
        pytest.param((37, 9, 8), id="smaller on one axis"),
    ],
)
def test_logits_are_those_of_monais_sliding_window(
    size: tuple[int, int, int], overlap: float, windows_at_once: int
) -> None:
    """Windows z-scored by MONAI each on its own, over volumes with and without zeros around them."""
    net, window = network(), (16, 16, 8)
    for image in (scan((2, *size)), corner_scan((2, *size), head=10)):
        expected = monais_logits(net, image, window, overlap, windows_at_once)
        found = sliding_window_logits(net, image, window, overlap, windows_at_once)
        assert found.shape == (1, 3, *size) and found.dtype == torch.float32 and not found.requires_grad
        torch.testing.assert_close(found, expected, **TOLERANCE)


def test_volumes_of_a_batch_and_four_regions_do_not_mix() -> None:
    net = network(regions=4)
    image = torch.cat([scan((2, 21, 18, 13)), corner_scan((2, 21, 18, 13), head=4)])
    found = sliding_window_logits(net, image, (16, 16, 8), windows_at_once=4)
    assert found.shape == (2, 4, 21, 18, 13)
    torch.testing.assert_close(found, monais_logits(net, image, (16, 16, 8)), **TOLERANCE)


@pytest.mark.parametrize("size", [(40, 18, 13), (8, 8, 8)])
def test_logits_in_bfloat16_are_summed_in_float32(size: tuple[int, int, int]) -> None:
    """A sum in bfloat16, or weights in it, would be off by 2^-8."""
    found = sliding_window_logits(lambda windows: (0 * windows[:, :1] + 1.5).bfloat16(), scan((2, *size)), (8, 8, 8))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.full_like(found, 1.5), rtol=1e-6, atol=0)


def test_the_network_sees_one_empty_window_for_all() -> None:
    seen: list[torch.Tensor] = []
    net = network()

    def watched(windows: torch.Tensor) -> torch.Tensor:
        seen.extend(windows.clone())
        return net(windows)

    image = corner_scan((2, 64, 16, 8), head=20)  # windows start at 0, 8, ..., 48: three of seven hold something
    found = sliding_window_logits(watched, image, (16, 16, 8))
    assert len(seen) == 4 and [bool(window.any()) for window in seen] == [True, True, True, False]
    torch.testing.assert_close(found, monais_logits(net, image, (16, 16, 8)), **TOLERANCE)


@pytest.mark.parametrize("value", [-0.5, 0.5])
def test_a_window_is_not_empty_with_one_voxel_of_one_channel(value: float) -> None:
    seen: list[bool] = []
    image = torch.zeros(1, 3, 32, 16, 8)
    image[0, 1, -1, -1, -1] = value

    def watched(windows: torch.Tensor) -> torch.Tensor:
        seen.extend([True] * len(windows))
        return windows

    sliding_window_logits(watched, image, (16, 16, 8), overlap=0)
    assert len(seen) == 2


@pytest.mark.parametrize("window", [(48, 48, 48), (128, 128, 64), (17, 80, 1)])
def test_weights_of_a_window_are_monais_to_the_last_bit(window: tuple[int, int, int]) -> None:
    assert torch.equal(window_weights(window), compute_importance_map(window, mode="gaussian"))


def test_the_sum_of_weights_is_computed_once_for_volumes_of_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []

    def counted(window: tuple[int, ...]) -> torch.Tensor:
        made.append(window)
        return window_weights(window)

    monkeypatch.setattr(sliding_window, "window_weights", counted)
    sliding_window._weights.cache_clear()
    net, image = network(), scan((2, 21, 18, 13))
    with torch.inference_mode():  # what is kept from here must serve outside it
        sliding_window_logits(net, image, (16, 16, 8))
    again = sliding_window_logits(net, image, (16, 16, 8))
    assert made == [(16, 16, 8)]
    torch.testing.assert_close(again, monais_logits(net, image, (16, 16, 8)), **TOLERANCE)
    sliding_window_logits(net, image, (16, 16, 8), overlap=0)
    assert made == [(16, 16, 8)] * 2


@pytest.mark.parametrize("windows_at_once", [1, 2, 4])
@pytest.mark.parametrize(
    ("size", "window"),
    [
        ((96, 80, 48), (64, 64, 32)),
        ((40, 80, 48), (64, 64, 32)),
        ((64, 64, 32), (64, 64, 32)),
        ((96, 96, 64), (32, 32, 16)),
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_it_never_holds_more_memory_than_monai(
    size: tuple[int, ...], window: tuple[int, ...], windows_at_once: int, is_first: bool
) -> None:
    """The sum of weights counts, made by this volume or kept from the last; MONAI is given our z-score, the smaller."""
    if torch.cuda.is_available():
        pytest.skip("the allocator's peak is read on the device, and these are CPU tensors")
    net, image = network(), scan((2, *size))
    sliding_window._weights.cache_clear()
    if not is_first:
        sliding_window_logits(net, image, window)
    kept = 0 if is_first or size == window else math.prod(map(max, size, window)) * image.itemsize
    ours = kept + peak_bytes(partial(sliding_window_logits, net, image, window, windows_at_once=windows_at_once))
    monais = peak_bytes(
        partial(monais_logits, net, image, window, windows_at_once=windows_at_once, zscore=zscore_nonzero)
    )
    assert ours <= monais


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"overlap": 1.0}, r"overlap 1.0 must be at least 0 and below 1"),
        ({"windows_at_once": 0}, r"windows_at_once 0 must be at least 1"),
        ({"window": (16, 8)}, r"window \(16, 8\) must be three sizes"),
        ({"image_BCXYZ": torch.zeros(2, 16, 16, 8)}, r"image \(2, 16, 16, 8\) must have five axes"),
    ],
)
def test_impossible_arguments_are_refused_by_value(arguments: dict, says: str) -> None:
    given = {"image_BCXYZ": scan((2, 16, 16, 8)), "window": (16, 16, 8), **arguments}
    with pytest.raises(ValueError, match=says):
        sliding_window_logits(network(), **given)


@pytest.mark.gpu
def test_on_a_gpu_logits_are_monais_and_the_host_waits_once_per_volume() -> None:
    net, image = network().cuda(), corner_scan((2, 70, 50, 41), head=30).cuda()
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        expected = monais_logits(net, image, (16, 16, 8))
        found = sliding_window_logits(net, image, (16, 16, 8))  # makes the weights
        torch.testing.assert_close(found, expected, **TOLERANCE)
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                sliding_window_logits(net, image, (16, 16, 8))
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert len([warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]) == 1
