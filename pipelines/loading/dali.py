"""Training and validation pipelines in NVIDIA DALI: one graph, on the CPU or on the GPU.

The store holds volumes that are already resampled and oriented, so a sample costs its crop and nothing else. The steps,
in the order of the published MONAI chain:

    crop      at the drawn start, out of wherever the volumes are (volumes.py); no other voxel is touched
    flip      of the first spatial axis, image and label, while the crop is copied
    z-score   of the non-zero voxels of each channel of the crop; zeros stay zero
    jitter    x * (1 + scale) + shift, on every voxel, zeros included

Extra augmentations (augment.py), where asked for, stand around the z-score.

Crop and flip are one copy, which Python starts between two batches; the rest is DALI's, in its own threads or on its
own CUDA streams, `PREFETCH` batches ahead of the training step. On a CPU a crop brings its mean and deviation with it
(`volumes.nonzero_mean_std`): DALI's reductions over all but the channels take four times as long there. On a GPU they
are part of the graph. Which batches come is decided in loaders.py.

Axes. Volumes are (X, Y, Z, C), DALI's layout DHWC; X, Y, Z are the axes of RAS. Yielded images have the shape
(B, C, X, Y, Z), float32 or bfloat16, in the memory format that is asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import torch
from nvidia.dali import math, pipeline_def, types
from nvidia.dali.pipeline import do_not_convert

from pipelines.loading.augment import Augment, apply_intensity, apply_spatial, input_names

PREFETCH = 2  # batches that DALI works on ahead of the one last yielded
NO_EXTRAS = Augment()
BUFFERS = PREFETCH + 2  # sets of crops: DALI reads them in place, and may still be at those of the batches before
SPATIAL = (0, 1, 2)

# DALI's default executor frees buffers after each batch. On a CPU they come from malloc, and the page faults of 16 MB
# cost more than the arithmetic (x * 2: 15.8 ms against 3.6, DALI 2.4). The older executor keeps its buffers.
CPU_EXECUTION = {"exec_dynamic": False}


def channel_mean(volume: Any) -> Any:
    """Mean of each channel of a DHWC volume, kept as (1, 1, 1, C)."""
    return fn.reductions.mean(volume, axes=SPATIAL, keep_dims=True)


def z_score(image: Any) -> Any:
    """Z-score the non-zero voxels of each channel of a DHWC image: MONAI's NormalizeIntensity(nonzero, channel_wise).

    Population standard deviation, in two passes (mean, then centred squares). A channel without non-zero voxels stays
    zero; a constant one is only centred: in float32 its deviation is the rounding of its mean, hence the bound.

    The arithmetic form runs on both devices: `fn.normalize`, which broadcasts faster on a CPU, takes its mean and
    deviation from the CPU alone. Counting through a uint8 view of the mask saves the 4 ms of a cast.
    """
    nonzero = fn.reinterpret(image != 0, dtype=types.UINT8)
    share = math.max(channel_mean(nonzero), np.float32(1e-12))
    mean = channel_mean(image) / share
    centred = (image - mean) * nonzero
    std = math.sqrt(fn.reductions.mean_square(centred, axes=SPATIAL, keep_dims=True) / share)
    return centred / (std + (std <= np.float32(1e-6) * math.abs(mean)))


def jitter(image: Any, scale: Any, shift: Any) -> Any:
    """x * (1 + scale) + shift on every voxel, in one pass over the image."""
    return fn.brightness_contrast(image, brightness=1.0 + scale, brightness_shift=shift)


def standardise(image: Any, mean: Any, std: Any) -> Any:
    """Z-score by the statistics of the non-zero voxels, each (C,): what `z_score` finds out for itself. CPU only."""
    mean, std = (fn.reshape(value, shape=[1, 1, 1, -1]) for value in (mean, std))
    return fn.normalize(image, mean=mean, stddev=std) * (image != 0)


@do_not_convert  # plain Python, which DALI's conditionals would otherwise rewrite
def _inputs(source: Callable[[], tuple[tuple, tuple]], device: str, in_place: bool, numbers: int) -> list[Any]:
    """Nodes of image and label, on `device`, and of the numbers of each sample, on the CPU.

    A source of DALI has one device, so there are two, which share what one call returns.
    """
    parts: tuple[deque, deque] = deque(), deque()

    def part(index: int) -> tuple:
        if not parts[index]:
            for queue, values in zip(parts, source(), strict=True):
                queue.append(values)
        return parts[index].popleft()

    where = "gpu" if in_place and device == "gpu" else "cpu"
    image, label = fn.external_source(
        lambda: part(0), num_outputs=2, layout="DHWC", device=where, no_copy=where == "cpu"
    )
    if where != device:
        image, label = image.gpu(), label.gpu()
    return [image, label, *fn.external_source(lambda: part(1), num_outputs=numbers)]


@pipeline_def(enable_conditionals=True)
def train_graph(
    source: Callable[[], tuple[tuple, tuple]], device: str, in_place: bool = False, extras: Augment = NO_EXTRAS
) -> tuple:
    """Z-score and jitter of crops, with the extra augmentations that are on.

    Args:
        source: returns a batch: (images (B, X, Y, Z, C) float32, labels (B, X, Y, Z, 1) uint8), and (scales (B,),
            shifts (B,), tags (B, 2) int64, inputs of the extras, and where `brings_statistics` means and deviations,
            (B, C)), float32.
        device: "cpu" or "gpu".
        in_place: images and labels come as tensors on `device`.
        extras: extra augmentations.
    """
    numbers = 3 + len(input_names(extras)) + (2 if brings_statistics(device, extras) else 0)
    image, label, scale, shift, tag, *rest = _inputs(source, device, in_place, numbers)
    return (*augmented(image, label, scale, shift, extras, rest), tag)


def augmented(image: Any, label: Any, scale: Any, shift: Any, extras: Augment, rest: Sequence[Any]) -> tuple[Any, Any]:
    """From a crop to what the network sees; `rest` holds the inputs of the extras, and statistics where they come."""
    names = input_names(extras)
    inputs, statistics = dict(zip(names, rest)), rest[len(names) :]
    image, label = apply_spatial(image, label, extras, inputs)
    image = standardise(image, *statistics) if statistics else z_score(image)
    return jitter(apply_intensity(image, extras, inputs), scale, shift), label


def brings_statistics(device: str, extras: Augment) -> bool:
    """Whether mean and deviation come with a crop: on a CPU, unless they are those of a crop that is yet to change."""
    return device == "cpu" and not extras.affine_prob


@pipeline_def
def val_graph(
    source: Callable[[], tuple[tuple, tuple]], device: str, in_place: bool = False, normalise: bool = True
) -> tuple:
    """Z-score of a centre crop or a full volume. As `train_graph`; `source` without scales and shifts."""
    image, label, tag, *statistics = _inputs(source, device, in_place, 3 if device == "cpu" and normalise else 1)
    if normalise:
        image = standardise(image, *statistics) if statistics else z_score(image)
    return image, label, tag


def torch_device(device: str, device_id: int | None) -> torch.device:
    """What DALI calls "cpu" or "gpu", as torch calls it."""
    if device == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device() if device_id is None else device_id)


class Stream:
    """The running pipeline: an endless sequence of batches (0, 0), (0, 1) ... (1, 0) ..., movable to any of them.

    DALI asks for input ahead of the batch that it hands out. Every batch therefore carries its (epoch, step) through
    the graph as a tag, and batches that were in flight when the stream was moved are dropped by it.

    Args:
        graph: `train_graph` or `val_graph`.
        read: from (epoch, step) and the tags of that batch to what the graph's `source` returns.
        steps: batches in an epoch.
        batch_size, threads, device, device_id: of the pipeline.
        dtype, memory_format: of the images that come out.
    """

    def __init__(
        self,
        graph: Callable[..., Any],
        read: Callable[[int, int, np.ndarray], tuple[tuple, tuple]],
        steps: int,
        batch_size: int,
        threads: int,
        device: str,
        device_id: int | None,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.channels_last_3d,
    ) -> None:
        self.read, self.steps, self.batch_size = read, steps, batch_size
        self.dtype, self.memory_format = dtype, memory_format
        self.next_in = self.next_out = (0, 0)
        self.turn = 0
        self.device = torch_device(device, device_id)
        self.pipeline = graph(
            self._source,
            device,
            batch_size=batch_size,
            num_threads=threads,
            device_id=self.device.index,
            prefetch_queue_depth=PREFETCH,
            **(CPU_EXECUTION if device == "cpu" else {}),
        )

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield (step, image (B, C, X, Y, Z), label (B, X, Y, Z)) of an epoch; earlier iterators raise from then on."""
        self.turn += 1
        turn = self.turn
        for step in range(first_step, self.steps):
            if turn != self.turn:
                raise RuntimeError(f"epoch {epoch} was left when another was started: keep one iterator at a time")
            yield (step, *self._fetch((epoch, step)))

    def _source(self) -> tuple[tuple, tuple]:
        epoch, step = self.next_in
        batch = self.read(epoch, step, np.tile(np.array([epoch, step]), (self.batch_size, 1)))
        self.next_in = self._after(self.next_in)  # not where reading raised: the same batch may be asked for again
        return batch

    def _after(self, tag: tuple[int, int]) -> tuple[int, int]:
        epoch, step = tag
        return (epoch, step + 1) if step + 1 < self.steps else (epoch + 1, 0)

    def _fetch(self, wanted: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.next_out != wanted:
            self.next_in = wanted
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        for _ in range(PREFETCH + 2):  # what may be in flight, and the one wanted
            image, label, tags = self.pipeline.run(stream)
            if tuple(tags.as_array()[0].tolist()) == wanted:
                self.next_out = self._after(wanted)
                image_BXYZC, label_BXYZ1 = (torch.from_dlpack(batch.as_tensor()) for batch in (image, label))
                return self._image(image_BXYZC.permute(0, 4, 1, 2, 3)), label_BXYZ1[..., 0].clone()
        raise AssertionError(f"batch {wanted} was asked for and never came")

    def _image(self, image_BCXYZ: torch.Tensor) -> torch.Tensor:
        """A tensor of its own, as DALI overwrites its buffers, converted on the way."""
        if self.device.type == "cuda":
            out = torch.empty_like(image_BCXYZ, dtype=self.dtype, memory_format=self.memory_format)
            return out.copy_(image_BCXYZ)
        # NumPy asks for huge pages, torch does not: page faults of small ones cost more than all of DALI's arithmetic.
        memory = torch.from_numpy(np.empty(image_BCXYZ.numel() * self.dtype.itemsize, np.uint8)).view(self.dtype)
        if self.memory_format == torch.channels_last_3d:
            out = memory.view(image_BCXYZ.permute(0, 2, 3, 4, 1).shape).permute(0, 4, 1, 2, 3)
        else:
            out = memory.view(image_BCXYZ.shape)
        return out.copy_(image_BCXYZ)
