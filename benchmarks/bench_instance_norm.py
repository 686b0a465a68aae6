"""Instance norm with activation and residual: ours, eager PyTorch, torch.compile, MONAI's modules.

Work: the passes over a feature map that our algorithm makes, for every variant, so that shares of the roofline compare
times: those of one launch where a sample and channel fits a program, else of three (`kernels.instance_norm`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from monai.networks.layers.utils import get_act_layer, get_norm_layer
from torch import Tensor, nn

from benchmarks.common import DIRECTIONS, IS_GPU, Work, calls_of
from benchmarks.conftest import Measure
from benchmarks.report import OURS
from kernels.cases import FIRST, INSTANCE_NORM, SLOPE, InstanceNorm, launches
from kernels.instance_norm import PASSES, instance_norm

ONE_LAUNCH_PASSES = {"none": (2, 3), "raw": (3, 5), "normalised": (3, 5)}
CPU_CASES = (
    InstanceNorm((1, 16, 32, 32, 32), torch.float32, FIRST),
    InstanceNorm((1, 16, 32, 32, 32), torch.float32, FIRST, residual="normalised"),
)
GPU_CASES = INSTANCE_NORM
CASES = GPU_CASES if IS_GPU else CPU_CASES
CHOICES = ("torch.compile",)
"""What path "torch" can take."""


def work(case: InstanceNorm, direction: str) -> Work:
    """Passes over the feature map, and the maps that there are, in bytes."""
    names = {launch.name for launch in launches(case)}
    kernels = ("norm_forward_one_tile_kernel", "norm_backward_one_tile_kernel")
    forward, backward = (
        (ONE_LAUNCH_PASSES if kernel in names else PASSES)[case.residual][i] for i, kernel in enumerate(kernels)
    )
    nbytes = torch.Size(case.shape).numel() * case.dtype.itemsize
    inputs = 1 if case.residual == "none" else 2
    if direction == DIRECTIONS[0]:
        return Work(forward * nbytes, (inputs + 1) * nbytes)
    return Work((forward + backward) * nbytes, 2 * (inputs + 1) * nbytes)


def ours(case: InstanceNorm, *tensors: Tensor) -> Tensor:
    """The one operation."""
    x, residual, slope, weight, bias = case.split(tensors)
    negative_slope = SLOPE if slope is None else slope
    return instance_norm(x, weight, bias, 1e-5, negative_slope, residual, case.residual == "normalised")


def eager(case: InstanceNorm, *tensors: Tensor) -> Tensor:
    """The chain of functions that it replaces."""
    x, residual, slope, weight, bias = case.split(tensors)
    y = F.instance_norm(x, weight=weight, bias=bias)
    if residual is not None:
        y = y + (F.instance_norm(residual) if case.residual == "normalised" else residual)
    return F.leaky_relu(y, SLOPE) if slope is None else F.prelu(y, slope.to(y.dtype))


@cache
def _layers(channels: int) -> tuple[nn.Module, nn.Module]:
    norm = get_norm_layer("instance", spatial_dims=3, channels=channels)
    return norm, get_act_layer(("leakyrelu", {"inplace": True, "negative_slope": SLOPE}))


def monai(case: InstanceNorm, *tensors: Tensor) -> Tensor:
    """The layers that MONAI's blocks call."""
    x, residual, slope, _, _ = case.split(tensors)
    norm, activation = _layers(case.shape[1])
    y = norm(x)
    if residual is not None:
        y = y + (norm(residual) if case.residual == "normalised" else residual)
    return activation(y) if slope is None else F.prelu(y, slope.to(y.dtype))


VARIANTS: dict[str, Callable[..., Tensor]] = {OURS: ours, "eager": eager, "MONAI": monai}
if IS_GPU:
    VARIANTS["torch.compile"] = torch.compile(eager, dynamic=False)


def calls(case: InstanceNorm, variant: str, direction: str) -> list[Callable[[], object]]:
    """Calls to time, on inputs that come from memory."""
    return calls_of(partial(VARIANTS[variant], case), case, direction, cached=False)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_instance_norm(case: InstanceNorm, direction: str, variant: str, measure: Measure) -> None:
    labels = {"op": "instance norm", "case": str(case), "direction": direction, "variant": variant}
    measure(partial(calls, case, variant, direction), work(case, direction), **labels)
