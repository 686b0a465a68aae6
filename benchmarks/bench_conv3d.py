"""Forward + backward of the convolutions of a UNETR on a CPU: ours and PyTorch's.

On a GPU both are cuDNN, but for 1 x 1 x 1.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.common import DEVICE, IS_GPU, synchronize
from kernels.conv3d import conv3d

LAYOUT = torch.channels_last_3d if IS_GPU else torch.contiguous_format
SIZE = (128, 128, 64) if IS_GPU else (48, 48, 32)
CASES = [(8, 8, 3), (16, 8, 3), (4, 8, 3), (16, 16, 3), (4, 16, 3), (16, 8, 1), (8, 3, 1), (16, 3, 1)]
"""(channels, out channels, width of the kernel)."""


def pytorch(x: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's convolution."""
    return F.conv3d(x, weight, padding=weight.shape[2] // 2)


@pytest.mark.parametrize("variant", ["glioforge", "PyTorch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids="{0[0]}-{0[1]}-{0[2]}^3".format)
def bench_conv3d(case: tuple[int, int, int], dtype: torch.dtype, variant: str, benchmark: BenchmarkFixture) -> None:
    channels, out, kernel = case
    x = torch.randn((2, channels, *SIZE), device=DEVICE, dtype=dtype).contiguous(memory_format=LAYOUT)
    weight = torch.randn((out, channels, kernel, kernel, kernel), device=DEVICE, dtype=dtype)
    weight = weight.contiguous(memory_format=LAYOUT).requires_grad_()
    x.requires_grad_(channels > 4)  # an image has no gradient
    function = conv3d if variant == "glioforge" else pytorch
    dy = torch.randn_like(function(x, weight))
    benchmark.group = f"conv3d {channels} to {out} channels, {kernel}^3, {str(dtype).removeprefix('torch.')}"

    def run() -> None:
        x.grad = weight.grad = None
        function(x, weight).backward(dy)
        synchronize()

    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
