"""Which crop of which case comes next, where in the volume it lies, and its random flip, scale and shift.

Randomness. A sample's draws come from a counter-based generator (Philox: the key holds the seed, the counter the epoch
and the position in the epoch). They depend on nothing else: not on the number of threads or ranks, not on what was
drawn before. So a run resumes by arithmetic, and epoch 5 is the same whether or not epochs 0 to 4 were run.

The order of an epoch is a permutation of its samples, padded from its own start, so every rank has the same number.

Axes. Volumes are (X, Y, Z, C); X, Y, Z are the axes of RAS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

FLIP_PROB = 0.5
SCALE_PROB = 0.5
SCALE_RANGE = 0.1  # x * (1 + U(-SCALE_RANGE, SCALE_RANGE))
SHIFT_PROB = 0.5
SHIFT_RANGE = 0.1  # x + U(-SHIFT_RANGE, SHIFT_RANGE)

Size = tuple[int, int, int]


@dataclass(frozen=True)
class CropDraw:
    """The random choices for one sample.

    Attributes:
        start: first voxel of the crop, in the volume padded to at least the crop size.
        flip: whether the first spatial axis is reversed.
        scale: the image is multiplied by 1 + scale; 0 where not drawn.
        shift: added to the image after that; 0 where not drawn.
    """

    start: Size
    flip: bool
    scale: float
    shift: float


def generator(seed: int, epoch: int, position: int, stream: int = 0) -> np.random.Generator:
    """The generator of a sample; `position` -1 is for the order of the epoch. Streams of one sample are independent.

    Philox itself advances the low word of the counter.
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, stream, epoch, position + 1]))


def draw_sample(
    seed: int,
    epoch: int,
    position: int,
    volume_shape: Size,
    crop_size: Size,
    foreground: NDArray[np.int32],
    foreground_prob: float,
) -> CropDraw:
    """Draw the crop, flip, scale and shift of one sample.

    The start is uniform over all crops that fit, as in MONAI's RandSpatialCrop; with probability `foreground_prob` the
    crop is centred on a random tumour voxel instead, and shifted to stay inside the volume.

    Args:
        seed, epoch: of the run; counted from 0.
        position: of the sample in the epoch's padded order, over all ranks.
        volume_shape, crop_size: (X, Y, Z) in voxels; the volume is padded to at least the crop.
        foreground: tumour voxels to centre on, (K, 3), in the unpadded volume; with K = 0 the start is uniform.
        foreground_prob: 0 to 1.
    """
    rng = generator(seed, epoch, position)
    room = np.subtract(volume_shape, crop_size)
    start = rng.integers(0, room, endpoint=True)
    if rng.random() < foreground_prob and len(foreground):
        centre = foreground[rng.integers(len(foreground))]
        start = np.clip(centre - np.asarray(crop_size) // 2, 0, room)
    flip = rng.random() < FLIP_PROB
    scale = rng.uniform(-SCALE_RANGE, SCALE_RANGE) if rng.random() < SCALE_PROB else 0.0
    shift = rng.uniform(-SHIFT_RANGE, SHIFT_RANGE) if rng.random() < SHIFT_PROB else 0.0
    return CropDraw((int(start[0]), int(start[1]), int(start[2])), bool(flip), float(scale), float(shift))


@lru_cache(4)  # needed for every batch
def epoch_order(seed: int, epoch: int, samples: int, multiple: int) -> NDArray[np.int64]:
    """A fresh permutation of `samples`, padded from its own start to a multiple of `multiple`; read-only."""
    order = np.resize(generator(seed, epoch, -1).permutation(samples), -(-samples // multiple) * multiple)
    order.flags.writeable = False
    return order


def copy_crop(volume: NDArray, start: Sequence[int], out: NDArray) -> None:
    """Copy a crop into `out`; a volume smaller than `out` is padded with zeros symmetrically, as in MONAI's SpatialPad.

    Args:
        volume: (X, Y, Z, C), in memory or mapped into it.
        start: first voxel (x, y, z), in the coordinates of the padded volume.
        out: (x, y, z, C), overwritten.
    """
    source, target = overlap(volume.shape, start, out.shape)
    if out[target].shape != out.shape:
        out[...] = 0
    out[target] = volume[source]


def overlap(shape: Sequence[int], start: Sequence[int], size: Sequence[int]) -> tuple[tuple, tuple]:
    """The part of the volume that a crop covers, and its place in the crop: three slices each."""
    padding = [max(n - dim, 0) // 2 for n, dim in zip(size[:3], shape[:3], strict=True)]
    first = [int(a) - p for a, p in zip(start, padding, strict=True)]
    source = tuple(slice(max(a, 0), min(a + n, dim)) for a, n, dim in zip(first, size, shape, strict=False))
    return source, tuple(slice(s.start - a, s.stop - a) for s, a in zip(source, first, strict=True))
