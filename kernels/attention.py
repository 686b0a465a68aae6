"""Exact softmax attention over the tokens of a 3D patch grid.

    S = scale * Q K^T        (B, H, N, N), scale = D^-0.5 unless given
    P = softmax(S) over the last axis
    O = P V                  (B, H, N, D)

    dV = P^T dO      dP = dO V^T      dS = P * (dP - rowsum(dO * O))      dQ = scale * dS K      dK = scale * dS^T Q

Legend: B batch, H heads, N tokens, D features of a head, up to 128: self-attention-cv's UNETR has 10 heads of
int(512 / 10) = 51. Q, K and V may be strided views into one projection; they are never copied. Scores, softmax and sums
are float32 (float64 for float64 inputs, to check gradients), also under `torch.autocast`. Two functions:

    flash_attention         q, k, v (B, H, N, D) -> (B, H, N, D)
    flash_attention_packed  a fused projection (B, N, 3 H D and more) -> (B, N, H D and more), for the next projection;
                            its backward writes one gradient of the projection. Columns beyond are padding, to rows of
                            16 bytes: ignored, and zero in what is written

The kernels keep S and P on the chip. A UNETR's grid is small (20 heads of 256 tokens), so latency counts most:

- Forward, one launch: a program takes a block of queries of one head and loops over blocks of keys with a running
  maximum and sum; where one block holds every key there is no loop. It stores the log-sum-exp of each row, 4 bytes,
  from which the backward recomputes P.
- Backward, one launch, two kinds of program: one keeps a block of keys and loops over the queries, for dK and dV, the
  other keeps queries and loops over the keys, for dQ. Seven products instead of five, for S and dP are computed twice;
  in return no atomics, no partial sums, the same bits each time, and twice the programs to fill a GPU.
- delta = rowsum(dO * O) is recomputed where it is used up to N = 512, which saves a launch (the limit was not
  measured); beyond that a launch of its own computes it.
- Products run on tensor cores with float32 sums. P and dS are rounded to the inputs' dtype, as in every fused
  attention; float32 inputs take three TF32 products ("tf32x3"), for an error near float32's own.
- Sizes and strides are compile-time constants: rows of 51 features are loaded 2 bytes at a time, and constant strides
  make their addresses immediate offsets, a quarter fewer instructions (sm_90, forward).
- O, dQ, dK and dV are (B, N, H, D) in memory, returned as (B, H, N, D) views: joining the heads is free. Packed, they
  are columns of one tensor: the kernels know strides only.

Sources: Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762; Dao, FlashAttention-2,
https://arxiv.org/abs/2307.08691.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from . import dispatch
from .checks import check_alike, check_floats
from .dispatch import ceil_div, next_power_of_two

MAX_HEAD_DIM = 128
LOG2_E = math.log2(math.e)
DELTA_IN_KERNEL_MAX = 512
"""Tokens up to which the backward computes delta where it uses it; not measured."""
ENOUGH_PROGRAMS = 128
"""Programs that fill a GPU: an A100 has 108 multiprocessors, an H100 132."""
Blocks = tuple[int, int, int, int]
"""BLOCK_M, BLOCK_N, num_warps, num_stages."""


def attention_reference(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, scale: float) -> Tensor:
    """The equation at the head of this file in plain PyTorch; arguments as `flash_attention`, unchecked."""
    compute = torch.promote_types(q_BHND.dtype, torch.float32)
    with torch.autocast(q_BHND.device.type, enabled=False):
        scores_BHNN = (q_BHND.to(compute) * scale) @ k_BHND.to(compute).transpose(-2, -1)
        out_BHND = scores_BHNN.softmax(dim=-1) @ v_BHND.to(compute)
    return out_BHND.to(q_BHND.dtype)


@triton.jit
def _dot(a, b, acc=None):
    return tl.dot(a, b, acc, input_precision="tf32x3")  # matters for float32 only


@triton.jit
def _head_ptr(x_ptr, strides: tl.constexpr, head, H):
    """Pointer to the first element of one head, of all heads of the batch."""
    return x_ptr + (head // H).to(tl.int64) * strides[0] + (head % H).to(tl.int64) * strides[1]


@triton.jit
def _tile_ptrs(x_ptr, strides: tl.constexpr, start, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    # int64: the compiler can't prove that a 32-bit sum does not wrap, and would not make the offsets immediate.
    rows = tl.arange(0, BLOCK).to(tl.int64)
    columns = tl.arange(0, BLOCK_D).to(tl.int64)
    return x_ptr + tl.cast(start, tl.int64) * strides[2] + (rows[:, None] * strides[2] + columns[None, :] * strides[3])


@triton.jit
def _tile_mask(start, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = start + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    if N % BLOCK == 0:
        return tl.broadcast_to(columns[None, :] < D, (BLOCK, BLOCK_D))
    return (rows[:, None] < N) & (columns[None, :] < D)


@triton.jit
def _load_tile(
    x_ptr, strides: tl.constexpr, start, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """(BLOCK, BLOCK_D) of one head from row `start` on, zero beyond N and D."""
    ptrs = _tile_ptrs(x_ptr, strides, start, BLOCK, BLOCK_D)
    if N % BLOCK == 0 and D == BLOCK_D:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=_tile_mask(start, N, D, BLOCK, BLOCK_D), other=0.0)


@triton.jit
def _store_tile(
    x_ptr, strides: tl.constexpr, start, x, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    ptrs = _tile_ptrs(x_ptr, strides, start, BLOCK, BLOCK_D)
    tl.store(ptrs, x.to(x_ptr.dtype.element_ty), mask=_tile_mask(start, N, D, BLOCK, BLOCK_D))


@triton.jit
def _store_padding(
    x_ptr, strides: tl.constexpr, start, N: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr
):
    """Zeros in the PAD columns after those of one head."""
    rows = start + tl.arange(0, BLOCK)
    ptrs = x_ptr + rows.to(tl.int64) * strides[2]
    for column in range(D, D + PAD):
        tl.store(ptrs + column * strides[3], tl.zeros((BLOCK,), x_ptr.dtype.element_ty), mask=rows < N)


@triton.jit
def attention_forward_kernel(
    q_ptr,  # (B, H, N, D), strides_q
    k_ptr,  # (B, H, N, D), strides_k
    v_ptr,  # (B, H, N, D), strides_v
    out_ptr,  # (B, H, N, D), strides_out
    lse_ptr,  # (B, H, N) float32: log2 of the sum of exp(scores)
    strides_q: tl.constexpr, strides_k: tl.constexpr, strides_v: tl.constexpr, strides_out: tl.constexpr,
    H, scale_log2,
    N: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head against all keys; grid (B * H * ceil(N / BLOCK_M),).

    PAD columns of the output after the last head's become zero.
    """
    NUM_BLOCKS: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    head = tl.program_id(0) // NUM_BLOCKS
    start_m = tl.program_id(0) % NUM_BLOCKS * BLOCK_M
    k_ptr = _head_ptr(k_ptr, strides_k, head, H)
    v_ptr = _head_ptr(v_ptr, strides_v, head, H)
    q = _load_tile(_head_ptr(q_ptr, strides_q, head, H), strides_q, start_m, N, D, BLOCK_M, BLOCK_D)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start_n in range(0, N, BLOCK_N):
        k = _load_tile(k_ptr, strides_k, start_n, N, D, BLOCK_N, BLOCK_D)
        v = _load_tile(v_ptr, strides_v, start_n, N, D, BLOCK_N, BLOCK_D)
        scores = _dot(q, tl.trans(k))
        if N % BLOCK_N != 0:
            is_key = (start_n + tl.arange(0, BLOCK_N) < N)[None, :]
            scores = tl.where(is_key, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        p = tl.exp2(scores * scale_log2 - new_max[:, None])
        if N % BLOCK_N != 0:
            p = tl.where(is_key, p, 0.0)  # -inf times a scale of zero is NaN
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        acc = _dot(p.to(v.dtype), v, acc * shrink[:, None])
        row_max = new_max
    out_ptr = _head_ptr(out_ptr, strides_out, head, H)
    _store_tile(out_ptr, strides_out, start_m, acc * (1.0 / row_sum)[:, None], N, D, BLOCK_M, BLOCK_D)
    if head % H == H - 1:
        _store_padding(out_ptr, strides_out, start_m, N, D, PAD, BLOCK_M)
    rows = start_m + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + head.to(tl.int64) * N + rows, row_max + tl.log2(row_sum), mask=rows < N)


@triton.jit
def _row_sums(
    out_ptr, strides_out: tl.constexpr, dout, start,
    N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    out = _load_tile(out_ptr, strides_out, start, N, D, BLOCK, BLOCK_D)
    return tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)


@triton.jit
def attention_delta_kernel(
    out_ptr,  # (B, H, N, D), strides_out
    dout_ptr,  # (B, H, N, D), strides_dout
    delta_ptr,  # (B, H, N) float32
    strides_out: tl.constexpr, strides_dout: tl.constexpr,
    H,
    N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """rowsum(dO * O) of BLOCK_M queries of one head; grid (B * H * ceil(N / BLOCK_M),)."""
    NUM_BLOCKS: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    head = tl.program_id(0) // NUM_BLOCKS
    start = tl.program_id(0) % NUM_BLOCKS * BLOCK_M
    dout = _load_tile(_head_ptr(dout_ptr, strides_dout, head, H), strides_dout, start, N, D, BLOCK_M, BLOCK_D)
    delta = _row_sums(_head_ptr(out_ptr, strides_out, head, H), strides_out, dout, start, N, D, BLOCK_M, BLOCK_D)
    rows = start + tl.arange(0, BLOCK_M)
    tl.store(delta_ptr + head.to(tl.int64) * N + rows, delta, mask=rows < N)


@triton.jit
def _load_lse(lse_ptr, start, N: tl.constexpr, BLOCK: tl.constexpr):
    """Of queries from `start` on. Beyond N any finite number will do: dO is zero there, and so is all that it adds."""
    rows = start + tl.arange(0, BLOCK)
    return tl.load(lse_ptr + rows, mask=rows < N, other=0.0)


@triton.jit
def _load_delta(
    delta_ptr, out_ptr, strides_out: tl.constexpr, dout, start,
    N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of queries from `start` on, computed here unless an earlier launch did."""
    if delta_ptr is None:
        delta = _row_sums(out_ptr, strides_out, dout, start, N, D, BLOCK, BLOCK_D)
    else:
        rows = start + tl.arange(0, BLOCK)
        delta = tl.load(delta_ptr + rows, mask=rows < N, other=0.0)
    return delta


@triton.jit
def attention_backward_kernel(
    q_ptr,  # (B, H, N, D), strides_q
    k_ptr,  # (B, H, N, D), strides_k
    v_ptr,  # (B, H, N, D), strides_v
    out_ptr,  # (B, H, N, D), strides_out
    dout_ptr,  # (B, H, N, D), strides_dout
    lse_ptr,  # (B, H, N) float32, of the forward
    delta_ptr,  # (B, H, N) float32, or None
    dq_ptr,  # (B, H, N, D), strides_grad, as the next two
    dk_ptr,
    dv_ptr,
    strides_q: tl.constexpr, strides_k: tl.constexpr, strides_v: tl.constexpr, strides_out: tl.constexpr,
    strides_dout: tl.constexpr, strides_grad: tl.constexpr,
    H, scale, scale_log2,
    N: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_M keys of one head, or dQ of BLOCK_M queries; grid (2 * B * H * ceil(N / BLOCK_M),).

    The program keeps BLOCK_M rows of the one and loops over the other, BLOCK_N rows at a time. PAD columns after the
    last head's dV become zero.
    """
    NUM_BLOCKS: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    head = tl.program_id(0) // (2 * NUM_BLOCKS)
    block = tl.program_id(0) % (2 * NUM_BLOCKS)
    start = block % NUM_BLOCKS * BLOCK_M
    q_ptr = _head_ptr(q_ptr, strides_q, head, H)
    k_ptr = _head_ptr(k_ptr, strides_k, head, H)
    v_ptr = _head_ptr(v_ptr, strides_v, head, H)
    out_ptr = _head_ptr(out_ptr, strides_out, head, H)
    dout_ptr = _head_ptr(dout_ptr, strides_dout, head, H)
    lse_ptr += head.to(tl.int64) * N
    if delta_ptr is not None:
        delta_ptr += head.to(tl.int64) * N
    if block < NUM_BLOCKS:
        k = _load_tile(k_ptr, strides_k, start, N, D, BLOCK_M, BLOCK_D)
        v = _load_tile(v_ptr, strides_v, start, N, D, BLOCK_M, BLOCK_D)
        dk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for other in range(0, N, BLOCK_N):
            # All loads before the first product: narrow ones are not pipelined, so this waits for them only once.
            q = _load_tile(q_ptr, strides_q, other, N, D, BLOCK_N, BLOCK_D)
            dout = _load_tile(dout_ptr, strides_dout, other, N, D, BLOCK_N, BLOCK_D)
            lse = _load_lse(lse_ptr, other, N, BLOCK_N)
            delta = _load_delta(delta_ptr, out_ptr, strides_out, dout, other, N, D, BLOCK_N, BLOCK_D)
            p_t = tl.exp2(_dot(k, tl.trans(q)) * scale_log2 - lse[None, :])
            dv = _dot(p_t.to(dout.dtype), dout, dv)
            ds_t = p_t * (_dot(v, tl.trans(dout)) - delta[None, :])
            dk = _dot(ds_t.to(q.dtype), q, dk)
        _store_tile(_head_ptr(dk_ptr, strides_grad, head, H), strides_grad, start, dk * scale, N, D, BLOCK_M, BLOCK_D)
        dv_ptr = _head_ptr(dv_ptr, strides_grad, head, H)
        _store_tile(dv_ptr, strides_grad, start, dv, N, D, BLOCK_M, BLOCK_D)
        if head % H == H - 1:
            _store_padding(dv_ptr, strides_grad, start, N, D, PAD, BLOCK_M)
    else:
        q = _load_tile(q_ptr, strides_q, start, N, D, BLOCK_M, BLOCK_D)
        dout = _load_tile(dout_ptr, strides_dout, start, N, D, BLOCK_M, BLOCK_D)
        lse = _load_lse(lse_ptr, start, N, BLOCK_M)
        delta = _load_delta(delta_ptr, out_ptr, strides_out, dout, start, N, D, BLOCK_M, BLOCK_D)
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for other in range(0, N, BLOCK_N):
            k = _load_tile(k_ptr, strides_k, other, N, D, BLOCK_N, BLOCK_D)
            v = _load_tile(v_ptr, strides_v, other, N, D, BLOCK_N, BLOCK_D)
            p = tl.exp2(_dot(q, tl.trans(k)) * scale_log2 - lse[:, None])
            if N % BLOCK_N != 0:
                # Scores of keys beyond N are 0, and exp2(-lse) may be infinite where all true scores are far below 0.
                p = tl.where((other + tl.arange(0, BLOCK_N) < N)[None, :], p, 0.0)
            ds = p * (_dot(dout, tl.trans(v)) - delta[:, None])
            dq = _dot(ds.to(k.dtype), k, dq)
        _store_tile(_head_ptr(dq_ptr, strides_grad, head, H), strides_grad, start, dq * scale, N, D, BLOCK_M, BLOCK_D)


def _configs(shape: tuple[int, ...], rows: list[Blocks], roles: int) -> list[dispatch.Config]:
    """Configurations from rows, best first, with blocks no larger than N needs.

    The default is the first that fills a GPU with programs, or else the one with the most programs.
    """
    batch, heads, tokens, _ = shape
    whole = max(16, next_power_of_two(tokens))
    rows = list(dict.fromkeys((min(m, whole), min(n, whole), warps, stages) for m, n, warps, stages in rows))
    programs = {row: roles * batch * heads * ceil_div(tokens, row[0]) for row in rows}
    default = next((row for row in rows if programs[row] >= ENOUGH_PROGRAMS), max(rows, key=programs.__getitem__))
    rows.sort(key=lambda row: row is not default)
    return [dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), row, strict=True)) for row in rows]


@cache
def _forward_configs(shape: tuple[int, ...], dtype: torch.dtype) -> list[dispatch.Config]:
    """Configurations for q of (B, H, N, D), best first."""
    tokens, features = shape[2:]
    rows: list[Blocks]
    if dtype == torch.float32:
        rows = [(32, 128, 8, 1), (32, 64, 4, 1), (16, 64, 4, 1)]
        if features > 64:
            rows = [(32, 64, 8, 1), (32, 32, 4, 1), (16, 64, 4, 1), (16, 32, 4, 1)]
    elif features > 64:
        rows = [(64, 64, 4, 2), (64, 128, 8, 1), (32, 64, 4, 2)]
        if tokens > 512:
            rows = [(128, 64, 8, 2), *rows]
        elif tokens <= 256:
            rows = [*rows, (32, 256, 8, 1)]
    elif tokens <= 256:  # one block of keys
        rows = [(32, 256, 8, 1), (32, 256, 4, 1), (16, 256, 4, 1), (64, 64, 4, 3)]
    elif _has_wide_loads(features, dtype) and tokens % 128 == 0:
        rows = [(128, 64, 8, 3), (64, 128, 4, 2), (64, 64, 4, 3), (32, 128, 4, 2), (32, 64, 4, 3)]
    else:
        rows = [(128, 64, 8, 3), (64, 64, 4, 3), (32, 64, 4, 3)]
    return _configs(shape, rows, roles=1)


@cache
def _backward_configs(shape: tuple[int, ...], dtype: torch.dtype) -> list[dispatch.Config]:
    """Configurations for q of (B, H, N, D), best first."""
    tokens, features = shape[2:]
    rows: list[Blocks]
    if dtype == torch.float32:
        rows = [(16, 32, 8, 1)] if features > 64 else [(32, 32, 8, 1), (16, 32, 4, 1), (16, 64, 8, 1)]
    elif features > 64:
        rows = [(64, 64, 8, 1), (64, 32, 8, 2)]
    elif not _has_wide_loads(features, dtype):
        rows = [(32, 64, 4, 1), (64, 32, 4, 1)]
    else:
        rows = [(64, 32, 4, 2)]
        if tokens % 128 == 0:
            rows = [(64, 64, 4, 2), *rows, (32, 64, 4, 2)]
        if tokens > 512:
            rows = [(128, 64, 8, 3), *rows]
    return _configs(shape, rows, roles=2)


def _has_wide_loads(features: int, dtype: torch.dtype) -> bool:
    """Whether rows are multiples of 16 bytes. Narrow loads, as of 51 features, need the registers of larger blocks."""
    return features * dtype.itemsize % 16 == 0


@dispatch.once_per_shape
def _key(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """What the best path and configuration depend on; batch x heads rounded up to a power of two."""
    batch, heads, tokens, features = shape
    return f"N{tokens} D{features} heads{next_power_of_two(batch * heads)} {str(dtype).removeprefix('torch.')}"


def _sizes(q: Tensor) -> dict[str, int]:
    _, heads, tokens, features = q.shape
    return {"H": heads, "N": tokens, "D": features, "BLOCK_D": max(16, next_power_of_two(features))}


def _empty_like(q: Tensor) -> Tensor:
    """(B, H, N, D), in memory (B, N, H, D): joining the heads afterwards copies nothing."""
    batch, heads, tokens, features = q.shape
    return torch.empty((batch, tokens, heads, features), dtype=q.dtype, device=q.device).transpose(1, 2)


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def _num_blocks(q: Tensor, config: dispatch.Config) -> int:
    batch, heads, tokens, _ = q.shape
    return batch * heads * ceil_div(tokens, config["BLOCK_M"])


def _pointers(**tensors: Tensor | None) -> dict[str, Any]:
    return {f"{name}_ptr": tensor for name, tensor in tensors.items()}


def _strides(**tensors: Tensor) -> dict[str, Any]:
    return {f"strides_{name}": tensor.stride() for name, tensor in tensors.items()}


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Launch the forward.

    Args:
        q, k, v: (B, H, N, D), any strides.
        scale: factor on the scores, not negative: the kernel takes the maximum of a row before it scales.

    Returns:
        output (B, H, N, D), dtype of `q`, (B, N, H, D) in memory; log2 of the sum of exp(scores) of each row,
        (B, H, N) float32.
    """
    out, lse = _empty_outputs(q)
    _launch_forward(q, k, v, out, lse, scale, padding=0)
    return out, lse


def _launch_forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, padding: int) -> None:
    args = {
        **_pointers(q=q, k=k, v=v, out=out, lse=lse),
        **_strides(q=q, k=k, v=v, out=out),
        **_sizes(q),
        "scale_log2": scale * LOG2_E,
        "PAD": padding,
    }
    configs = _forward_configs(q.shape, q.dtype)
    key = _key(q.shape, q.dtype)
    dispatch.launch(attention_forward_kernel, lambda config: (_num_blocks(q, config),), args, configs, key)


def _make_delta(out: Tensor, dout: Tensor, key: str) -> Tensor:
    delta = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    args = {**_pointers(out=out, dout=dout, delta=delta), **_strides(out=out, dout=dout), **_sizes(out)}
    configs = [{"BLOCK_M": block, "num_warps": 4, "num_stages": 1} for block in (32, 64, 16)]
    dispatch.launch(attention_delta_kernel, lambda config: (_num_blocks(out, config),), args, configs, key)
    return delta


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward.

    Args:
        q, k, v, scale: as in the forward.
        out, lse: its results.
        dout: gradient of `out`, (B, H, N, D), any strides.

    Returns:
        dq, dk, dv: (B, H, N, D), dtype of `q`, (B, N, H, D) in memory.
    """
    gradients = _empty_like(q), _empty_like(q), _empty_like(q)
    _launch_backward((q, k, v), out, lse, dout, gradients, scale, padding=0)
    return gradients


def _launch_backward(
    qkv: tuple[Tensor, ...],
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    gradients: tuple[Tensor, ...],
    scale: float,
    padding: int,
) -> None:
    (q, k, v), (dq, dk, dv) = qkv, gradients
    key = _key(q.shape, q.dtype)
    delta = _make_delta(out, dout, key) if q.shape[2] > DELTA_IN_KERNEL_MAX else None
    args = {
        **_pointers(q=q, k=k, v=v, out=out, dout=dout, lse=lse, delta=delta, dq=dq, dk=dk, dv=dv),
        **_strides(q=q, k=k, v=v, out=out, dout=dout, grad=dq),
        **_sizes(q),
        "scale": scale,
        "scale_log2": scale * LOG2_E,
        "PAD": padding,
    }
    configs = _backward_configs(q.shape, q.dtype)
    dispatch.launch(attention_backward_kernel, lambda config: (2 * _num_blocks(q, config),), args, configs, key)


def _split(packed: Tensor, count: int, num_heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """`count` views (B, H, N, D) into the first columns of (B, N, columns)."""
    used = count * num_heads * head_dim
    columns = packed if packed.shape[-1] == used else packed[..., :used]
    return columns.view(*packed.shape[:2], count, num_heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)


def _empty_packed_outputs(qkv: Tensor, num_heads: int, out_columns: int) -> tuple[Tensor, Tensor]:
    batch, tokens, _ = qkv.shape
    return qkv.new_empty(batch, tokens, out_columns), qkv.new_empty(batch, num_heads, tokens, dtype=torch.float32)


def attention_packed_forward(
    qkv: Tensor, num_heads: int, head_dim: int, scale: float, out_columns: int
) -> tuple[Tensor, Tensor]:
    """Launch the forward on a fused projection.

    Args:
        qkv, num_heads, head_dim, out_columns: as `flash_attention_packed`.
        scale: as `attention_forward`.

    Returns:
        output (B, N, out_columns), contiguous; log-sum-exps as `attention_forward`.
    """
    out, lse = _empty_packed_outputs(qkv, num_heads, out_columns)
    q, k, v = _split(qkv, 3, num_heads, head_dim)
    (heads,) = _split(out, 1, num_heads, head_dim)
    _launch_forward(q, k, v, heads, lse, scale, padding=out_columns - num_heads * head_dim)
    return out, lse


def attention_packed_backward(
    qkv: Tensor, out: Tensor, lse: Tensor, dout: Tensor, num_heads: int, head_dim: int, scale: float
) -> Tensor:
    """Launch the backward on a fused projection.

    Args:
        qkv, num_heads, head_dim, scale: as in the forward.
        out, lse: its results.
        dout: gradient of `out`, (B, N, out_columns), any strides.

    Returns:
        dqkv: shape and dtype of `qkv`, contiguous.
    """
    dqkv = qkv.new_empty(qkv.shape)
    (heads,), (dheads,) = (_split(x, 1, num_heads, head_dim) for x in (out, dout))
    views, gradients = (_split(x, 3, num_heads, head_dim) for x in (qkv, dqkv))
    padding = qkv.shape[-1] - 3 * num_heads * head_dim
    _launch_backward(views, heads, lse, dheads, gradients, scale, padding)
    return dqkv


_forward_op = dispatch.operator(attention_forward)
_backward_op = dispatch.operator(attention_backward)


@_forward_op.register_fake
def _(q, k, v, scale):
    return _empty_outputs(q)


@_backward_op.register_fake
def _(q, k, v, out, lse, dout, scale):
    return _empty_like(q), _empty_like(q), _empty_like(q)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # else a launch fills the gradient of lse with zeros
    ctx.save_for_backward(q, k, v, out, lse)


def _backward(run: Callable[..., Any], ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    dq, dk, dv = run(q, k, v, out, lse, dout, ctx.scale)
    return dispatch.gradients(attention_forward, q=dq, k=dk, v=dv)


_attention = dispatch.differentiable(_forward_op, _backward_op, _setup_context, _backward)

_packed_forward_op = dispatch.operator(attention_packed_forward)
_packed_backward_op = dispatch.operator(attention_packed_backward)


@_packed_forward_op.register_fake
def _(qkv, num_heads, head_dim, scale, out_columns):
    return _empty_packed_outputs(qkv, num_heads, out_columns)


@_packed_backward_op.register_fake
def _(qkv, out, lse, dout, num_heads, head_dim, scale):
    return qkv.new_empty(qkv.shape)


def _setup_packed_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.num_heads, ctx.head_dim, ctx.scale, _ = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, out, lse)


def _packed_backward(run: Callable[..., Any], ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    dqkv = run(*ctx.saved_tensors, dout, ctx.num_heads, ctx.head_dim, ctx.scale)
    return dispatch.gradients(attention_packed_forward, qkv=dqkv)


_attention_packed = dispatch.differentiable(
    _packed_forward_op, _packed_backward_op, _setup_packed_context, _packed_backward
)


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_floats(name, tensor, "batch, heads, tokens, features")
        check_alike(name, tensor, "q", q)
    _check_head(q.shape[-1], scale)


def _check_head(features: int, scale: float | None) -> None:
    if features > MAX_HEAD_DIM:
        raise ValueError(f"{features} features per head; the limit is {MAX_HEAD_DIM}: use more heads")
    if scale is not None and not (isinstance(scale, Real) and abs(scale) < math.inf):
        raise ValueError(f"scale {scale!r} must be a finite number; omit it for features ** -0.5")


def flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Exact softmax attention, differentiable once in q, k and v.

    Args:
        q, k, v: (B, H, N, D) of one shape, dtype and device; D up to 128; any strides (views of a fused projection).
        scale: factor on the scores; None = D ** -0.5.

    Returns:
        (B, H, N, D), dtype of `q`; accumulated in float32.

    Raises:
        ValueError: a wrong rank; shapes, dtypes or devices that differ; D over 128; a scale that is not finite.
    """
    _check(q, k, v, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if torch.compiler.is_exporting():  # an exported graph has plain operations, and any batch size; a key needs one
        return attention_reference(q, k, v, scale)
    key = _key(q.shape, q.dtype)
    dispatch.compare("attention", key, flash_attention, (q, k, v, scale), dispatch.SDPA_WAYS)
    path = dispatch.path("attention", q, key)
    if path == "triton":
        if scale < 0:
            q, scale = -q, -scale
        return _attention(q, k, v, scale)[0]
    if path == "torch":
        backends = dispatch.sdpa_backends("attention", q, key)
        with torch.autocast(q.device.type, enabled=False), sdpa_kernel(backends, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return attention_reference(q, k, v, scale)


def _check_packed(qkv: Tensor, num_heads: int, head_dim: int, scale: float | None, out_columns: int | None) -> None:
    check_floats("qkv", qkv, "batch, tokens, columns")
    for name, value in (("num_heads", num_heads), ("head_dim", head_dim)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} {value!r} must be a whole number of at least 1")
    _check_head(head_dim, scale)
    features = num_heads * head_dim
    for name, columns, least in (("qkv", qkv.shape[-1], 3 * features), ("out_columns", out_columns, features)):
        if columns is not None and columns < least:
            raise ValueError(f"{name} of {columns} columns; {num_heads} heads of {head_dim} need {least} or more")


def flash_attention_packed(
    qkv: Tensor, num_heads: int, head_dim: int, scale: float | None = None, out_columns: int | None = None
) -> Tensor:
    """Exact softmax attention on a fused projection, differentiable once; one launch each way up to 512 tokens.

    Args:
        qkv: (B, N, columns), any strides. The first 3 * num_heads * head_dim columns are ordered (q|k|v, head,
            feature); any others are ignored, and their gradient is zero.
        num_heads, head_dim: heads, and features of each, up to 128.
        scale: factor on the scores; None = head_dim ** -0.5.
        out_columns: columns of the result, zero beyond num_heads * head_dim; None = no more than these.

    Returns:
        (B, N, out_columns), ordered (head, feature), dtype of `qkv`; accumulated in float32.

    Raises:
        ValueError: a wrong rank or dtype; too few columns; head_dim over 128; a scale that is not finite.
    """
    _check_packed(qkv, num_heads, head_dim, scale, out_columns)
    columns = num_heads * head_dim if out_columns is None else out_columns
    scale = head_dim**-0.5 if scale is None else scale
    if not torch.compiler.is_exporting() and scale >= 0:
        batch, tokens, _ = qkv.shape
        key = _key((batch, num_heads, tokens, head_dim), qkv.dtype)
        args = (qkv, num_heads, head_dim, scale, columns)
        dispatch.compare("attention", key, flash_attention_packed, args, dispatch.SDPA_WAYS)
        if dispatch.path("attention", qkv, key) == "triton":
            return _attention_packed(qkv, num_heads, head_dim, scale, columns)[0]
    q, k, v = _split(qkv, 3, num_heads, head_dim)
    out = flash_attention(q, k, v, scale).transpose(1, 2).flatten(2)
    return out if columns == out.shape[-1] else F.pad(out, (0, columns - out.shape[-1]))
