"""Doubling by a transposed convolution against its equation, and its kernels against PyTorch in float64.

Which path a call takes depends on the run: see `kernel_paths`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_paths import DEVICES, needs_kernels, not_interpreted, runs_kernels
from torch import Tensor, nn

from kernels import dispatch
from kernels import up_conv as module
from kernels.up_conv import up_conv, up_conv_into

pytestmark = pytest.mark.kernel

FIRST, LAST = torch.contiguous_format, torch.channels_last_3d
SHAPE = (2, 5, 3, 4, 2)
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of an element relative to itself, and to the largest of its tensor: a few units in the last place of the dtype."""


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(
    shape: tuple[int, ...], c_out: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """x, channels_last_3d, and weight, as nn.ConvTranspose3d makes it; with gradients."""
    x = randn(*shape, seed=0, dtype=dtype).to(device, memory_format=LAST)
    weight = randn(shape[1], c_out, 2, 2, 2, seed=1, dtype=dtype).to(device)
    return x.requires_grad_(), weight.requires_grad_()


def sliced(tensor: Tensor, before: int = 3, after: int = 2) -> Tensor:
    """The same values as a slice of the channels of a wider channels_last_3d tensor of NaN."""
    batch, channels, *space = tensor.shape
    wide = tensor.new_full((batch, before + channels + after, *space), float("nan")).to(memory_format=LAST)
    part = wide[:, before : before + channels]
    part.copy_(tensor.detach())
    return part.requires_grad_(tensor.requires_grad)


def out_shape(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    return x.shape[0], weight.shape[1], *(2 * size for size in x.shape[2:])


def cotangent(x: Tensor, weight: Tensor) -> Tensor:
    return randn(*out_shape(x, weight), seed=2, dtype=x.dtype).to(x.device, memory_format=LAST)


def into_slice(x: Tensor, weight: Tensor) -> Tensor:
    """`up_conv_into` the second half of a buffer."""
    batch, channels, *space = out_shape(x, weight)
    dtype = torch.float16 if torch.is_autocast_enabled(x.device.type) else x.dtype
    buffer = torch.zeros((batch, 2 * channels, *space), dtype=dtype, device=x.device).to(memory_format=LAST)
    return up_conv_into(x, weight, buffer[:, channels:])


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    scale = max(expected.abs().max().item(), 1.0)
    torch.testing.assert_close(
        actual.double(), expected, rtol=tolerance, atol=tolerance * scale, msg=lambda m: f"{name}: {m}"
    )


def assert_as_in_float64(
    x: Tensor, weight: Tensor, dy: Tensor | None = None, op: Callable[[Tensor, Tensor], Tensor] = up_conv
) -> tuple[Tensor, Tensor]:
    """Output and both gradients against PyTorch's convolution in float64; returns the gradients."""
    dy = cotangent(x, weight) if dy is None else dy
    y = op(x, weight)
    assert y.dtype == x.dtype
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = F.conv_transpose3d(exact[0], exact[1], stride=2)
    tolerance = TOLERANCES[x.dtype]
    assert_near(y, expected, tolerance, "y")
    gradients = torch.autograd.grad(y, (x, weight), dy)
    wanted = torch.autograd.grad(expected, exact, dy.double())
    for name, leaf, gradient, want in zip(("x", "weight"), (x, weight), gradients, wanted):
        assert (gradient.dtype, gradient.shape) == (leaf.dtype, leaf.shape), name
        assert_near(gradient, want, tolerance, name)
    return gradients  # type: ignore[return-value]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dispatch.Launch]]:
    """Launches as they are made."""
    launches: list[dispatch.Launch] = []
    launch = dispatch.launch

    def spy(*args: Any) -> None:
        launches.append(dispatch.Launch(*args))
        launch(*args)

    monkeypatch.setattr(dispatch, "launch", spy)
    yield launches


@not_interpreted
@pytest.mark.parametrize("op", [up_conv, into_slice])
def test_output_and_gradients_follow_the_equation(op: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, weight = inputs(SHAPE, 3, torch.float64)
    y = op(x, weight)
    blocks = torch.einsum("bcxyz,coijk->boxiyjzk", x, weight)
    expected = blocks.reshape(y.shape)
    tolerance = TOLERANCES[torch.float64]
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    dy = cotangent(x, weight)
    pairs = zip(torch.autograd.grad(y, (x, weight), dy), torch.autograd.grad(expected, (x, weight), dy))
    for gradient, want in pairs:
        torch.testing.assert_close(gradient, want, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", [FIRST, LAST])
def test_it_equals_the_module_that_it_replaces(device: str, memory_format: torch.memory_format) -> None:
    x, _ = inputs(SHAPE, 3, device=device)
    up = nn.ConvTranspose3d(5, 3, kernel_size=2, stride=2, bias=False).to(device, memory_format=memory_format)  # type: ignore[call-overload]
    torch.testing.assert_close(up_conv(x, up.weight), up(x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "c_out"),
    [
        ((1, 1, 5, 3, 7), 1),
        ((2, 3, 1, 4, 3), 3),
        ((1, 17, 4, 1, 5), 16),
        ((3, 32, 3, 5, 1), 17),
        ((1, 32, 1, 1, 1), 16),
        ((2, 510, 2, 1, 2), 3),
        ((2, 16, 6, 7, 4), 32),
    ],
)
def test_any_number_of_channels_and_voxels(device: str, shape: tuple[int, ...], c_out: int, dtype: torch.dtype) -> None:
    assert_as_in_float64(*inputs(shape, c_out, dtype, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("c_in", "c_out"), [(3, 1), (16, 17), (32, 16)])
def test_slices_are_read_and_written_in_place(
    device: str, c_in: int, c_out: int, dtype: torch.dtype, launched: list[dispatch.Launch]
) -> None:
    x, weight = inputs((2, c_in, 3, 2, 5), c_out, dtype, device)
    x, dy = sliced(x), sliced(cotangent(x, weight))
    assert_as_in_float64(x, weight, dy, into_slice)
    if runs_kernels(device):
        forward, gradient, of_weight, _ = launched
        assert forward.args["stride_x"] == of_weight.args["stride_x"] == c_in + 5
        assert forward.args["stride_y"] == 2 * c_out
        assert gradient.args["stride_y"] == of_weight.args["stride_y"] == c_out + 5
        assert of_weight.args["x_ptr"].data_ptr() == x.data_ptr()
        assert gradient.args["dy_ptr"].data_ptr() == dy.data_ptr()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("first", [0, 17], ids=["first half", "second half"])
def test_the_rest_of_the_buffer_keeps_its_bits(device: str, first: int, dtype: torch.dtype) -> None:
    x, weight = inputs((2, 16, 3, 5, 2), 17, dtype, device)
    buffer = randn(2, 34, 6, 10, 4, seed=3, dtype=dtype).to(device, memory_format=LAST)
    before = buffer.clone()
    y = up_conv_into(x, weight, buffer[:, first : first + 17])
    rest = slice(17 - first, 34 - first)
    assert torch.equal(buffer[:, rest], before[:, rest])
    assert torch.equal(buffer[:, first : first + 17], up_conv(x, weight))
    assert y.data_ptr() == buffer[:, first:].data_ptr() and y.stride() == buffer[:, :17].stride()
    assert not buffer.requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_a_buffer_of_both_halves_has_the_gradients_of_a_concatenation(device: str) -> None:
    x, weight = inputs(SHAPE, 3, device=device)
    other, other_weight = inputs((2, 2, 3, 4, 2), 3, device=device)

    class Joined(torch.autograd.Function):
        """As a decoder joins the halves of a buffer that their makers have written."""

        @staticmethod
        def forward(ctx: Any, left: Tensor, right: Tensor, buffer: list[Tensor]) -> Tensor:
            return buffer[0].detach()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
            return dy[:, :3], dy[:, 3:], None

    buffer = torch.empty((2, 6, 6, 8, 4), device=device, memory_format=LAST)
    halves = up_conv_into(x, weight, buffer[:, :3]), up_conv_into(other, other_weight, buffer[:, 3:])
    joined = Joined.apply(*halves, [buffer])
    expected = torch.cat([up_conv(x, weight), up_conv(other, other_weight)], dim=1)
    torch.testing.assert_close(joined, expected)
    leaves = x, weight, other, other_weight
    dy = randn(2, 6, 6, 8, 4, seed=4).to(device, memory_format=LAST)
    for a, b in zip(torch.autograd.grad(joined, leaves, dy), torch.autograd.grad(expected, leaves, dy)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", [FIRST, LAST])
def test_a_weights_gradient_has_its_memory_format(device: str, memory_format: torch.memory_format) -> None:
    x, weight = inputs(SHAPE, 3, device=device)
    weight = weight.detach().to(memory_format=memory_format).requires_grad_()
    _, dweight = assert_as_in_float64(x, weight)
    if runs_kernels(device):
        assert dweight.stride() == weight.stride()


@pytest.mark.parametrize("device", DEVICES)
def test_a_weight_in_channels_last_memory_is_read_in_place(device: str, launched: list[dispatch.Launch]) -> None:
    needs_kernels(device)
    x, weight = inputs(SHAPE, 3, device=device)
    weight = weight.detach().to(memory_format=LAST).requires_grad_()
    up_conv(x, weight).sum().backward()
    read = [launch.args["weight_ptr"] for launch in launched if "weight_ptr" in launch.args]
    assert len(read) == 2 and all(tensor.data_ptr() == weight.data_ptr() for tensor in read)


@pytest.mark.parametrize("device", DEVICES)
def test_a_weight_and_a_gradient_may_have_any_strides(device: str) -> None:
    x, weight = inputs(SHAPE, 3, device=device)
    weight = weight.detach().permute(0, 1, 4, 3, 2).requires_grad_()
    for dy in (
        torch.ones((), device=device).expand(out_shape(x, weight)),
        cotangent(x, weight).contiguous(),
        cotangent(x, weight).transpose(2, 4).contiguous(memory_format=LAST).transpose(2, 4),
    ):
        assert_as_in_float64(x, weight, dy)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_voxel_gives_the_kernel_back_where_it_is(device: str, dtype: torch.dtype) -> None:
    weight = randn(4, 3, 2, 2, 2, seed=0, dtype=dtype).to(device)
    x = torch.zeros((2, 4, 3, 4, 5), dtype=dtype, device=device).to(memory_format=LAST)
    x[1, 2, 1, 3, 4] = 1
    y = up_conv(x, weight)
    assert torch.equal(y[1, :, 2:4, 6:8, 8:10], weight[2])
    assert y.count_nonzero() == weight[2].count_nonzero()


@pytest.mark.parametrize("device", DEVICES)
def test_a_second_call_gives_the_same_bits(device: str) -> None:
    x, weight = inputs((2, 17, 6, 7, 8), 3, torch.float16, device)
    dy = cotangent(x, weight)
    first, second = ((y := into_slice(x, weight), *torch.autograd.grad(y, (x, weight), dy)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("device", DEVICES)
def test_chunks_of_rows_join_to_the_whole_sum(
    device: str, launched: list[dispatch.Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAST_CHUNK", 32)
    monkeypatch.setattr(module, "CHUNK_STEP", 32)
    x, weight = inputs((3, 3, 9, 11, 4), 2, torch.float32, device)
    assert_as_in_float64(x, weight)
    if runs_kernels(device):
        assert [launch.args["splits"] for launch in launched[3:]] == [38]


@pytest.mark.parametrize("device", DEVICES)
def test_a_forward_takes_one_launch_and_a_backward_three(device: str, launched: list[dispatch.Launch]) -> None:
    needs_kernels(device)
    x, weight = inputs(SHAPE, 3, device=device)
    for op in (up_conv, into_slice):
        launched.clear()
        op(x, weight).sum().backward()
        parts = ("forward", "gradient", "weight_gradient", "join")
        assert [launch.name for launch in launched] == [f"up_conv_{part}_kernel" for part in parts]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", [up_conv, into_slice])
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_a_gradient_that_is_not_needed_is_not_computed(
    device: str, frozen: str, op: Callable[[Tensor, Tensor], Tensor], launched: list[dispatch.Launch]
) -> None:
    x, weight = inputs(SHAPE, 3, device=device)
    (x if frozen == "x" else weight).requires_grad_(False)
    op(x, weight).sum().backward()
    assert (x.grad is None) == (frozen == "x") and (weight.grad is None) == (frozen == "weight")
    if runs_kernels(device):
        names = {launch.name for launch in launched[1:]}
        wanted = {"weight_gradient", "join"} if frozen == "x" else {"gradient"}
        assert names == {f"up_conv_{part}_kernel" for part in wanted}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "c_out"), [(torch.float32, 8), (torch.float16, 8), (torch.float16, 3)])
def test_every_candidate_is_right(device: str, dtype: torch.dtype, c_out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_kernels(device)
    launch, most = dispatch.launch, 0
    choice = 0

    def chosen(kernel: Any, grid: Any, args: Any, candidates: Any, key: str) -> None:
        nonlocal most
        most = max(most, len(candidates))
        launch(kernel, grid, args, [candidates[choice % len(candidates)]], key)

    monkeypatch.setattr(dispatch, "launch", chosen)
    x, weight = inputs((1, 72, 7, 5, 6), c_out, dtype, device)
    while choice == 0 or choice < most:
        assert_as_in_float64(x, weight)
        choice += 1


def test_offsets_pass_two_to_the_31() -> None:
    """In the interpreter: memory that is not written takes no pages. Eight voxels are 5 * 2^26 elements apart."""
    needs_kernels("cpu")
    stride, weight = 5 * 2**26, randn(3, 2, 2, 2, 2, seed=0, dtype=torch.float16)
    memory = torch.empty(7 * stride + 2, dtype=torch.float16)
    out = memory.as_strided((1, 2, 2, 2, 2), (8 * stride, 1, 4 * stride, 2 * stride, stride))
    x = torch.ones(1, 3, 1, 1, 1, dtype=torch.float16)
    y = up_conv_into(x, weight, out)
    assert 7 * stride > 2**31
    torch.testing.assert_close(y, weight.float().sum(0, keepdim=True).half())
    weight.requires_grad_()
    up_conv(x, weight).backward(out)
    torch.testing.assert_close(weight.grad, out.expand(3, -1, -1, -1, -1))


@pytest.mark.parametrize("device", DEVICES)
def test_the_operators_pass_opcheck(device: str) -> None:
    needs_kernels(device)
    x, weight = inputs((1, 3, 2, 3, 2), 2, device=device)
    torch.library.opcheck(torch.ops.glioforge.up_conv.default, (x, weight))
    torch.library.opcheck(torch.ops.glioforge.up_conv.default, (sliced(x), weight))
    dy, x, weight = cotangent(x, weight), x.detach(), weight.detach()
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.glioforge.up_conv_backward.default, (dy, x, weight, *needs))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", [up_conv, into_slice])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_without_a_graph_break_it_gives_what_it_gives_eagerly(
    device: str, op: Callable[[Tensor, Tensor], Tensor], autocast: bool
) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for shape in ((2, 3, 4, 3, 2), (3, 3, 2, 4, 4)):
        x, weight = inputs(shape, 2, device=device)
        dy = cotangent(x, weight)
        both = []
        for function in (compiled, op):
            with torch.autocast(device, torch.float16, enabled=autocast):
                y = function(x, weight)
            both.append((y, *torch.autograd.grad(y, (x, weight), dy.to(y.dtype))))
        assert both[0][0].dtype == (torch.float16 if autocast else torch.float32)
        for a, b in zip(*both):
            torch.testing.assert_close(a, b)
            assert a.stride() == b.stride() or not runs_kernels(device)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_it_writes_its_destination(device: str) -> None:
    torch._dynamo.reset()
    x, weight = inputs(SHAPE, 3, device=device)
    buffer = torch.zeros((2, 6, 6, 8, 4), device=device).to(memory_format=LAST)

    def write(x: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
        return up_conv_into(x, weight, buffer[:, 3:]) * 1

    y = torch.compile(write, fullgraph=True, backend="aot_eager")(x, weight, buffer)
    torch.testing.assert_close(buffer[:, 3:], y)
    torch.testing.assert_close(y, up_conv(x, weight))
    assert not buffer[:, :3].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", [up_conv, into_slice])
def test_autocast_converts_as_for_a_convolution(device: str, op: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, weight = inputs(SHAPE, 3, device=device)
    half = x.detach().half(), weight.detach().half()
    with torch.autocast(device, torch.float16):
        y = op(x, weight)
        assert F.conv_transpose3d(x, weight, stride=2).dtype == y.dtype == torch.float16
    torch.testing.assert_close(y, up_conv(*half), rtol=0, atol=0)
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    with torch.autocast(device, torch.float16):
        assert up_conv(x.detach().double(), weight.detach().double()).dtype == torch.float64


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_leaves_a_weight_of_its_dtype_alone(device: str, launched: list[dispatch.Launch]) -> None:
    needs_kernels(device)
    x, weight = inputs(SHAPE, 3, device=device)
    half = weight.detach().half().to(memory_format=LAST)
    with torch.autocast(device, torch.float16):
        up_conv(x, half)
    assert launched[0].args["weight_ptr"].data_ptr() == half.data_ptr()


def test_pytorchs_convolution_is_taken_on_request_and_where_no_kernel_fits(launched: list[dispatch.Launch]) -> None:
    x, weight = inputs(SHAPE, 3)
    up_conv(x.double(), weight.double())
    up_conv(x.bfloat16(), weight.bfloat16())
    for op in (up_conv, into_slice):
        assert_as_in_float64(x.detach().contiguous().requires_grad_(), weight, op=op)
        assert_as_in_float64(x.detach().transpose(2, 3).requires_grad_(), weight, op=op)
    with dispatch.using("reference", "cpu"):
        assert_as_in_float64(x, weight)
    assert launched == []


def test_pytorchs_convolution_is_taken_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, launched: list[dispatch.Launch]
) -> None:
    asked = []

    def path(op: str, x: Tensor, key: str) -> str:
        asked.append(f"{op} {key}")
        return "torch"

    monkeypatch.setattr(dispatch, "path", path)
    x, weight = inputs(SHAPE, 3)
    for op in (up_conv, into_slice):
        assert_as_in_float64(x, weight, op=op)
    assert asked == ["up_conv C5 O3 M64 float32", "up_conv C5 O3 M64 float32 slice"] and launched == []


def test_an_exported_graph_has_pytorchs_convolution() -> None:
    class Up(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return up_conv(x, weight)

    x, weight = (tensor.detach() for tensor in inputs(SHAPE, 3))
    program = torch.export.export(Up(), (x, weight))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert len(targets) == 1 and "conv_transpose3d" in targets[0]


def buffer_slice(dtype: torch.dtype = torch.float32, memory_format: torch.memory_format = LAST) -> Tensor:
    return torch.zeros((2, 6, 6, 8, 4), dtype=dtype).to(memory_format=memory_format)[:, :3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 4, 4, 4)}, r"x of shape \(5, 4, 4, 4\) must have the axes \(batch, channels, X, Y, Z\)"),
        ({"x": torch.zeros(SHAPE, dtype=torch.int32)}, "x of torch.int32 must be floating point: convert with"),
        ({"weight": [1.0]}, "weight must be a tensor, not list"),
        ({"weight": torch.zeros(4, 3, 2, 2, 2)}, r"weight of shape \(4, 3, 2, 2, 2\) must be \(5, C_out, 2, 2, 2\)"),
        ({"weight": torch.zeros(5, 3, 3, 3, 3)}, r"weight of shape .* nn.ConvTranspose3d\(kernel_size=2, stride=2\)"),
        ({"weight": torch.zeros(5, 0, 2, 2, 2)}, r"weight of shape \(5, 0, 2, 2, 2\) must be"),
        ({"weight": torch.zeros(5, 3, 2, 2, 2).half()}, "weight of torch.float16 but x of torch.float32: convert one"),
        ({"weight": torch.zeros(5, 3, 2, 2, 2, device="meta")}, "weight on meta but x on cpu: move both"),
        ({"out": [1.0]}, "out must be a tensor, not list"),
        ({"out": torch.zeros(2, 3, 6, 8, 5)}, r"out is \(2, 3, 6, 8, 5\).*the result is \(2, 3, 6, 8, 4\)"),
        ({"out": buffer_slice(dtype=torch.float16)}, "out is .* torch.float16; the result is .* torch.float32"),
        ({"out": buffer_slice().to("meta")}, "out on meta but x on cpu: move both"),
        ({"out": buffer_slice().requires_grad_()}, r"out requires a gradient; .* give out.detach\(\)"),
        ({"out": buffer_slice(memory_format=FIRST)}, "out has strides .* must be adjacent .* take a slice of channels"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    args = {"x": torch.zeros(SHAPE), "weight": torch.zeros(5, 3, 2, 2, 2), "out": buffer_slice(), **change}
    with pytest.raises(ValueError, match=message):
        up_conv_into(**args)
    if "out" not in change:
        with pytest.raises(ValueError, match=message):
            up_conv(args["x"], args["weight"])


@pytest.mark.parametrize(
    ("x", "stride"),
    [
        (torch.empty(2, 3, 4, 5, 6).to(memory_format=LAST), 3),
        (torch.empty(2, 8, 4, 5, 6).to(memory_format=LAST)[:, 2:5], 8),
        (torch.empty(2, 3, 4, 5, 6), None),
        (torch.empty(2, 1, 4, 5, 6), 1),
        (torch.empty(2, 3, 1, 1, 1), 3),
        (torch.empty(1, 3, 1, 1, 1)[:, :2], 2),
        (torch.empty(2, 3, 4, 5, 6).to(memory_format=LAST)[:, :, 1:], None),
        (torch.empty(2, 3, 4, 5, 6).to(memory_format=LAST)[..., ::2], 6),
        (torch.empty(2, 3, 4, 5, 6).to(memory_format=LAST)[..., ::5], None),
        (torch.empty(2, 3, 4, 5, 6).to(memory_format=LAST).transpose(2, 4), None),
        (torch.empty(2, 3, 1, 1, 1).expand(2, 3, 4, 5, 6), None),
        (torch.empty(1, 3, 1, 1, 1).expand(1, 3, 4, 5, 6), None),
    ],
)
def test_rows_are_evenly_spaced_voxels_of_adjacent_channels(x: Tensor, stride: int | None) -> None:
    assert module._row_stride(x) == stride


def test_shapes_that_are_tuned_separately_have_different_keys() -> None:
    def key(*shape: int, c_out: int = 16, dtype: torch.dtype = torch.bfloat16, is_slice: bool = False) -> str:
        return module._key(torch.Size(shape), c_out, dtype, is_slice)

    shape = (2, 32, 64, 64, 32)
    assert key(*shape) == "C32 O16 M262144 bfloat16"
    assert key(3, *shape[1:]) == key(4, *shape[1:])
    others = [key(4, *shape[1:]), key(2, 64, *shape[2:]), key(*shape, c_out=32), key(*shape, dtype=torch.float16)]
    assert len({key(*shape), *others, key(*shape, is_slice=True)}) == 6


@pytest.mark.parametrize("rows", [33, 60, 64])
def test_rows_of_one_key_have_the_same_candidates(rows: int) -> None:
    for is_forward in (True, False):
        candidates = module._product_configs(rows, 32, 16, torch.bfloat16, is_forward)
        assert candidates == module._product_configs(64, 32, 16, torch.bfloat16, is_forward) and len(candidates) <= 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("shape", "c_out"), [((2, 32, 64, 64, 32), 16), ((2, 64, 32, 32, 16), 32)])
def test_a_large_map_fills_a_large_gpu(shape: tuple[int, ...], c_out: int, dtype: torch.dtype) -> None:
    x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=LAST)
    weight = torch.empty(shape[1], c_out, 2, 2, 2, dtype=dtype, device="meta").to(memory_format=LAST)
    launches: list[dispatch.Launch] = []
    with dispatch.observed(launches.append):
        y = module.up_conv_forward(x, weight)
        module.up_conv_backward(y, x, weight, True, True)
    for launch in launches[:3]:
        grid = launch.grid(launch.candidates[0])
        assert torch.Size(grid).numel() >= 128 and len(launch.candidates) <= 3
    chunk, splits = (launches[2].args["chunk"], launches[3].args["splits"])
    assert chunk * (splits - 1) < x[:, 0].numel() <= chunk * splits
    assert all(chunk % config["BLOCK_K"] == 0 for config in launches[2].candidates)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", dispatch.DTYPES)
@pytest.mark.parametrize(
    ("shape", "c_out"),
    [
        ((2, 512, 8, 8, 4), 32),
        ((2, 512, 8, 8, 4), 128),
        ((2, 128, 16, 16, 8), 64),
        ((2, 64, 32, 32, 16), 32),
        ((2, 32, 64, 64, 32), 16),
        ((2, 768, 8, 8, 4), 128),
    ],
)
def test_the_models_doublings_follow_float64_and_themselves(
    shape: tuple[int, ...], c_out: int, dtype: torch.dtype
) -> None:
    needs_kernels("cuda")
    x, weight = inputs(shape, c_out, dtype, "cuda")
    dy = sliced(cotangent(x, weight), c_out, 0)
    with dispatch.using("triton"):
        first, second = (assert_as_in_float64(x, weight, dy, into_slice) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
