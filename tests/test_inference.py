"""Z-score of windows and the sliding window, against MONAI."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from monai.transforms import NormalizeIntensity

from engine.inference import sliding_window_logits, zscore_nonzero


def scan(shape: tuple[int, ...]) -> torch.Tensor:
    """(1, C, X, Y, Z): a head in the middle, zeros around it, one empty channel."""
    generator = torch.Generator().manual_seed(0)
    image = 300 + 80 * torch.randn(1, *shape, generator=generator)
    image[:, :, :3] = 0
    image[:, -1] = 0
    return image


def test_zscore_equals_monais() -> None:
    image = scan((3, 12, 10, 8))
    expected = NormalizeIntensity(nonzero=True, channel_wise=True)(image[0].clone())
    torch.testing.assert_close(zscore_nonzero(image)[0], torch.as_tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [-0.4711, 0.1, 3.7, 100.3, 1234.567])
def test_a_constant_channel_becomes_zero_not_noise(value: float) -> None:
    assert zscore_nonzero(torch.full((1, 1, 48, 48, 48), value)).abs().max() < 1e-3


def test_windows_are_weighted_and_stitched_as_monai_does() -> None:
    """A network that sees each window z-scored, over a volume that no window divides."""
    torch.manual_seed(0)
    network = torch.nn.Conv3d(2, 3, 3, padding=1)
    image = scan((2, 21, 18, 13))
    inferer = SlidingWindowInferer((16, 16, 8), sw_batch_size=1, overlap=0.5, mode="gaussian")
    with torch.no_grad():
        expected = inferer(image, lambda window: network(zscore_nonzero(window)))
        found = sliding_window_logits(network, image, (16, 16, 8))
    assert found.shape == (1, 3, 21, 18, 13)
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=1e-5, atol=1e-5)


def test_a_volume_smaller_than_the_window_is_padded() -> None:
    found = sliding_window_logits(torch.nn.Conv3d(2, 3, 1), scan((2, 10, 20, 8)), (16, 16, 8))
    assert found.shape == (1, 3, 10, 20, 8) and found.dtype == torch.float32
