"""Convolutions that know what follows: an instance norm, or another convolution on the same input.

    SameConv3d                             as PyTorch's, but the fastest way for a CPU
    NormedConv3d, NormedConvTranspose3d    conv, then a norm: the norm subtracts the mean, and with it any bias
    Doubling                               kernel and stride 2, written where a concatenation wants it
    ProjectionConv3d                       1 x 1 x 1 beside a 3 x 3 x 3 on one input, each followed by a norm

A bias before a norm has no effect and a gradient of zero, but PyTorch would pay a pass over the map to add it and
another to sum its gradient. The reference packages have it, so it stays in the state dict.

Two convolutions of one input have two input gradients as large as the input, and a third pass to add them. That of a
1 x 1 x 1 convolution is a product of matrices, voxels by channels, and a product can add to what is there:

    dx = dx_other + dy @ weight            in place, dx_other being what the other convolution sends back
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels.autocast import as_operands
from kernels.conv3d import conv3d
from kernels.up_conv import up_conv, up_conv_into


class SameConv3d(nn.Conv3d):
    """A convolution of stride 1 that keeps the size, 3 x 3 x 3 or 1 x 1 x 1."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return conv3d(x, self.weight, self.bias)


class NormedConv3d(nn.Conv3d):
    """A convolution that an instance norm follows: its bias cancels there, so it is kept, frozen and never added."""

    def __init__(self, *sizes: Any, **options: Any) -> None:
        super().__init__(*sizes, **options)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        keeps_size = self.stride == (1, 1, 1) and self.kernel_size in ((3, 3, 3), (1, 1, 1))
        return conv3d(x, self.weight) if keeps_size else self._conv_forward(x, self.weight, None)


class NormedConvTranspose3d(nn.ConvTranspose3d):
    """As `NormedConv3d`, transposed."""

    def __init__(self, *sizes: Any, **options: Any) -> None:
        super().__init__(*sizes, **options)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.conv_transpose3d(x, self.weight, None, self.stride, self.padding, self.output_padding)  # type: ignore[arg-type]


class Doubling(nn.ConvTranspose3d):
    """Transposed convolution of kernel and stride 2 without bias, (B, in, X, Y, Z) -> (B, out, 2X, 2Y, 2Z).

    `out`: a half of a `models.concatenation.Room`, which the result is written into.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=2, stride=2, bias=False)

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return up_conv(x, self.weight) if out is None else up_conv_into(x, self.weight, out)


class ProjectionConv3d(NormedConv3d):
    """1 x 1 x 1 convolution, before a norm, of an input that one other convolution takes too.

    Returns:
        y, and x again: the other convolution must take this x, and nothing else may. Its gradient comes back here and
        becomes that of both. Under autocast this x is cast already.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        if not needs_gradient or torch.compiler.is_compiling():  # a compiled or exported graph has plain operations
            return super().forward(x), x
        return _Projection.apply(*as_operands(x, self.weight))


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        return conv3d(x, weight), x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dx: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            _add_input_gradient(dx, dy, weight)
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = _weight_gradient(x, dy, weight)
        return dx, dweight


def _weight_gradient(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """The weight gradient of a 1 x 1 x 1 convolution; for contiguous maps as products, which a CPU does far faster."""
    if x.is_contiguous() and dy.is_contiguous():
        return torch.bmm(dy.flatten(2), x.flatten(2).transpose(1, 2)).sum(0).view_as(weight)
    where = ([1] * 3, [0] * 3, [1] * 3, False, [0] * 3, 1)  # stride, padding, dilation; transposed; groups
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *where, [False, True, False])[1]


def _add_input_gradient(dx: Tensor, dy: Tensor, weight: Tensor) -> None:
    """dx += the input gradient of a 1 x 1 x 1 convolution, as one product in the layout of dx."""
    if dx.is_contiguous():
        transposed = weight.flatten(1).t().expand(len(dx), -1, -1)
        dx.flatten(2).baddbmm_(transposed, dy.flatten(2))
    else:
        rows = dx.permute(0, 2, 3, 4, 1).view(-1, dx.shape[1])
        rows.addmm_(dy.permute(0, 2, 3, 4, 1).reshape(-1, dy.shape[1]), weight.flatten(1))
