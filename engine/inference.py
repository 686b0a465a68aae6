"""From an image to regions: the network on a crop of its own size, or by sliding window over a volume.

A window is z-scored on its own non-zero voxels, as training crops are, rather than the volume as a whole: the network
then sees what it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from monai.inferers.utils import sliding_window_inference

OVERLAP = 0.5  # of neighbouring windows
WINDOWS_AT_ONCE = 2


def zscore_nonzero(image_BCXYZ: torch.Tensor) -> torch.Tensor:
    """Subtract the mean and divide by the standard deviation of each channel's non-zero voxels; zeros stay zero.

    As MONAI's `NormalizeIntensity(nonzero=True, channel_wise=True)`: population deviation, and 1 in place of 0; in
    float32 the deviation of a constant is the rounding of its mean, hence the bound (the same as in `pipelines.dali`).

    Args:
        image_BCXYZ: float32 (B, C, X, Y, Z).
    """
    axes = (2, 3, 4)
    mask = image_BCXYZ != 0
    count = mask.sum(axes, keepdim=True).clamp(min=1)
    mean = image_BCXYZ.sum(axes, keepdim=True) / count
    centred = torch.where(mask, image_BCXYZ - mean, 0.0)
    deviation = (centred.square().sum(axes, keepdim=True) / count).sqrt()
    return centred / torch.where(deviation <= 1e-6 * mean.abs(), 1.0, deviation)


def sliding_window_logits(
    network: Callable[[torch.Tensor], torch.Tensor], image_BCXYZ: torch.Tensor, window: Sequence[int]
) -> torch.Tensor:
    """Logits of a whole volume, from windows that overlap by half and count by a Gaussian of their centre.

    Args:
        network: (B, C, *window) -> (B, R, *window).
        image_BCXYZ: prepared volume, not normalised, float32 (1, C, X, Y, Z); smaller than the window is padded.
        window: the network's input size in voxels.

    Returns:
        float32 (1, R, X, Y, Z).
    """
    return sliding_window_inference(
        image_BCXYZ,
        tuple(window),
        WINDOWS_AT_ONCE,
        lambda windows: network(zscore_nonzero(windows)).float(),
        overlap=OVERLAP,
        mode="gaussian",
    )
