"""Instance norm with activation and residual: ours, eager PyTorch, torch.compile, MONAI's modules.

Work: the passes over a feature map that our algorithm makes (`kernels.instance_norm.PASSES`), for every variant, so
that shares of the roofline compare times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from monai.networks.layers.utils import get_act_layer, get_norm_layer
from torch import Tensor

from benchmarks.common import DEVICE, DIRECTIONS, IS_GPU, Work, calls_of
from benchmarks.conftest import Measure
from benchmarks.report import OURS
from kernels.instance_norm import PASSES, instance_norm

SLOPE = 0.01


@dataclass(frozen=True)
class Case:
    """Shape, dtype, memory format, residual, and whether the activation is a PReLU."""

    shape: tuple[int, int, int, int, int]
    dtype: torch.dtype = torch.bfloat16
    memory_format: torch.memory_format = torch.channels_last_3d
    residual: Literal["none", "raw", "normalised"] = "none"
    prelu: bool = False

    def __str__(self) -> str:
        layout = "channels_last" if self.memory_format == torch.channels_last_3d else "contiguous"
        uses = ["PReLU" if self.prelu else ""] + [f"{self.residual} residual" if self.residual != "none" else ""]
        return " ".join([str(self.shape), str(self.dtype).removeprefix("torch."), layout, *filter(None, uses)])

    def inputs(self) -> list[Tensor]:
        """x, then the residual and the slope where there are any."""
        count = 1 if self.residual == "none" else 2
        maps = [torch.randn(self.shape, device=DEVICE, dtype=self.dtype) for _ in range(count)]
        tensors = [tensor.to(memory_format=self.memory_format) for tensor in maps]
        if self.prelu:
            tensors.append(torch.full((1,), 0.25, device=DEVICE))
        return [tensor.requires_grad_() for tensor in tensors]

    def work(self, direction: str) -> Work:
        """Passes over the feature map, in bytes."""
        forward, backward = PASSES[self.residual]
        passes = forward if direction == DIRECTIONS[0] else forward + backward
        return Work(passes * torch.Size(self.shape).numel() * self.dtype.itemsize)

    def split(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x, residual and slope of a set of inputs."""
        rest = list(tensors[1:])
        residual = rest.pop(0) if self.residual != "none" else None
        return tensors[0], residual, rest.pop() if rest else None


GPU_CASES = (
    Case((2, 16, 128, 128, 64)),
    Case((8, 32, 128, 128, 64)),
    Case((2, 16, 128, 128, 64), memory_format=torch.contiguous_format),
    Case((2, 16, 128, 128, 64), residual="normalised"),
    Case((2, 16, 128, 128, 64), residual="raw"),
    Case((2, 16, 128, 128, 64), torch.float32, torch.contiguous_format, residual="normalised"),
    Case((2, 16, 64, 64, 32), prelu=True),
    Case((2, 3, 128, 128, 64), prelu=True),
    Case((2, 64, 32, 32, 16)),
    Case((2, 128, 16, 16, 8), residual="normalised"),
    Case((2, 256, 8, 8, 4), prelu=True),
)
CPU_CASES = (
    Case((1, 16, 32, 32, 32), torch.float32, torch.contiguous_format),
    Case((1, 16, 32, 32, 32), torch.float32, torch.contiguous_format, residual="normalised"),
)
CASES = GPU_CASES if IS_GPU else CPU_CASES


def ours(case: Case, *tensors: Tensor) -> Tensor:
    """The one operation."""
    x, residual, slope = case.split(tensors)
    negative_slope = SLOPE if slope is None else slope
    return instance_norm(x, None, None, 1e-5, negative_slope, residual, case.residual == "normalised")


def eager(case: Case, *tensors: Tensor) -> Tensor:
    """The chain of functions that it replaces."""
    x, residual, slope = case.split(tensors)
    y = F.instance_norm(x)
    if residual is not None:
        y = y + (F.instance_norm(residual) if case.residual == "normalised" else residual)
    return F.leaky_relu(y, SLOPE) if slope is None else F.prelu(y, slope.to(y.dtype))


def monai(case: Case, *tensors: Tensor) -> Tensor:
    """The layers that MONAI's blocks call."""
    x, residual, slope = case.split(tensors)
    norm = get_norm_layer("instance", spatial_dims=3, channels=case.shape[1])
    y = norm(x)
    if residual is not None:
        y = y + (norm(residual) if case.residual == "normalised" else residual)
    if slope is not None:
        return F.prelu(y, slope.to(y.dtype))
    return get_act_layer(("leakyrelu", {"inplace": True, "negative_slope": SLOPE}))(y)


VARIANTS: dict[str, Callable[..., Tensor]] = {OURS: ours, "eager": eager, "MONAI": monai}
if IS_GPU:
    VARIANTS["torch.compile"] = torch.compile(eager, dynamic=False)


def calls(case: Case, variant: str, direction: str) -> list[Callable[[], object]]:
    """Calls to time, on inputs that come from memory."""
    return calls_of(partial(VARIANTS[variant], case), case, direction, cached=False)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_instance_norm(case: Case, direction: str, variant: str, measure: Measure) -> None:
    timed = calls(case, variant, direction)
    measure(timed, case.work(direction), op="instance norm", case=str(case), direction=direction, variant=variant)
