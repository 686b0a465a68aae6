"""Attention against torch's own in float64, on the head sizes and layouts that the models use.

A plain run tests the reference, other runs the kernels (see `kernel_paths`), except for float64 and in the interpreter
bfloat16, which take the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from kernel_paths import DEVICES, ON_GPU, needs_kernels, runs_kernels
from torch import Tensor
from torch.nn.attention import SDPBackend

from kernels import attention, dispatch
from kernels.attention import (
    attention_backward,
    attention_forward,
    attention_packed_forward,
    flash_attention,
    flash_attention_packed,
)

pytestmark = pytest.mark.kernel
TOLERANCES = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest error over the largest true value: float32 sums and, in half precision, P, dS and the results rounded."""
DTYPES = [dtype for dtype in TOLERANCES if not dispatch.INTERPRETED or dtype in (torch.float16, torch.float32)]
"""In the interpreter others take the reference, as in a plain run."""
# (B, H, N, D). Up to 256 tokens one block holds every key, beyond 512 delta has a launch of its own.
SHAPES = [
    (1, 2, 1, 1),
    (2, 1, 7, 8),
    (1, 2, 16, 16),
    (2, 3, 33, 51),
    (1, 1, 64, 128),
    (1, 2, 70, 80),
    (1, 1, 216, 51),
    (1, 1, 256, 64),
    (1, 1, 300, 51),
    (1, 1, 515, 51),
    (1, 1, 640, 64),
]
# The two UNETRs at their crops, a crop of 96 voxels a side, and a long sequence.
MODELS = [(2, 10, 256, 51), (2, 12, 512, 64), (2, 10, 216, 51), (1, 4, 4096, 64)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device; kernels are required where they can run, and the interpreter takes large blocks, to be fast."""
    mode: dispatch.Kernels = "triton" if runs_kernels(request.param) else "auto"
    observed = dispatch.observed(run_in_few_programs) if request.param == "cpu" else nullcontext()
    with dispatch.using(mode, request.param), observed:
        yield request.param


def run_in_few_programs(launch: dispatch.Launch) -> None:
    config = {**launch.candidates[0]}
    launch.run(config | {name: max(256, config[name]) for name in ("BLOCK_M", "BLOCK_N") if name in config})


def random_qkv(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    return [tensor.to(device, dtype).requires_grad_() for tensor in tensors]


def random_like(x: Tensor, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x)


def in_float64(inputs: list[Tensor], dout: Tensor, scale: float | None = None) -> list[Tensor]:
    """Output and gradients of torch's attention, in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in inputs)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.double())]


def assert_attention_is_right(
    inputs: list[Tensor], scale: float | None = None, dout: Tensor | None = None, autocast: bool = False
) -> None:
    """Output and gradients against float64; gradients by the largest of all three, as a true one may be zero."""
    q, k, v = inputs
    tolerance = TOLERANCES[q.dtype]
    with torch.autocast(q.device.type, torch.bfloat16, enabled=autocast):
        out = flash_attention(q, k, v, scale)
    dout = random_like(out) if dout is None else dout
    actual = [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]
    expected = in_float64(inputs, dout, scale)
    largest = [expected[0].abs().max()] + 3 * [max(x.abs().max() for x in expected[1:])]
    for name, x, y, unit in zip(("out", "dq", "dk", "dv"), actual, expected, largest, strict=True):
        assert x.dtype == q.dtype
        error = ((x.double() - y).abs().max() / unit).item()
        assert error <= tolerance, f"{name} is off by {error:.1e} of the largest, more than {tolerance:.1e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_size_equals_float64(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    assert_attention_is_right(random_qkv(shape, dtype, device))


@pytest.mark.parametrize("device", [ON_GPU], indirect=True)
@pytest.mark.parametrize("dtype", dispatch.DTYPES)
@pytest.mark.parametrize("shape", MODELS, ids=str)
def test_views_of_the_models_sizes_equal_float64_and_themselves(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    batch, heads, tokens, features = shape
    qkv, *_ = random_qkv((batch, tokens, 3, heads, features), dtype, device)
    inputs = [view.requires_grad_() for view in qkv.detach().permute(2, 0, 3, 1, 4).unbind(0)]
    assert_attention_is_right(inputs)
    assert_the_same_bits(inputs)


def assert_the_same_bits(inputs: list[Tensor]) -> None:
    """Of output and gradients in two calls."""
    results = []
    for _ in range(2):
        out = flash_attention(*inputs)  # type: ignore[arg-type]
        results.append([out, *torch.autograd.grad(out, inputs, random_like(out))])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("blocks", "delta_in_kernel"), [((16, 16), True), ((16, 64), False), ((128, 32), False), ((64, 128), True)], ids=str
)
def test_blocks_of_any_size_are_right(
    blocks: tuple[int, int], delta_in_kernel: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_kernels(device)
    monkeypatch.setattr(attention, "DELTA_IN_KERNEL_MAX", 512 if delta_in_kernel else 0)

    def run(launch: dispatch.Launch) -> None:
        sizes = zip(("BLOCK_M", "BLOCK_N"), blocks, strict=True)
        launch.run({**launch.candidates[0]} | {name: size for name, size in sizes if name in launch.candidates[0]})

    with dispatch.observed(run):
        assert_attention_is_right(random_qkv((2, 2, 40, 51), torch.float16, device))
        assert_attention_is_right(random_qkv((1, 1, 64, 64), torch.float16, device))


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.7])
def test_any_finite_scale_is_right(scale: float, device: str) -> None:
    assert_attention_is_right(random_qkv((1, 2, 33, 51), torch.float32, device), scale)


def test_a_negative_scale_does_not_overflow(device: str) -> None:
    q, k, v = (x.detach() for x in random_qkv((1, 2, 33, 51), torch.float32, device))
    torch.testing.assert_close(flash_attention(q, k, v, -9.0), flash_attention(-q, k, v, 9.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 40, 51), (1, 1, 40, 128), pytest.param((1, 2, 600, 64), marks=pytest.mark.gpu)], ids=str
)
def test_every_configuration_is_right(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    needs_kernels(device)
    inputs = random_qkv(shape, dtype, device)
    left: dict[str, list[dispatch.Config]] = {}

    def run(launch: dispatch.Launch) -> None:
        configs = left.setdefault(launch.name, list(launch.candidates))
        launch.run(configs.pop() if configs else launch.candidates[0])

    with dispatch.observed(run):
        while not left or any(left.values()):
            assert_attention_is_right(inputs)


def test_views_into_one_projection_give_what_copies_give(device: str) -> None:
    qkv = torch.randn(2, 34, 3, 3, 51, generator=torch.Generator().manual_seed(0)).to(device)
    views = list(qkv[:, 1:].permute(2, 0, 3, 1, 4).unbind(0))
    assert not views[0].is_contiguous() and views[0].storage_offset()
    results = []
    for q, k, v in (views, [view.contiguous() for view in views]):
        inputs = [q.requires_grad_(), k.requires_grad_(), v.requires_grad_()]
        out = flash_attention(q, k, v)
        results.append([out, *torch.autograd.grad(out, inputs, random_like(out))])
    for of_views, of_copies in zip(*results, strict=True):
        torch.testing.assert_close(of_views, of_copies)


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    # self-attention-cv splits its projection as (feature, q|k|v, head), which leaves the features strided
    "features strided": lambda x: torch.empty(1, 33, 51, 3, 2).to(x)[..., 1, :].permute(0, 3, 1, 2).copy_(x.detach()),
    "tokens last": lambda x: x.detach().transpose(2, 3).contiguous().transpose(2, 3),
    "tokens first": lambda x: x.detach().permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "every other token": lambda x: torch.stack([x.detach(), torch.full_like(x, torch.nan)], 3).flatten(2, 3)[:, :, ::2],
    "one head for all": lambda x: x.detach()[:, :1].expand(-1, 2, -1, -1),
}


@pytest.mark.parametrize("layout", STRIDED)
def test_any_strides_are_read_as_they_are(layout: str, device: str) -> None:
    inputs = [STRIDED[layout](x).requires_grad_() for x in random_qkv((1, 2, 33, 51), torch.float32, device)]
    dout = STRIDED[layout](random_like(inputs[0], seed=2))
    assert not inputs[0].is_contiguous() and not dout.is_contiguous()
    assert_attention_is_right(inputs, dout=dout)


def test_an_expanded_gradient_is_right(device: str) -> None:
    inputs = random_qkv((1, 2, 33, 51), torch.float32, device)
    assert_attention_is_right(inputs, dout=torch.ones((), device=device).expand(1, 2, 33, 51))


def test_joining_the_heads_of_the_output_copies_nothing(device: str) -> None:
    needs_kernels(device)
    q, k, v = random_qkv((2, 3, 9, 51), torch.float32, device)
    out = flash_attention(q, k, v)
    for x in (out, *torch.autograd.grad(out.sum(), (q, k, v))):
        assert x.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_loses_no_more_than_the_last_roundings(dtype: torch.dtype, autocast: bool, device: str) -> None:
    """A weight is rounded before the product, an output before it is stored: half an eps each."""
    q, k, v = (tensor.detach() for tensor in random_qkv((1, 4, 200, 51), dtype, device))
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        out = flash_attention(q, k, v)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert out.dtype == dtype
    half_eps = torch.finfo(dtype).eps / 2
    bound = 1.01 * half_eps * expected.abs() + 1e-6
    if runs_kernels(device):
        bound += half_eps * F.scaled_dot_product_attention(q.double(), k.double(), v.double().abs())
    assert ((out.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("path", ["triton", "torch", "reference"])
def test_autocast_does_not_lower_float32(path: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "triton":
        needs_kernels(device)
    monkeypatch.setattr(dispatch, "path", lambda *_: path)
    assert_attention_is_right(random_qkv((1, 2, 33, 51), torch.float32, device), autocast=True)


@pytest.mark.parametrize("scale", [None, 0.3, -0.3])
def test_torchs_own_attention_has_the_same_meaning(
    scale: float | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "path", lambda *_: "torch")
    assert_attention_is_right(random_qkv((2, 2, 33, 51), torch.float32, device), scale)


def test_torchs_own_attention_takes_the_fastest_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "path", lambda *_: "torch")
    q, k, v = random_qkv((1, 2, 33, 51), torch.float32)
    for backend, is_flash in ((SDPBackend.FLASH_ATTENTION, True), (SDPBackend.MATH, False)):
        monkeypatch.setattr(dispatch, "sdpa_backends", lambda *_, backend=backend: [backend])
        assert ("Flash" in type(flash_attention(q, k, v).grad_fn).__name__) == is_flash


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scores_beyond_the_range_of_float16_do_not_overflow(dtype: torch.dtype, device: str) -> None:
    q = torch.full((1, 1, 4, 128), 100.0, dtype=dtype, device=device)
    v = torch.arange(4, dtype=dtype, device=device).view(1, 1, 4, 1).expand(1, 1, 4, 128)
    torch.testing.assert_close(flash_attention(q, q, v), torch.full_like(v, 1.5))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("tokens", [33, pytest.param(300, marks=pytest.mark.gpu)])
def test_scores_of_thousands_keep_exact_gradients(sign: int, tokens: int, device: str) -> None:
    """Far below zero, where the exponential of a missing key would be infinite, and far above."""
    q, k, v = random_qkv((1, 1, tokens, 51), torch.float16, device)
    with torch.no_grad():
        q, k = sign * (20 + q / 8), 20 + k / 8
    assert_attention_is_right([x.requires_grad_() for x in (q, k, v)])


def test_equal_keys_are_attended_equally(device: str) -> None:
    q, _, v = (x.detach() for x in random_qkv((1, 2, 37, 51), torch.float32, device))
    out = flash_attention(q, torch.full_like(q, 3.0), v)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(v), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_order_of_keys_does_not_matter(dtype: torch.dtype, device: str) -> None:
    q, k, v = (x.detach() for x in random_qkv((1, 2, 19, 51), dtype, device))
    order = torch.randperm(19, generator=torch.Generator().manual_seed(0)).to(device)
    torch.testing.assert_close(flash_attention(q, k[:, :, order], v[:, :, order]), flash_attention(q, k, v))


def test_nan_in_one_head_stays_there(device: str) -> None:
    q, k, v = random_qkv((2, 2, 33, 51), torch.float32, device)
    with torch.no_grad():
        k[0, 1, 5, 50] = torch.nan
    out = flash_attention(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for x in (out, *grads):
        assert x[0, 1].isnan().all()
        assert x[1].isfinite().all() and x[0, 0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [70, pytest.param(520, marks=pytest.mark.gpu)])
def test_a_second_call_gives_the_same_bits(tokens: int, dtype: torch.dtype, device: str) -> None:
    assert_the_same_bits(random_qkv((1, 2, tokens, 51), dtype, device))


@pytest.mark.parametrize(
    ("tokens", "backward"),
    [
        (64, ["attention_backward_kernel"]),
        (512, ["attention_backward_kernel"]),
        (513, ["attention_delta_kernel", "attention_backward_kernel"]),
    ],
)
def test_one_launch_forward_and_one_or_two_backward(tokens: int, backward: list[str], device: str) -> None:
    needs_kernels(device)
    launched: list[str] = []
    q, k, v = random_qkv((1, 2, tokens, 51), torch.float32, device)
    with dispatch.observed(lambda launch: launched.append(launch.name)):
        out = flash_attention(q, k, v)
        assert launched == ["attention_forward_kernel"]
        out.backward(torch.ones_like(out))
    assert launched == ["attention_forward_kernel", *backward]


@pytest.mark.parametrize("tokens", [256, 600])
def test_launches_can_be_collected_without_memory(tokens: int) -> None:
    launches: list[dispatch.Launch] = []
    qkv = torch.empty(2, tokens, 3, 10, 51, dtype=torch.bfloat16, device="meta")
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    with dispatch.observed(launches.append):
        out, lse = attention_forward(q, k, v, 0.14)
        attention_backward(q, k, v, out, lse, out, 0.14)
    assert len(launches) == (2 if tokens == 256 else 3)
    for launch in launches:
        assert all(min(launch.grid(config)) > 0 for config in launch.candidates)
        assert len({tuple(sorted(config.items())) for config in launch.candidates}) == len(launch.candidates)


def test_shapes_that_are_tuned_separately_have_different_keys() -> None:
    def key(*shape: int, dtype: torch.dtype = torch.bfloat16) -> str:
        return attention._key(torch.Size(shape), dtype)

    assert key(2, 10, 216, 51) == "N216 D51 heads32 bfloat16"
    others = [(2, 10, 256, 51), (2, 10, 216, 64), (4, 10, 216, 51)]
    assert key(2, 10, 216, 51) == key(2, 16, 216, 51) not in [key(*shape) for shape in others]
    assert key(2, 10, 216, 51) != key(2, 10, 216, 51, dtype=torch.float16)


def test_a_models_grid_fills_a_gpu() -> None:
    launches: list[dispatch.Launch] = []
    q = torch.empty(2, 10, 256, 51, dtype=torch.bfloat16, device="meta")
    with dispatch.observed(launches.append):
        out, lse = attention_forward(q, q, q, 0.14)
        attention_backward(q, q, q, out, lse, out, 0.14)
    assert all(launch.grid(launch.candidates[0])[0] >= attention.ENOUGH_PROGRAMS for launch in launches)


@pytest.mark.parametrize("shape", [(1, 2, 17, 51), (1, 1, 1, 8)])
def test_the_operators_pass_opcheck(shape: tuple[int, ...], device: str) -> None:
    needs_kernels(device)
    qkv = torch.randn(shape[0], shape[2], 3, shape[1], shape[3], generator=torch.Generator().manual_seed(0)).to(device)
    q, k, v = (x.requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind(0))
    torch.library.opcheck(torch.ops.glioforge.attention.default, (q, k, v, 0.2))
    with torch.no_grad():
        out, lse = attention_forward(q, k, v, 0.2)
    arguments = [x.detach() for x in (q, k, v, out, lse, random_like(out).transpose(1, 2).contiguous().transpose(1, 2))]
    torch.library.opcheck(torch.ops.glioforge.attention_backward.default, (*arguments, 0.2))


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [("aot_eager", None), ("aot_eager", True), pytest.param("inductor", None, marks=pytest.mark.gpu)],
)
def test_compiled_equals_eager(backend: str, dynamic: bool | None, device: str) -> None:
    torch.compiler.reset()

    def join(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 2 * flash_attention(q, k, v).transpose(1, 2).flatten(2)

    inputs = random_qkv((2, 2, 33, 51), torch.float32, device)
    compiled = torch.compile(join, backend=backend, fullgraph=True, dynamic=dynamic)
    out, expected = compiled(*inputs), join(*inputs)
    torch.testing.assert_close(out, expected)
    dout = random_like(out)
    for mine, theirs in zip(torch.autograd.grad(out, inputs, dout), torch.autograd.grad(expected, inputs, dout)):
        torch.testing.assert_close(mine, theirs)


def test_a_second_derivative_is_refused(device: str) -> None:
    needs_kernels(device)
    q, k, v = random_qkv((1, 1, 16, 16), torch.float32, device)
    (dq,) = torch.autograd.grad(flash_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_backward.*no autograd formula"):
        dq.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, r"q of shape \(2, 3, 4\) .* axes \(batch, heads, tokens, features\)"),
        ({"v": torch.zeros(1, 2, 0, 8)}, r"v of shape \(1, 2, 0, 8\)"),
        ({"k": torch.zeros(1, 2, 5, 8)}, r"k is \(1, 2, 5, 8\).*q is \(1, 2, 4, 8\)"),
        ({"v": torch.zeros(1, 2, 4, 8, dtype=torch.bfloat16)}, "v is .*bfloat16.*must agree"),
        (dict.fromkeys("qkv", torch.zeros(1, 2, 4, 129)), "129 features per head; the limit is 128"),
        ({"scale": float("nan")}, "scale nan must be a finite number"),
        ({"scale": "x"}, "scale 'x' must be a finite number; omit it"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str) -> None:
    arguments = {**dict.fromkeys("qkv", torch.zeros(1, 2, 4, 8)), **change}
    with pytest.raises(ValueError, match=message):
        flash_attention(**arguments)


# (B, N, H, D), columns after qkv, columns after the output.
PACKED = [
    ((2, 17, 2, 51), 6, 2),
    ((1, 9, 1, 8), 0, 0),
    ((1, 33, 2, 5), 2, 6),
    ((2, 5, 3, 16), 0, 20),
    ((1, 1, 1, 1), 5, 7),
]


def random_packed(shape: tuple[int, ...], extra: int, dtype: torch.dtype, device: str) -> Tensor:
    """A fused projection whose columns beyond are NaN: nothing may read them."""
    batch, tokens, heads, features = shape
    used = 3 * heads * features
    qkv = torch.full((batch, tokens, used + extra), torch.nan, dtype=torch.float64)
    qkv[..., :used] = torch.randn(batch, tokens, used, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return qkv.to(device, dtype).requires_grad_()


def packed_in_float64(qkv: Tensor, shape: tuple[int, ...], dout: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Output and gradient without the columns beyond, by torch's attention."""
    batch, tokens, heads, features = shape
    wide = qkv[..., : 3 * heads * features].detach().double().requires_grad_()
    q, k, v = wide.unflatten(-1, (3, heads, features)).permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
    (dqkv,) = torch.autograd.grad(out, wide, dout[..., : heads * features].double())
    return out.detach(), dqkv


def assert_packed_is_right(
    qkv: Tensor, shape: tuple[int, ...], out_extra: int, scale: float | None = None, dout: Tensor | None = None
) -> None:
    used = shape[2] * shape[3]
    out = flash_attention_packed(qkv, shape[2], shape[3], scale, used + out_extra if out_extra else None)
    dout = random_like(out) if dout is None else dout
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    assert out.shape == (*shape[:2], used + out_extra) and out.dtype == dqkv.dtype == qkv.dtype
    assert dqkv.shape == qkv.shape and not out[..., used:].any() and not dqkv[..., 3 * used :].any()
    found = out[..., :used], dqkv[..., : 3 * used]
    for x, truth in zip(found, packed_in_float64(qkv, shape, dout, scale), strict=True):
        error = (x.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-3)
        assert error <= TOLERANCES[qkv.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "extra", "out_extra"), PACKED, ids=str)
def test_a_fused_projection_equals_float64_and_its_padding_stays_zero(
    shape: tuple[int, ...], extra: int, out_extra: int, dtype: torch.dtype, device: str
) -> None:
    assert_packed_is_right(random_packed(shape, extra, dtype, device), shape, out_extra)


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.7])
def test_a_fused_projection_takes_any_finite_scale(scale: float, device: str) -> None:
    assert_packed_is_right(random_packed((1, 9, 2, 5), 2, torch.float32, device), (1, 9, 2, 5), 6, scale)


def test_a_negative_scale_of_a_fused_projection_does_not_overflow(device: str) -> None:
    qkv = random_packed((1, 33, 2, 51), 0, torch.float32, device).detach()
    negated = torch.cat([-qkv[..., :102], qkv[..., 102:]], 2)
    torch.testing.assert_close(flash_attention_packed(qkv, 2, 51, -9.0), flash_attention_packed(negated, 2, 51, 9.0))


def test_a_fused_projection_has_any_strides(device: str) -> None:
    shape = (2, 9, 2, 5)
    qkv = random_packed(shape, 3, torch.float32, device).detach().transpose(0, 2).contiguous().transpose(0, 2)
    assert not qkv.is_contiguous()
    dout = random_like(torch.empty(16, 9, 2, device=device)).permute(2, 1, 0)
    assert_packed_is_right(qkv.requires_grad_(), shape, 6, dout=dout)


@pytest.mark.parametrize("device", [ON_GPU], indirect=True)
@pytest.mark.parametrize("dtype", dispatch.DTYPES)
def test_padded_projections_of_the_models_sizes_equal_float64(dtype: torch.dtype, device: str) -> None:
    for shape, extra, out_extra in (((2, 256, 10, 51), 6, 2), ((2, 512, 12, 64), 0, 0), ((1, 4096, 10, 51), 6, 2)):
        assert_packed_is_right(random_packed(shape, extra, dtype, device), shape, out_extra)


def test_a_fused_projection_gives_the_bits_of_views_into_it(device: str) -> None:
    needs_kernels(device)
    qkv = random_packed((2, 17, 2, 51), 6, torch.float16, device)
    out = flash_attention_packed(qkv, 2, 51)
    (dqkv,) = torch.autograd.grad(out, qkv, random_like(out))
    q, k, v = (x.requires_grad_() for x in attention._split(qkv.detach(), 3, 2, 51))
    by_views = flash_attention(q, k, v)
    dout = random_like(out).unflatten(-1, (2, 51)).transpose(1, 2)
    gradients = torch.autograd.grad(by_views, (q, k, v), dout)
    assert torch.equal(out, by_views.transpose(1, 2).flatten(2))
    for x, y in zip(attention._split(dqkv, 3, 2, 51), gradients, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("tokens", [64, 513])
def test_a_fused_projection_takes_no_more_launches_than_views(tokens: int, device: str) -> None:
    needs_kernels(device)
    launched: list[str] = []
    qkv = random_packed((1, tokens, 2, 51), 6, torch.float32, device)
    with dispatch.observed(lambda launch: launched.append(launch.name)):
        out = flash_attention_packed(qkv, 2, 51, out_columns=104)
        out.backward(torch.ones_like(out))
    assert len(launched) == (2 if tokens <= 512 else 3)


@pytest.mark.parametrize("path", ["torch", "reference"])
def test_pytorchs_paths_take_a_fused_projection(path: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "path", lambda *_: path)
    assert_packed_is_right(random_packed((2, 9, 2, 5), 2, torch.float32, device), (2, 9, 2, 5), 6)


def test_the_operators_on_a_fused_projection_pass_opcheck(device: str) -> None:
    needs_kernels(device)
    qkv = torch.randn(2, 17, 36, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    torch.library.opcheck(torch.ops.glioforge.attention_packed.default, (qkv, 2, 5, 0.2, 12))
    with torch.no_grad():
        out, lse = attention_packed_forward(qkv, 2, 5, 0.2, 12)
    backward = (qkv.detach(), out, lse, random_like(out), 2, 5, 0.2)
    torch.library.opcheck(torch.ops.glioforge.attention_packed_backward.default, backward)


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [("aot_eager", None), ("aot_eager", True), pytest.param("inductor", None, marks=pytest.mark.gpu)],
)
def test_a_compiled_fused_projection_equals_eager(backend: str, dynamic: bool | None, device: str) -> None:
    torch.compiler.reset()

    def attend(qkv: Tensor) -> Tensor:
        return 2 * flash_attention_packed(qkv, 2, 51, out_columns=104)

    qkv = random_packed((2, 33, 2, 51), 6, torch.float32, device)
    out, expected = torch.compile(attend, backend=backend, fullgraph=True, dynamic=dynamic)(qkv), attend(qkv)
    torch.testing.assert_close(out, expected)
    dout = random_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, qkv, dout), torch.autograd.grad(expected, qkv, dout))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(2, 3)}, r"qkv of shape \(2, 3\) must have the axes \(batch, tokens, columns\)"),
        ({"qkv": torch.zeros(1, 2, 29)}, "qkv of 29 columns; 2 heads of 5 need 30 or more"),
        ({"out_columns": 9}, "out_columns of 9 columns; 2 heads of 5 need 10 or more"),
        ({"num_heads": 0}, "num_heads 0 must be a whole number of at least 1"),
        ({"head_dim": 2.5}, "head_dim 2.5 must be a whole number of at least 1"),
        ({"head_dim": 129}, "129 features per head; the limit is 128"),
        ({"scale": float("inf")}, "scale inf must be a finite number"),
    ],
)
def test_wrong_arguments_of_a_fused_projection_are_refused(change: dict, message: str) -> None:
    arguments = {"qkv": torch.zeros(1, 2, 30), "num_heads": 2, "head_dim": 5, **change}
    with pytest.raises(ValueError, match=message):
        flash_attention_packed(**arguments)
