"""Residual add and LayerNorm against torch's own in float64.

A plain run tests the reference, other runs the kernels (see `kernel_paths`), except for float64 and in the interpreter
bfloat16, which take the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_paths import COMPILED, DEVICES, needs_kernels, runs_kernels
from torch import Tensor

from kernels import dispatch, layer_norm
from kernels.layer_norm import (
    layer_norm_backward,
    layer_norm_forward,
    residual_layer_norm,
    residual_layer_norm_reference,
)

pytestmark = pytest.mark.kernel
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest error over the largest true value, by the dtype of the result: half precision is rounded once."""
EPS = 1e-5
# (B, N, D): one token, odd sizes, a last chunk that is not full.
SHAPES = [(1, 1, 8), (1, 1, 130), (2, 3, 5), (1, 7, 51), (2, 11, 40)]
HALF = [torch.float16] if dispatch.INTERPRETED else [torch.float16, torch.bfloat16]
"""In the interpreter bfloat16 takes the reference, as in a plain run."""


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device; kernels are required where they can run."""
    with dispatch.using("triton" if runs_kernels(request.param) else "auto", request.param):
        yield request.param


@dataclass
class Inputs:
    """What one call takes."""

    tokens: Tensor
    update: Tensor | None
    weight: Tensor
    bias: Tensor
    stream_bias: Tensor | None = None

    def given(self) -> list[Tensor]:
        """The tensors that there are."""
        return [x for x in vars(self).values() if x is not None]

    def arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """Of the operation."""
        return self.tokens, self.update, self.weight, self.bias, EPS, dtype, self.stream_bias

    def call(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The operation on them."""
        return residual_layer_norm(*self.arguments(dtype))

    def double(self) -> Inputs:
        """The same in float64, of their own."""
        wide = [None if x is None else x.detach().double().requires_grad_() for x in vars(self).values()]
        return Inputs(*wide)  # type: ignore[arg-type]


def random(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def make_inputs(
    shape: tuple[int, int, int],
    device: str,
    update: torch.dtype | None,
    tokens: torch.dtype = torch.float32,
    stream_bias: torch.dtype | None = None,
) -> Inputs:
    """Tokens with a mean and a spread far from 0 and 1, as a residual stream has."""
    made = [
        3 + 2 * random(shape, tokens, device, 0),
        None if update is None else random(shape, update, device, 1),
        random(shape[2:], torch.promote_types(tokens, torch.float32), device, 2),
        random(shape[2:], torch.promote_types(tokens, torch.float32), device, 3),
        None if stream_bias is None else random(shape[2:], stream_bias, device, 6),
    ]
    return Inputs(*(None if x is None else x.requires_grad_() for x in made))  # type: ignore[arg-type]


def in_float64(inputs: Inputs, dstream: Tensor | None, dy: Tensor | None) -> list[Tensor]:
    """Stream, norm and gradients by torch's own functions in float64."""
    wide = inputs.double()
    stream = wide.tokens if wide.update is None else wide.tokens + wide.update
    y = F.layer_norm(stream, wide.weight.shape, wide.weight, wide.bias, EPS)
    if wide.stream_bias is not None:
        stream = stream + wide.stream_bias
    wanted = [(out, grad.double()) for out, grad in ((stream, dstream), (y, dy)) if grad is not None]
    outputs, gradients = zip(*wanted, strict=True)
    found = torch.autograd.grad(outputs, wide.given(), gradients, materialize_grads=True)
    return [stream.detach(), y.detach(), *found]


def assert_norm_is_right(inputs: Inputs, dtype: torch.dtype, dstream: Tensor | None, dy: Tensor | None) -> None:
    """Both results and every gradient against float64; a gradient relative to the largest, or to 1."""
    stream, y = inputs.call(dtype)
    assert y.dtype == dtype
    wanted = [(out, grad) for out, grad in ((stream, dstream), (y, dy)) if grad is not None]
    outputs, gradients = zip(*wanted, strict=True)
    found = torch.autograd.grad(outputs, inputs.given(), gradients, materialize_grads=True)
    names = ["stream", "y", *(f"d{name}" for name, x in vars(inputs).items() if x is not None)]
    expected = in_float64(inputs, dstream, dy)
    for name, x, truth in zip(names, (stream.detach(), y.detach(), *found), expected, strict=True):
        error = ((x.double() - truth).abs().max() / truth.abs().max().clamp_min(1)).item()
        assert x.shape == truth.shape and error <= TOLERANCES[x.dtype], f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("update", [None, torch.float32, *HALF])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_size_and_dtype_equals_float64(
    shape: tuple[int, int, int], update: torch.dtype | None, dtype: torch.dtype, device: str
) -> None:
    gradients = random(shape, torch.float32, device, 4), random(shape, dtype, device, 5)
    assert_norm_is_right(make_inputs(shape, device, update), dtype, *gradients)


@pytest.mark.parametrize("stream_bias", [torch.float32, *HALF])
@pytest.mark.parametrize("update", [None, *HALF])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 50, 40)], ids=str)
def test_a_bias_of_the_stream_is_in_the_stream_and_not_in_its_norm(
    shape: tuple[int, int, int], update: torch.dtype | None, stream_bias: torch.dtype, device: str
) -> None:
    """The last shape has more rows than a program sums at once."""
    gradients = random(shape, torch.float32, device, 4), random(shape, torch.float16, device, 5)
    assert_norm_is_right(make_inputs(shape, device, update, stream_bias=stream_bias), torch.float16, *gradients)


def test_a_bias_of_the_stream_far_above_it_costs_its_digits_alone(device: str) -> None:
    """The backward subtracts it again: what is lost is a rounding of their sum."""
    inputs = make_inputs((2, 5, 24), device, torch.float32, stream_bias=torch.float32)
    assert inputs.stream_bias is not None
    with torch.no_grad():
        inputs.stream_bias *= 100
    dy = random((2, 5, 24), torch.float32, device, 5)
    stream, y = inputs.call(torch.float32)
    largest = stream.abs().max()
    found = torch.autograd.grad(y, inputs.given()[:4], dy)
    expected = in_float64(inputs, None, dy)
    assert (stream.double() - expected[0]).abs().max() <= 2e-7 * largest
    assert (y.double() - expected[1]).abs().max() <= TOLERANCES[torch.float32] * expected[1].abs().max()
    for x, truth in zip(found, expected[2:], strict=False):
        assert (x.double() - truth).abs().max() <= 1e-7 * largest * truth.abs().max()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("shape", [(2, 256, 512), (16, 256, 512), (2, 512, 768), (1, 300, 2048), (1, 9, 4096)], ids=str)
def test_the_models_sizes_equal_float64_and_themselves(shape: tuple[int, int, int], device: str) -> None:
    inputs = make_inputs(shape, device, torch.bfloat16, stream_bias=torch.bfloat16)
    gradients = random(shape, torch.float32, device, 4), random(shape, torch.bfloat16, device, 5)
    assert_norm_is_right(inputs, torch.bfloat16, *gradients)
    assert_the_same_bits(inputs, torch.bfloat16, *gradients)


ONE_LAUNCH, TWO_LAUNCHES = ["layer_norm_backward_kernel"], ["layer_norm_chunks_kernel", "layer_norm_combine_kernel"]


@pytest.mark.parametrize("stream_bias", [None, torch.float16])
@pytest.mark.parametrize("tokens", [11, 12, 13])
def test_more_rows_than_one_launch_takes_are_summed_by_a_second(
    tokens: int, stream_bias: torch.dtype | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_kernels(device)
    monkeypatch.setattr(layer_norm, "ONE_LAUNCH_ROWS", 36)
    shape, launched = (3, tokens, 24), []
    gradients = random(shape, torch.float32, device, 4), random(shape, torch.float16, device, 5)

    def run(launch: dispatch.Launch) -> None:
        launched.append(launch.name)
        launch.run(launch.candidates[0])

    with dispatch.observed(run):
        inputs = make_inputs(shape, device, torch.float16, stream_bias=stream_bias)
        assert_norm_is_right(inputs, torch.float16, *gradients)
    assert launched == ["layer_norm_forward_kernel", *(ONE_LAUNCH if tokens <= 12 else TWO_LAUNCHES)]


@pytest.mark.parametrize("stream_bias", [None, torch.float16])
@pytest.mark.parametrize("programs", [1, 2, 5])
def test_chunks_of_many_tokens_are_right(
    programs: int, stream_bias: torch.dtype | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_kernels(device)
    monkeypatch.setattr(layer_norm, "ONE_LAUNCH_ROWS", 0)
    monkeypatch.setattr(layer_norm, "PROGRAMS", programs)
    gradients = random((3, 15, 24), torch.float32, device, 4), random((3, 15, 24), torch.float16, device, 5)
    inputs = make_inputs((3, 15, 24), device, torch.float16, stream_bias=stream_bias)
    assert_norm_is_right(inputs, torch.float16, *gradients)


def test_more_chunks_than_are_summed_at_once_are_right(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_kernels(device)
    monkeypatch.setattr(layer_norm, "ONE_LAUNCH_ROWS", 0)
    monkeypatch.setattr(layer_norm, "COMBINE_BLOCK", {"BLOCK_P": 4, "BLOCK_D": 8})
    gradients = random((3, 15, 24), torch.float32, device, 4), random((3, 15, 24), torch.float16, device, 5)
    inputs = make_inputs((3, 15, 24), device, torch.float16, stream_bias=torch.float32)
    assert_norm_is_right(inputs, torch.float16, *gradients)


def assert_the_same_bits(inputs: Inputs, dtype: torch.dtype, *gradients: Tensor) -> None:
    results = []
    for _ in range(2):
        outputs = inputs.call(dtype)
        results.append([*outputs, *torch.autograd.grad(outputs, inputs.given(), gradients)])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("most_rows", [layer_norm.ONE_LAUNCH_ROWS, 0])
def test_a_second_call_gives_the_same_bits(most_rows: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_norm, "ONE_LAUNCH_ROWS", most_rows)
    shape = (2, 40, 24)
    gradients = random(shape, torch.float32, device, 4), random(shape, torch.float16, device, 5)
    inputs = make_inputs(shape, device, torch.float16, stream_bias=torch.float16)
    assert_the_same_bits(inputs, torch.float16, *gradients)


@pytest.mark.parametrize("stream_bias", [None, torch.float16])
@pytest.mark.parametrize("update", [None, torch.float16])
@pytest.mark.parametrize("used", ["stream", "norm"])
def test_either_result_may_go_unused(
    used: str, update: torch.dtype | None, stream_bias: torch.dtype | None, device: str
) -> None:
    shape = (2, 5, 24)
    dstream = random(shape, torch.float32, device, 4) if used == "stream" else None
    dy = random(shape, torch.float16, device, 5) if used == "norm" else None
    assert_norm_is_right(make_inputs(shape, device, update, stream_bias=stream_bias), torch.float16, dstream, dy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_stream_of_any_dtype_is_summed_in_it_and_normalised_in_float32_or_better(
    dtype: torch.dtype, device: str
) -> None:
    shape = (2, 5, 24)
    inputs = make_inputs(shape, device, dtype, tokens=dtype, stream_bias=torch.float32)
    stream, y = inputs.call(dtype)
    assert stream.dtype == dtype and inputs.update is not None and inputs.stream_bias is not None
    x = inputs.tokens + inputs.update
    assert torch.equal(stream, x + inputs.stream_bias.to(dtype))
    expected = F.layer_norm(x.double(), shape[2:], inputs.weight.double(), inputs.bias.double(), EPS)
    assert (y.double() - expected).abs().max() <= TOLERANCES[dtype] * expected.abs().max()


def test_a_wider_update_widens_the_stream(device: str) -> None:
    inputs = make_inputs((1, 4, 24), device, torch.float32, tokens=torch.float16)
    stream, y = inputs.call(torch.float16)
    assert stream.dtype == torch.float32
    gradients = torch.autograd.grad((stream.sum(), y.sum()), inputs.given())
    assert [x.dtype for x in gradients] == [x.dtype for x in inputs.given()]


def test_the_plain_way_is_torchs_add_and_layer_norm_bit_for_bit() -> None:
    inputs = make_inputs((2, 24, 40), "cpu", torch.bfloat16)
    assert inputs.update is not None
    with torch.autocast("cpu", torch.bfloat16):
        stream = inputs.tokens + inputs.update
        expected = F.layer_norm(stream, (40,), inputs.weight, inputs.bias, EPS).to(torch.bfloat16)
        found = residual_layer_norm_reference(
            inputs.tokens, inputs.update, inputs.weight, inputs.bias, EPS, torch.bfloat16
        )
    assert torch.equal(found[0], stream) and torch.equal(found[1], expected)


def test_any_strides_are_right(device: str) -> None:
    shape = (2, 6, 24)
    inputs = make_inputs(shape, device, torch.float16, stream_bias=torch.float16)
    assert inputs.update is not None
    strided = Inputs(
        inputs.tokens.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
        torch.stack([inputs.update.detach(), torch.full_like(inputs.update, torch.nan)], 3)[..., 0].requires_grad_(),
        inputs.weight,
        inputs.bias,
        inputs.stream_bias,
    )
    assert not any(x.is_contiguous() for x in strided.given()[:2])
    dstream = torch.ones((), device=device).expand(shape)
    dy = random((6, 2, 24), torch.float16, device, 5).transpose(0, 1)
    assert_norm_is_right(strided, torch.float16, dstream, dy)


@pytest.mark.parametrize("update", [None, torch.float16])
def test_tokens_of_one_volume_are_read_for_all(update: torch.dtype | None, device: str) -> None:
    shape = (3, 5, 24)
    inputs = make_inputs(shape, device, update)
    inputs.tokens = inputs.tokens.detach()[:1].expand(shape).requires_grad_()
    gradients = random(shape, torch.float32, device, 4), random(shape, torch.float16, device, 5)
    assert_norm_is_right(inputs, torch.float16, *gradients)
    if runs_kernels(device):
        launched: list[dispatch.Launch] = []
        with dispatch.observed(launched.append):
            inputs.call(torch.float16)
        assert launched[0].args["tokens_ptr"].numel() == 5 * 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_mean_far_above_the_spread_keeps_its_digits(dtype: torch.dtype, device: str) -> None:
    tokens = 1e4 + random((1, 3, 128), torch.float32, device, 0)
    weight, bias = torch.ones(128, device=device), torch.zeros(128, device=device)
    _, y = residual_layer_norm(tokens, None, weight, bias, EPS, dtype)
    expected = F.layer_norm(tokens.double(), (128,), eps=EPS)
    assert (y.double() - expected).abs().max() < 2e-3


@pytest.mark.parametrize("features", [1, 24])
def test_a_constant_token_has_a_norm_of_zero_and_a_finite_gradient(features: int, device: str) -> None:
    inputs = make_inputs((1, 3, features), device, None)
    with torch.no_grad():
        inputs.tokens.fill_(7)
    _, y = inputs.call(torch.float32)
    torch.testing.assert_close(y, inputs.bias.expand_as(y), rtol=0, atol=1e-3)
    assert all(x.isfinite().all() for x in torch.autograd.grad(y.sum(), inputs.given()))


def test_nan_in_one_token_stays_there(device: str) -> None:
    inputs = make_inputs((2, 5, 24), device, torch.float16)
    assert inputs.update is not None
    with torch.no_grad():
        inputs.update[1, 2, 23] = torch.nan
    stream, y = inputs.call(torch.float32)
    dtokens, dupdate = torch.autograd.grad((stream.sum(), y.sum()), inputs.given()[:2])
    for x in (y, dtokens, dupdate):
        assert x[1, 2].isnan().all()
        assert x[0].isfinite().all() and x[1, :2].isfinite().all() and x[1, 3:].isfinite().all()


@pytest.mark.parametrize("most_rows", [layer_norm.ONE_LAUNCH_ROWS, 0])
def test_every_configuration_is_right(most_rows: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_kernels(device)
    monkeypatch.setattr(layer_norm, "ONE_LAUNCH_ROWS", most_rows)
    for shape in ((1, 9, 51), (1, 3, 300)):
        left: dict[str, list[dispatch.Config]] = {}

        def run(launch: dispatch.Launch, left: dict[str, list[dispatch.Config]] = left) -> None:
            configs = left.setdefault(launch.name, list(launch.candidates))
            launch.run(configs.pop() if configs else launch.candidates[0])

        inputs = make_inputs(shape, device, torch.float16, stream_bias=torch.float16)
        gradients = random(shape, torch.float32, device, 4), random(shape, torch.float16, device, 5)
        with dispatch.observed(run):
            while not left or any(left.values()):
                assert_norm_is_right(inputs, torch.float16, *gradients)


@pytest.mark.parametrize("update", [torch.float16, torch.float32])
def test_both_gradients_of_the_sum_come_from_one_pass(update: torch.dtype, device: str) -> None:
    """In one dtype they are one tensor."""
    needs_kernels(device)
    inputs = make_inputs((1, 4, 24), device, update)
    stream, y = inputs.call(torch.float16)
    dtokens, dupdate = torch.autograd.grad((stream, y), inputs.given()[:2], (stream, y))
    assert torch.equal(dtokens.to(update), dupdate)
    assert (dtokens.data_ptr() == dupdate.data_ptr()) == (update == torch.float32)


@pytest.mark.parametrize("features", [layer_norm.MAX_FEATURES + 1])
def test_more_features_than_registers_hold_take_plain_pytorch(features: int, device: str) -> None:
    inputs = make_inputs((1, 2, features), device, None)
    launched: list[Any] = []
    with dispatch.observed(launched.append):
        gradient = random((1, 2, features), torch.float32, device, 5)
        assert_norm_is_right(inputs, torch.float32, None, gradient)
    assert not launched


@pytest.mark.parametrize("stream_bias", [None, torch.float16])
@pytest.mark.parametrize("update", [None, torch.float16, torch.float32])
def test_the_operators_pass_opcheck(update: torch.dtype | None, stream_bias: torch.dtype | None, device: str) -> None:
    needs_kernels(device)
    inputs = make_inputs((2, 3, 24), device, update, stream_bias=stream_bias)
    arguments = inputs.arguments(torch.float16)
    torch.library.opcheck(torch.ops.glioforge.layer_norm.default, arguments)
    with torch.no_grad():
        stream, y, stats = layer_norm_forward(*arguments)
        kept = stream if stream.numel() else inputs.tokens.detach()
        weights = [None if x is None else x.detach() for x in (inputs.weight, inputs.bias, inputs.stream_bias)]
        for dstream in (None, torch.ones_like(kept)):
            backward: Any = (dstream, torch.ones_like(y), kept, stats, *weights, update)
            torch.library.opcheck(torch.ops.glioforge.layer_norm_backward.default, backward)
        _, dupdate, _, _, dstream_bias = layer_norm_backward(*backward)
        assert dupdate.numel() == (kept.numel() if update == torch.float16 else 0)
        assert dstream_bias.numel() == (0 if stream_bias is None else 24)


@pytest.mark.parametrize(("device", "backend"), COMPILED, indirect=["device"])
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("stream_bias", [None, torch.float16])
@pytest.mark.parametrize("update", [None, torch.float16])
def test_compiled_equals_eager(
    update: torch.dtype | None, stream_bias: torch.dtype | None, dynamic: bool | None, device: str, backend: str
) -> None:
    torch.compiler.reset()

    def both(tokens: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor, stream_bias: Tensor | None) -> Tensor:
        stream, y = residual_layer_norm(tokens, update, weight, bias, EPS, torch.float16, stream_bias)
        return 2 * stream + y

    inputs = make_inputs((2, 6, 24), device, update, stream_bias=stream_bias)
    compiled = torch.compile(both, backend=backend, fullgraph=True, dynamic=dynamic)
    out, expected = compiled(*vars(inputs).values()), both(*vars(inputs).values())
    torch.testing.assert_close(out, expected)
    for mine, theirs in zip(
        torch.autograd.grad(out.sum(), inputs.given()), torch.autograd.grad(expected.sum(), inputs.given()), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_torchs_own_way_has_the_same_meaning(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "path", lambda *_: "torch")
    monkeypatch.setattr(dispatch, "compiled", lambda function, shape: function)
    gradients = random((2, 5, 24), torch.float32, device, 4), random((2, 5, 24), torch.float16, device, 5)
    inputs = make_inputs((2, 5, 24), device, torch.float16, stream_bias=torch.float16)
    assert_norm_is_right(inputs, torch.float16, *gradients)


def test_a_second_derivative_is_refused(device: str) -> None:
    needs_kernels(device)
    inputs = make_inputs((1, 2, 16), device, None)
    _, y = inputs.call(torch.float32)
    (dtokens,) = torch.autograd.grad(y.sum(), inputs.tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="layer_norm_backward.*no autograd formula"):
        dtokens.sum().backward()


def test_shapes_that_are_tuned_separately_have_different_keys() -> None:
    def key(*shape: int, update: torch.dtype | None = torch.bfloat16) -> str:
        return layer_norm._key(torch.Size(shape), torch.float32, update, torch.bfloat16)

    assert key(2, 216, 512) == "rows512 D512 float32 bfloat16 bfloat16"
    assert key(2, 216, 512) == key(2, 256, 512) not in (key(2, 216, 768), key(4, 216, 512))
    assert key(2, 216, 512) != key(2, 216, 512, update=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(3, 4)}, r"tokens of shape \(3, 4\) must have the axes \(batch, tokens, features\)"),
        ({"update": torch.zeros(1, 3, 5)}, r"update is \(1, 3, 5\) but tokens are \(1, 3, 4\)"),
        ({"update": torch.zeros(1, 3, 4, dtype=torch.int32)}, "update of torch.int32 must be floating point"),
        ({"weight": torch.zeros(5)}, r"weight is \(5,\).*tokens have 4 features"),
        ({"bias": torch.zeros(4, dtype=torch.float64)}, r"bias is \(4,\) torch.float64; .* both of one dtype"),
        ({"bias": None}, "bias must be a tensor, not NoneType"),
        ({"stream_bias": torch.zeros(3)}, r"stream_bias is \(3,\) torch.float32; tokens have 4 features"),
        ({"stream_bias": torch.zeros(4, dtype=torch.int32)}, "stream_bias .* torch.int32.*must be floating point"),
        ({"eps": 0.0}, "eps 0.0 must be a positive number"),
        ({"dtype": torch.int8}, "dtype torch.int8 must be one of torch.float16"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"tokens": torch.zeros(1, 3, 4), "update": None, "weight": torch.ones(4), "bias": torch.zeros(4)}
    with pytest.raises(ValueError, match=message):
        residual_layer_norm(**{**arguments, "eps": EPS, "dtype": torch.float32, **change})
