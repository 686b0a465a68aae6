"""Operands are cast as autocast casts those of PyTorch's own convolution."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F

from kernels.autocast import as_operands, product_dtype

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_is_that_of_pytorchs_convolution(dtype: torch.dtype, low: torch.dtype | None) -> None:
    x = torch.ones(1, 1, 3, 3, 3, dtype=dtype)
    with torch.autocast("cpu", low) if low else contextlib.nullcontext():
        assert product_dtype(x) == F.conv3d(x, x).dtype
        assert [each.dtype for each in as_operands(x, x)] == 2 * [product_dtype(x)]


def test_an_operand_that_is_right_already_is_not_copied() -> None:
    x = torch.ones(2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert as_operands(x)[0] is x


def test_what_autocast_does_not_cast_stays() -> None:
    labels = torch.ones(2, dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        assert as_operands(labels)[0] is labels
        assert as_operands(None, 3) == [None, 3]
        assert product_dtype(torch.ones(2, device="meta")) == torch.float32
