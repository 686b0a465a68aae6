"""Attention against torch's own, on the head sizes and layouts that the models use."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import flash_attention


def random_qkv(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("shape", [(2, 10, 33, 51), (1, 3, 64, 64), (2, 1, 1, 1), (1, 2, 7, 128)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_output_and_gradients_equal_torch_attention(shape: tuple[int, ...], scale: float | None) -> None:
    ours, torchs = random_qkv(shape), random_qkv(shape)
    q, k, v = ours
    out = flash_attention(q, k, v, scale=scale)
    q, k, v = torchs
    expected = F.scaled_dot_product_attention(q, k, v, scale=scale)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, theirs in zip(ours, torchs, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_views_into_one_projection_give_what_copies_give() -> None:
    qkv = torch.randn(2, 33, 3, 10, 51, generator=torch.Generator().manual_seed(0))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    assert not q.is_contiguous()
    torch.testing.assert_close(
        flash_attention(q, k, v), flash_attention(q.contiguous(), k.contiguous(), v.contiguous())
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_loses_no_more_than_the_last_rounding(dtype: torch.dtype, autocast: bool) -> None:
    q, k, v = (tensor.detach() for tensor in random_qkv((1, 4, 200, 51), dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = flash_attention(q, k, v)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_scores_beyond_the_range_of_float16_do_not_overflow() -> None:
    q = torch.full((1, 1, 4, 128), 100.0, dtype=torch.float16)
    v = torch.arange(4, dtype=torch.float16).view(1, 1, 4, 1).expand(1, 1, 4, 128)
    torch.testing.assert_close(flash_attention(q, q, v), torch.full_like(v, 1.5))


def test_order_of_keys_does_not_matter() -> None:
    q, k, v = random_qkv((1, 2, 19, 51))
    order = torch.randperm(19, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(flash_attention(q, k[:, :, order], v[:, :, order]), flash_attention(q, k, v))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, r"q has shape \(2, 3, 4\).*four axes"),
        ({"v": torch.zeros(1, 2, 0, 8)}, r"v has shape \(1, 2, 0, 8\)"),
        ({"k": torch.zeros(1, 2, 5, 8)}, r"k is \(1, 2, 5, 8\).*q is \(1, 2, 4, 8\)"),
        ({"v": torch.zeros(1, 2, 4, 8, dtype=torch.bfloat16)}, "v is .*bfloat16.*must agree"),
        ({"q": torch.zeros(1, 2, 4, 8, dtype=torch.int32)}, "q is torch.int32.*floating point"),
        (dict.fromkeys("qkv", torch.zeros(1, 2, 4, 129)), "129 features per head; the limit is 128"),
        ({"scale": float("nan")}, "scale nan must be finite"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str) -> None:
    arguments = {**dict.fromkeys("qkv", torch.zeros(1, 2, 4, 8)), **change}
    with pytest.raises(ValueError, match=message):
        flash_attention(**arguments)
