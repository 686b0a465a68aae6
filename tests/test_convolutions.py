"""Convolutions before a norm never add their bias; a projection adds its input gradient to another's, in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.instance_norm import instance_norm
from models.convolutions import NormedConv3d, NormedConvTranspose3d, ProjectionConv3d

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}
"""Largest difference relative to the norm of what is expected."""
FORMATS = [torch.contiguous_format, torch.channels_last_3d]
TRANSPOSED = {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}


class Operations(TorchDispatchMode):
    """Names of the operations within it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


class Pair(nn.Module):
    """A projection and the convolution that shares its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = NormedConv3d(4, 3, kernel_size=3, padding=1)
        self.projection = ProjectionConv3d(4, 3, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        y, x = self.projection(x)
        return self.conv(x).sin() + y

    def plain(self, x: Tensor) -> Tensor:
        conv, projection = self.conv, self.projection
        return nn.functional.conv3d(x, conv.weight, padding=1).sin() + nn.functional.conv3d(x, projection.weight)


def volume(memory_format: torch.memory_format, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(2, 4, 5, 3, 6, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return x.contiguous(memory_format=memory_format).requires_grad_()


def gradients(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad(y, inputs, cotangent.to(y.dtype))


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("ours", "plain", "options"),
    [
        (NormedConv3d, nn.Conv3d, {"kernel_size": 3, "stride": 2, "padding": 1}),
        (NormedConvTranspose3d, nn.ConvTranspose3d, TRANSPOSED),
    ],
)
def test_a_bias_before_a_norm_is_kept_and_frozen_but_neither_added_nor_missed(
    ours: Any, plain: Any, options: dict[str, int]
) -> None:
    torch.manual_seed(0)
    expected, drawn = plain(4, 3, **options).double(), torch.rand(4)
    torch.manual_seed(0)
    conv = ours(4, 3, **options).double()
    assert torch.equal(torch.rand(4), drawn)  # the next layer starts from the same values
    assert conv.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in conv.state_dict().items())
    x, their_x = volume(FORMATS[0]), volume(FORMATS[0])
    y, wanted = conv(x), expected(their_x)
    assert relative(y, wanted) > 0.01
    assert relative(instance_norm(y), instance_norm(wanted)) < TOLERANCES[torch.float64]
    assert not conv.bias.requires_grad
    found = gradients(instance_norm(y), x, conv.weight)
    for gradient, want in zip(found, gradients(instance_norm(wanted), their_x, expected.weight), strict=True):
        assert relative(gradient, want) < TOLERANCES[torch.float64]


@pytest.mark.parametrize(
    ("memory_format", "dtype"),
    [(FORMATS[0], torch.float64), (FORMATS[1], torch.float64), (FORMATS[1], torch.float32)],
)
def test_a_projection_adds_its_input_gradient_to_the_others_without_a_pass_of_its_own(
    memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    pair = Pair().to(dtype)
    x = volume(memory_format, dtype)
    inputs = (x, pair.conv.weight, pair.projection.weight)
    expected = gradients(pair.plain(x), *inputs)
    for _ in range(2):
        y = pair(x)
        assert relative(y, pair.plain(x)) < TOLERANCES[dtype]
        with Operations() as operations:
            found = gradients(y, *inputs)
        assert not {"add", "add_"} & set(operations.names)
        # A CPU's float64 convolution sends back a contiguous gradient in any case.
        in_place = "addmm_" if dtype == torch.float32 else "baddbmm_"
        assert in_place in operations.names
        by_product = x.is_contiguous()  # the projection's weight gradient
        assert operations.names.count("convolution_backward") == 2 - by_product
        for gradient, want in zip(found, expected, strict=True):
            assert relative(gradient, want) < TOLERANCES[dtype]


def test_frozen_weights_leave_the_input_gradient_as_it_was() -> None:
    pair, x = Pair().double(), volume(FORMATS[1])
    expected = gradients(pair.plain(x), x)[0]
    pair.requires_grad_(False)
    y = pair(x)
    with Operations() as operations:
        assert relative(gradients(y, x)[0], expected) < TOLERANCES[torch.float64]
    assert operations.names.count("convolution_backward") == 1


def test_an_input_without_a_gradient_is_given_back_itself() -> None:
    projection = ProjectionConv3d(4, 3, bias=False).double()
    x = volume(FORMATS[0])
    assert projection(x.detach())[1].grad_fn is None
    with torch.no_grad():
        assert projection(x)[1] is x


@pytest.mark.parametrize("memory_format", FORMATS)
def test_autocast_casts_once_and_not_what_is_low_already(memory_format: torch.memory_format) -> None:
    pair = Pair()
    x = volume(memory_format, torch.float32)
    expected = gradients(pair.plain(x), x, pair.projection.weight)
    with torch.autocast("cpu", torch.bfloat16):
        with Operations() as operations:
            y, low = pair.projection(x)
        assert operations.names.count("_to_copy") == 2  # the volume and the weight
        assert y.dtype == low.dtype == torch.bfloat16
        out = pair(x)
    found = gradients(out, x, pair.projection.weight)
    for gradient, want in zip(found, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert relative(gradient, want) < TOLERANCES[torch.bfloat16]
    pair.projection.weight = nn.Parameter(pair.projection.weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16), Operations() as operations:
        pair.projection(low.detach().requires_grad_())
    assert "_to_copy" not in operations.names


def test_a_compiled_pair_is_one_graph_with_the_same_gradients() -> None:
    pair, x = Pair().double(), volume(FORMATS[1])
    compiled = torch.compile(pair, backend="aot_eager", fullgraph=True)
    for found, want in zip(gradients(compiled(x), x), gradients(pair(x), x), strict=True):
        assert relative(found, want) < TOLERANCES[torch.float64]


def test_an_exported_pair_has_plain_operations() -> None:
    program = torch.export.export(Pair().double(), (volume(FORMATS[0]),))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called == {"aten.conv3d.default", "aten.sin.default", "aten.add.Tensor"}
