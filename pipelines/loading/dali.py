"""Training and validation pipelines in NVIDIA DALI, the same on the CPU and on the GPU.

The store holds volumes that are already resampled and oriented, so a sample costs its crop and nothing else. The steps,
in the order of the published MONAI chain:

    crop      at the drawn start, out of wherever the volumes are (volumes.py); no other voxel is touched
    flip      of the first spatial axis, image and label, while the crop is copied
    z-score   of the non-zero voxels of each channel of the crop; zeros stay zero
    jitter    x * (1 + scale) + shift, on every voxel, zeros included

Extra augmentations (augment.py), if any, come before and after the z-score.

Crop and flip are one copy, which Python makes: between two batches on a CPU, in a thread for a GPU (batch_thread.py).
DALI, imported with the first pipeline, does the rest in its own threads or CUDA streams, `PREFETCH` batches ahead of
the training step. On a CPU the mean and
deviation are computed while the crop is in cache (`volumes.nonzero_mean_std`): DALI's reductions over all but the
channels take four times as long there. On a GPU they are part of the pipeline. loaders.py decides which batches come.

Axes. Volumes are (X, Y, Z, C), DALI's layout DHWC; X, Y, Z are the axes of RAS. Yielded images are (B, C, X, Y, Z).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
import torch

from pipelines.basics.lazy import Lazy
from pipelines.loading.augment import Augment, apply_intensity, apply_spatial, input_names
from pipelines.loading.batch_thread import BatchThread, on_stream
from pipelines.loading.loader_options import LoaderOptions
from pipelines.loading.sampling import Size

fn, math, types = (Lazy(f"nvidia.dali.{name}") for name in ("fn", "math", "types"))

PREFETCH = 2  # batches that DALI prepares ahead of the one last yielded
SPATIAL = (0, 1, 2)

Batch = tuple[Sequence[Any], Sequence[Any]]
"""What a pipeline is fed: volumes, and numbers of each sample."""


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
    """Z-score by the given statistics of the non-zero voxels, each (C,), which `z_score` computes itself. CPU only."""
    mean, std = (fn.reshape(value, shape=[1, 1, 1, -1]) for value in (mean, std))
    return fn.normalize(image, mean=mean, stddev=std) * (image != 0)


def augmented(image: Any, label: Any, scale: Any, shift: Any, extras: Augment, rest: Sequence[Any]) -> tuple[Any, Any]:
    """From a crop to what the network sees; `rest` holds the inputs of the extras, then the statistics, if given."""
    names = input_names(extras)
    inputs, statistics = dict(zip(names, rest)), rest[len(names) :]
    image, label = apply_spatial(image, label, extras, inputs)
    image = standardise(image, *statistics) if statistics else z_score(image)
    return jitter(apply_intensity(image, extras, inputs), scale, shift), label


# ---------- pipelines


def train_pipeline(sources: Sequence[Callable[[], Any]], device: str, extras: Augment, statistics: bool) -> tuple:
    """Z-score and jitter of crops, with the extra augmentations that are on.

    Args:
        sources: one returns images (B, X, Y, Z, C) float32 and labels (B, X, Y, Z, 1) uint8 of a batch, on `device`;
            the other tags (B, 2) int64, scales (B,), shifts (B,), inputs of the extras, and with `statistics` means and
            deviations (B, C), float32, on the CPU.
        device: DALI's "cpu" or "gpu".
        extras: extra augmentations.
        statistics: means and deviations of the crops are given.
    """
    given = 3 + len(input_names(extras)) + 2 * statistics
    image, label, tag, scale, shift, *rest = external_inputs(sources, ["DHWC", "DHWC"], given, device)
    return (*augmented(image, label, scale, shift, extras, rest), tag)


def val_pipeline(sources: Sequence[Callable[[], Any]], device: str, normalise: bool, statistics: bool) -> tuple:
    """Z-score of a centre crop or a full volume, if `normalise`. As `train_pipeline`, without the draws."""
    image, label, tag, *given = external_inputs(sources, ["DHWC", "DHWC"], 1 + 2 * statistics, device)
    if normalise:
        image = standardise(image, *given) if statistics else z_score(image)
    return image, label, tag


def external_inputs(
    sources: Sequence[Callable[[], Any]], layouts: list[str], numbers: int, device: str = "cpu"
) -> list[Any]:
    """Nodes of the volumes of a batch, on `device`, and of its numbers: two sources, as each has one device."""
    where = {"device": device, "no_copy": device == "cpu"}
    volumes = fn.external_source(sources[0], num_outputs=len(layouts), layout=layouts, **where)
    return [*volumes, *fn.external_source(sources[1], num_outputs=numbers, no_copy=True)]


def build_pipeline(
    define: Callable[..., Any],
    device: torch.device,
    *args: Any,
    batch_size: int = 1,
    threads: int = 1,
    prefetch: int = 1,
    **keywords: Any,
) -> Any:
    """The DALI pipeline that `define(*args, device="cpu" or "gpu", **keywords)` describes, on `device`."""
    from nvidia.dali import pipeline_def

    # DALI's default executor frees buffers after each batch. On a CPU they come from malloc, and the page faults of
    # 16 MB cost more than the arithmetic (x * 2: 15.8 ms against 3.6, DALI 2.4). The older executor keeps its buffers.
    keywords |= {"device": "cpu", "exec_dynamic": False} if device.type == "cpu" else {"device": "gpu"}
    keywords |= {"batch_size": batch_size, "num_threads": threads, "prefetch_queue_depth": prefetch}
    return pipeline_def(enable_conditionals=True)(define)(*args, device_id=device.index, **keywords)


def with_index(device: torch.device) -> torch.device:
    """The same device; "cuda" alone becomes torch's current GPU, because DALI wants an index."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def buffers_for(device: torch.device) -> int:
    """Sets of crops that a loader fills in turn: DALI may still be reading those of earlier batches. For a GPU a thread
    is filling the next one, and may have filled one that a jump dropped."""
    return PREFETCH + (4 if device.type == "cuda" else 2)


def gpu_bytes(crop_size: Size, channels: int, batch_size: int) -> int:
    """Memory of a GPU that batches on their way take at most: the sets that a loader fills, and DALI's own.

    DALI's lies outside PyTorch's allocator. By its graph it holds `PREFETCH` copies of what it was fed, as many results
    and the one handed out, and of the batch it works on the mask, what is centred and what comes out of that: with the
    mask counted as an image, three. An extra augmentation adds its input and result while it works.
    """
    sets = buffers_for(torch.device("cuda")) + PREFETCH + (PREFETCH + 1) + 3
    return sets * batch_size * prod(crop_size) * (4 * channels + 1)


class Stream:
    """The running pipeline: an endless sequence of batches (0, 0), (0, 1) ... (1, 0) ..., which can jump to any.

    DALI asks for input ahead of the batch that it hands out. Every batch therefore carries its (epoch, step) through
    the pipeline as a tag; batches that were in flight at a jump are recognised by it and dropped.

    Args:
        define: `train_pipeline`, `val_pipeline` or `raw_pipeline`.
        read: from (epoch, step) to that batch; its tags are added to the numbers, as the first of them.
        steps, batch_size: batches in an epoch, samples in a batch.
        options, keywords: of the loader; for `define`.
        side: the CUDA stream on which `read` works, in a thread; None: it reads in the thread that wants a batch.
    """

    def __init__(
        self,
        define: Callable[..., Any],
        read: Callable[[int, int], Batch],
        steps: int,
        batch_size: int,
        options: LoaderOptions,
        side: torch.cuda.Stream | None = None,
        **keywords: Any,
    ) -> None:
        self.steps, self.batch_size, self._side = steps, batch_size, side
        self._read = BatchThread(read, self._after, side).take if side is not None else lambda tag: read(*tag)
        self.dtype, self.memory_format = options.dtype, options.memory_format
        self.next_in = self.next_out = (0, 0)
        self.turn = 0
        self.device = with_index(options.device)
        self._parts: tuple[deque, deque] = deque(), deque()
        self._in_use: deque[Batch] = deque(maxlen=buffers_for(self.device))  # DALI reads them in place
        sources = (lambda: self._next_part(0), lambda: self._next_part(1))
        self.pipeline = build_pipeline(
            define, self.device, sources, batch_size=batch_size, threads=options.threads, prefetch=PREFETCH, **keywords
        )

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield (step, image (B, C, X, Y, Z), label (B, X, Y, Z)) of an epoch; earlier iterators raise from then on."""
        self.turn = turn = self.turn + 1
        for step in range(first_step, self.steps):
            if turn != self.turn:
                raise RuntimeError(f"epoch {epoch} was abandoned when another was started: use one iterator at a time")
            yield (step, *self._fetch((epoch, step)))

    def _next_part(self, index: int) -> Sequence[Any]:
        """Volumes (0) or numbers (1) of the next batch; whichever source asks first has it read."""
        if not self._parts[index]:
            tag = self.next_in
            volumes, numbers = self._read(tag)
            self.next_in = self._after(tag)  # not where reading raised: the same batch may be asked for again
            batch = volumes, (np.tile(np.array(tag), (self.batch_size, 1)), *numbers)
            self._in_use.append(batch)
            for queue, part in zip(self._parts, batch, strict=True):
                queue.append(part)
        return self._parts[index].popleft()

    def _after(self, tag: tuple[int, int]) -> tuple[int, int]:
        epoch, step = tag
        return divmod(epoch * self.steps + step + 1, self.steps)

    def _fetch(self, wanted: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.next_out != wanted:
            self.next_in = wanted
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        for _ in range(PREFETCH + 2):  # those in flight, and the one wanted
            with on_stream(self._side):  # DALI copies what it is fed on the current stream: where it was made
                image, label, tags = self.pipeline.run(stream)
            if tuple(tags.as_array()[0].tolist()) == wanted:
                self.next_out = self._after(wanted)
                image_BXYZC, label_BXYZ1 = (torch.from_dlpack(batch.as_tensor()) for batch in (image, label))
                return self._image(image_BXYZC.permute(0, 4, 1, 2, 3)), label_BXYZ1[..., 0].clone()
        raise AssertionError(f"batch {wanted} was requested but never came")

    def _image(self, image_BCXYZ: torch.Tensor) -> torch.Tensor:
        """A tensor of its own, as DALI overwrites its buffers, converted on the way."""
        if self.device.type == "cuda":
            out = torch.empty_like(image_BCXYZ, dtype=self.dtype, memory_format=self.memory_format)
            return out.copy_(image_BCXYZ)
        # NumPy asks for huge pages, torch does not: page faults of small ones cost more than all of DALI's arithmetic.
        memory = torch.from_numpy(np.empty(image_BCXYZ.numel() * self.dtype.itemsize, np.uint8)).view(self.dtype)
        if self.memory_format != torch.channels_last_3d:
            return memory.view(image_BCXYZ.shape).copy_(image_BCXYZ)
        batch, channels, *size = image_BCXYZ.shape
        return memory.view(batch, *size, channels).permute(0, 4, 1, 2, 3).copy_(image_BCXYZ)
