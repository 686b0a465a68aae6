"""Checks of tensors that the operations share. All raise ValueError."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_is_tensor(name: str, tensor: object) -> None:
    """Refuse an array or a list."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(tensor).__name__}: torch.as_tensor({name})")


def check_floats(name: str, tensor: object, axes: str) -> None:
    """Refuse all but a floating point tensor with axes like "batch, channels", none of them empty."""
    check_is_tensor(name, tensor)
    assert isinstance(tensor, Tensor)
    if tensor.dim() != axes.count(",") + 1 or 0 in tensor.shape:
        raise ValueError(f"{name} of shape {tuple(tensor.shape)} must have the axes ({axes}), none of them empty")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} of {tensor.dtype} must be floating point: convert with {name}.float()")


def check_alike(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse two tensors that differ in shape, dtype or device."""
    if (tensor.shape, tensor.dtype, tensor.device) != (other.shape, other.dtype, other.device):
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device} but {other_name} is "
            f"{tuple(other.shape)} {other.dtype} on {other.device}; they must agree in all three"
        )


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse two tensors on different devices."""
    if tensor.device != other.device:
        raise ValueError(f"{name} on {tensor.device} but {other_name} on {other.device}: move both to one device")
