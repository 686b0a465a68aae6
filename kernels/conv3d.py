"""Convolutions of 3D feature maps that keep their size, 3 x 3 x 3 or 1 x 1 x 1, in the fastest way that PyTorch has.

    y[b, o, v] = sum over c and taps t of weight[o, c, t] * x[b, c, v + t] + bias[o]

1 x 1 x 1: a matrix product of the weight and the voxels. On a CPU PyTorch's convolution takes two to five times as long
as the product; on a GPU the product adds the bias in its epilogue, where the convolution needs a pass of its own. There
the channels of a voxel must fill 16 bytes, as those of a network's last layer do not.

3 x 3 x 3 on a CPU: for contiguous maps oneDNN computes blocks of 16 output channels, and with 8 of them half of a block
is padding. In channels_last_3d it is not, so such maps are converted on the way in and out, two cheap passes.
`benchmarks/bench_conv3d.py` compares the two. Everything else is `torch.nn.functional.conv3d`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import as_operands, product_dtype
from .checks import check_floats, check_same_device

BLOCK = 16
"""Channels that oneDNN computes together, with AVX-512."""
LAST = torch.channels_last_3d


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution of stride 1 that keeps the size: zeros pad the border of a 3 x 3 x 3 one.

    Args:
        x: (B, C, X, Y, Z), contiguous or channels_last_3d.
        weight: (O, C, 3, 3, 3) or (O, C, 1, 1, 1).
        bias: (O,). Under autocast all three are cast to its dtype, as for `torch.nn.functional.conv3d`.

    Returns:
        (B, O, X, Y, Z).

    Raises:
        ValueError: a wrong rank, dtype, shape or device of a tensor.
    """
    _check(x, weight)
    is_pointwise = weight.shape[2:].numel() == 1
    if not torch.compiler.is_compiling():
        if is_pointwise and (x.is_contiguous() or _has_wide_rows(x, weight)):
            return _pointwise(x, weight, bias)
        if _pads_blocks(x, weight):
            return _LastInside.apply(*as_operands(x, weight, bias))
    return F.conv3d(x, weight, bias, padding=0 if is_pointwise else 1)


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The products of 1 x 1 x 1 in the layout of x."""
    weight_OC = weight.flatten(1)
    if not x.is_contiguous():
        return F.linear(x.permute(0, 2, 3, 4, 1), weight_OC, bias).permute(0, 4, 1, 2, 3)
    x_BCV, weight_BOC = x.flatten(2), weight_OC.expand(x.shape[0], -1, -1)
    y_BOV = torch.bmm(weight_BOC, x_BCV) if bias is None else torch.baddbmm(bias[:, None], weight_BOC, x_BCV)
    return y_BOV.unflatten(2, x.shape[2:])


def _has_wide_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether x and y, channels_last_3d, have rows of 16 bytes: libraries have no fast product of others."""
    sizes = (channels * product_dtype(x).itemsize for channels in weight.shape[:2])
    return x.is_contiguous(memory_format=LAST) and not any(size % 16 for size in sizes)


def _pads_blocks(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN would pad the channels of y."""
    fits = weight.shape[0] % BLOCK == 0 or x.dtype == torch.float64
    has_blocks = x.is_cpu and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return has_blocks and not fits and x.is_contiguous()


class _LastInside(torch.autograd.Function):
    """A 3 x 3 x 3 convolution of contiguous maps, computed in channels_last_3d, with contiguous gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, last_weight = x.contiguous(memory_format=LAST), weight.contiguous(memory_format=LAST)
        ctx.save_for_backward(x, last_weight)
        ctx.has_bias = bias is not None
        return F.conv3d(x, last_weight, bias, padding=1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, dweight, dbias = torch.ops.aten.convolution_backward(
            dy.contiguous(memory_format=LAST), x, weight, [weight.shape[0]] if ctx.has_bias else None,
            [1] * 3, [1] * 3, [1] * 3, False, [0] * 3, 1, ctx.needs_input_grad,
        )  # fmt: skip
        dweight = None if dweight is None else dweight.contiguous()
        return None if dx is None else dx.contiguous(), dweight, dbias


def _check(x: Tensor, weight: Tensor) -> None:
    check_floats("x", x, "batch, channels, X, Y, Z")
    check_floats("weight", weight, "out channels, channels, X, Y, Z")
    if weight.shape[1] != x.shape[1] or tuple(weight.shape[2:]) not in ((3, 3, 3), (1, 1, 1)):
        raise ValueError(
            f"weight of {tuple(weight.shape)} for x with {x.shape[1]} channels: it must be (out channels, "
            f"{x.shape[1]}, 3, 3, 3) or (out channels, {x.shape[1]}, 1, 1, 1)"
        )
    check_same_device("weight", weight, "x", x)
