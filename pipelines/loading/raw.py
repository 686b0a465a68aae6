"""From raw volume to training crop in one DALI pipeline, for cases that are not prepared, on the CPU or on the GPU.

    decode      pipelines/scans/nifti.py, in threads, some cases ahead: DALI reads no NIfTI
    box         the part of the raw volume that the crop needs; the other voxels are never copied
    resample    the box to the crop's own grid, oriented and flipped by the same operator (fn.resize, axis by axis)
    support     a mask of the voxels that MONAI leaves non-zero
    z-score, jitter     as in dali.py

raw_loader.py feeds the pipeline. `resample_case` only resamples, a whole volume, for preparing cases on GPUs; on a CPU
`resample.resample_image` is faster and exact.

Resampling. Where the file's axes run along the scanner's, the map from crop to raw volume scales and flips each axis by
itself, so fn.resize does all of it, from fractional ends of a region that may run backwards. On a CPU it takes 56 ms
where fn.warp_affine takes 500, and its positions, relative to the box, are exact for the usual spacings: images agree
with the store's within 3e-6 of their range. Images with rotated or sheared axes are resampled by resample.py when they
are decoded, and only cropped here.

Support. The z-score counts what is not zero, and MONAI's rounding puts 1e-11 into zero voxels beside the head, which
float32 positions can't reproduce: 1.6 % of the voxels that it counts in a BraTS scan. Without them its deviation is 2
to 12 % smaller. So the source says which voxels have a non-zero neighbour of non-zero weight, by the weights of
resample.py. There the pipeline adds `TINY`; elsewhere, the padding of small volumes included, it puts zero. Only voxels
whose neighbours cancel to an exact zero are counted and should not be; intensities of one sign have none.

Label maps are resampled whole by resample.py when they are decoded (15 ms), and cropped here: no voxel differs.

Axes. The raw image is (C, Z, Y, X) as it is decoded, its axes in the order of RAS, in the file's directions; DALI's
layout CDHW. From the resampling on everything is (X, Y, Z, C) of RAS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.basics.lazy import Lazy
from pipelines.loading.augment import Augment, input_names
from pipelines.loading.dali import augmented, build_pipeline, external_inputs, with_index
from pipelines.loading.sampling import overlap
from pipelines.preparing.processes import worker_index
from pipelines.scans.geometry import Grid
from pipelines.scans.nifti import RawCase
from pipelines.scans.resample import Weights, axis_weights, resample_image

fn, types = Lazy("nvidia.dali.fn"), Lazy("nvidia.dali.types")

TINY = np.float32(1e-30)  # makes a voxel non-zero and changes no other number
LAYOUTS = ["CDHW", "CDHW", "", "", ""]  # of `ResampleInputs`


class ResampleInputs(NamedTuple):
    """A crop, or a whole prepared volume, as what `resample` takes.

    Attributes:
        box: float32 (C, z, y, x), a view of the raw volume.
        support: uint8 (C, Z, Y, X) of the crop: 1 where MONAI's voxel is not zero.
        start, end: float32 (3,), z, y, x: the crop's outer faces in voxels of the box; start > end on a flipped axis.
        size: float32 (3,), z, y, x: voxels of the crop.
    """

    box: NDArray[np.float32]
    support: NDArray[np.uint8]
    start: NDArray[np.float32]
    end: NDArray[np.float32]
    size: NDArray[np.float32]


@dataclass(frozen=True)
class ImageOnGrid:
    """A raw image, and where the voxels of its prepared grid lie in it.

    Attributes:
        image_CZYX: float32; axes in the order of RAS, directions the file's.
        weights: along X, Y and Z of the prepared grid.
        first: (3,), x, y, z: position of the grid's first voxel, in voxels of the image.
        step: (3,), x, y, z: from one voxel of the grid to the next, negative on a flipped axis.
    """

    image_CZYX: NDArray[np.float32]
    weights: tuple[Weights, ...]
    first: NDArray[np.float64]
    step: NDArray[np.float64]

    @staticmethod
    def of(image_XYZC: NDArray[np.float32], affine: NDArray[np.float64], grid: Grid) -> ImageOnGrid:
        """An image in file orientation, as `resample.resample_image` takes it; a rotated one is resampled here."""
        weights = axis_weights(image_XYZC.shape[:3], affine, grid)
        if weights is None:
            image_XYZC = resample_image(image_XYZC, affine, grid)
            whole = (Weights.at(torch.arange(n, dtype=torch.float64), n, False) for n in grid.shape)
            return ImageOnGrid(image_XYZC.transpose(3, 2, 1, 0), tuple(whole), np.zeros(3), np.ones(3))
        image_XYZC, affine = grid.turned(image_XYZC, affine)
        order = list(grid.permutation)
        to_source = grid.to_source(affine)[order]
        image_CZYX = image_XYZC.transpose(3, *reversed(order))
        ordered = tuple(weights[i] for i in order)
        return ImageOnGrid(image_CZYX, ordered, to_source[:, 3], np.diag(to_source[:, :3]).copy())

    @property
    def shape(self) -> tuple[int, ...]:
        """(X, Y, Z) of the prepared grid."""
        return tuple(len(weights.low) for weights in self.weights)

    def crop(self, start: Sequence[int], size: Sequence[int], flip: bool = False) -> ResampleInputs:
        """A crop of the prepared grid.

        Args:
            start: first voxel (x, y, z), in the volume as padded with zeros to at least `size`.
            size: (x, y, z).
            flip: reverse the first axis.
        """
        inside, target = overlap(self.shape, start, size)
        pairs = []  # along each axis, the two voxels of the image that each voxel of the crop is made of
        for weights, part in zip(self.weights, inside, strict=True):
            high = torch.where(weights.high_weight > 0, weights.high, weights.low)
            pairs.append(np.stack([weights.low[part], high[part]]))
        begin = np.array([pair.min() for pair in pairs])
        stop = np.array([pair.max() + 1 for pair in pairs])
        box = self.image_CZYX[:, begin[2] : stop[2], begin[1] : stop[1], begin[0] : stop[0]]
        support = np.zeros((len(box), *reversed(size)), np.uint8)
        oriented = support[..., ::-1] if flip else support
        reached = box != 0  # where a voxel of the crop has a non-zero one among its neighbours in the box
        for axis in (2, 1, 0):
            low, high = pairs[axis] - begin[axis]
            reached = reached.take(low, 3 - axis) | reached.take(high, 3 - axis)
        oriented[:, target[2], target[1], target[0]] = reached
        index = np.array([part.start - place.start for part, place in zip(inside, target, strict=True)])
        # Faces lie half a voxel of the crop before the first centre, and a centre is half a voxel of the box from 0.
        faces = self.first + self.step * (index - 0.5) + 0.5 - begin
        ends = [faces, faces + self.step * size]
        if flip:
            ends[0][0], ends[1][0] = ends[1][0], ends[0][0]
        return ResampleInputs(box, support, *(np.array(values[::-1], np.float32) for values in (*ends, size)))


def resample(box: Any, support: Any, start: Any, end: Any, size: Any) -> Any:
    """From nodes of `ResampleInputs` to an image in layout DHWC, oriented, with MONAI's zeros."""
    how = {"interp_type": types.INTERP_LINEAR, "antialias": False}
    planar = (fn.resize(box, roi_start=start, roi_end=end, size=size, **how) + TINY) * support
    # At once this transposition takes 62 ms on a CPU, in two steps 37 (128 x 128 x 64, 4 channels).
    oriented = fn.transpose(planar, perm=[0, 3, 2, 1], transpose_layout=False)
    return fn.transpose(oriented, perm=[1, 2, 3, 0], transpose_layout=False, output_layout="DHWC")


def raw_pipeline(sources: Sequence[Callable[[], Any]], device: str, extras: Augment) -> tuple:
    """Resample, orient, crop, flip, z-score, jitter, with the extra augmentations that are on.

    Args:
        sources: one returns the `ResampleInputs` of a batch, a list for each field, and its labels (B, X, Y, Z, 1)
            uint8; the other tags (B, 2) int64, scales (B,), shifts (B,), inputs of the extras, float32.
        device: DALI's "cpu" or "gpu".
        extras: extra augmentations.
    """
    given = external_inputs(sources, [*LAYOUTS, "DHWC"], 3 + len(input_names(extras)))
    box, support, start, end, size, label, tag, scale, shift, *rest = given
    if device == "gpu":
        box, support, label = box.gpu(), support.gpu(), label.gpu()
    image = resample(box, support, start, end, size)
    return (*augmented(image, label, scale, shift, extras, rest), tag)


def resample_pipeline(device: str) -> Any:
    """`resample` of what is fed to the names of `ResampleInputs`."""
    named = zip(ResampleInputs._fields, LAYOUTS)
    box, support, start, end, size = [fn.external_source(name=n, layout=layout, no_copy=True) for n, layout in named]
    if device == "gpu":
        box, support = box.gpu(), support.gpu()
    return resample(box, support, start, end, size)


def resample_case(raw: RawCase, grid: Grid, device: torch.device) -> NDArray[np.float32]:
    """Resample and orient the image of a case in DALI: `resample.resample_image` for a GPU.

    Args:
        raw, grid: the case, from `read_case`, and `target_grid` of its shape and affine.
        device: where; "cuda" alone is torch's current GPU.

    Returns:
        float32 (X', Y', Z', C) in RAS, C order.
    """
    image = ImageOnGrid.of(raw.image, raw.affine, grid)
    pipeline = _resample_pipeline(with_index(device))
    fed = [np.ascontiguousarray(array) for array in image.crop((0, 0, 0), image.shape)]
    for name, array in zip(ResampleInputs._fields, fed, strict=True):
        pipeline.feed_input(name, [array])
    return np.array(pipeline.run()[0].as_cpu().as_array()[0])


def resample_on_gpus(gpus: int, raw: RawCase, grid: Grid) -> NDArray[np.float32]:
    """`resample_case` on one of so many GPUs: worker processes take them in turn."""
    return resample_case(raw, grid, torch.device("cuda", worker_index() % gpus))


@lru_cache
def _resample_pipeline(device: torch.device) -> Any:
    return build_pipeline(resample_pipeline, device)
