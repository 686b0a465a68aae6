"""Dice + cross-entropy: ours, eager PyTorch, torch.compile, MONAI's loss.

Ours, eager and torch.compile start from the uint8 label map. MONAI's loss is given its multi-hot float32 target ready
made, which costs it a larger read and saves it the making. Work: logits and labels read once forward, once more
backward, and the gradient written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from monai.losses import DiceCELoss, DiceLoss
from torch import Tensor

from benchmarks.common import DEVICE, DIRECTIONS, IS_GPU, Work, calls_of
from benchmarks.conftest import Measure
from benchmarks.report import OURS
from kernels.dice_ce import CrossEntropy, bytes_moved, dice_ce_loss, dice_ce_loss_reference, region_masks

REGIONS = ((2, 3), (1, 2, 3), (3,))  # TC, WT, ET of Decathlon


@dataclass(frozen=True)
class Case:
    """Shape of the logits, dtype, kind of cross-entropy, memory format."""

    shape: tuple[int, int, int, int, int]
    dtype: torch.dtype = torch.bfloat16
    ce: CrossEntropy = "bce"
    memory_format: torch.memory_format = torch.contiguous_format

    def __str__(self) -> str:
        layout = "channels_last" if self.memory_format == torch.channels_last_3d else "contiguous"
        return f"{self.shape} {str(self.dtype).removeprefix('torch.')} {self.ce} {layout}"

    def inputs(self) -> list[Tensor]:
        """Logits and labels."""
        logits = torch.randn(self.shape, device=DEVICE, dtype=self.dtype).to(memory_format=self.memory_format)
        labels = torch.randint(0, 4, (self.shape[0], *self.shape[2:]), device=DEVICE, dtype=torch.uint8)
        return [logits.requires_grad_(), labels]

    def work(self, direction: str) -> Work:
        """One read; backward one more and one write."""
        forward, backward = bytes_moved(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        return Work(forward if direction == DIRECTIONS[0] else forward + backward)


FULL = (2, 3, 128, 128, 64)
GPU_CASES = (
    Case(FULL),
    Case(FULL, ce="multihot"),
    Case(FULL, memory_format=torch.channels_last_3d),
    Case(FULL, torch.float32),
    Case((16, *FULL[1:])),
    Case((16, *FULL[1:]), ce="multihot"),
    Case((16, *FULL[1:]), torch.float32, ce="argmax"),
)
CASES = GPU_CASES if IS_GPU else (Case((2, 3, 32, 32, 32), torch.float32),)


def ours(case: Case, logits: Tensor, labels: Tensor) -> Tensor:
    """From the label map."""
    return dice_ce_loss(logits, labels, REGIONS, case.ce, check_labels=False).loss


def eager(case: Case, logits: Tensor, labels: Tensor) -> Tensor:
    """The same in plain PyTorch."""
    return dice_ce_loss_reference(logits, labels, REGIONS, case.ce).loss


def monai(case: Case, logits: Tensor, target: Tensor) -> Tensor:
    """From the multi-hot target; MONAI has no binary cross-entropy for several regions, so PyTorch's joins its Dice."""
    if case.ce == "bce":
        bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))
        return DiceLoss(sigmoid=True)(logits, target) + bce
    if case.ce == "argmax":
        return DiceLoss(sigmoid=True)(logits, target) + torch.nn.functional.cross_entropy(logits, target.argmax(dim=1))
    return DiceCELoss(sigmoid=True)(logits, target)


@dataclass(frozen=True)
class MultiHot(Case):
    """The same case with MONAI's target in place of the labels."""

    def inputs(self) -> list[Tensor]:
        logits, labels = super().inputs()
        return [logits, region_masks(labels, REGIONS).float()]


VARIANTS: dict[str, Callable[..., Tensor]] = {OURS: ours, "eager": eager, "MONAI": monai}
if IS_GPU:
    VARIANTS["torch.compile"] = torch.compile(eager, dynamic=False)


def calls(case: Case, variant: str, direction: str) -> list[Callable[[], object]]:
    """Calls to time, on inputs that come from memory."""
    given = MultiHot(**vars(case)) if variant == "MONAI" else case
    return calls_of(partial(VARIANTS[variant], case), given, direction, cached=False)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_dice_ce(case: Case, direction: str, variant: str, measure: Measure) -> None:
    timed = calls(case, variant, direction)
    measure(timed, case.work(direction), op="Dice + CE", case=str(case), direction=direction, variant=variant)
