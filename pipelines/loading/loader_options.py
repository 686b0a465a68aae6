"""What a loader is given besides its cases: which crops, whose share of them, and where the batches go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from pipelines.loading.augment import Augment
from pipelines.loading.sampling import Size


def _alone(value: Any) -> list[Any]:
    return [value]


Residence = Literal["auto", "gpu", "pinned", "mapped"]


@dataclass(frozen=True)
class CropOptions:
    """Random crops: all that decides which ones come, apart from the cases and the number of ranks.

    Values are not checked here; the options of a run that give them have bounds.
    """

    crop_size: Size  # (X, Y, Z) in voxels
    batch_size: int = 2  # crops per step on this rank
    seed: int = 0  # of the order and of every draw
    crops_per_case: int = 1  # in an epoch
    accumulate_steps: int = 1  # an epoch has a multiple of so many batches
    foreground_prob: float = 0.0  # share centred on a tumour voxel; published: 0
    augment: bool = True  # flip, scale and shift; crops stay random without
    extras: Augment = field(default_factory=Augment)  # extra augmentations


@dataclass(frozen=True)
class LoaderOptions:
    """What a loader needs besides its cases and crops: whose share it loads, and where batches go.

    Raises:
        ValueError: no such device or rank.
    """

    device: torch.device = torch.device("cpu")  # of pipeline and batches; "cuda" alone is torch's current GPU
    rank: int = 0  # of this process
    world_size: int = 1
    ranks_on_node: int = 1  # processes that share the memory of a node
    gather_on_node: Callable[[Any], Sequence[Any]] = _alone  # from a value to those of all of them, which all call it
    pad: bool = False  # fill volumes smaller than the crop with zeros, symmetrically, instead of refusing them
    threads: int = 2  # DALI's, on the CPU
    residence: Residence = "auto"  # where prepared volumes stay during training, see volumes.py
    dtype: torch.dtype = torch.float32  # of the images
    memory_format: torch.memory_format = torch.channels_last_3d  # of the images

    def __post_init__(self) -> None:
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"device {self.device} must be a CPU or a CUDA GPU")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} must be at least 0 and below world_size {self.world_size}")


DEFAULT_OPTIONS = LoaderOptions()
