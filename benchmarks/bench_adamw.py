"""AdamW over many tensors: ours, and torch's fused AdamW with its multi-tensor norm and copies.

Work: gradients read once for their norm, then again with parameters and moments, which are written with the copies in
low precision. There is no backward: both directions are the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import ceil

import pytest
import torch

from benchmarks.common import CACHE_BYTES, DEVICE, IS_GPU, LeastWork
from benchmarks.conftest import Measure
from benchmarks.report import OURS
from benchmarks.workloads import AdamWWorkload, measured
from kernels.adamw import AdamWStep, guarded_adamw_reference
from kernels.dispatch import DIRECTIONS

pytestmark = pytest.mark.kernel
WORKLOADS = measured("adamw") if IS_GPU else (AdamWWorkload(4, 64, torch.float32),)
CHOICES = ("torch.optim.AdamW",)
"""What path "torch" can take."""
VARIANTS = (OURS, CHOICES[0])


def work(workload: AdamWWorkload) -> LeastWork:
    """Each tensor once, and the gradients once more."""
    tensors = workload.tensors("meta")
    gradients, copies = (
        sum(each.nbytes for each in part if each is not None) for part in (tensors.gradients, tensors.copies)
    )
    parameters = sum(each.nbytes for each in tensors.parameters)
    return LeastWork(6 * parameters + 2 * gradients + copies, 3 * parameters + gradients + copies)


def calls(workload: AdamWWorkload, variant: str, direction: str) -> list[Callable[[], None]]:
    """Calls to time, each with tensors of its own."""
    sets = ceil(CACHE_BYTES / work(workload).tensors) if IS_GPU else 1
    return [
        torch.no_grad()(
            partial(
                AdamWStep() if variant == OURS else guarded_adamw_reference,
                workload.tensors(DEVICE),
                workload.guard(DEVICE),
                workload.options(),
            )
        )
        for _ in range(sets)
    ]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def bench_adamw(workload: AdamWWorkload, variant: str, measure: Measure) -> None:
    labels = {"op": "AdamW", "case": str(workload), "direction": DIRECTIONS[0], "variant": variant}
    measure(partial(calls, workload, variant, DIRECTIONS[0]), work(workload), **labels)
