"""Dice + cross-entropy: ours, eager PyTorch, torch.compile, MONAI's loss.

Ours, eager and torch.compile start from the uint8 label map. MONAI's loss gets a ready multi-hot float32 target: a
larger read, but no time to make it. Work: logits and labels read once forward, once more backward, and the gradient
written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from monai.losses import DiceCELoss, DiceLoss
from torch import Tensor

from benchmarks.common import IS_GPU, LeastWork, calls_of
from benchmarks.conftest import Measure
from benchmarks.report import OURS
from benchmarks.workloads import REGIONS, DiceCEWorkload, measured
from kernels.dice_ce import dice_ce_loss, dice_ce_loss_reference, region_masks
from kernels.dispatch import DIRECTIONS

pytestmark = pytest.mark.kernel
WORKLOADS = measured("dice_ce") if IS_GPU else (DiceCEWorkload((2, 3, 32, 32, 32), torch.float32),)
MONAI_DICE = DiceLoss(sigmoid=True)
MONAI_DICE_CE = DiceCELoss(sigmoid=True)


def work(workload: DiceCEWorkload, direction: str) -> LeastWork:
    """Logits and labels read once; backward once more, and the gradient written."""
    logits = torch.Size(workload.shape).numel() * workload.dtype.itemsize
    forward = logits + torch.Size(workload.shape).numel() // workload.shape[1]
    backward = forward + logits
    return LeastWork(forward, forward) if direction == DIRECTIONS[0] else LeastWork(forward + backward, backward)


def ours(workload: DiceCEWorkload, logits: Tensor, labels: Tensor) -> Tensor:
    """From the label map."""
    return dice_ce_loss(logits, labels, REGIONS, workload.ce, check_labels=False).loss


def eager(workload: DiceCEWorkload, logits: Tensor, labels: Tensor) -> Tensor:
    """The same in plain PyTorch."""
    return dice_ce_loss_reference(logits, labels, REGIONS, workload.ce).loss


def monai(workload: DiceCEWorkload, logits: Tensor, target: Tensor) -> Tensor:
    """From the multi-hot target; MONAI has no binary cross-entropy for several regions, so PyTorch's joins its Dice."""
    if workload.ce == "bce":
        bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))
        return MONAI_DICE(logits, target) + bce
    if workload.ce == "argmax":
        return MONAI_DICE(logits, target) + torch.nn.functional.cross_entropy(logits, target.argmax(dim=1))
    return MONAI_DICE_CE(logits, target)


@dataclass(frozen=True)
class MultiHot(DiceCEWorkload):
    """The same with MONAI's target in place of the labels."""

    def inputs(self, device: torch.device | str) -> list[Tensor]:
        logits, labels = super().inputs(device)
        return [logits, region_masks(labels, REGIONS).float()]


VARIANTS: dict[str, Callable[..., Tensor]] = {OURS: ours, "eager": eager, "MONAI": monai}
if IS_GPU:
    VARIANTS["torch.compile"] = torch.compile(eager, dynamic=False)


def calls(workload: DiceCEWorkload, variant: str, direction: str) -> list[Callable[[], object]]:
    """Calls to time, on inputs that come from memory."""
    given = MultiHot(**vars(workload)) if variant == "MONAI" else workload
    return calls_of(partial(VARIANTS[variant], workload), given, direction, cached=False)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def bench_dice_ce(workload: DiceCEWorkload, direction: str, variant: str, measure: Measure) -> None:
    labels = {"op": "Dice + CE", "case": str(workload), "direction": direction, "variant": variant}
    measure(partial(calls, workload, variant, direction), work(workload, direction), **labels)
