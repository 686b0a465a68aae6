"""Instance norm with activation and residual: ours, eager PyTorch, torch.compile, MONAI's modules.

Work: the passes over a feature map that our algorithm makes, for every variant, so that shares of the roofline compare
times. Reads and writes of one map, forward + backward, with an activation:

    residual      eager     torch.compile   three launches   one launch (a sample and channel fits a program)
    none          5 + 8         3 + 5           3 + 5            2 + 3
    raw           8 + 8         4 + 8           4 + 7            3 + 5
    normalised   11 + 13        5 + 8           5 + 8            3 + 5

Eager: maps contiguous and in one dtype, batch_norm 2 reads 1 write (backward 4 + 1), add 2 + 1 (backward an alias),
leaky_relu 1 + 1 (backward 2 + 1); `F.instance_norm` first copies a channels_last_3d map, 2 passes more. torch.compile:
the least it can do with one kernel for each reduction and one for each pointwise end. Without an activation a raw
residual's gradient is dy, and our backward takes 5.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from monai.networks.layers.utils import get_act_layer, get_norm_layer
from torch import Tensor, nn

from benchmarks.common import IS_GPU, LeastWork, calls_of
from benchmarks.conftest import Measure
from benchmarks.report import OURS
from benchmarks.workloads import FIRST, SLOPE, InstanceNormWorkload, launches, measured
from kernels.dispatch import DIRECTIONS
from kernels.instance_norm import instance_norm

pytestmark = pytest.mark.kernel
PASSES = {"none": (3, 5), "raw": (4, 7), "normalised": (5, 8)}
"""(forward, backward), by the residual."""
ONE_LAUNCH_PASSES = {"none": (2, 3), "raw": (3, 5), "normalised": (3, 5)}
CPU_WORKLOADS = (
    InstanceNormWorkload((1, 16, 32, 32, 32), torch.float32, FIRST),
    InstanceNormWorkload((1, 16, 32, 32, 32), torch.float32, FIRST, residual="normalised"),
)
WORKLOADS = measured("instance_norm") if IS_GPU else CPU_WORKLOADS


def work(workload: InstanceNormWorkload, direction: str) -> LeastWork:
    """Passes over the feature map, and the maps of one call, in bytes."""
    names = {launch.name for launch in launches(workload)}
    kernels = ("norm_forward_one_tile_kernel", "norm_backward_one_tile_kernel")
    forward, backward = (
        (ONE_LAUNCH_PASSES if kernel in names else PASSES)[workload.residual][i] for i, kernel in enumerate(kernels)
    )
    nbytes = torch.Size(workload.shape).numel() * workload.dtype.itemsize
    inputs = 1 if workload.residual == "none" else 2
    if direction == DIRECTIONS[0]:
        return LeastWork(forward * nbytes, (inputs + 1) * nbytes)
    return LeastWork((forward + backward) * nbytes, 2 * (inputs + 1) * nbytes)


def ours(workload: InstanceNormWorkload, *tensors: Tensor) -> Tensor:
    """The one operation."""
    x, residual, slope, weight, bias = workload.split(tensors)
    negative_slope = SLOPE if slope is None else slope
    return instance_norm(x, weight, bias, 1e-5, negative_slope, residual, workload.residual == "normalised")


def eager(workload: InstanceNormWorkload, *tensors: Tensor) -> Tensor:
    """The chain of functions that it replaces."""
    x, residual, slope, weight, bias = workload.split(tensors)
    y = F.instance_norm(x, weight=weight, bias=bias)
    if residual is not None:
        y = y + (F.instance_norm(residual) if workload.residual == "normalised" else residual)
    return F.leaky_relu(y, SLOPE) if slope is None else F.prelu(y, slope.to(y.dtype))


@cache
def _layers(channels: int) -> tuple[nn.Module, nn.Module]:
    norm = get_norm_layer("instance", spatial_dims=3, channels=channels)
    return norm, get_act_layer(("leakyrelu", {"inplace": True, "negative_slope": SLOPE}))


def monai(workload: InstanceNormWorkload, *tensors: Tensor) -> Tensor:
    """The layers that MONAI's blocks call."""
    x, residual, slope, _, _ = workload.split(tensors)
    norm, activation = _layers(workload.shape[1])
    y = norm(x)
    if residual is not None:
        y = y + (norm(residual) if workload.residual == "normalised" else residual)
    return activation(y) if slope is None else F.prelu(y, slope.to(y.dtype))


VARIANTS: dict[str, Callable[..., Tensor]] = {OURS: ours, "eager": eager, "MONAI": monai}
if IS_GPU:
    VARIANTS["torch.compile"] = torch.compile(eager, dynamic=False)


def calls(workload: InstanceNormWorkload, variant: str, direction: str) -> list[Callable[[], object]]:
    """Calls to time, on inputs that come from memory."""
    return calls_of(partial(VARIANTS[variant], workload), workload, direction, cached=False)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def bench_instance_norm(workload: InstanceNormWorkload, direction: str, variant: str, measure: Measure) -> None:
    labels = {"op": "instance norm", "case": str(workload), "direction": direction, "variant": variant}
    measure(partial(calls, workload, variant, direction), work(workload, direction), **labels)
