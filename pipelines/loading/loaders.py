"""Loaders: which batches a rank sees, out of prepared volumes, for training and for validation.

The pipelines that they feed are in dali.py, the draws in sampling.py, the volumes in volumes.py. What a batch holds
depends on the seed, its epoch and its step alone; `CropLoader.state_dict` is all that a run needs to resume with the
batches that it would have seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.basics.errors import DataError
from pipelines.loading.augment import draw_augment, pipeline_inputs
from pipelines.loading.batch_thread import on_stream, side_stream
from pipelines.loading.dali import Batch, Stream, buffers_for, train_pipeline, val_pipeline
from pipelines.loading.loader_options import DEFAULT_OPTIONS, CropOptions, LoaderOptions
from pipelines.loading.sampling import CropDraw, Size, draw_sample, epoch_order, generator
from pipelines.loading.volumes import Volumes, map_volumes, nonzero_mean_std, open_volumes
from pipelines.preparing.store import Store


class CaseSource(Protocol):
    """What a loader asks of the cases: of a `Store`, or of the scans themselves."""

    names: tuple[str, ...]
    modalities: tuple[str, ...]

    def index(self, name: str) -> int: ...
    def shape(self, i: int) -> tuple[int, int, int]: ...
    def has_label(self, i: int) -> bool: ...
    def foreground(self, i: int) -> NDArray[np.int32]: ...


class CropLoader:
    """Random crops of cases, augmented, in reproducible batches, the same number on every rank.

    Each epoch is a fresh permutation of `len(names) * crops_per_case` samples, padded from its own start to a multiple
    of `batch_size * world_size * accumulate_steps`; each rank takes every `world_size`-th. The DALI pipeline is built
    once and runs from one epoch into the next. A subclass makes the `_stream` and reads its batches.

    Args:
        cases: where `names` are.
        names: cases to train on.
        crops: the crops.
        options: this rank's share, and where its batches go.

    Raises:
        DataError: a case without a label, or smaller than the crop unless `options.pad`.
    """

    gpu_bytes = 0  # of volumes in the memory of the GPU
    _stream: Stream

    def __init__(self, cases: CaseSource, names: Sequence[str], crops: CropOptions, options: LoaderOptions) -> None:
        self.indices = indices_of(cases, names, crops.crop_size, options.pad)
        self.cases, self.names, self.crops, self.options = cases, tuple(names), crops, options
        self.samples = len(self.names) * crops.crops_per_case
        self._batch_stride = crops.batch_size * options.world_size  # samples of all ranks in one batch
        self._stride = self._batch_stride * crops.accumulate_steps  # the same in one optimizer step
        self.position = (0, 0)
        """Epoch, and step within it, of the batch that comes next."""

    def __len__(self) -> int:
        """Batches of an epoch on this rank."""
        return -(-self.samples // self._stride) * self.crops.accumulate_steps

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (image (B, C, X, Y, Z), label uint8 (B, X, Y, Z)) of an epoch, in tensors of their own.

        Epochs count from 0 and may be asked for in any order; starting one ends the iterator of the one before.
        The first `first_step` batches are skipped.
        """
        for step, image, label in self._stream.epoch(epoch, first_step):
            self.position = (epoch, step + 1)
            yield image, label

    def state_dict(self) -> dict[str, Any]:
        """What decides the batches to come: the position and the recipe; plain values."""
        epoch, step = self.position
        return {"epoch": epoch, "samples": step * self._batch_stride, "recipe": self._recipe}

    def load_state_dict(self, state: Mapping[str, Any]) -> tuple[int, int]:
        """Epoch and batch to resume from, for `epoch`: the same samples follow as would have without a stop.

        Another number of ranks, or another batch size, divides an epoch into other steps; the loader then resumes at
        the start of the step that the position is in.

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
        batch = state["samples"] // self._stride * self.crops.accumulate_steps
        self.position = (state["epoch"], min(batch, len(self)))
        return self.position

    @property
    def _recipe(self) -> dict[str, Any]:
        """All that decides which samples come, beside the position."""
        names = blake2b("\n".join(self.names).encode(errors="surrogatepass"), digest_size=8).hexdigest()
        crops = self.crops
        return {
            "seed": crops.seed, "cases": names, "samples": self.samples, "crop_size": list(crops.crop_size),
            "foreground_prob": crops.foreground_prob, "augment": crops.augment, "extras": repr(crops.extras),
        }  # fmt: skip

    def names_of(self, epoch: int, step: int) -> list[str]:
        """Names of the cases in a batch of this rank."""
        return [self.names[case] for case, _ in self._batch(epoch, step)]

    def draws_of(self, epoch: int, step: int) -> list[CropDraw]:
        """The draws of a batch of this rank."""
        return [self._draw(epoch, position, self.indices[case]) for case, position in self._batch(epoch, step)]

    def _batch(self, epoch: int, step: int) -> list[tuple[int, int]]:
        """(case, position in the epoch) of each sample of a batch of this rank."""
        order = epoch_order(self.crops.seed, epoch, self.samples, self._stride)
        first = step * self._batch_stride
        positions = range(first + self.options.rank, first + self._batch_stride, self.options.world_size)
        return [(int(order[p]) % len(self.names), p) for p in positions]

    def _draw(self, epoch: int, position: int, i: int) -> CropDraw:
        crops = self.crops
        x, y, z = np.maximum(self.cases.shape(i), crops.crop_size).tolist()
        # Not moved by the padding: an axis that is padded has one start only.
        foreground = self.cases.foreground(i) if crops.foreground_prob else np.empty((0, 3), np.int32)
        draw = draw_sample(crops.seed, epoch, position, (x, y, z), crops.crop_size, foreground, crops.foreground_prob)
        return draw if crops.augment else CropDraw(draw.start, flip=False, scale=0.0, shift=0.0)

    def _numbers(self, draws: Sequence[CropDraw], epoch: int, step: int) -> tuple[Any, ...]:
        """Scales, shifts and inputs of the extra augmentations of a batch, as the pipeline takes them."""
        scales, shifts = np.array([(draw.scale, draw.shift) for draw in draws], np.float32).T.copy()
        channels, extras = len(self.cases.modalities), self.crops.extras
        streams = (generator(self.crops.seed, epoch, position, stream=1) for _, position in self._batch(epoch, step))
        drawn = [draw_augment(stream, extras, channels) for stream in streams]
        return scales, shifts, *pipeline_inputs(extras, drawn, self.crops.crop_size, channels).values()


class TrainLoader(CropLoader):
    """Random crops of prepared cases, in a store; arguments as `CropLoader`.

    Raises:
        DataError, ValueError: as `CropLoader`; volumes that do not fit where `options.residence` puts them.
    """

    def __init__(
        self, store: Store, names: Sequence[str], crops: CropOptions, options: LoaderOptions = DEFAULT_OPTIONS
    ) -> None:
        super().__init__(store, names, crops, options)
        side = side_stream(options.device)
        with on_stream(side):
            self._volumes = open_volumes(store, self.indices, options, "training volumes")
            self._buffers = deque(
                self._volumes.new_buffers(crops.batch_size, crops.crop_size) for _ in range(buffers_for(options.device))
            )
        self.gpu_bytes = self._volumes.gpu_bytes
        # The affine changes the crop before the z-score, so its statistics are not those of the crop as it was cut.
        self._statistics = options.device.type == "cpu" and not crops.extras.affine_prob
        given = {"extras": crops.extras, "statistics": self._statistics}
        self._stream = Stream(train_pipeline, self._read, len(self), crops.batch_size, options, side, **given)

    def _read(self, epoch: int, step: int) -> Batch:
        self._buffers.rotate()
        image, label = self._buffers[0]
        draws = self.draws_of(epoch, step)
        for b, (draw, (case, _)) in enumerate(zip(draws, self._batch(epoch, step), strict=True)):
            self._volumes.crop(self.indices[case], draw.start, image[b], label[b], draw.flip)
        statistics = nonzero_mean_std(image) if self._statistics else ()
        return (image, label), (*self._numbers(draws, epoch, step), *statistics)


class ValLoader:
    """Validation cases one by one: the centre crop, or the full volume, z-scored.

    Rank r takes the cases r, r + world_size ...; nothing is padded, so ranks may differ in number by one.

    Args:
        store: prepared cases.
        names: cases to validate on.
        crop_size: (X, Y, Z) in voxels, cut as MONAI's CenterSpatialCrop does; None is the full volume.
        options: this rank's share, and where its batches go. Loading the volumes into memory pays where cases are
            asked for again and again.
        normalise: False leaves the z-score to the caller, as sliding windows want it.

    Raises:
        DataError, ValueError: as `TrainLoader`.
    """

    def __init__(
        self,
        store: Store,
        names: Sequence[str],
        crop_size: Size | None,
        options: LoaderOptions = DEFAULT_OPTIONS,
        normalise: bool = True,
    ) -> None:
        self.store, self.crop_size = store, crop_size
        own = slice(options.rank, None, options.world_size)
        self.indices = indices_of(store, names, crop_size, options.pad)[own]
        self.names = tuple(names)[own]
        self._passes = 0
        side = side_stream(options.device)
        with on_stream(side):
            self._volumes: Volumes = (
                map_volumes(store, options.device)
                if options.residence == "mapped"
                else open_volumes(store, self.indices, options, "validation volumes")
            )
        self.gpu_bytes = self._volumes.gpu_bytes  # in the memory of the GPU
        self._statistics = normalise and options.device.type == "cpu"
        given = {"normalise": normalise, "statistics": self._statistics}
        self._stream = Stream(val_pipeline, self._read, len(self), 1, options, side, **given)

    def __len__(self) -> int:
        """Cases of this rank."""
        return len(self.names)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Yield (name, image (1, C, X, Y, Z), label uint8 (1, X, Y, Z)), in tensors of their own."""
        passes, self._passes = self._passes, self._passes + 1
        for step, image, label in self._stream.epoch(passes):
            yield self.names[step], image, label

    def _read(self, _pass: int, step: int) -> Batch:
        i = self.indices[step]
        shape = np.array(self.store.shape(i))
        size = self.crop_size or self.store.shape(i)
        start = np.maximum(shape, size) // 2 - np.array(size) // 2
        image, label = self._volumes.new_buffers(1, size)
        self._volumes.crop(i, start.tolist(), image[0], label[0])
        return (image, label), nonzero_mean_std(image) if self._statistics else ()


def indices_of(cases: CaseSource, names: Sequence[str], crop_size: Size | None, pad: bool) -> list[int]:
    """Indices of `names`, once it is clear that the cases can be loaded. Raises as the loaders say."""
    if crop_size is not None and (len(crop_size) != 3 or min(crop_size) < 1):
        raise ValueError(f"crop_size {tuple(crop_size)} must be three positive numbers of voxels, e.g. (128, 128, 64)")
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
