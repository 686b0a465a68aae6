"""Training and validation pipelines in NVIDIA DALI: one graph, on the CPU or on the GPU.

The store holds volumes that are already resampled and oriented, so a sample costs its crop and nothing else. The steps,
in the order of the published MONAI chain:

    crop      at the drawn start, out of wherever the volumes are (pipelines/volumes.py); no other voxel is touched
    flip      of the first spatial axis, image and label, while the crop is copied
    z-score   of the non-zero voxels of each channel of the crop; zeros stay zero
    jitter    x * (1 + scale) + shift, on every voxel, zeros included

Extra augmentations (pipelines/augment.py), where asked for, stand around the z-score.

Crop and flip are one copy, which Python starts between two batches; the rest is DALI's, in its own threads or on its
own CUDA streams, `PREFETCH` batches ahead of the training step. On a CPU mean and deviation of a crop come with it from
`nonzero_mean_std`, for DALI's reductions over all but the channels take four times as long there; on a GPU they are
part of the graph. Which crops come, and what is drawn for each, is decided in pipelines/sampling.py from the seed, the
epoch and the position alone.

Axes. Volumes are (X, Y, Z, C), DALI's layout DHWC; X, Y, Z are the axes of RAS. Yielded images have the shape
(B, C, X, Y, Z), float32 or bfloat16, in the memory format that is asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import torch
from nvidia.dali import math, pipeline_def, types
from nvidia.dali.pipeline import do_not_convert

from pipelines.augment import Augment, apply_intensity, apply_spatial, draw_augment, graph_inputs, input_names
from pipelines.cases import DataError
from pipelines.sampling import Draw, Size, draw_sample, epoch_order, generator
from pipelines.store import Store
from pipelines.volumes import LoadedVolumes, MappedVolumes, Residence, label_of, nonzero_mean_std, open_volumes

PREFETCH = 2  # batches that DALI works on ahead of the one last yielded
NO_EXTRAS = Augment()
BUFFERS = PREFETCH + 2  # sets of crops: DALI reads them in place, and may still be at those of the batches before
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
            shifts (B,), tags (B, 2) int64, inputs of the extras, and where `_brings_statistics` means and deviations,
            (B, C)), float32.
        device: "cpu" or "gpu".
        in_place: images and labels come as tensors on `device`.
        extras: extra augmentations.
    """
    names = input_names(extras)
    numbers = 3 + len(names) + (2 if _brings_statistics(device, extras) else 0)
    image, label, scale, shift, tag, *rest = _inputs(source, device, in_place, numbers)
    inputs, statistics = dict(zip(names, rest)), rest[len(names) :]
    image, label = apply_spatial(image, label, extras, inputs)
    image = standardise(image, *statistics) if statistics else z_score(image)
    image = apply_intensity(image, extras, inputs)
    return jitter(image, scale, shift), label, tag


def _brings_statistics(device: str, extras: Augment) -> bool:
    """Whether mean and deviation come with a crop: on a CPU, unless they are those of a crop that is yet to change."""
    return device == "cpu" and not extras.affine_prob


@pipeline_def
def val_graph(source: Callable[[], tuple[tuple, tuple]], device: str, normalise: bool = True) -> tuple:
    """Z-score of a centre crop or a full volume. `source` as in `train_graph`, without scales and shifts."""
    image, label, tag, *statistics = _inputs(source, device, False, 3 if device == "cpu" and normalise else 1)
    if normalise:
        image = standardise(image, *statistics) if statistics else z_score(image)
    return image, label, tag


def torch_device(device: str, device_id: int | None) -> torch.device:
    """What DALI calls "cpu" or "gpu", as torch calls it."""
    if device == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device() if device_id is None else device_id)


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

    def statistics(self, images: np.ndarray) -> tuple[np.ndarray, ...]:
        """Means and deviations (B, C) of the non-zero voxels, for a graph on the CPU; on a GPU it has its own."""
        if self.device.type == "cuda":
            return ()
        means, stds = zip(*map(nonzero_mean_std, images), strict=True)
        return np.stack(means), np.stack(stds)

    def _source(self) -> tuple[tuple, tuple]:
        epoch, step = self.next_in
        self.next_in = self._after(self.next_in)
        return self.read(epoch, step, np.tile(np.array([epoch, step]), (self.batch_size, 1)))

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
        out = torch.empty(
            image_BCXYZ.shape, dtype=self.dtype, device=image_BCXYZ.device, memory_format=self.memory_format
        )
        return out.copy_(image_BCXYZ)


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
        residence: where the volumes are meanwhile (pipelines/volumes.py). ranks_on_node: processes that share a node.
        dtype, memory_format: of the images.
        extras: extra augmentations.

    Raises:
        DataError: a case without a label, or smaller than the crop while `pad` is false; volumes that do not fit where
            `residence` puts them.
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
        residence: Residence = "auto",
        ranks_on_node: int = 1,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.channels_last_3d,
        extras: Augment = NO_EXTRAS,
    ) -> None:
        self.indices = check_loader(store, names, crop_size, pad, device, rank, world_size)
        if min(batch_size, crops_per_case) < 1:
            raise ValueError(f"batch_size ({batch_size}) and crops_per_case ({crops_per_case}) must be at least 1")
        if not 0 <= foreground_prob <= 1:
            raise ValueError(f"foreground_prob {foreground_prob} must lie between 0 and 1")
        self.store, self.names, self.crop_size, self.batch_size = store, tuple(names), crop_size, batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.foreground_prob, self.augment, self.extras = foreground_prob, augment, extras
        self.samples = len(self.names) * crops_per_case
        where = torch_device(device, device_id)
        self._volumes = open_volumes(store, self.indices, where, residence, ranks_on_node)
        self._buffers = deque(self._volumes.new_buffers(batch_size, crop_size) for _ in range(BUFFERS))
        graph = partial(train_graph, in_place=isinstance(self._volumes, LoadedVolumes), extras=extras)
        self._stream = Stream(
            graph, self._read, len(self), batch_size, threads, device, device_id, dtype, memory_format
        )
        self.position = (0, 0)
        """Epoch, and step within it, of the batch that comes next."""

    def __len__(self) -> int:
        """Steps of an epoch on this rank."""
        return -(-self.samples // (self.batch_size * self.world_size))

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (image (B, C, X, Y, Z), label uint8 (B, X, Y, Z)) of an epoch, in tensors of their own.

        Epochs count from 0 and may be asked for in any order; starting one ends the iterator of the one before.
        `first_step` leaves out the steps before it.
        """
        for step, image, label in self._stream.epoch(epoch, first_step):
            self.position = (epoch, step + 1)
            yield image, label

    def state_dict(self) -> dict[str, Any]:
        """What makes the batches to come: position, and what else decides their content; plain values."""
        epoch, step = self.position
        return {"epoch": epoch, "step": step, "recipe": self._recipe}

    def load_state_dict(self, state: Mapping[str, Any]) -> tuple[int, int]:
        """Epoch and step to go on from, for `epoch`: from there on come the batches that would have come.

        Raises:
            DataError: another recipe would make other batches.
        """
        differing = [name for name, value in self._recipe.items() if state["recipe"].get(name) != value]
        if differing:
            was, now = ({name: recipe.get(name) for name in differing} for recipe in (state["recipe"], self._recipe))
            raise DataError(
                f"the checkpoint's batches were made with {was}, this run has {now}: resume with the same data, crops, "
                "seed, batch size and ranks, or start a new run"
            )
        self.position = (state["epoch"], state["step"])
        return self.position

    @property
    def _recipe(self) -> dict[str, Any]:
        """All that decides which batches come, beside epoch and step."""
        names = blake2b("\n".join(self.names).encode(), digest_size=8).hexdigest()
        return {
            "seed": self.seed, "cases": names, "samples": self.samples, "crop_size": list(self.crop_size),
            "batch_size": self.batch_size, "world_size": self.world_size, "foreground_prob": self.foreground_prob,
            "augment": self.augment, "extras": repr(self.extras),
        }  # fmt: skip

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

    def _read(self, epoch: int, step: int, tags: np.ndarray) -> tuple[tuple, tuple]:
        draws = self.draws_of(epoch, step)
        self._buffers.rotate()
        image, label = self._buffers[0]
        for b, (case, _) in enumerate(self._batch(epoch, step)):
            self._volumes.crop(self.indices[case], draws[b].start, image[b], label[b], draws[b].flip)
        scales, shifts = np.array([(draw.scale, draw.shift) for draw in draws], np.float32).T.copy()
        statistics = self._stream.statistics(image) if not self.extras.affine_prob else ()
        return (image, label), (scales, shifts, tags, *self._extra_inputs(epoch, step), *statistics)

    def _extra_inputs(self, epoch: int, step: int) -> list[list[np.ndarray]]:
        """What the graph needs of the draws of the extra augmentations; a stream of draws of their own."""
        channels = len(self.store.modalities)
        draws = [
            draw_augment(generator(self.seed, epoch, position, stream=1), self.extras, channels)
            for _, position in self._batch(epoch, step)
        ]
        return list(graph_inputs(self.extras, draws, self.crop_size, channels).values())


class ValLoader:
    """Validation cases one by one: the centre crop, or the full volume, z-scored.

    Rank r takes the cases r, r + world_size ...; nothing is padded, so ranks may differ in number by one.

    Args:
        store: prepared cases.
        names: cases to validate on.
        crop_size: (X, Y, Z) in voxels, cut as MONAI's CenterSpatialCrop does; None is the full volume.
        device, rank, world_size, pad, device_id, threads, memory_format: as in `TrainLoader`.
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
        memory_format: torch.memory_format = torch.channels_last_3d,
    ) -> None:
        self.store, self.crop_size = store, crop_size
        self.indices = check_loader(store, names, crop_size, pad, device, rank, world_size)[rank::world_size]
        self.names = tuple(names)[rank::world_size]
        self.normalise = normalise
        self._passes = 0
        self._volumes = MappedVolumes(store)
        self._buffers: deque[tuple] = deque(maxlen=BUFFERS)
        graph = partial(val_graph, normalise=normalise)
        self._stream = Stream(graph, self._read, len(self), 1, threads, device, device_id, memory_format=memory_format)

    def __len__(self) -> int:
        """Cases of this rank."""
        return len(self.names)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Yield (name, image float32 (1, C, X, Y, Z), label uint8 (1, X, Y, Z)), in tensors of their own."""
        passes, self._passes = self._passes, self._passes + 1
        for step, image, label in self._stream.epoch(passes):
            yield self.names[step], image, label

    def _read(self, _pass: int, step: int, tags: np.ndarray) -> tuple[tuple, tuple]:
        i = self.indices[step]
        shape = np.array(self.store.shape(i))
        size = self.crop_size or self.store.shape(i)
        start = np.maximum(shape, size) // 2 - np.array(size) // 2
        image, label = self._volumes.new_buffers(1, size)
        self._volumes.crop(i, start.tolist(), image[0], label[0])
        self._buffers.append((image, label))
        return (image, label), (tags, *(self._stream.statistics(image) if self.normalise else ()))
