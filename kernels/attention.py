"""Exact softmax attention over the tokens of a 3D patch grid.

    S = scale * Q K^T        (B, H, N, N), scale = D^-0.5 unless given
    P = softmax(S) over the last axis
    O = P V                  (B, H, N, D)

    dV = P^T dO      dP = dO V^T      dS = P * (dP - rowsum(dO * O))      dQ = scale * dS K      dK = scale * dS^T Q

Legend: B batch, H heads, N tokens, D features of one head. D may be any number up to 128: self-attention-cv's UNETR has
10 heads of int(512 / 10) = 51. Q, K and V may be strided views into one fused projection; they are never copied to be
made contiguous. Scores, softmax and sums are float32 whatever the dtype of the inputs (float64 for float64 inputs, for
checks of gradients), also inside a `torch.autocast` region, which would otherwise lower the two products again.

`attention_reference` states the equation in plain PyTorch: the oracle that everything faster is compared with.

Source: Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attention_reference(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, scale: float) -> Tensor:
    """Attention as the equation states it, in float32 (float64 for float64 inputs).

    Args:
        q_BHND, k_BHND, v_BHND: queries, keys, values, (B, H, N, D), any strides.
        scale: factor on the scores.

    Returns:
        (B, H, N, D) in the dtype of `q_BHND`.
    """
    compute = torch.promote_types(q_BHND.dtype, torch.float32)
    with torch.autocast(q_BHND.device.type, enabled=False):
        scores_BHNN = (q_BHND.to(compute) * scale) @ k_BHND.to(compute).transpose(-2, -1)
        out_BHND = scores_BHNN.softmax(dim=-1) @ v_BHND.to(compute)
    return out_BHND.to(q_BHND.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4 or 0 in tensor.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; attention takes (batch, heads, tokens, "
                "features), four axes, none of them empty"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; attention takes floating point: convert with {name}.float()")
        if tensor.shape != q.shape or tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device} but q is "
                f"{tuple(q.shape)} {q.dtype} on {q.device}; q, k and v must agree in all three"
            )
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"{q.shape[-1]} features per head; the limit is {MAX_HEAD_DIM}: use more heads")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale {scale} must be finite; leave it out for features ** -0.5")


def flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Exact softmax attention, differentiable in q, k and v.

    Args:
        q, k, v: (B, H, N, D) of one shape, dtype and device; D up to 128; any strides (views of a fused projection).
        scale: factor on the scores; None = D ** -0.5.

    Returns:
        (B, H, N, D), dtype of `q`; accumulated in float32.

    Raises:
        ValueError: wrong rank, shapes, dtypes or devices that differ, D over 128, a scale that is not finite.
    """
    _check(q, k, v, scale)
    return attention_reference(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
