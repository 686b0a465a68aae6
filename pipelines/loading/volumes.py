"""Where prepared volumes stay while a run trains, and how crops are cut from them.

    gpu       on the GPU, as stored: a crop is a copy within its memory
    pinned    in page-locked memory of this process: the slab of x that holds a crop goes to the GPU in one transfer,
              without the processor, and is cropped there. PyTorch rounds each page-locked block up to a power of two,
              so the volumes share a few blocks of such sizes (`plan_blocks`), which are what is counted
    mapped    in the store's files, memory-mapped: the processor copies the crop, from the page cache, which all ranks
              of a node share, or else from the disk; for a GPU into page-locked memory, and from there in one transfer

`choose_residence` takes the first that fits. All 388 training cases of Task01 are 12.4 GB in float32.

Axes. Volumes are (X, Y, Z, C); X, Y, Z are the axes of RAS. A crop is copied into a buffer of the caller and flipped in
the same pass, so a flip costs nothing on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from pipelines.basics.errors import DataError
from pipelines.loading.loader_options import LoaderOptions, Residence
from pipelines.loading.sampling import Size, copy_crop, overlap
from pipelines.preparing.store import Store

log = logging.getLogger(__name__)

GPU_SHARE = 0.4  # of a GPU's free memory, for volumes: the model, activations and cuDNN's workspaces need the rest
HOST_SHARE = 0.5  # of a node's available memory, for the page-locked volumes of all its ranks
ALIGNMENT = 512  # bytes, of a volume in page-locked memory


class MappedVolumes:
    """Volumes in the files of a store; crops are NumPy arrays."""

    gpu_bytes = 0  # in the memory of a GPU

    def __init__(self, store: Store) -> None:
        self.store = store

    def new_buffers(self, batch_size: int, size: Size) -> tuple[Any, Any]:
        """Image (B, x, y, z, C) float32 and label (B, x, y, z, 1) uint8, for `crop` to fill."""
        image = np.empty((batch_size, *size, len(self.store.modalities)), np.float32)
        return image, np.empty((batch_size, *size, 1), np.uint8)

    def crop(self, case: int, start: Sequence[int], image: Any, label: Any, flip: bool = False) -> None:
        """Copy a crop into one sample of the buffers.

        Args:
            case: index in the store.
            start: first voxel (x, y, z), in the volume padded with zeros to at least the size of the crop.
            image, label: (x, y, z, C) and (x, y, z, 1), overwritten.
            flip: reverse the first axis.
        """
        voxels, scale = self.store.voxels(case)
        copy_crop(voxels, start, image[::-1] if flip else image)
        if scale is not None:
            image *= scale
        copy_crop(label_of(self.store, case), start, label[::-1] if flip else label)


class StagedVolumes(MappedVolumes):
    """The same for a GPU: crops are tensors on `device`, cut in page-locked memory and copied without waiting for it.

    PyTorch gives that memory out again only once the GPU has copied it.
    """

    def __init__(self, store: Store, device: torch.device) -> None:
        super().__init__(store)
        self.device = device

    def new_buffers(self, batch_size: int, size: Size) -> tuple[Any, Any]:
        return _buffers_on(self.device, (batch_size, *size), len(self.store.modalities))

    def crop(self, case: int, start: Sequence[int], image: Any, label: Any, flip: bool = False) -> None:
        staged = [page_locked(out.nbytes).view(out.dtype).view(out.shape) for out in (image, label)]
        super().crop(case, start, staged[0].numpy(), staged[1].numpy(), flip)
        for part, out in zip(staged, (image, label)):
            out.copy_(part, non_blocking=True)


class LoadedVolumes:
    """The same with volumes in memory, read once from a store; crops are tensors on `device`.

    Args:
        store: prepared cases.
        cases: indices of those to load.
        device: where crops are made.
        pinned: keep the volumes in page-locked memory of the host instead.
    """

    def __init__(self, store: Store, cases: Sequence[int], device: torch.device, pinned: bool = False) -> None:
        self.channels = len(store.modalities)
        self.device = device
        self.volumes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.scales: dict[int, torch.Tensor] = {}
        cases = list(dict.fromkeys(cases))
        blocks = plan_blocks([store.nbytes([case]) for case in cases]) if pinned else None
        memory = [page_locked(size) for size in blocks.sizes] if blocks else []
        for n, case in enumerate(cases):
            voxels, scale = store.voxels(case)
            arrays = voxels, label_of(store, case)
            if blocks:
                block, first = blocks.places[n]
                self.volumes[case] = _copies_in(memory[block][first:], arrays)
            else:
                image, label = (torch.tensor(array).to(device) for array in arrays)
                self.volumes[case] = image, label
            if scale is not None:
                self.scales[case] = torch.from_numpy(scale).to(device)
        held = (part for volume in self.volumes.values() for part in volume if part.is_cuda)
        self.gpu_bytes = sum(part.nbytes for part in held)

    def new_buffers(self, batch_size: int, size: Size) -> tuple[Any, Any]:
        return _buffers_on(self.device, (batch_size, *size), self.channels)

    def crop(self, case: int, start: Sequence[int], image: Any, label: Any, flip: bool = False) -> None:
        for volume, out in zip(self.volumes[case], (image, label), strict=True):
            source, target = overlap(volume.shape, start, out.shape)
            # Whole planes of x are contiguous, as an asynchronous transfer needs.
            slab = volume[source[0]].to(self.device, non_blocking=True)[:, source[1], source[2]]
            if slab.shape != out.shape:
                out.zero_()
            out[target] = slab
            if flip:
                out.copy_(out.flip(0))
        if case in self.scales:
            image.mul_(self.scales[case])


def _buffers_on(device: torch.device, shape: tuple[int, ...], channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.empty((*shape, channels), dtype=torch.float32, device=device)
    return image, torch.empty((*shape, 1), dtype=torch.uint8, device=device)


class Blocks(NamedTuple):
    """Blocks of memory for some volumes: the bytes of each, and block and first byte of each volume."""

    sizes: list[int]
    places: list[tuple[int, int]]


def plan_blocks(sizes: Sequence[int]) -> Blocks:
    """Put volumes of so many bytes into few blocks whose bytes are powers of two, in order.

    Each block is the largest that the volumes that are left fill, but holds at least one of them. So at most a volume's
    bytes are lost in each, about 4 % for 40 cases of BraTS at 1 mm and less for more; blocks of their own would be up
    to twice as large as the volumes.
    """
    blocks = Blocks([], [])
    aligned = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    left, room = sum(aligned), 0
    for size in aligned:
        if size > room:
            room = max(1 << (left.bit_length() - 1), 1 << (size - 1).bit_length())
            blocks.sizes.append(room)
        blocks.places.append((len(blocks.sizes) - 1, blocks.sizes[-1] - room))
        room -= size
        left -= size
    return blocks


def page_locked(nbytes: int) -> torch.Tensor:
    """uint8 (nbytes,) in memory that a GPU reads without the processor."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _copies_in(memory: torch.Tensor, arrays: Sequence[NDArray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of an image and its label, one after the other, at the beginning of uint8 memory, as views of it."""
    copies, first = [], 0
    for array in arrays:
        part = memory[first : first + array.nbytes].view(getattr(torch, array.dtype.name)).view(array.shape)
        np.copyto(part.numpy(), array)
        copies.append(part)
        first += array.nbytes
    image, label = copies
    return image, label


def label_of(store: Store, case: int) -> NDArray[np.uint8]:
    """Label of a case that has one, as (X, Y, Z, 1), memory-mapped."""
    label = store.label(case)
    assert label is not None, "loaders refuse cases without a label"
    return label[..., None]


def nonzero_mean_std(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and population standard deviation of the non-zero voxels of each channel of each image.

    One pass in float64, in which squares of float32 voxels are exact: plane by plane, in cache, each a matrix of long
    rows (z, C), so that sums are vector operations.

    Args:
        images: (B, x, y, z, C), C order.

    Returns:
        means (B, C), 0 for a channel without non-zero voxels; deviations (B, C), 1 for such a channel and for a
        constant one (up to the rounding of its mean in float32), which is then only centred, as by MONAI's
        NormalizeIntensity.
    """
    batch, x, y, z, channels = images.shape
    wide = torch.empty((y, z * channels), dtype=torch.float64)
    mean, std = np.empty((batch, channels), np.float32), np.empty((batch, channels), np.float32)
    for b, image in enumerate(images):
        total, squares = torch.zeros(z * channels, dtype=torch.float64), torch.zeros(z * channels, dtype=torch.float64)
        for plane in torch.from_numpy(image).view(x, y, z * channels):
            total += wide.copy_(plane).sum(0)
            squares += wide.mul_(wide).sum(0)
        nonzero = (image.reshape(x, y, -1) != 0).view(np.uint8).sum(1, dtype=np.uint16).sum(0, dtype=np.int64)
        count = np.maximum(nonzero.reshape(z, channels).sum(0), 1)
        exact_mean = total.numpy().reshape(z, channels).sum(0) / count
        variance = squares.numpy().reshape(z, channels).sum(0) / count - exact_mean**2
        exact_std = np.sqrt(np.maximum(variance, 0))
        mean[b], std[b] = exact_mean, np.where(exact_std <= 1e-6 * np.abs(exact_mean), 1, exact_std)
    return mean, std


Volumes = MappedVolumes | LoadedVolumes


def open_volumes(store: Store, cases: Sequence[int], options: LoaderOptions, title: str) -> Volumes:
    """The volumes of some cases, by index, where `choose_residence` puts them. Raises as that."""
    sizes = [store.nbytes([case]) for case in dict.fromkeys(cases)]
    chosen = choose_residence({"gpu": sum(sizes), "pinned": sum(plan_blocks(sizes).sizes)}, options, title)
    if chosen == "mapped":
        return map_volumes(store, options.device)
    return LoadedVolumes(store, cases, options.device, pinned=chosen == "pinned")


def map_volumes(store: Store, device: torch.device) -> MappedVolumes:
    """The volumes in a store's files, with crops for a device."""
    return StagedVolumes(store, device) if device.type == "cuda" else MappedVolumes(store)


def choose_residence(needed: Mapping[str, int], options: LoaderOptions, title: str = "volumes") -> str:
    """Where volumes go: with `options.residence` "auto" the first of "gpu", "pinned", "mapped" that fits.

    All ranks of a node choose alike, by the largest of their needs and the least that any of them may take, before one
    of them loads: each by itself would see memory that the others are taking.

    Without a GPU "auto" is "mapped": the page cache already keeps in memory what fits.

    Args:
        needed: bytes of the volumes on the "gpu", and of blocks for them that are "pinned".
        options: the device where crops are wanted, the residence, and the ranks of this node.
        title: what the volumes are called in the log.

    Raises:
        DataError: they do not fit, or there is no GPU.
        ValueError: an unknown residence.
    """
    residence, device = options.residence, options.device
    if residence not in get_args(Residence):
        raise ValueError(f"--data.residence {residence!r} must be one of {', '.join(get_args(Residence))}")
    where = {"gpu": "on the GPU", "pinned": "in page-locked memory", "mapped": "mapped from the store's files"}
    if device.type != "cuda":
        if residence in ("gpu", "pinned"):
            raise DataError(f"--data.residence {residence} needs a GPU and this run is on the CPU: use auto or mapped")
        log.info("%s of %s: %s", _bytes(needed["gpu"]), title, where["mapped"])
        return "mapped"
    own_limits = {
        "gpu": GPU_SHARE * torch.cuda.mem_get_info(device)[0],
        "pinned": HOST_SHARE * psutil.virtual_memory().available / options.ranks_on_node,
    }
    ranks = options.gather_on_node((dict(needed), own_limits))
    needed = {kind: max(needs[kind] for needs, _ in ranks) for kind in needed}
    limits = {kind: min(limits[kind] for _, limits in ranks) for kind in own_limits}
    fitting = [kind for kind, limit in limits.items() if needed[kind] <= limit]
    chosen = residence if residence != "auto" else (*fitting, "mapped")[0]
    if chosen not in (*fitting, "mapped"):
        share = GPU_SHARE if chosen == "gpu" else HOST_SHARE / options.ranks_on_node
        raise DataError(
            f"--data.residence {chosen}: {_bytes(needed[chosen])} of {title}, and {limits[chosen] / 1e9:.1f} GB may be "
            f"taken ({share:g} of what is free): use auto"
        )
    gpu, pinned = (f"{limits[kind] / 1e9:.1f} GB" for kind in ("gpu", "pinned"))
    size = _bytes(needed["pinned" if chosen == "pinned" else "gpu"])
    log.info("%s of %s: %s (limits: %s on the GPU, %s page-locked)", size, title, where[chosen], gpu, pinned)
    return chosen


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count > 1e9 else f"{count / 1e6:.1f} MB"
