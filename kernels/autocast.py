"""What a product or a convolution computes in, under `torch.autocast` and without it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def product_dtype(operand: Tensor) -> torch.dtype:
    """The dtype that an operand is cast to: autocast's, or its own. float64 stays as it is."""
    device = operand.device.type
    is_eligible = operand.is_floating_point() and operand.dtype != torch.float64
    if not is_eligible or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return operand.dtype
    return torch.get_autocast_dtype(device)


def as_operands(*values: Any) -> list[Any]:
    """Tensors in the dtype of a product; what is no tensor stays."""
    return [_as_operand(value) if isinstance(value, Tensor) else value for value in values]


def _as_operand(tensor: Tensor) -> Tensor:
    dtype = product_dtype(tensor)
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # `to` would leave a node in an exported graph
