"""Instance norm, affine, residual and leaky ReLU of a 3D feature map, as one operation.

    mean, var  over the voxels of each sample and channel (var biased)
    xhat = (x - mean) / sqrt(var + eps)
    r    = residual, or (residual - mean_r) / sqrt(var_r + eps) where `residual_norm`
    y    = leaky_relu(xhat * weight + bias + r)          leaky_relu(z) = z where z > 0, slope * z elsewhere

With g = dL/dy * (1 where y > 0, slope elsewhere) and N voxels:

    dx = weight * rstd * (g - mean(g) - xhat * mean(g * xhat))       dweight = sum(g * xhat)      dbias = sum(g)
    dresidual = g, or what dx is without weight, by the residual's statistics
    dslope = sum of dL/dy * z where z <= 0

The three uses: conv + norm + activation (slope 0.01), the end of UNETR's residual block, whose skip branch has a
convolution and a norm of its own (`residual_norm`), and the UNet's PReLU (`negative_slope` a parameter). Statistics are
float32 whatever the input's dtype: a bf16 sum over 10^6 voxels keeps two digits (float64 inputs keep float64).

A channel of one single voxel is its own mean, so xhat = 0 and y = leaky_relu(bias + r). `torch.nn.InstanceNorm3d`
refuses that case in training; here it is defined, because the deepest level of a 16 x 16 x 16 crop is one voxel.

`instance_norm_reference` states this with `torch.nn.functional`: the oracle that everything faster is compared with.

Source: Ulyanov et al., Instance Normalization, https://arxiv.org/abs/1607.08022.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _normalise(x_BCXYZ: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if math.prod(x_BCXYZ.shape[2:]) > 1:
        return F.instance_norm(x_BCXYZ, weight=weight, bias=bias, eps=eps)
    y = x_BCXYZ - x_BCXYZ
    if weight is not None:
        y = y * weight.view(-1, 1, 1, 1)
    return y if bias is None else y + bias.view(-1, 1, 1, 1)


def instance_norm_reference(
    x_BCXYZ: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    negative_slope: float | Tensor | None = None,
    residual: Tensor | None = None,
    residual_norm: bool = False,
) -> Tensor:
    """The equation at the head of this file in plain PyTorch; arguments as `instance_norm`, unchecked."""
    compute = torch.promote_types(x_BCXYZ.dtype, torch.float32)
    weight = None if weight is None else weight.to(compute)
    bias = None if bias is None else bias.to(compute)
    y = _normalise(x_BCXYZ.to(compute), weight, bias, eps)
    if residual is not None:
        residual = residual.to(compute)
        y = y + (_normalise(residual, None, None, eps) if residual_norm else residual)
    if isinstance(negative_slope, Tensor):
        y = F.prelu(y, negative_slope.to(compute))
    elif negative_slope is not None:
        y = F.leaky_relu(y, negative_slope)
    return y.to(x_BCXYZ.dtype)


def _check_channels(name: str, tensor: Tensor | None, x: Tensor, sizes: tuple[int, ...]) -> None:
    if tensor is None:
        return
    if tensor.dim() != 1 or tensor.shape[0] not in sizes or tensor.dtype not in DTYPES:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype}; x has {x.shape[1]} channels, so it must be "
            f"floating point of shape {' or '.join(f'({size},)' for size in dict.fromkeys(sizes))}"
        )
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}; move both to one device")


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    negative_slope: float | Tensor | None,
    residual: Tensor | None,
    residual_norm: bool,
) -> None:
    if x.dim() != 5 or 0 in x.shape:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; instance_norm takes (batch, channels, X, Y, Z), five axes, "
            "none of them empty"
        )
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; instance_norm takes floating point: convert with x.float()")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps {eps} must be positive: a constant channel has variance 0; the usual value is 1e-5")
    channels = x.shape[1]
    _check_channels("weight", weight, x, (channels,))
    _check_channels("bias", bias, x, (channels,))
    if isinstance(negative_slope, Tensor):
        _check_channels("negative_slope", negative_slope, x, (1, channels))
    elif negative_slope is not None and not math.isfinite(negative_slope):
        raise ValueError(f"negative_slope {negative_slope} must be finite; None leaves the activation out")
    if residual is None:
        if residual_norm:
            raise ValueError("residual_norm is True but there is no residual: give one, or leave residual_norm out")
    elif (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"residual is {tuple(residual.shape)} {residual.dtype} on {residual.device} but x is "
            f"{tuple(x.shape)} {x.dtype} on {x.device}; they must agree in all three"
        )


def instance_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    negative_slope: float | Tensor | None = None,
    residual: Tensor | None = None,
    residual_norm: bool = False,
) -> Tensor:
    """leaky_relu(IN(x) * weight + bias + residual), differentiable in every tensor given.

    Args:
        x: (B, C, X, Y, Z), contiguous or channels_last_3d.
        weight, bias: (C,), each optional.
        eps: added to the variance.
        negative_slope: None = no activation; a number = leaky ReLU; a tensor of 1 or C elements = PReLU.
        residual: same shape and dtype as `x`, added before the activation.
        residual_norm: normalise the residual by its own statistics first (without affine).

    Returns:
        Shape and dtype of `x`; statistics in float32.

    Raises:
        ValueError: wrong rank, dtype, shape or device of a tensor, eps not positive, a slope that is not finite,
            `residual_norm` without a residual.
    """
    _check(x, weight, bias, eps, negative_slope, residual, residual_norm)
    return instance_norm_reference(x, weight, bias, eps, negative_slope, residual, residual_norm)
