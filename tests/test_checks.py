"""Tensors that no operation takes are refused by name, with the rule and the remedy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.checks import FLOATS, check_alike, check_floats, check_is_tensor, check_same_device


@pytest.mark.parametrize("given", [[[0.0]], 1.0, np.zeros((2, 3)), None], ids=lambda given: type(given).__name__)
def test_what_is_not_a_tensor_is_refused(given: object) -> None:
    with pytest.raises(ValueError, match=rf"x must be a tensor, not {type(given).__name__}: torch.as_tensor\(x\)"):
        check_is_tensor("x", given)
    with pytest.raises(ValueError, match="x must be a tensor"):
        check_floats("x", given, "batch, channels")


@pytest.mark.parametrize("shape", [(2,), (2, 3, 4), (), (0, 3), (2, 0)], ids=str)
def test_other_axes_and_empty_ones_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x of shape \(.*\) must have the axes \(batch, channels\), none .* empty"):
        check_floats("x", torch.zeros(shape), "batch, channels")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64])
def test_dtypes_without_a_kernel_or_reference_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"x of {dtype} must be floating point: convert with x.float\(\)"):
        check_floats("x", torch.zeros(2, 3, dtype=dtype), "batch, channels")


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_with_the_axes_are_taken(dtype: torch.dtype) -> None:
    check_floats("x", torch.zeros(2, 3, dtype=dtype), "batch, channels")


@pytest.mark.parametrize(
    "other", [torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.float16), torch.zeros(2, 3, device="meta")]
)
def test_tensors_that_differ_in_shape_dtype_or_device_are_refused(other: torch.Tensor) -> None:
    x = torch.zeros(2, 3)
    check_alike("x", x, "a copy", x.clone())
    with pytest.raises(ValueError) as refused:
        check_alike("other", other, "x", x)
    first = f"other is {tuple(other.shape)} {other.dtype} on {other.device}"
    assert str(refused.value) == f"{first} but x is (2, 3) torch.float32 on cpu; they must agree in all three"


def test_tensors_on_two_devices_are_refused() -> None:
    check_same_device("weight", torch.zeros(2), "x", torch.zeros(3))
    with pytest.raises(ValueError, match="weight on meta but x on cpu: move both to one device"):
        check_same_device("weight", torch.zeros(2, device="meta"), "x", torch.zeros(3))
