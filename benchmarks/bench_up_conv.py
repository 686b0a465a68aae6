"""Doubling by a transposed convolution: ours, PyTorch's (cuDNN) and torch.compile.

A case with "slice" writes a half of a wider buffer, beside a skip connection, and its gradient is such a slice. There
PyTorch's convolution is copied to the buffer, as `torch.cat` does. Work: 16 M C_in C_out floating-point operations for
M voxels of x, forward, and as many for each gradient. Bytes, each tensor once for every product that takes it:

    forward             x, weight, y
    gradient of x       dy, weight, dx
    gradient of weight  x, dy, dweight

Partial sums of the weight's gradient are not counted: they stay in the cache. The ceiling of float32 is three TF32
products for one, which keep its accuracy on tensor cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import IS_GPU, LeastWork, calls_of
from benchmarks.conftest import Measure
from benchmarks.report import OURS
from benchmarks.workloads import UpConvWorkload, measured
from kernels.dispatch import DIRECTIONS
from kernels.up_conv import up_conv, up_conv_into

pytestmark = pytest.mark.kernel
CPU_WORKLOADS = tuple(UpConvWorkload((1, 32, 16, 16, 8), 16, torch.float32, sliced) for sliced in (False, True))
WORKLOADS = measured("up_conv") if IS_GPU else CPU_WORKLOADS
CHOICES = ("cuDNN",)
"""What path "torch" can take."""


def work(workload: UpConvWorkload, direction: str) -> LeastWork:
    """Bytes and operations, as above."""
    x, y = math.prod(workload.shape), math.prod(workload.out_shape)
    weight = workload.shape[1] * workload.out_channels * 8
    forward, products = x + weight + y, 1
    total = touched = forward
    if direction != DIRECTIONS[0]:
        total, touched, products = 3 * forward, 2 * forward, 3
    size = workload.dtype.itemsize
    rate = "tf32 x 3" if IS_GPU and workload.dtype == torch.float32 else str(workload.dtype).removeprefix("torch.")
    return LeastWork(total * size, touched * size, products * 16 * x * workload.out_channels, rate)


def ours(x: Tensor, weight: Tensor, destination: Tensor | None = None) -> Tensor:
    """The one operation."""
    return up_conv(x, weight) if destination is None else up_conv_into(x, weight, destination)


def eager(x: Tensor, weight: Tensor, destination: Tensor | None = None) -> Tensor:
    """PyTorch's convolution, then the copy."""
    y = F.conv_transpose3d(x, weight, stride=2)
    return y if destination is None else destination.detach().copy_(y)


VARIANTS: dict[str, Callable[..., Tensor]] = {OURS: ours, "cuDNN" if IS_GPU else "eager": eager}
if IS_GPU:
    VARIANTS["torch.compile"] = torch.compile(eager, dynamic=False)


def calls(workload: UpConvWorkload, variant: str, direction: str) -> list[Callable[[], object]]:
    """Calls to time, on inputs that come from memory."""
    return calls_of(VARIANTS[variant], workload, direction, cached=False)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def bench_up_conv(workload: UpConvWorkload, direction: str, variant: str, measure: Measure) -> None:
    labels = {"op": "up-convolution", "case": str(workload), "direction": direction, "variant": variant}
    measure(partial(calls, workload, variant, direction), work(workload, direction), **labels)
