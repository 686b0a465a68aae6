"""Training and validation pipelines in NVIDIA DALI: one graph, on the CPU or on the GPU.

The store holds volumes that are already resampled and oriented, so a sample costs its crop and nothing else. The steps,
in the order of the published MONAI chain:

    crop      read from the memory-mapped volume at the drawn start; no other voxel is touched
    flip      of the first spatial axis, image and label
    z-score   of the non-zero voxels of each channel of the crop; zeros stay zero
    jitter    x * (1 + scale) + shift, on every voxel, zeros included

Only the copy of the crop runs in Python, between two batches; the rest is DALI's, in its own threads or on its own CUDA
streams, `PREFETCH` batches ahead of the training step. Which crops come, and what is drawn for each, is decided in
pipelines/sampling.py from the seed, the epoch and the position alone.

Axes. Volumes are (X, Y, Z, C), DALI's layout DHWC; X, Y, Z are the axes of RAS. Yielded images have the shape
(B, C, X, Y, Z) but keep the memory order (B, X, Y, Z, C): they are `torch.channels_last_3d` views, never transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import torch
from numpy.typing import NDArray
from nvidia.dali import math, pipeline_def, types
from nvidia.dali.plugin.pytorch import feed_ndarray

from pipelines.cases import DataError
from pipelines.sampling import Draw, Size, copy_crop, draw_sample, epoch_order
from pipelines.store import Store

PREFETCH = 2  # batches that DALI works on ahead of the one last yielded
SPATIAL = (0, 1, 2)

# DALI's default executor frees buffers after each batch. On a CPU they come from malloc, and the page faults of 16 MB
# cost more than the arithmetic (x * 2: 15.8 ms against 3.6, DALI 2.4). The older executor keeps its buffers.
CPU_EXECUTION = {"exec_dynamic": False}


def flip_first_axis(volume: Any, flip: Any) -> Any:
    """Reverse the first spatial axis of a DHWC volume where `flip` is 1."""
    return fn.flip(volume, depthwise=flip, horizontal=0)


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


@pipeline_def
def train_graph(source: Callable[[], tuple], device: str) -> tuple:
    """Crop (in `source`), flip, z-score, jitter.

    Args:
        source: returns a batch: images (B, X, Y, Z, C) float32, labels (B, X, Y, Z, 1) uint8, flips (B,) int32,
            scales (B,) and shifts (B,) float32, tags (B, 2) int64.
        device: "cpu" or "gpu".
    """
    image, label, flip, scale, shift, tag = fn.external_source(source, num_outputs=6, layout=["DHWC", "DHWC"])
    if device == "gpu":
        image, label = image.gpu(), label.gpu()
    image, label = flip_first_axis(image, flip), flip_first_axis(label, flip)
    image = z_score(image)
    image = jitter(image, scale, shift)
    return image, label, tag


@pipeline_def
def val_graph(source: Callable[[], tuple], device: str, normalise: bool = True) -> tuple:
    """Centre crop or full volume (in `source`), z-score. `source` as in `train_graph`, without the draws."""
    image, label, tag = fn.external_source(source, num_outputs=3, layout=["DHWC", "DHWC"])
    if device == "gpu":
        image, label = image.gpu(), label.gpu()
    return z_score(image) if normalise else image, label, tag


def label_of(store: Store, i: int) -> NDArray[np.uint8]:
    """Label of a case as (X, Y, Z, 1), memory-mapped.

    Raises:
        DataError: the case has none.
    """
    label = store.label(i)
    if label is None:
        raise DataError(f"case {store.names[i]} has no label: add it, or leave the case out of training and validation")
    return label[..., None]


def check_loader(
    store: Store, names: Sequence[str], crop_size: Size | None, pad: bool, device: str, rank: int, world_size: int
) -> list[int]:
    """Store indices of `names`, once everything that a loader is given makes sense. Raises as the loaders say."""
    if crop_size is not None and (len(crop_size) != 3 or min(crop_size) < 1):
        raise ValueError(f"crop_size {tuple(crop_size)} must be three positive numbers of voxels, e.g. (128, 128, 64)")
    if device not in ("cpu", "gpu"):
        raise ValueError(f'device {device!r} must be "cpu" or "gpu"')
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} must be at least 0 and below world_size {world_size}")
    if not names:
        raise DataError("no cases to load: name at least one case of the store")
    indices = [store.index(name) for name in names]
    for name, i in zip(names, indices, strict=True):
        shape = label_of(store, i).shape[:3]
        if crop_size is not None and not pad and np.less(shape, crop_size).any():
            smallest = np.min([crop_size, *(store.shape(i) for i in indices)], axis=0)
            # Rounded down to what the models take: multiples of 16.
            fits = ",".join(str(n - n % 16 if n >= 16 else n) for n in smallest.tolist())
            raise DataError(
                f"case {name} has {shape} voxels, fewer than the crop of {tuple(crop_size)} on at least one axis; "
                f"--data.crop_size_voxels [{fits}] fits all cases, --data.pad true fills up with zeros"
            )
    return indices


class Stream:
    """The running pipeline: an endless sequence of batches (0, 0), (0, 1) ... (1, 0) ..., movable to any epoch.

    DALI asks for input ahead of the batch that it hands out. Every batch therefore carries its (epoch, step) through
    the graph as a tag, and batches that were in flight when the stream was moved are dropped by it.

    Args:
        graph: `train_graph` or `val_graph`.
        read: returns the inputs of the batch (epoch, step), as the graph's `source` without the tags.
        steps: batches in an epoch.
        batch_size, threads, device, device_id: of the pipeline.
    """

    def __init__(
        self,
        graph: Callable[..., Any],
        read: Callable[[int, int], tuple],
        steps: int,
        batch_size: int,
        threads: int,
        device: str,
        device_id: int | None,
    ) -> None:
        self.read, self.steps, self.batch_size = read, steps, batch_size
        self.next_in = self.next_out = (0, 0)
        self.turn = 0
        self.device = torch.device("cpu")
        if device == "gpu":
            self.device = torch.device("cuda", torch.cuda.current_device() if device_id is None else device_id)
        self.pipeline = graph(
            self._source,
            device,
            batch_size=batch_size,
            num_threads=threads,
            device_id=self.device.index,
            prefetch_queue_depth=PREFETCH,
            **(CPU_EXECUTION if device == "cpu" else {}),
        )

    def epoch(self, epoch: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield (step, image (B, C, X, Y, Z), label (B, X, Y, Z)) of an epoch; earlier iterators raise from then on."""
        self.turn += 1
        turn = self.turn
        for step in range(self.steps):
            if turn != self.turn:
                raise RuntimeError(f"epoch {epoch} was left when another was started: keep one iterator at a time")
            yield (step, *self._fetch((epoch, step)))

    def _source(self) -> tuple:
        epoch, step = self.next_in
        self.next_in = self._after(self.next_in)
        return (*self.read(epoch, step), np.tile(np.array([epoch, step]), (self.batch_size, 1)))

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
                return self._copy(image, stream).permute(0, 4, 1, 2, 3), self._copy(label, stream)[..., 0]
        raise AssertionError(f"batch {wanted} was asked for and never came")

    def _copy(self, batch: Any, stream: torch.cuda.Stream | None) -> torch.Tensor:
        """A tensor of its own, as DALI overwrites its buffers; copied on torch's stream, which orders that after it."""
        dense = batch.as_tensor()
        dtype = torch.uint8 if dense.dtype == types.UINT8 else torch.float32
        out = torch.empty(dense.shape(), dtype=dtype, device=self.device)
        return feed_ndarray(dense, out, cuda_stream=stream)


class TrainLoader:
    """Random crops of prepared cases, augmented, in batches that are as many on every rank and reproducible.

    Each epoch is a fresh permutation of `len(names) * crops_per_case` samples, padded from its own start to a multiple
    of `batch_size * world_size`; each rank takes every `world_size`-th. The DALI pipeline is built once and runs on
    from one epoch into the next.

    Args:
        store: prepared cases.
        names: cases to train on.
        crop_size: (X, Y, Z) in voxels.
        batch_size: crops per step on this rank.
        seed: of the order and of every draw.
        device: "cpu" or "gpu": where the graph runs and the batches are.
        rank, world_size: of this process.
        crops_per_case: crops of each case in an epoch.
        foreground_prob: share of crops centred on a random tumour voxel; 0 is the published experiment.
        pad: fill volumes smaller than the crop with zeros, symmetrically, instead of refusing them.
        augment: flip, scale and shift; crops stay random without it.
        device_id: GPU of this process (its local rank); None is torch's current one.
        threads: DALI's CPU threads.

    Raises:
        DataError: a case without a label, or smaller than the crop while `pad` is false.
        ValueError: a setting that makes no sense.
    """

    def __init__(
        self,
        store: Store,
        names: Sequence[str],
        crop_size: Size,
        batch_size: int,
        seed: int = 0,
        device: str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        crops_per_case: int = 1,
        foreground_prob: float = 0.0,
        pad: bool = False,
        augment: bool = True,
        device_id: int | None = None,
        threads: int = 2,
    ) -> None:
        self.indices = check_loader(store, names, crop_size, pad, device, rank, world_size)
        if min(batch_size, crops_per_case) < 1:
            raise ValueError(f"batch_size ({batch_size}) and crops_per_case ({crops_per_case}) must be at least 1")
        if not 0 <= foreground_prob <= 1:
            raise ValueError(f"foreground_prob {foreground_prob} must lie between 0 and 1")
        self.store, self.names, self.crop_size, self.batch_size = store, tuple(names), crop_size, batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.foreground_prob, self.augment = foreground_prob, augment
        self.samples = len(self.names) * crops_per_case
        channels = store.image(self.indices[0]).shape[3]
        # Reused for every batch: DALI takes its own copy, and page faults make a fresh 16 MB array the dearer way.
        self._image = np.empty((batch_size, *crop_size, channels), np.float32)
        self._label = np.empty((batch_size, *crop_size, 1), np.uint8)
        self._stream = Stream(train_graph, self._read, len(self), batch_size, threads, device, device_id)

    def __len__(self) -> int:
        """Steps of an epoch on this rank."""
        return -(-self.samples // (self.batch_size * self.world_size))

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (image float32 (B, C, X, Y, Z), label uint8 (B, X, Y, Z)) of an epoch, in tensors of their own.

        Epochs count from 0 and may be asked for in any order; starting one ends the iterator of the one before.
        """
        for _, image, label in self._stream.epoch(epoch):
            yield image, label

    def names_of(self, epoch: int, step: int) -> list[str]:
        """Names of the cases in a batch of this rank."""
        return [self.names[case] for case, _ in self._batch(epoch, step)]

    def draws_of(self, epoch: int, step: int) -> list[Draw]:
        """The draws of a batch of this rank."""
        return [self._draw(epoch, position, self.indices[case]) for case, position in self._batch(epoch, step)]

    def _batch(self, epoch: int, step: int) -> list[tuple[int, int]]:
        """(case, position in the epoch) of each sample of a batch of this rank."""
        stride = self.batch_size * self.world_size
        order = epoch_order(self.seed, epoch, self.samples, stride)
        positions = range(step * stride + self.rank, (step + 1) * stride, self.world_size)
        return [(int(order[p]) % len(self.names), p) for p in positions]

    def _draw(self, epoch: int, position: int, i: int) -> Draw:
        x, y, z = np.maximum(self.store.shape(i), self.crop_size).tolist()
        # Not moved by the padding: an axis that is padded has one start only.
        foreground = self.store.foreground(i) if self.foreground_prob else np.empty((0, 3), np.int32)
        draw = draw_sample(self.seed, epoch, position, (x, y, z), self.crop_size, foreground, self.foreground_prob)
        return draw if self.augment else Draw(draw.start, flip=False, scale=0.0, shift=0.0)

    def _read(self, epoch: int, step: int) -> tuple:
        draws = self.draws_of(epoch, step)
        for b, (case, _) in enumerate(self._batch(epoch, step)):
            i = self.indices[case]
            copy_crop(self.store.image(i), draws[b].start, self._image[b])
            copy_crop(label_of(self.store, i), draws[b].start, self._label[b])
        flips = np.array([draw.flip for draw in draws], np.int32)
        scales, shifts = np.array([(draw.scale, draw.shift) for draw in draws], np.float32).T.copy()
        return self._image, self._label, flips, scales, shifts


class ValLoader:
    """Validation cases one by one: the centre crop, or the full volume, z-scored.

    Rank r takes the cases r, r + world_size ...; nothing is padded, so ranks may differ in number by one.

    Args:
        store: prepared cases.
        names: cases to validate on.
        crop_size: (X, Y, Z) in voxels, cut as MONAI's CenterSpatialCrop does; None is the full volume.
        device, rank, world_size, pad, device_id, threads: as in `TrainLoader`.
        normalise: False leaves the z-score to the caller, as sliding windows want it.

    Raises:
        DataError, ValueError: as `TrainLoader`.
    """

    def __init__(
        self,
        store: Store,
        names: Sequence[str],
        crop_size: Size | None,
        device: str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        pad: bool = False,
        device_id: int | None = None,
        threads: int = 2,
        normalise: bool = True,
    ) -> None:
        self.store, self.crop_size = store, crop_size
        self.indices = check_loader(store, names, crop_size, pad, device, rank, world_size)[rank::world_size]
        self.names = tuple(names)[rank::world_size]
        self._passes = 0
        graph = partial(val_graph, normalise=normalise)
        self._stream = Stream(graph, self._read, len(self), 1, threads, device, device_id)

    def __len__(self) -> int:
        """Cases of this rank."""
        return len(self.names)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Yield (name, image float32 (1, C, X, Y, Z), label uint8 (1, X, Y, Z)), in tensors of their own."""
        passes, self._passes = self._passes, self._passes + 1
        for step, image, label in self._stream.epoch(passes):
            yield self.names[step], image, label

    def _read(self, _pass: int, step: int) -> tuple:
        image, label = self.store.image(self.indices[step]), label_of(self.store, self.indices[step])
        shape = np.array(image.shape[:3])
        size = self.crop_size or tuple(shape)
        start = np.maximum(shape, size) // 2 - np.array(size) // 2
        image_crop, label_crop = np.empty((*size, image.shape[3]), np.float32), np.empty((*size, 1), np.uint8)
        copy_crop(image, start, image_crop)
        copy_crop(label, start, label_crop)
        return image_crop[None], label_crop[None]
