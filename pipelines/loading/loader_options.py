"""What a loader is given beside its cases: which crops, whose share of them, and where the batches go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from pipelines.basics.option_values import faults, number, refuse
from pipelines.loading.augment import Augment
from pipelines.loading.sampling import Size

Residence = Literal["auto", "gpu", "pinned", "mapped"]


@dataclass(frozen=True)
class CropOptions:
    """Random crops: all that decides which come, beside the cases and the number of ranks.

    Attributes:
        crop_size: (X, Y, Z) in voxels.
        batch_size: crops per step on this rank.
        seed: of the order and of every draw.
        crops_per_case: crops of each case in an epoch.
        accumulate_steps: an epoch has a multiple of so many batches.
        foreground_prob: share of crops centred on a random tumour voxel; 0 is the published experiment.
        augment: flip, scale and shift; crops stay random without it.
        extras: extra augmentations.

    Raises:
        ValueError: a value outside its bounds.
    """

    crop_size: Size
    batch_size: int = number(2, least=1)
    seed: int = 0
    crops_per_case: int = number(1, least=1)
    accumulate_steps: int = number(1, least=1)
    foreground_prob: float = number(0.0, least=0, most=1)
    augment: bool = True
    extras: Augment = field(default_factory=Augment)

    def __post_init__(self) -> None:
        refuse(list(faults(self)))


@dataclass(frozen=True)
class LoaderOptions:
    """What a loader needs beside its cases and crops: whose share it loads, and where batches go.

    Attributes:
        device: where the pipeline runs and the batches are; "cuda" alone is torch's current GPU.
        rank, world_size: of this process.
        ranks_on_node: processes that share the memory of a node.
        pad: fill volumes smaller than the crop with zeros, symmetrically, instead of refusing them.
        threads: DALI's CPU threads.
        residence: where prepared volumes are meanwhile (volumes.py).
        dtype, memory_format: of the images.

    Raises:
        ValueError: a value that makes no sense.
    """

    device: torch.device = torch.device("cpu")
    rank: int = 0
    world_size: int = 1
    ranks_on_node: int = 1
    pad: bool = False
    threads: int = 2
    residence: Residence = "auto"
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.channels_last_3d

    def __post_init__(self) -> None:
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"device {self.device} must be a CPU or a CUDA GPU")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} must be at least 0 and below world_size {self.world_size}")


DEFAULT_OPTIONS = LoaderOptions()
