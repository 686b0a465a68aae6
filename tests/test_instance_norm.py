"""Fused instance norm against its equation, torch's modules, and its kernels against the reference in float64.

Which path a call takes depends on the run: see `kernel_paths`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_paths import COMPILED, DEVICES, needs_kernels, not_interpreted
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import dispatch
from kernels import instance_norm as module
from kernels.instance_norm import instance_norm, instance_norm_into, writes_slices

pytestmark = pytest.mark.kernel

SHAPE = (2, 5, 6, 4, 3)
SMALL = (2, 2, 5, 6, 5)
"""Fewer rows than `SHAPE`: the interpreter takes about 20 ms per program."""
EPS = 1e-5
FORMATS = [torch.contiguous_format, torch.channels_last_3d]
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of an element relative to itself, and to the largest of its tensor: a few units in the last place of the dtype."""


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


@not_interpreted
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
    tolerance = TOLERANCES[torch.float64]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    cotangent = randn(*SHAPE, seed=5)
    (out * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    for name, tensor in ours.items():
        if tensor is not None:
            torch.testing.assert_close(tensor.grad, theirs[name].grad, rtol=tolerance, atol=tolerance)  # type: ignore[union-attr]


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
        ({"x": torch.zeros(2, 5, 4, 4)}, r"x of shape \(2, 5, 4, 4\) .* axes \(batch, channels, X, Y, Z\)"),
        ({"eps": 0.0}, "eps 0.0 must be a positive number"),
        ({"eps": "1e-5"}, "eps '1e-5' must be a positive number"),
        ({"weight": [1.0, 1.0]}, r"weight must be a tensor, not list"),
        ({"weight": torch.ones(4)}, r"weight is \(4,\).*5 channels.*shape \(5,\)"),
        ({"bias": torch.ones(5, dtype=torch.int64)}, "bias is .*int64.*floating point"),
        ({"bias": torch.ones(5, device="meta")}, "bias on meta but x on cpu: move both"),
        ({"negative_slope": torch.ones(2)}, r"negative_slope is \(2,\).*\(1,\) or \(5,\)"),
        ({"negative_slope": float("inf")}, "negative_slope inf must be a finite number"),
        ({"negative_slope": [0.1]}, r"negative_slope \[0.1\] must be a finite number, or a tensor of 1 or 5"),
        ({"residual": 1.0}, "residual must be a tensor, not float"),
        ({"residual": torch.zeros(2, 5, 6, 4, 2)}, r"residual is \(2, 5, 6, 4, 2\).*x is \(2, 5, 6, 4, 3\)"),
        ({"residual_norm": True}, "residual_norm is True but there is no residual"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        instance_norm(**{"x": torch.zeros(SHAPE), **change})


@pytest.fixture(autouse=True)
def uncached_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests change what a plan depends on besides its arguments."""
    monkeypatch.setattr(module, "_plan", module._plan.__wrapped__)


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three launches, and several splits, for small maps too."""
    for name, value in {"ONE_TILE": 0, "CHUNK_STEP": 64, "PROGRAMS": 8}.items():
        monkeypatch.setattr(module, name, value)


@pytest.fixture(params=["one tile", "splits"])
def each_path(request: pytest.FixtureRequest) -> None:
    if request.param == "splits":
        request.getfixturevalue("splits")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels as they are launched."""
    names: list[str] = []
    launch = dispatch.launch

    def spy(kernel: Any, *args: Any) -> None:
        names.append(kernel.fn.__name__)
        launch(kernel, *args)

    monkeypatch.setattr(dispatch, "launch", spy)
    yield names


def inputs(
    shape: tuple[int, ...],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    slope: float | str | None = 0.01,
    residual: str = "none",
    memory_format: torch.memory_format = torch.contiguous_format,
) -> dict[str, Any]:
    """Arguments of `instance_norm`, affine; slope "one" or "channels" is a tensor."""
    slopes = {"one": randn(1, seed=4), "channels": randn(shape[1], seed=4)}
    args: dict[str, Any] = {
        "x": (randn(*shape, seed=0) * 3 + 7).to(dtype, memory_format=memory_format),
        "weight": randn(shape[1], seed=1).float(),
        "bias": randn(shape[1], seed=2).float(),
        "negative_slope": slopes[slope].float() if isinstance(slope, str) else slope,
        "residual": None if residual == "none" else randn(*shape, seed=3).to(dtype, memory_format=memory_format),
        "residual_norm": residual == "normalised",
    }
    return {name: a.to(device) if isinstance(a, Tensor) else a for name, a in args.items()}


def leaves(args: dict[str, Any]) -> dict[str, Any]:
    """The same values with tensors that take gradients of their own."""
    return {name: a.detach().requires_grad_() if isinstance(a, Tensor) else a for name, a in args.items()}


def tensors(args: dict[str, Any]) -> dict[str, Tensor]:
    return {name: a for name, a in args.items() if isinstance(a, Tensor)}


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    scale = max(expected.abs().max().item(), 1.0)
    torch.testing.assert_close(
        actual.double(), expected, rtol=tolerance, atol=tolerance * scale, msg=lambda m: f"{name}: {m}"
    )


def assert_as_in_float64(args: dict[str, Any], dy: Tensor, tolerance: float) -> Tensor:
    """Output and every gradient against float64, which takes the reference on any device; returns the output."""
    ours = leaves(args)
    theirs = leaves({name: a.double() if isinstance(a, Tensor) else a for name, a in args.items()})
    out, expected = instance_norm(**ours), instance_norm(**theirs)
    assert out.dtype == args["x"].dtype
    assert_near(out, expected, tolerance, "y")
    gradients = torch.autograd.grad(out, list(tensors(ours).values()), dy)
    wanted = torch.autograd.grad(expected, list(tensors(theirs).values()), dy.double())
    for (name, leaf), gradient, want in zip(tensors(ours).items(), gradients, wanted):
        assert (gradient.dtype, gradient.shape) == (leaf.dtype, leaf.shape), name
        assert_near(gradient, want, tolerance, name)
    return out


def assert_the_same_bits(args: dict[str, Any], dy: Tensor) -> None:
    """Of output and gradients in two calls."""
    args = leaves(args)
    first, second = (
        (out := instance_norm(**args), *torch.autograd.grad(out, list(tensors(args).values()), dy)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def cotangent(args: dict[str, Any]) -> Tensor:
    x = args["x"]
    return randn(*x.shape, seed=5).to(x.dtype, memory_format=suggested(x)).to(x.device)


def suggested(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last_3d


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual", ["none", "raw", "normalised"])
@pytest.mark.parametrize(
    ("slope", "memory_format"), [(None, FORMATS[0]), ("channels", FORMATS[0]), (-0.2, FORMATS[1]), ("one", FORMATS[1])]
)
def test_output_and_gradients_follow_the_reference_in_float64(
    device: str, residual: str, slope: float | str | None, memory_format: torch.memory_format
) -> None:
    args = inputs(SMALL, device, torch.float32, slope, residual, memory_format)
    out = assert_as_in_float64(args, cotangent(args), TOLERANCES[torch.float32])
    assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.float16)]
    + [pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.float16, torch.bfloat16)],
)
@pytest.mark.parametrize("residual", ["none", "raw", "normalised"])
def test_half_precision_gradients_lose_no_more_than_their_roundings(
    device: str, dtype: torch.dtype, residual: str
) -> None:
    args = inputs(SMALL, device, dtype, "channels", residual, torch.channels_last_3d)
    assert_as_in_float64(args, cotangent(args), TOLERANCES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", dispatch.DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("residual", ["none", "raw", "normalised"])
@pytest.mark.parametrize("shape", [(2, 16, 128, 128, 64), (2, 32, 64, 64, 32), (2, 16, 16, 16, 8), (2, 32, 4, 4, 2)])
def test_the_models_maps_follow_float64_and_themselves(
    shape: tuple[int, ...], residual: str, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    needs_kernels("cuda")
    args = inputs((1, shape[1], 1, 1, 1), "cuda", torch.float32, "channels", residual)
    generator = torch.Generator("cuda").manual_seed(0)

    def random() -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype, memory_format=memory_format)

    args |= {"x": random() * 3 + 7, "residual": None if residual == "none" else random()}
    # Of millions of inputs of the activation some are so near zero that float32 may take the other side.
    exact: dict[str, Any] = {n: a.double() if isinstance(a, Tensor) else a for n, a in args.items()}
    dy = random() * (instance_norm(**exact).abs() > 1e-3)
    assert_as_in_float64(args, dy, TOLERANCES[dtype])
    assert_the_same_bits(args, dy)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("channels", "path"),
    [(1, "splits"), (1, "one tile"), (16, "one tile"), (33, "one tile"), (33, "splits"), (130, "splits")],
)
def test_any_number_of_channels(device: str, channels: int, path: str, request: pytest.FixtureRequest) -> None:
    if path == "splits":
        request.getfixturevalue("splits")
    args = inputs((1, channels, 4, 3, 3), device, torch.float32, "channels", "normalised", torch.channels_last_3d)
    assert_as_in_float64(args, cotangent(args), TOLERANCES[torch.float32])


@pytest.mark.usefixtures("splits")
@pytest.mark.parametrize("device", DEVICES)
def test_more_partial_results_than_a_program_holds_at_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMBINE_TILE", 2)
    args = inputs((5, 2, 6, 5, 5), device, torch.float32, "channels", "normalised", torch.channels_last_3d)
    assert_as_in_float64(args, cotangent(args), TOLERANCES[torch.float32])


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("size", [(1, 1, 2), (5, 5, 13), (8, 8, 8)])
def test_any_number_of_voxels(device: str, memory_format: torch.memory_format, size: tuple[int, int, int]) -> None:
    args = inputs((1, 3, *size), device, torch.float32, 0.1, "raw", memory_format)
    assert_as_in_float64(args, cotangent(args), TOLERANCES[torch.float32])


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual", ["none", "raw", "normalised"])
def test_one_voxel_has_no_gradient_but_that_of_bias_and_raw_residual(device: str, residual: str) -> None:
    args = leaves(inputs((2, 3, 1, 1, 1), device, torch.float32, 0.1, residual))
    out = instance_norm(**args)
    raw = args["residual"] if residual == "raw" else 0
    expected = F.leaky_relu(args["bias"].view(1, 3, 1, 1, 1) + raw, 0.1).expand(2, 3, 1, 1, 1)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    out.sum().backward()
    assert args["x"].grad.abs().max() == 0 and args["weight"].grad.abs().max() == 0
    assert args["bias"].grad.abs().min() > 0
    if args["residual"] is not None:
        assert (args["residual"].grad != 0).all() == (residual == "raw")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("memory_format", "tiles"), list(zip(FORMATS, ["whole pairs", "a ragged one"])))
def test_a_program_that_walks_several_tiles_misses_and_repeats_no_voxel(
    device: str, memory_format: torch.memory_format, tiles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ONE_TILE", 0)
    monkeypatch.setattr(module, "PROGRAMS", 4)
    size = (16, 16, 32) if tiles == "whole pairs" else (19, 17, 31)
    args = inputs((1, 2, *size), device, torch.float32, "one", "normalised", memory_format)
    assert_as_in_float64(args, cotangent(args), TOLERANCES[torch.float32])


@pytest.mark.parametrize("device", DEVICES)
def test_a_map_too_large_for_one_program_takes_three_launches_each_way(device: str, launched: list[str]) -> None:
    needs_kernels(device)
    args = inputs((1, 2, 33, 31, 17), device, torch.float32, 0.01, "raw")
    assert_as_in_float64(args, cotangent(args), TOLERANCES[torch.float32])
    assert launched == [
        *("norm_statistics_kernel", "norm_combine_kernel", "norm_apply_kernel"),
        *("norm_gradient_sums_kernel", "norm_gradient_combine_kernel", "norm_gradient_apply_kernel"),
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_a_small_map_takes_one_launch_and_another_for_gradients_of_parameters(device: str, launched: list[str]) -> None:
    needs_kernels(device)
    args = leaves(inputs(SHAPE, device, torch.float32, 0.01, "normalised"))
    instance_norm(**args).sum().backward()
    assert launched == ["norm_forward_one_tile_kernel", "norm_backward_one_tile_kernel", "norm_gradient_combine_kernel"]
    launched.clear()
    instance_norm(args["x"], negative_slope=0.01).sum().backward()
    assert launched == ["norm_forward_one_tile_kernel", "norm_backward_one_tile_kernel"]


def test_the_reference_is_taken_on_request_and_for_dtypes_without_a_kernel(launched: list[str]) -> None:
    x = randn(*SHAPE, seed=0)
    instance_norm(x)
    instance_norm(x.bfloat16())
    with dispatch.using("reference", "cpu"):
        instance_norm(x.float())
    assert launched == []


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("values", "memory_format"),
    [
        ("mean 10000", FORMATS[0]),
        ("first voxel 0, then mean 10000", FORMATS[1]),
        ("first half 0, then mean 10000", FORMATS[0]),
    ],
)
def test_statistics_hold_far_from_zero(device: str, memory_format: torch.memory_format, values: str) -> None:
    x = randn(1, 2, 12, 9, 10, seed=0) + 1e4
    if values.startswith("first voxel"):
        x[:, :, 0, 0, 0] = 0
    elif values.startswith("first half"):
        x[:, :, :6] = 0
    x = x.float().to(device, memory_format=memory_format)
    residual = x.flip(4)
    out = instance_norm(x, residual=residual, residual_norm=True)
    expected = instance_norm(x.double(), residual=residual.double(), residual_norm=True)
    # A mean near 10000 is itself known to 0.0005 in float32; here in standard deviations, for x and for the residual.
    bound = 2 * 1e-3 / x.double().std((2, 3, 4)).min().item() + 1e-5 * expected.abs().max().item()
    assert (out.double() - expected).abs().max() < bound


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("value", "memory_format"), [(0.1, FORMATS[0]), (12345.678, FORMATS[1])])
def test_a_constant_map_becomes_the_bias_exactly(device: str, memory_format: torch.memory_format, value: float) -> None:
    needs_kernels(device)
    x = torch.full((2, 3, 11, 7, 9), value, device=device).to(memory_format=memory_format)
    bias = torch.tensor([0.5, 0.0, -0.25], device=device)
    out = instance_norm(x, torch.ones(3, device=device), bias, residual=x, residual_norm=True)
    assert torch.equal(out, bias.view(3, 1, 1, 1).expand_as(out))


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize("device", DEVICES)
def test_slope_applies_where_the_input_of_the_activation_is_exactly_zero(device: str) -> None:
    x = torch.ones(1, 2, 4, 4, 4, device=device, requires_grad=True)
    residual = torch.zeros_like(x).requires_grad_()
    dy = randn(*x.shape, seed=0, dtype=torch.float32).to(device)
    for slope in (0.25, torch.full((1,), 0.25, device=device)):
        (gradient,) = torch.autograd.grad(instance_norm(x, negative_slope=slope, residual=residual), residual, dy)
        torch.testing.assert_close(gradient, 0.25 * dy, rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual", ["raw", "normalised"])
@pytest.mark.parametrize("formats", ["contiguous, last, last", "last, contiguous, last", "last, last, contiguous"])
def test_memory_formats_may_differ_between_map_residual_and_gradient(device: str, residual: str, formats: str) -> None:
    of_x, of_residual, of_dy = (FORMATS[name == "last"] for name in formats.split(", "))
    args = inputs(SMALL, device, torch.float32, 0.1, residual, of_x)
    args["residual"] = args["residual"].contiguous(memory_format=of_residual)
    out = assert_as_in_float64(args, cotangent(args).contiguous(memory_format=of_dy), TOLERANCES[torch.float32])
    assert out.is_contiguous(memory_format=of_x)


@pytest.mark.parametrize("device", DEVICES)
def test_any_strides_give_what_a_contiguous_copy_gives(device: str) -> None:
    wide = inputs((2, 6, 5, 8, 3), device, torch.float32, 0.1, "normalised")
    strided = {n: wide[n].transpose(2, 3)[:, ::2] for n in ("x", "residual")}
    parameters = {n: wide[n][::2] for n in ("weight", "bias")}
    dy = torch.ones((), device=device).expand(2, 3, 8, 5, 3)
    args = {**wide, **strided, **parameters, "negative_slope": randn(6, seed=6, dtype=torch.float32).to(device)[::2]}
    assert not any(args[n].is_contiguous() for n in ("x", "residual", "weight", "bias", "negative_slope"))
    assert assert_as_in_float64(args, dy, TOLERANCES[torch.float32]).is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
def test_a_raw_residual_without_activation_gets_the_incoming_gradient_itself(device: str) -> None:
    needs_kernels(device)
    args = leaves(inputs(SHAPE, device, torch.float32, None, "raw"))
    dy = cotangent(args)
    (gradient,) = torch.autograd.grad(instance_norm(**args), args["residual"], dy)
    assert gradient.data_ptr() == dy.data_ptr()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("given", ["none", "weight", "bias", "negative_slope"])
def test_parameters_get_gradients_each_alone_in_their_own_dtype(device: str, given: str) -> None:
    args = inputs(SHAPE, device, torch.float32, "channels")
    alone = {"x": args["x"], **({given: args[given].half()} if given != "none" else {})}
    assert_as_in_float64(alone, cotangent(args), TOLERANCES[torch.float16])


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize("device", DEVICES)
def test_a_second_call_gives_the_same_bits(device: str) -> None:
    args = inputs(SMALL, device, torch.float32, "one", "normalised")
    assert_the_same_bits(args, cotangent(args))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("memory_format", "residual"), list(zip(FORMATS, ["normalised", "raw"])))
def test_every_candidate_is_right(
    device: str, memory_format: torch.memory_format, residual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_kernels(device)
    launch, most = dispatch.launch, 0
    choice = 0

    def chosen(kernel: Any, grid: Any, args: Any, candidates: Any, key: str) -> None:
        nonlocal most
        most = max(most, len(candidates))
        launch(kernel, grid, args, [candidates[choice % len(candidates)]], key)

    monkeypatch.setattr(dispatch, "launch", chosen)
    monkeypatch.setattr(module, "ONE_TILE", 0)
    monkeypatch.setattr(module, "PROGRAMS", 1)
    args = inputs((1, 2, 15, 17, 18), device, torch.float32, "one", residual, memory_format)
    while choice == 0 or choice < most:
        assert_as_in_float64(args, cotangent(args), TOLERANCES[torch.float32])
        choice += 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("slope", "residual"), [(None, "raw"), (0.1, "raw"), ("channels", "normalised")])
def test_the_operators_pass_opcheck(device: str, slope: float | str | None, residual: str) -> None:
    needs_kernels(device)
    memory_format = FORMATS[residual == "raw"]
    args = leaves(inputs((1, 2, 2, 3, 2), device, torch.float32, slope, residual, memory_format))
    x, weight, bias = args["x"], args["weight"], args["bias"]
    slopes = (args["negative_slope"], None) if isinstance(slope, str) else (None, slope)
    forward = (x, weight, bias, EPS, *slopes, args["residual"], args["residual_norm"])
    torch.library.opcheck(torch.ops.glioforge.instance_norm.default, forward)
    stats = torch.ops.glioforge.instance_norm(*forward)[1].detach()
    kept = None if slope is None and residual == "raw" else args["residual"]
    backward = (cotangent(args), x, stats, weight, bias, *slopes, kept, args["residual_norm"])
    detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in backward)
    torch.library.opcheck(torch.ops.glioforge.instance_norm_backward.default, detached)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("memory_format", "slope"), list(zip(FORMATS, ["one", 0.1])))
def test_compiled_without_a_graph_break_it_gives_what_it_gives_eagerly(
    device: str, memory_format: torch.memory_format, slope: float | str
) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(instance_norm, fullgraph=True, backend="aot_eager")
    for shape in ((1, 3, 4, 3, 2), (2, 3, 2, 4, 4)):
        args = leaves(inputs(shape, device, torch.float32, slope, "normalised", memory_format))
        dy = cotangent(args)
        both = [
            (out := f(**args), *torch.autograd.grad(out, list(tensors(args).values()), dy))
            for f in (compiled, instance_norm)
        ]
        for a, b in zip(*both):
            torch.testing.assert_close(a, b)
            assert a.stride() == b.stride()


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_by_inductor_between_other_operations(device: str) -> None:
    needs_kernels(device)
    torch._dynamo.reset()
    args = leaves(inputs(SHAPE, device, torch.float32, 0.1, "raw"))

    def block(x: Tensor, residual: Tensor) -> Tensor:
        return instance_norm(x * 2, negative_slope=0.1, residual=residual + 1).tanh()

    pair = args["x"], args["residual"]
    out, expected = torch.compile(block, fullgraph=True)(*pair), block(*pair)
    torch.testing.assert_close(out, expected)
    for a, b in zip(torch.autograd.grad(out.sum(), pair), torch.autograd.grad(expected.sum(), pair)):
        torch.testing.assert_close(a, b)


def slice_of(t: Tensor, width: int, first: int) -> Tensor:
    """The values of a map as channels `first` and on of a channels_last_3d map of `width` channels, the others 9."""
    batch, channels, *space = t.shape
    wide = torch.full((batch, width, *space), 9, dtype=t.dtype, device=t.device)
    wide = wide.contiguous(memory_format=torch.channels_last_3d)
    wide[:, first : first + channels] = t
    return wide[:, first : first + channels]


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("residual", "slope", "dtype"),
    [
        ("none", 0.1, torch.float32),
        ("raw", 0.1, torch.float16),
        ("raw", None, torch.float32),
        ("normalised", 0.1, torch.float16),
    ],
)
@pytest.mark.parametrize(("channels", "width", "first"), [(3, 7, 2), (16, 32, 16)])
def test_y_and_dy_may_be_slices_of_wider_maps_and_the_rest_of_those_is_left_alone(
    device: str, residual: str, slope: float | None, dtype: torch.dtype, channels: int, width: int, first: int
) -> None:
    needs_kernels(device)
    args = inputs((2, channels, 3, 5, 3), device, dtype, slope, residual, torch.channels_last_3d)
    args = leaves({name: a for name, a in args.items() if name not in ("weight", "bias")})
    leaf = list(tensors(args).values())
    dense = cotangent(args)
    expected = instance_norm(**args)
    wanted = torch.autograd.grad(expected, leaf, dense)
    for _ in range(2):
        out = slice_of(torch.zeros_like(dense), width, first)
        dy = slice_of(dense, width, first)
        y = instance_norm_into(out.data, **args)
        assert y.data_ptr() == out.data_ptr() and y.stride(1) == 1 and y.stride(4) == width
        assert torch.equal(y, expected)
        found = torch.autograd.grad(y, leaf, dy)
        assert all(torch.equal(gradient, want) for gradient, want in zip(found, wanted, strict=True))
        for wide in (out._base, dy._base):
            assert wide is not None
            assert (wide[:, :first] == 9).all() and (wide[:, first + channels :] == 9).all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_program_that_walks_several_tiles_of_a_slice_misses_no_voxel(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_kernels(device)
    monkeypatch.setattr(module, "ONE_TILE", 0)
    monkeypatch.setattr(module, "PROGRAMS", 4)
    args = inputs((1, 2, 19, 17, 31), device, torch.float32, 0.1, "normalised", torch.channels_last_3d)
    args = leaves({name: a for name, a in args.items() if name not in ("weight", "bias")})
    dense = cotangent(args)
    expected = instance_norm(**args)
    y = instance_norm_into(slice_of(torch.zeros_like(dense), 5, 1).data, **args)
    assert torch.equal(y, expected)
    leaf = [args["x"], args["residual"]]
    wanted = torch.autograd.grad(expected, leaf, dense)
    found = torch.autograd.grad(y, leaf, slice_of(dense, 5, 3))
    assert all(torch.equal(gradient, want) for gradient, want in zip(found, wanted, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_a_slice_of_the_gradient_is_not_copied(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_kernels(device)
    args = leaves(inputs(SMALL, device, torch.float32, 0.1, "none", torch.channels_last_3d))
    dy = slice_of(cotangent(args), 4, 2)
    read: list[int] = []
    launch = dispatch.launch

    def spy(kernel: Any, grid: Any, args: Any, *others: Any) -> None:
        read.extend(args[name].data_ptr() for name in ("dy_ptr", "g_ptr") if args.get(name) is not None)
        launch(kernel, grid, args, *others)

    monkeypatch.setattr(dispatch, "launch", spy)
    torch.autograd.grad(instance_norm(**args), args["x"], dy)
    assert read and set(read) == {dy.data_ptr()}


@pytest.mark.parametrize("device", DEVICES)
def test_a_place_that_cannot_be_written_into_is_left_alone(device: str) -> None:
    x = randn(*SMALL, seed=0, dtype=torch.float32).to(device)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    out = slice_of(torch.zeros_like(last), 4, 0)
    for given in (x, last.double()):
        assert not writes_slices(given)
        torch.testing.assert_close(
            instance_norm_into(out, given, negative_slope=0.1), instance_norm(given, negative_slope=0.1)
        )
    assert not out.any()
    assert torch.equal(instance_norm_into(None, last), instance_norm(last))
    if writes_slices(last):
        with pytest.raises(ValueError, match="out is .*float16.* but x is"):
            instance_norm_into(out.half(), last)


def test_fake_tensors_and_other_modes_see_operators_and_no_launch(
    monkeypatch: pytest.MonkeyPatch, launched: list[str]
) -> None:
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    monkeypatch.setattr(dispatch, "path", lambda op, x, key: "triton")
    with FakeTensorMode(), Seen():
        x = torch.empty(SHAPE, requires_grad=True)
        (gradient,) = torch.autograd.grad(instance_norm(x, negative_slope=0.1), x, torch.empty(SHAPE))
    assert gradient.shape == SHAPE and launched == []
    assert [name for name in seen if name.startswith("glioforge")] == [
        "glioforge::instance_norm",
        "glioforge::instance_norm_backward",
    ]
    assert "aten::zeros" not in seen  # nobody asks for a gradient of the statistics


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(device: str, dtype: torch.dtype) -> None:
    args = inputs(SHAPE, device, dtype, "one", "normalised")
    with torch.autocast(device, torch.bfloat16):
        out = instance_norm(**args)
    assert out.dtype == dtype
    torch.testing.assert_close(out, instance_norm(**args), rtol=0, atol=0)


def test_torch_is_taken_where_it_is_faster(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    calls = []

    def compiled(*args: Any) -> Tensor:
        calls.append(args)
        return args[0]

    monkeypatch.setattr(dispatch, "path", lambda op, x, key: "torch")
    monkeypatch.setattr(dispatch, "compiled", lambda function, shape: compiled)
    args = inputs(SHAPE, "meta")  # neither a CPU nor in need of a GPU
    assert instance_norm(**args) is args["x"]
    assert len(calls) == 1 and launched == []


@not_interpreted
@pytest.mark.parametrize("dtype", dispatch.DTYPES)
@pytest.mark.parametrize("slope", [0.01, "one"])
@pytest.mark.parametrize("residual", ["none", "raw", "normalised"])
def test_a_cpu_takes_group_norm_and_loses_nothing_by_it(
    dtype: torch.dtype, slope: float | str, residual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_norm = SimpleNamespace(leaky_relu=F.leaky_relu, prelu=F.prelu)  # the reference would fail
    monkeypatch.setattr(module, "F", no_norm)
    args = inputs((2, 3, 12, 11, 10), "cpu", dtype, slope, residual)
    args["x"] = args["x"] * 100
    out = instance_norm(**args)
    monkeypatch.undo()
    in_float64: dict[str, Any] = {name: a.double() if isinstance(a, Tensor) else a for name, a in args.items()}
    exact = instance_norm(**in_float64)
    with dispatch.using("reference"):
        errors = [(y.double() - exact).abs().max() for y in (out, instance_norm(**args))]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize(("channels", "memory_format"), [(1, FORMATS[1]), (2, FORMATS[0])])
def test_statistics_are_right_in_mixed_layouts(channels: int, memory_format: torch.memory_format) -> None:
    """A map of one channel is both contiguous and channels_last_3d; a residual may have another layout than its map."""
    x = (randn(1, channels, 12, 9, 10, seed=0) + 1e3).float().to(memory_format=memory_format)
    residual = x.flip(4).contiguous(memory_format=torch.channels_last_3d)
    out = instance_norm(x, residual=residual, residual_norm=True)
    expected = instance_norm(x.double(), residual=residual.double(), residual_norm=True)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-3)


@not_interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_without_weight_has_the_statistics_of_float32_in_its_gradient(dtype: torch.dtype) -> None:
    args = leaves({"x": (randn(2, 3, 12, 11, 10, seed=0) + 10).to(dtype), "negative_slope": 0.01})
    in_float64 = leaves({"x": args["x"].detach().double(), "negative_slope": 0.01})
    dy = args["x"].detach() - 10  # in step with the map, so that the statistics count
    instance_norm(**args).backward(dy)
    instance_norm(**in_float64).backward(dy.double())
    exact = in_float64["x"].grad
    error = (args["x"].grad.double() - exact).abs().max() / exact.abs().max()
    assert error < torch.finfo(dtype).eps


@not_interpreted
@pytest.mark.parametrize("without", [(), ("weight",), ("bias",), ("weight", "bias")])
def test_one_voxel_is_its_own_mean_in_float32_too(without: tuple[str, ...]) -> None:
    args = leaves(inputs((2, 5, 1, 1, 1), slope=None) | dict.fromkeys(without))
    out = instance_norm(**args)
    expected = torch.zeros(5) if args["bias"] is None else args["bias"]
    torch.testing.assert_close(out, expected.view(1, 5, 1, 1, 1).expand(2, 5, 1, 1, 1), rtol=0, atol=0)
    out.sum().backward()
    assert not args["x"].grad.any()


@not_interpreted
@pytest.mark.parametrize(("device", "backend"), COMPILED)
@pytest.mark.parametrize(
    ("slope", "residual", "memory_format"),
    [
        (None, "raw", FORMATS[0]),
        (0.1, "none", FORMATS[1]),
        ("one", "raw", FORMATS[1]),
        ("channels", "normalised", FORMATS[0]),
    ],
)
def test_pytorchs_own_path_is_the_reference_compiled_as_one_graph(
    slope: float | str | None,
    residual: str,
    memory_format: torch.memory_format,
    device: str,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(dispatch, "path", lambda op, x, key: "torch")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    monkeypatch.setattr(dispatch, "compiled", dispatch.compiled.__wrapped__)  # without its cache
    for shape in (SHAPE, (1, 3, 1, 1, 1)):
        args = inputs(shape, device, torch.float32, slope, residual, memory_format)
        assert_as_in_float64(args, cotangent(args), TOLERANCES[torch.float32])


def test_shapes_that_are_tuned_separately_have_different_keys() -> None:
    def key(*shape: int, dtype: torch.dtype = torch.bfloat16, last: bool = False, residual: str = "none") -> str:
        x = torch.empty(shape, dtype=dtype, device="meta")
        x = x.to(memory_format=torch.channels_last_3d) if last else x
        return module._key_of(x, None if residual == "none" else x, residual == "normalised")

    space = (128, 128, 64)
    assert key(2, 16, *space) == "N2 C16 S1048576 contiguous bfloat16"
    assert key(3, 16, *space) == key(4, 16, *space)
    others = [key(2, 16, *space, residual=kind) for kind in ("raw", "normalised")]
    others += [key(8, 16, *space), key(2, 32, *space), key(2, 16, 64, 64, 64), key(2, 16, 127, 127, 63)]
    others += [key(2, 16, *space, last=True), key(2, 16, *space, dtype=torch.float16)]
    assert len({key(2, 16, *space), *others}) == 9


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(2, 16, 128, 128, 64), (8, 32, 128, 128, 64), (1, 1, 128, 128, 64)])
def test_a_large_map_fills_a_large_gpu(memory_format: torch.memory_format, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta").to(memory_format=memory_format)
    launches: list[dispatch.Launch] = []
    with dispatch.observed(launches.append):
        y, stats = module.instance_norm_forward(x, None, None, EPS, None, 0.01, None, False)
        module.instance_norm_backward(y, x, stats, None, None, None, 0.01, None, False)
    assert [launch.name for launch in launches][::2] == [
        "norm_statistics_kernel",
        "norm_apply_kernel",
        "norm_gradient_combine_kernel",
    ]
    for launch in launches:
        if "combine" not in launch.name:
            blocks, splits = launch.grid(launch.candidates[0])[:2]
            assert 4 * 132 <= blocks * splits <= 2048 or shape[1] == 1 and blocks * splits >= 132


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS)
def test_offsets_hold_beyond_two_to_the_31_elements(memory_format: torch.memory_format) -> None:
    needs_kernels("cuda")
    shape = (3, 2, 1024, 1024, 512)
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free GPU memory")
    x = torch.empty(shape, dtype=torch.float16, device="cuda", memory_format=memory_format).normal_()
    last = x[2:].clone(memory_format=torch.preserve_format).requires_grad_()
    x.requires_grad_()
    out, alone = instance_norm(x, negative_slope=0.01), instance_norm(last, negative_slope=0.01)
    torch.testing.assert_close(out[2:], alone)
    (dx,) = torch.autograd.grad(out, x, out.detach())
    (dlast,) = torch.autograd.grad(alone, last, alone.detach())
    torch.testing.assert_close(dx[2:], dlast)
