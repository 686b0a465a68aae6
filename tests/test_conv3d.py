"""Convolutions equal PyTorch's in every layout, dtype and gradient, and leave maps in the layout that they had."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import conv3d as module
from kernels.conv3d import conv3d

LAST, FIRST = torch.channels_last_3d, torch.contiguous_format
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}  # of the largest value
Result = tuple[Tensor, list[Tensor]]


def tensors(kernel: int, channels: tuple[int, int] = (8, 5), size: tuple[int, int, int] = (5, 4, 3)) -> list[Tensor]:
    """x, weight, bias and the gradient of y, in float64."""
    generator = torch.Generator().manual_seed(0)
    into, out = channels
    shapes = (2, into, *size), (out, into, kernel, kernel, kernel), (out,), (2, out, *size)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def results(function: Any, given: list[Tensor], has_bias: bool = True) -> Result:
    """y and the gradients of x, weight and, if there is one, bias."""
    *inputs, dy = given
    inputs = [each.detach().clone().requires_grad_() for each in inputs[: 2 + has_bias]]
    y = function(*inputs)
    return y, list(torch.autograd.grad(y, inputs, dy.to(y.dtype)))


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv3d(x, weight, bias, padding=weight.shape[2] // 2)


def assert_near(found: Result, expected: Result, tolerance: float) -> None:
    for ours, theirs in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.fixture(params=[True, False], ids=["AVX-512", "another CPU"], autouse=True)
def has_avx512(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512_BF16" if request.param else "AVX2")


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("layout", [FIRST, LAST])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kernel", [3, 1])
def test_outputs_and_gradients_are_those_of_pytorch(
    kernel: int, dtype: torch.dtype, layout: torch.memory_format, has_bias: bool
) -> None:
    given = tensors(kernel)
    maps = [each.to(dtype).contiguous(memory_format=layout) if each.dim() == 5 else each.to(dtype) for each in given]
    found = results(conv3d, maps, has_bias)
    expected = results(plain, [each.double() for each in maps], has_bias)
    assert_near(found, expected, TOLERANCES[dtype])
    if plain(*maps[:2]).is_contiguous(memory_format=layout):  # not in float64, nor small ones on one thread
        assert found[0].is_contiguous(memory_format=layout)
        assert found[1][0].is_contiguous(memory_format=layout)
        assert found[1][1].stride() == maps[1].stride() or layout == LAST


@pytest.mark.parametrize("channels", [(1, 1), (16, 32), (4, 16), (17, 3), (8, 8)])
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 6, 2)])
def test_any_channels_and_sizes(channels: tuple[int, int], size: tuple[int, int, int]) -> None:
    for kernel in (3, 1):
        given = [each.float() for each in tensors(kernel, channels, size)]
        assert_near(
            results(conv3d, given), results(plain, [each.double() for each in given]), TOLERANCES[torch.float32]
        )


def test_only_maps_that_onednn_would_pad_are_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def apply(x: Tensor, weight: Tensor, bias: None) -> Tensor:
        taken.append(weight.shape[0])
        return x

    monkeypatch.setattr(module._LastInside, "apply", apply)
    for out in (8, 16, 24, 32):
        conv3d(*(each.float() for each in tensors(3, (8, out))[:2]))
    assert taken == ([8, 24] if torch.backends.cpu.get_cpu_capability() == "AVX512_BF16" else [])


@pytest.mark.parametrize("kernel", [3, 1])
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_float32(kernel: int) -> None:
    given = [each.float() for each in tensors(kernel)]
    with torch.autocast("cpu", torch.bfloat16):
        found = results(conv3d, given)
    assert found[0].dtype == torch.bfloat16 and all(each.dtype == torch.float32 for each in found[1])
    lowered = [each.bfloat16().double() for each in given]
    assert_near(found, results(plain, lowered), TOLERANCES[torch.bfloat16])


def test_rows_are_as_wide_as_the_operands_of_the_product() -> None:
    """Four channels in float32 fill 16 bytes, but a product under autocast reads them in half."""
    x, weight = torch.ones(2, 4, 3, 3, 3).contiguous(memory_format=LAST), torch.ones(8, 4, 1, 1, 1)
    assert module._has_wide_rows(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not module._has_wide_rows(x, weight)


@pytest.mark.parametrize("kernel", [3, 1])
def test_compiled_whole(kernel: int) -> None:
    given = [each.float() for each in tensors(kernel)]
    compiled = torch.compile(conv3d, backend="aot_eager", fullgraph=True)
    assert_near(results(compiled, given), results(plain, [each.double() for each in given]), TOLERANCES[torch.float32])


def test_an_image_without_a_gradient_gets_none() -> None:
    x, weight, *_ = (each.float() for each in tensors(3))
    weight.requires_grad_()
    conv3d(x, weight).sum().backward()
    assert x.grad is None and weight.grad is not None


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        ((2, 4, 3, 3), (4, 4, 3, 3, 3), r"x of shape \(2, 4, 3, 3\)"),
        ((2, 4, 3, 3, 3), (4, 5, 3, 3, 3), r"weight of \(4, 5, 3, 3, 3\) for x with 4 channels"),
        ((2, 4, 3, 3, 3), (4, 4, 5, 5, 5), r"must be \(out channels, 4, 3, 3, 3\)"),
    ],
)
def test_wrong_shapes_are_refused(x: tuple[int, ...], weight: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conv3d(torch.zeros(x), torch.zeros(weight))
