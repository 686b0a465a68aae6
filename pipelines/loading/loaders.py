"""Loaders: which batches a rank sees, out of prepared volumes, for training and for validation.

The graphs that they feed are in dali.py, the draws in sampling.py, the volumes in
volumes.py. What a batch holds depends on the seed, its epoch and its step alone; `CropLoader.state_dict` is
all that a run needs to go on with the batches that it would have seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.basics.errors import DataError
from pipelines.loading.augment import Augment, draw_augment, graph_inputs
from pipelines.loading.dali import BUFFERS, NO_EXTRAS, Stream, brings_statistics, torch_device, train_graph, val_graph
from pipelines.loading.sampling import Draw, Size, draw_sample, epoch_order, generator
from pipelines.loading.volumes import LoadedVolumes, MappedVolumes, Residence, Volumes, nonzero_mean_std, open_volumes
from pipelines.preparing.store import Store


class Cases(Protocol):
    """What a loader asks of cases: a `Store`, or cases that are in none."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def modalities(self) -> tuple[str, ...]: ...

    def index(self, name: str) -> int: ...

    def shape(self, i: int) -> tuple[int, int, int]: ...

    def has_label(self, i: int) -> bool: ...

    def foreground(self, i: int) -> NDArray[np.int32]: ...


class CropLoader:
    """Random crops of cases, augmented, in batches that are as many on every rank and reproducible.

    Each epoch is a fresh permutation of `len(names) * crops_per_case` samples, padded from its own start to a multiple
    of `batch_size * world_size`; each rank takes every `world_size`-th. The DALI pipeline is built once and runs on
    from one epoch into the next. A subclass starts it with `_start`, and gives it its batches.

    Args:
        cases: where `names` are.
        names: cases to train on.
        crop_size: (X, Y, Z) in voxels.
        batch_size: crops per step on this rank.
        seed: of the order and of every draw.
        device: "cpu" or "gpu": where the graph runs and the batches are.
        rank, world_size: of this process.
        crops_per_case: crops of each case in an epoch.
        accumulate_steps: an epoch has a multiple of so many batches.
        foreground_prob: share of crops centred on a random tumour voxel; 0 is the published experiment.
        pad: fill volumes smaller than the crop with zeros, symmetrically, instead of refusing them.
        augment: flip, scale and shift; crops stay random without it.
        extras: extra augmentations.
        device_id: GPU of this process (its local rank); None is torch's current one.
        threads: DALI's CPU threads.
        dtype, memory_format: of the images.

    Raises:
        DataError: a case without a label, or smaller than the crop while `pad` is false.
        ValueError: a setting that makes no sense.
    """

    _stream: Stream

    def __init__(
        self,
        cases: Cases,
        names: Sequence[str],
        crop_size: Size,
        batch_size: int,
        seed: int = 0,
        device: str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        crops_per_case: int = 1,
        accumulate_steps: int = 1,
        foreground_prob: float = 0.0,
        pad: bool = False,
        augment: bool = True,
        extras: Augment = NO_EXTRAS,
        device_id: int | None = None,
        threads: int = 2,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.channels_last_3d,
    ) -> None:
        self.indices = check_loader(cases, names, crop_size, pad, device, rank, world_size)
        if min(batch_size, crops_per_case, accumulate_steps) < 1:
            raise ValueError(
                f"batch_size ({batch_size}), crops_per_case ({crops_per_case}) and accumulate_steps "
                f"({accumulate_steps}) must be at least 1"
            )
        if not 0 <= foreground_prob <= 1:
            raise ValueError(f"foreground_prob {foreground_prob} must lie between 0 and 1")
        self.cases, self.names, self.crop_size, self.batch_size = cases, tuple(names), crop_size, batch_size
        self.seed, self.rank, self.world_size, self.accumulate_steps = seed, rank, world_size, accumulate_steps
        self.foreground_prob, self.augment, self.extras = foreground_prob, augment, extras
        self.samples = len(self.names) * crops_per_case
        self._device, self._device_id = device, device_id
        self._running = (threads, device, device_id, dtype, memory_format)
        self.position = (0, 0)
        """Epoch, and step within it, of the batch that comes next."""

    def _start(self, graph: Callable[..., Any]) -> Stream:
        return Stream(graph, self._read, len(self), self.batch_size, *self._running)

    def _read(self, epoch: int, step: int, tags: NDArray[np.int64]) -> tuple[tuple, tuple]:
        """What the graph's source returns for a batch."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Batches of an epoch on this rank."""
        return -(-self.samples // self._stride) * self.accumulate_steps

    @property
    def _stride(self) -> int:
        """Samples of all ranks in one optimizer step."""
        return self.batch_size * self.world_size * self.accumulate_steps

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (image (B, C, X, Y, Z), label uint8 (B, X, Y, Z)) of an epoch, in tensors of their own.

        Epochs count from 0 and may be asked for in any order; starting one ends the iterator of the one before.
        `first_step` leaves out the steps before it.
        """
        for step, image, label in self._stream.epoch(epoch, first_step):
            self.position = (epoch, step + 1)
            yield image, label

    @property
    def gpu_bytes(self) -> int:
        """Volumes in the memory of the GPU."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """What makes the batches to come: position, and what else decides their content; plain values."""
        epoch, step = self.position
        return {"epoch": epoch, "samples": step * self.batch_size * self.world_size, "recipe": self._recipe}

    def load_state_dict(self, state: Mapping[str, Any]) -> tuple[int, int]:
        """Epoch and batch to go on from, for `epoch`: from there on come the samples that would have come.

        Another number of ranks, or another batch size, divides an epoch into other steps; then it goes on from the
        start of the step that the position is in.

        Raises:
            DataError: another recipe would make other samples.
        """
        differing = [name for name, value in self._recipe.items() if state["recipe"].get(name) != value]
        if differing:
            was, now = ({name: recipe.get(name) for name in differing} for recipe in (state["recipe"], self._recipe))
            raise DataError(
                f"the checkpoint's batches were made with {was}, this run has {now}: resume with the same data, crops "
                "and seed, or start a new run"
            )
        batch = state["samples"] // self._stride * self.accumulate_steps
        self.position = (state["epoch"], min(batch, len(self)))
        return self.position

    @property
    def _recipe(self) -> dict[str, Any]:
        """All that decides which samples come, beside the position."""
        names = blake2b("\n".join(self.names).encode(errors="surrogatepass"), digest_size=8).hexdigest()
        return {
            "seed": self.seed, "cases": names, "samples": self.samples, "crop_size": list(self.crop_size),
            "foreground_prob": self.foreground_prob, "augment": self.augment, "extras": repr(self.extras),
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
        order = epoch_order(self.seed, epoch, self.samples, self._stride)
        positions = range(step * stride + self.rank, (step + 1) * stride, self.world_size)
        return [(int(order[p]) % len(self.names), p) for p in positions]

    def _draw(self, epoch: int, position: int, i: int) -> Draw:
        x, y, z = np.maximum(self.cases.shape(i), self.crop_size).tolist()
        # Not moved by the padding: an axis that is padded has one start only.
        foreground = self.cases.foreground(i) if self.foreground_prob else np.empty((0, 3), np.int32)
        draw = draw_sample(self.seed, epoch, position, (x, y, z), self.crop_size, foreground, self.foreground_prob)
        return draw if self.augment else Draw(draw.start, flip=False, scale=0.0, shift=0.0)

    def _numbers(self, draws: Sequence[Draw], epoch: int, step: int, tags: NDArray[np.int64]) -> tuple[Any, ...]:
        """Scales, shifts, tags and inputs of the extra augmentations of a batch, as the graph takes them."""
        scales, shifts = np.array([(draw.scale, draw.shift) for draw in draws], np.float32).T.copy()
        channels = len(self.cases.modalities)
        extras = [
            draw_augment(generator(self.seed, epoch, position, stream=1), self.extras, channels)
            for _, position in self._batch(epoch, step)
        ]
        return scales, shifts, tags, *graph_inputs(self.extras, extras, self.crop_size, channels).values()


class TrainLoader(CropLoader):
    """Random crops of prepared cases.

    Args:
        store: prepared cases.
        names, crop_size, batch_size, seed, options: as in `CropLoader`.
        residence: where the volumes are meanwhile (volumes.py).
        ranks_on_node: processes that share the memory of a node.

    Raises:
        DataError, ValueError: as `CropLoader`; volumes that do not fit where `residence` puts them.
    """

    def __init__(
        self,
        store: Store,
        names: Sequence[str],
        crop_size: Size,
        batch_size: int,
        seed: int = 0,
        residence: Residence = "auto",
        ranks_on_node: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(store, names, crop_size, batch_size, seed, **options)
        where = torch_device(self._device, self._device_id)
        self._volumes = open_volumes(store, self.indices, where, residence, ranks_on_node, "training volumes")
        self._buffers = deque(self._volumes.new_buffers(batch_size, crop_size) for _ in range(BUFFERS))
        in_place = isinstance(self._volumes, LoadedVolumes)
        self._stream = self._start(partial(train_graph, in_place=in_place, extras=self.extras))

    @property
    def gpu_bytes(self) -> int:
        """Volumes in the memory of the GPU."""
        return self._volumes.gpu_bytes

    def _read(self, epoch: int, step: int, tags: NDArray[np.int64]) -> tuple[tuple, tuple]:
        self._buffers.rotate()
        image, label = self._buffers[0]
        draws = self.draws_of(epoch, step)
        for b, (draw, (case, _)) in enumerate(zip(draws, self._batch(epoch, step), strict=True)):
            self._volumes.crop(self.indices[case], draw.start, image[b], label[b], draw.flip)
        statistics = _statistics(image) if brings_statistics(self._device, self.extras) else ()
        return (image, label), (*self._numbers(draws, epoch, step, tags), *statistics)


class ValLoader:
    """Validation cases one by one: the centre crop, or the full volume, z-scored.

    Rank r takes the cases r, r + world_size ...; nothing is padded, so ranks may differ in number by one.

    Args:
        store: prepared cases.
        names: cases to validate on.
        crop_size: (X, Y, Z) in voxels, cut as MONAI's CenterSpatialCrop does; None is the full volume.
        device, rank, world_size, pad, device_id, threads, memory_format: as in `CropLoader`.
        residence, ranks_on_node: as in `TrainLoader`; to load volumes pays where cases are asked for again and again.
        normalise: False leaves the z-score to the caller, as sliding windows want it.

    Raises:
        DataError, ValueError: as `CropLoader`.
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
        residence: Residence = "mapped",
        ranks_on_node: int = 1,
        normalise: bool = True,
        memory_format: torch.memory_format = torch.channels_last_3d,
    ) -> None:
        self.store, self.crop_size = store, crop_size
        self.indices = check_loader(store, names, crop_size, pad, device, rank, world_size)[rank::world_size]
        self.names = tuple(names)[rank::world_size]
        self._brings_statistics = normalise and device == "cpu"
        self._passes = 0
        where = torch_device(device, device_id)
        self._volumes: Volumes = (
            MappedVolumes(store)
            if residence == "mapped"
            else open_volumes(store, self.indices, where, residence, ranks_on_node, "validation volumes")
        )
        self._buffers: deque[tuple] = deque(maxlen=BUFFERS)
        graph = partial(val_graph, in_place=isinstance(self._volumes, LoadedVolumes), normalise=normalise)
        self._stream = Stream(graph, self._read, len(self), 1, threads, device, device_id, memory_format=memory_format)

    @property
    def gpu_bytes(self) -> int:
        """Volumes in the memory of the GPU."""
        return self._volumes.gpu_bytes

    def __len__(self) -> int:
        """Cases of this rank."""
        return len(self.names)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Yield (name, image float32 (1, C, X, Y, Z), label uint8 (1, X, Y, Z)), in tensors of their own."""
        passes, self._passes = self._passes, self._passes + 1
        for step, image, label in self._stream.epoch(passes):
            yield self.names[step], image, label

    def _read(self, _pass: int, step: int, tags: NDArray[np.int64]) -> tuple[tuple, tuple]:
        i = self.indices[step]
        shape = np.array(self.store.shape(i))
        size = self.crop_size or self.store.shape(i)
        start = np.maximum(shape, size) // 2 - np.array(size) // 2
        image, label = self._volumes.new_buffers(1, size)
        self._volumes.crop(i, start.tolist(), image[0], label[0])
        self._buffers.append((image, label))
        return (image, label), (tags, *(_statistics(image) if self._brings_statistics else ()))


def _statistics(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Means and deviations (B, C) of the non-zero voxels of a batch."""
    means, stds = zip(*map(nonzero_mean_std, images), strict=True)
    return np.stack(means), np.stack(stds)


def check_loader(
    cases: Cases, names: Sequence[str], crop_size: Size | None, pad: bool, device: str, rank: int, world_size: int
) -> list[int]:
    """Indices of `names`, once everything that a loader is given makes sense. Raises as the loaders say."""
    if crop_size is not None and (len(crop_size) != 3 or min(crop_size) < 1):
        raise ValueError(f"crop_size {tuple(crop_size)} must be three positive numbers of voxels, e.g. (128, 128, 64)")
    if device not in ("cpu", "gpu"):
        raise ValueError(f'device {device!r} must be "cpu" or "gpu"')
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} must be at least 0 and below world_size {world_size}")
    if not names:
        raise DataError("no cases to load: name at least one case")
    indices = [cases.index(name) for name in names]
    for name, i in zip(names, indices, strict=True):
        shape = cases.shape(i)
        if not cases.has_label(i):
            raise DataError(f"case {name} has no label: add it, or leave the case out of training and validation")
        if crop_size is not None and not pad and np.less(shape, crop_size).any():
            smallest = np.min([crop_size, *(cases.shape(i) for i in indices)], axis=0)
            # Rounded down to what the models take: multiples of 16.
            fits = ",".join(str(n - n % 16 if n >= 16 else n) for n in smallest.tolist())
            raise DataError(
                f"case {name} has {shape} voxels, fewer than the crop of {tuple(crop_size)} on at least one axis; "
                f"--data.crop_size_voxels [{fits}] fits all cases, --data.pad true fills up with zeros"
            )
    return indices
