"""From an image to regions: the network on a crop of its own size, or by sliding window over a volume.

Each window is z-scored on its own non-zero voxels, as training crops are, not the volume as a whole: the network sees
what it was trained on.

The sliding window has the positions, padding and Gaussian weights of MONAI's `sliding_window_inference` and gives the
same logits. It is faster and takes less memory: the sum of weights over a volume is kept from the last volume of that
size; windows are z-scored into one buffer, without a temporary; logits of any dtype are weighted and added to the
float32 volume in one pass; and the network sees only one of the windows that hold nothing but zeros, which stay zeros.
Finding those is the only time that the host waits for the device, once per volume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import product

import torch

OVERLAP = 0.5  # of neighbouring windows
WINDOWS_AT_ONCE = 2
SIGMA_SCALE = 0.125  # deviation of the Gaussian weights in window sizes; MONAI's default
MIN_WEIGHT = 1e-3  # of a voxel far from the centre of its window; MONAI's

Place = tuple[slice, ...]
"""Of one window in (B, C, X, Y, Z)."""


def zscore_nonzero(image_BCXYZ: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Subtract the mean and divide by the standard deviation of each channel's non-zero voxels; zeros stay zero.

    As MONAI's `NormalizeIntensity(nonzero=True, channel_wise=True)`: population deviation, and 1 in place of 0; in
    float32 the deviation of a constant is the rounding of its mean, hence the bound (as in `loading.dali`).

    Args:
        image_BCXYZ: (B, C, X, Y, Z), float32 or narrower, any strides; without a gradient.
        out: float32 and contiguous, of the same shape, for the result; a new tensor without it.

    Returns:
        `out`, float32.
    """
    axes = (2, 3, 4)
    if out is None:
        out = torch.empty(image_BCXYZ.shape, dtype=torch.float32, device=image_BCXYZ.device)
    torch.ne(image_BCXYZ, 0, out=out)  # the mask as 0 and 1 in the place of the result, so that it takes no memory
    count = out.sum(axes, keepdim=True).clamp_(min=1)
    mean = image_BCXYZ.sum(axes, keepdim=True, dtype=torch.float32) / count
    torch.addcmul(image_BCXYZ, out, mean, value=-1, out=out)  # mask times mean is exact, so zeros stay zero
    # A float32 norm over a million voxels at once is off by up to 4e-3 on a CPU; over planes it is right to 1e-7.
    planes = torch.linalg.vector_norm(out, dim=(3, 4), keepdim=True)
    deviation = (planes.square_().sum(2, keepdim=True) / count).sqrt_()
    return out.div_(torch.where(deviation <= 1e-6 * mean.abs(), 1.0, deviation))


@torch.no_grad()
def sliding_window_logits(
    network: Callable[[torch.Tensor], torch.Tensor],
    image_BCXYZ: torch.Tensor,
    window: Sequence[int],
    overlap: float = OVERLAP,
    windows_at_once: int = WINDOWS_AT_ONCE,
) -> torch.Tensor:
    """Logits of whole volumes, from overlapping windows weighted by a Gaussian around their centre.

    Args:
        network: (N, C, *window) float32 -> (N, R, *window) of any float dtype, for N up to `windows_at_once`. It must
            not keep its input, which the next windows overwrite.
        image_BCXYZ: prepared volumes, not normalised, (B, C, X, Y, Z), on the network's device; padded with zeros on
            both sides where smaller than the window.
        window: the network's input size in voxels.
        overlap: share of a window that its neighbour on an axis covers too, from 0 up to, but not including, 1.
        windows_at_once: windows in one call of the network.

    Returns:
        float32 (B, R, X, Y, Z).

    Raises:
        ValueError: an argument out of its range.
    """
    window = tuple(window)
    _check(image_BCXYZ, window, overlap, windows_at_once)
    volume, inside = _pad(image_BCXYZ, window)
    batch, channels, *size = volume.shape
    if batch == 1 and tuple(size) == window:  # its weights would only be divided out again
        return network(zscore_nonzero(volume)).float()[inside]
    starts = [window_starts(*axis, overlap) for axis in zip(size, window)]
    weights, weight_sum = _weights(tuple(size), window, overlap, volume.device)
    groups = _same_windows(volume, starts, window)
    buffer = torch.empty(
        (min(windows_at_once, len(groups)), channels, *window), dtype=torch.float32, device=volume.device
    )
    sums: torch.Tensor | None = None
    for call in _calls(len(groups), windows_at_once):
        some = groups[call]
        for slot, places in enumerate(some):
            zscore_nonzero(volume[places[0]], out=buffer[slot : slot + 1])
        logits = network(buffer[: len(some)])
        if sums is None:
            sums = torch.zeros((batch, logits.shape[1], *size), dtype=torch.float32, device=volume.device)
        for slot, places in enumerate(some):
            for place in places:
                sums[place].addcmul_(logits[slot : slot + 1], weights)
        del logits  # before the network's next call, which needs the memory
    assert sums is not None
    return sums.div_(weight_sum)[inside]


def _calls(windows: int, at_once: int) -> Iterator[slice]:
    """Which windows go into each call: `at_once`, and the last ones by halves of it.

    So a network meets few sizes, however many windows a volume has: cuDNN searches for its algorithms for each.
    """
    first = 0
    while first < windows:
        while at_once > windows - first:
            at_once //= 2
        yield slice(first, first + at_once)
        first += at_once


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """First voxels of the windows on an axis, MONAI's: equally far apart, but for the last, which ends at the edge.

    Args:
        size: of the volume on this axis, at least `window`. overlap: from 0 up to 1.
    """
    step = max(1, int(window * (1 - overlap)))
    last = size - window
    return [*range(0, last, step), last]


def window_weights(window: Sequence[int]) -> torch.Tensor:
    """How much each voxel of a window counts: a Gaussian around its centre, nowhere below 1e-3; float32 (*window).

    MONAI's `compute_importance_map(window, "gaussian")` to the last bit. Its import takes as long as PyTorch's and
    100 MB, and prediction needs nothing else of MONAI.
    """
    weights = torch.ones(())
    for size in window:
        offsets = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
        weights = weights[..., None] * torch.exp(offsets**2 / (-2 * (size * SIGMA_SCALE) ** 2))
    return weights.clamp(min=max(weights.min().item(), MIN_WEIGHT))


def _check(image_BCXYZ: torch.Tensor, window: tuple[int, ...], overlap: float, windows_at_once: int) -> None:
    if image_BCXYZ.ndim != 5:
        raise ValueError(f"image {tuple(image_BCXYZ.shape)} must have five axes: B, C, X, Y and Z")
    if len(window) != 3 or min(window) < 1:
        raise ValueError(f"window {window} must be three sizes in voxels, such as (128, 128, 64)")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap {overlap} must be at least 0 and below 1; the usual is {OVERLAP}")
    if windows_at_once < 1:
        raise ValueError(f"windows_at_once {windows_at_once} must be at least 1; the usual is {WINDOWS_AT_ONCE}")


def _pad(image_BCXYZ: torch.Tensor, window: tuple[int, ...]) -> tuple[torch.Tensor, Place]:
    """The image, with zeros up to the window's size on both sides, and where in it the image lies."""
    size = image_BCXYZ.shape[2:]
    missing = [max(0, wanted - given) for wanted, given in zip(window, size)]
    before = [voxels // 2 for voxels in missing]
    inside = (slice(None), slice(None), *_box(before, size))
    if any(missing):
        pads = [pad for start, voxels in zip(before, missing) for pad in (voxels - start, start)]
        image_BCXYZ = torch.nn.functional.pad(image_BCXYZ, pads[::-1])  # from the last axis to the first
    return image_BCXYZ, inside


@lru_cache(maxsize=1)  # volumes of a data set are mostly of one size
def _weights(
    size: tuple[int, ...], window: tuple[int, ...], overlap: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of a window's voxels, float32 (*window), and their sum over all windows, float32 (*size)."""
    weights = window_weights(window).to(device)
    weight_sum = torch.zeros(size, dtype=torch.float32, device=device)
    for corner in product(*(window_starts(*axis, overlap) for axis in zip(size, window))):
        weight_sum[_box(corner, window)] += weights
    return weights, weight_sum


def _same_windows(volume: torch.Tensor, starts: list[list[int]], window: tuple[int, ...]) -> list[list[Place]]:
    """All windows in groups of the same content: each by itself, and those of zeros only in one group."""
    empty: list[Place] = []
    groups: list[list[Place]] = []
    occupied = _occupied(volume, starts, window)
    for image, of_image in enumerate(occupied):
        for corner, is_occupied in zip(product(*starts), of_image):
            place = (slice(image, image + 1), slice(None), *_box(corner, window))
            if is_occupied:
                groups.append([place])
            else:
                empty.append(place)
    return [*groups, empty] if empty else groups


def _occupied(volume: torch.Tensor, starts: list[list[int]], window: tuple[int, ...]) -> list[list[bool]]:
    """For each image and window, in the order of the product of `starts`: is any voxel of any channel not zero?

    Along one axis after another, so that each voxel is read for the windows of one axis only. By magnitudes, because
    `any` takes twice as long on a CPU.
    """
    magnitude = volume.amax(1)  # (B, X, Y, Z)
    torch.maximum(magnitude, volume.amin(1).neg_(), out=magnitude)
    for axis, (firsts, length) in enumerate(zip(starts, window), start=1):
        magnitude = torch.stack([magnitude.narrow(axis, first, length).amax(axis) for first in firsts], axis)
    return magnitude.ne(0).flatten(1).tolist()


def _box(corner: Sequence[int], window: Sequence[int]) -> Place:
    return tuple(slice(first, first + length) for first, length in zip(corner, window))
