"""Fused instance norm against its equation and against torch's modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.instance_norm import instance_norm

SHAPE = (2, 5, 6, 4, 3)
EPS = 1e-5


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def equation(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: float | Tensor | None,
    residual: Tensor | None,
    residual_norm: bool,
) -> Tensor:
    """The docstring's equation, written out with mean and variance."""

    def normalised(t: Tensor) -> Tensor:
        centred = t - t.mean((2, 3, 4), keepdim=True)
        return centred / (centred.square().mean((2, 3, 4), keepdim=True) + EPS).sqrt()

    y = normalised(x)
    if weight is not None:
        y = y * weight[:, None, None, None]
    if bias is not None:
        y = y + bias[:, None, None, None]
    if residual is not None:
        y = y + (normalised(residual) if residual_norm else residual)
    if slope is None:
        return y
    slope = slope[:, None, None, None] if isinstance(slope, Tensor) else slope
    return torch.where(y > 0, y, slope * y)


@pytest.mark.parametrize("affine", ["none", "weight", "bias", "both"])
@pytest.mark.parametrize("slope", [None, 0.01, 0.0, -0.2, "one", "channels"])
@pytest.mark.parametrize("residual", ["none", "raw", "normalised"])
def test_output_and_gradients_follow_the_equation(affine: str, slope: float | str | None, residual: str) -> None:
    slopes = {"one": randn(1, seed=4), "channels": randn(5, seed=4)}
    given: dict[str, Tensor | None] = {
        "x": randn(*SHAPE, seed=0) * 3 + 7,
        "weight": randn(5, seed=1) if affine in ("weight", "both") else None,
        "bias": randn(5, seed=2) if affine in ("bias", "both") else None,
        "residual": randn(*SHAPE, seed=3) * 2 - 4 if residual != "none" else None,
        "negative_slope": slopes[slope] if isinstance(slope, str) else None,
    }
    ours = {name: None if t is None else t.clone().requires_grad_() for name, t in given.items()}
    theirs = {name: None if t is None else t.clone().requires_grad_() for name, t in given.items()}
    fixed = {} if isinstance(slope, str) else {"negative_slope": slope}
    out = instance_norm(**{**ours, **fixed}, residual_norm=residual == "normalised")  # type: ignore[arg-type]
    their_slope = theirs["negative_slope"] if isinstance(slope, str) else slope
    assert theirs["x"] is not None
    expected = equation(
        theirs["x"], theirs["weight"], theirs["bias"], their_slope, theirs["residual"], residual == "normalised"
    )
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    cotangent = randn(*SHAPE, seed=5)
    (out * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    for name, tensor in ours.items():
        if tensor is not None:
            torch.testing.assert_close(tensor.grad, theirs[name].grad, rtol=1e-9, atol=1e-9)  # type: ignore[union-attr]


def test_float32_equals_the_torch_modules_it_replaces() -> None:
    x, skip = randn(*SHAPE, seed=0, dtype=torch.float32), randn(*SHAPE, seed=1, dtype=torch.float32)
    norm, act = nn.InstanceNorm3d(5), nn.LeakyReLU(0.01)
    torch.testing.assert_close(instance_norm(x, negative_slope=0.01), act(norm(x)))
    fused = instance_norm(x, negative_slope=0.01, residual=skip, residual_norm=True)
    torch.testing.assert_close(fused, act(norm(x) + norm(skip)))


def test_one_voxel_is_its_own_mean() -> None:
    x = randn(2, 5, 1, 1, 1, seed=0).requires_grad_()
    weight, bias = randn(5, seed=1).requires_grad_(), randn(5, seed=2).requires_grad_()
    out = instance_norm(x, weight, bias, negative_slope=0.1)
    torch.testing.assert_close(out, F.leaky_relu(bias, 0.1).view(1, 5, 1, 1, 1).expand(2, 5, 1, 1, 1))
    out.sum().backward()
    assert x.grad is not None and weight.grad is not None and bias.grad is not None
    assert x.grad.abs().max() == 0 and weight.grad.abs().max() == 0 and bias.grad.abs().min() > 0
    assert instance_norm(x.detach(), residual=x.detach(), residual_norm=True).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_than_the_last_rounding(dtype: torch.dtype) -> None:
    x = (randn(1, 3, 40, 40, 40, seed=0) + 20).to(dtype)
    skip = randn(1, 3, 40, 40, 40, seed=1).to(dtype)
    slope = torch.tensor([0.25])
    out = instance_norm(x, negative_slope=slope, residual=skip)
    expected = equation(x.double(), None, None, slope.double(), skip.double(), False)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_channels_last_gives_what_contiguous_gives() -> None:
    x, skip = randn(*SHAPE, seed=0), randn(*SHAPE, seed=1)
    last = instance_norm(
        x.to(memory_format=torch.channels_last_3d),
        negative_slope=0.01,
        residual=skip.to(memory_format=torch.channels_last_3d),
        residual_norm=True,
    )
    torch.testing.assert_close(last, instance_norm(x, negative_slope=0.01, residual=skip, residual_norm=True))


def test_inputs_are_left_as_they_were() -> None:
    x, skip = randn(*SHAPE, seed=0), randn(*SHAPE, seed=1)
    before = x.clone(), skip.clone()
    instance_norm(x, negative_slope=0.01, residual=skip)
    assert torch.equal(x, before[0]) and torch.equal(skip, before[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 4, 4)}, r"x has shape \(2, 5, 4, 4\).*five axes"),
        ({"x": torch.zeros(2, 5, 4, 0, 4)}, "none of them empty"),
        ({"x": torch.zeros(SHAPE, dtype=torch.uint8)}, "x is torch.uint8.*floating point"),
        ({"eps": 0.0}, "eps 0.0 must be positive"),
        ({"weight": torch.ones(4)}, r"weight is \(4,\).*5 channels.*shape \(5,\)"),
        ({"bias": torch.ones(5, dtype=torch.int64)}, "bias is .*int64.*floating point"),
        ({"negative_slope": torch.ones(2)}, r"negative_slope is \(2,\).*\(1,\) or \(5,\)"),
        ({"negative_slope": float("inf")}, "negative_slope inf must be finite"),
        ({"residual": torch.zeros(2, 5, 6, 4, 2)}, r"residual is \(2, 5, 6, 4, 2\).*x is \(2, 5, 6, 4, 3\)"),
        ({"residual": torch.zeros(SHAPE, dtype=torch.float16)}, "residual is .*float16.*must agree"),
        ({"residual_norm": True}, "residual_norm is True but there is no residual"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        instance_norm(**{"x": torch.zeros(SHAPE), **change})
