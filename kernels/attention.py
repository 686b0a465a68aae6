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

The kernels keep S and P on the chip. A UNETR's grid is small (20 heads of 256 tokens), so what counts there is latency:

- Forward, one launch: a program has a block of queries of one head and goes over blocks of keys with a running maximum
  and sum. Where one block holds every key the loop is gone, and it is a plain softmax. It leaves the log-sum-exp of
  each row, 4 bytes, from which the backward makes P again.
- Backward, one launch, two kinds of program: one keeps a block of keys and goes over the queries, for dK and dV; the
  other keeps a block of queries and goes over the keys, for dQ. That is seven products where five would do, for S and
  dP are made twice; in return nothing is summed across programs: no atomics, no partial sums, the same bits each time,
  and twice the programs to fill a GPU with.
- delta = rowsum(dO * O) is made where it is used up to N = 512, from few rows of O, which each program reads again: a
  second launch is thought to cost more, though where that ends was not measured. Beyond, a launch of its own makes it.
- Products are tensor-core products with float32 sums. P and dS are rounded to the dtype of the inputs for theirs, as
  in every fused attention. float32 inputs are split in three TF32 products each ("tf32x3"), which leaves an error near
  float32's own where TF32 alone keeps three digits.
- Sizes and strides are compile-time constants. With 51 features a row may start at any even byte, so loads are 2 bytes
  wide; constant strides make their addresses immediate offsets, a quarter fewer instructions in the compiled code
  (sm_90, forward).
- O, dQ, dK and dV are (B, N, H, D) in memory, returned as (B, H, N, D) views: joining the heads is then free.

Sources: Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762; Dao, FlashAttention-2,
https://arxiv.org/abs/2307.08691.
"""

from __future__ import annotations

import math
from functools import cache
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from kernels import dispatch

MAX_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LOG2_E = math.log2(math.e)
DELTA_IN_KERNEL_MAX = 512
"""Tokens up to which the backward makes delta where it uses it; not measured."""
ENOUGH_PROGRAMS = 128
"""Programs that fill a GPU: an A100 has 108 multiprocessors, an H100 132."""
Row = tuple[int, int, int, int]
"""BLOCK_M, BLOCK_N, num_warps, num_stages."""


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


@triton.jit
def _dot(a, b, acc=None):
    return tl.dot(a, b, acc, input_precision="tf32x3")  # says something for float32 only


@triton.jit
def _head_ptr(x_ptr, strides: tl.constexpr, head, H):
    return x_ptr + (head // H).to(tl.int64) * strides[0] + (head % H).to(tl.int64) * strides[1]


@triton.jit
def _tile_ptrs(x_ptr, strides: tl.constexpr, start, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    # In int64: the compiler can't prove that a 32-bit sum does not wrap, and so could not make offsets immediate.
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
def attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    strides_q: tl.constexpr,
    strides_k: tl.constexpr,
    strides_v: tl.constexpr,
    strides_out: tl.constexpr,
    H,
    scale_log2,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
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
            p = tl.where(is_key, p, 0.0)  # a scale of zero makes NaN of -inf
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        acc = _dot(p.to(v.dtype), v, acc * shrink[:, None])
        row_max = new_max
    out_ptr = _head_ptr(out_ptr, strides_out, head, H)
    _store_tile(out_ptr, strides_out, start_m, acc * (1.0 / row_sum)[:, None], N, D, BLOCK_M, BLOCK_D)
    rows = start_m + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + head.to(tl.int64) * N + rows, row_max + tl.log2(row_sum), mask=rows < N)


@triton.jit
def _row_sums(
    out_ptr,
    strides_out: tl.constexpr,
    dout,
    start,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    out = _load_tile(out_ptr, strides_out, start, N, D, BLOCK, BLOCK_D)
    return tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)


@triton.jit
def attention_delta_kernel(
    out_ptr,
    dout_ptr,
    delta_ptr,
    strides_out: tl.constexpr,
    strides_dout: tl.constexpr,
    H,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    NUM_BLOCKS: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    head = tl.program_id(0) // NUM_BLOCKS
    start = tl.program_id(0) % NUM_BLOCKS * BLOCK_M
    dout = _load_tile(_head_ptr(dout_ptr, strides_dout, head, H), strides_dout, start, N, D, BLOCK_M, BLOCK_D)
    delta = _row_sums(_head_ptr(out_ptr, strides_out, head, H), strides_out, dout, start, N, D, BLOCK_M, BLOCK_D)
    rows = start + tl.arange(0, BLOCK_M)
    tl.store(delta_ptr + head.to(tl.int64) * N + rows, delta, mask=rows < N)


@triton.jit
def _load_lse(lse_ptr, start, N: tl.constexpr, BLOCK: tl.constexpr):
    """Of queries from `start` on. Beyond N any finite number does: dO is zero there, and so is all that a row adds."""
    rows = start + tl.arange(0, BLOCK)
    return tl.load(lse_ptr + rows, mask=rows < N, other=0.0)


@triton.jit
def _load_delta(
    delta_ptr,
    out_ptr,
    strides_out: tl.constexpr,
    dout,
    start,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of queries from `start` on, made here where no launch before has made it."""
    if delta_ptr is None:
        delta = _row_sums(out_ptr, strides_out, dout, start, N, D, BLOCK, BLOCK_D)
    else:
        rows = start + tl.arange(0, BLOCK)
        delta = tl.load(delta_ptr + rows, mask=rows < N, other=0.0)
    return delta


@triton.jit
def attention_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    strides_q: tl.constexpr,
    strides_k: tl.constexpr,
    strides_v: tl.constexpr,
    strides_out: tl.constexpr,
    strides_dout: tl.constexpr,
    strides_grad: tl.constexpr,
    H,
    scale,
    scale_log2,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # BLOCK_M rows are kept and BLOCK_N rows at a time gone over, whichever of the two are queries and which keys.
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
            # All loads before the first product: narrow ones are not pipelined, and so they are waited for once.
            q = _load_tile(q_ptr, strides_q, other, N, D, BLOCK_N, BLOCK_D)
            dout = _load_tile(dout_ptr, strides_dout, other, N, D, BLOCK_N, BLOCK_D)
            lse = _load_lse(lse_ptr, other, N, BLOCK_N)
            delta = _load_delta(delta_ptr, out_ptr, strides_out, dout, other, N, D, BLOCK_N, BLOCK_D)
            p_t = tl.exp2(_dot(k, tl.trans(q)) * scale_log2 - lse[None, :])
            dv = _dot(p_t.to(dout.dtype), dout, dv)
            ds_t = p_t * (_dot(v, tl.trans(dout)) - delta[None, :])
            dk = _dot(ds_t.to(q.dtype), q, dk)
        _store_tile(_head_ptr(dk_ptr, strides_grad, head, H), strides_grad, start, dk * scale, N, D, BLOCK_M, BLOCK_D)
        _store_tile(_head_ptr(dv_ptr, strides_grad, head, H), strides_grad, start, dv, N, D, BLOCK_M, BLOCK_D)
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
                # Scores of keys beyond N are 0, and exp2(-lse) may be infinite where all true scores are far below.
                p = tl.where((other + tl.arange(0, BLOCK_N) < N)[None, :], p, 0.0)
            ds = p * (_dot(dout, tl.trans(v)) - delta[:, None])
            dq = _dot(ds.to(k.dtype), k, dq)
        _store_tile(_head_ptr(dq_ptr, strides_grad, head, H), strides_grad, start, dq * scale, N, D, BLOCK_M, BLOCK_D)


def _configs(shape: tuple[int, ...], rows: list[Row], roles: int) -> list[dispatch.Config]:
    """Configurations from rows, preferred first, their blocks cut down to what N needs.

    The default is the first that gives enough programs to fill a GPU, or else the one that gives most.
    """
    batch, heads, tokens, _ = shape
    whole = max(16, triton.next_power_of_2(tokens))
    rows = list(dict.fromkeys((min(block_m, whole), min(block_n, whole), *rest) for block_m, block_n, *rest in rows))
    programs = {row: roles * batch * heads * _ceil_div(tokens, row[0]) for row in rows}
    default = next((row for row in rows if programs[row] >= ENOUGH_PROGRAMS), max(rows, key=programs.__getitem__))
    rows.sort(key=lambda row: row is not default)
    return [dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), row, strict=True)) for row in rows]


@cache
def _forward_configs(shape: tuple[int, ...], dtype: torch.dtype) -> list[dispatch.Config]:
    """Configurations for q of (B, H, N, D), preferred first."""
    tokens, features = shape[2:]
    rows: list[Row]
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
    """Configurations for q of (B, H, N, D), preferred first."""
    tokens, features = shape[2:]
    rows: list[Row]
    if dtype == torch.float32:
        rows = [(16, 32, 8, 1)] if features > 64 else [(32, 32, 8, 1), (16, 32, 4, 1), (16, 64, 8, 1)]
    elif features > 64:
        rows = [(64, 64, 8, 1), (64, 32, 8, 2)]
    elif not _has_wide_loads(features, dtype):
        rows = [(64, 32, 4, 1), (32, 64, 4, 1)]
    else:
        rows = [(64, 32, 4, 2)]
        if tokens % 128 == 0:
            rows = [(64, 64, 4, 2), *rows, (32, 64, 4, 2)]
        if tokens > 512:
            rows = [(128, 64, 8, 3), *rows]
    return _configs(shape, rows, roles=2)


def _has_wide_loads(features: int, dtype: torch.dtype) -> bool:
    """Whether rows are whole 16-byte pieces. Narrow loads, as of 51 features, and masks take the registers that the
    larger blocks need.
    """
    return features * dtype.itemsize % 16 == 0


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)  # `triton.cdiv` takes some microseconds


def _key(q: Tensor) -> str:
    """What the choice of a path and of a configuration depends on; batch x heads rounded up to a power of two."""
    batch, heads, tokens, features = q.shape
    dtype = str(q.dtype).removeprefix("torch.")
    return f"N{tokens} D{features} heads{1 << (batch * heads - 1).bit_length()} {dtype}"


def _sizes(q: Tensor) -> dict[str, int]:
    _, heads, tokens, features = q.shape
    return {"H": heads, "N": tokens, "D": features, "BLOCK_D": max(16, 1 << (features - 1).bit_length())}


def _empty_like(q: Tensor) -> Tensor:
    """(B, H, N, D), in memory (B, N, H, D): joining the heads afterwards copies nothing."""
    batch, heads, tokens, features = q.shape
    return torch.empty((batch, tokens, heads, features), dtype=q.dtype, device=q.device).transpose(1, 2)


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def _num_blocks(q: Tensor, config: dispatch.Config) -> int:
    batch, heads, tokens, _ = q.shape
    return batch * heads * _ceil_div(tokens, config["BLOCK_M"])


def _pointers(**tensors: Tensor | None) -> dict[str, Any]:
    return {f"{name}_ptr": tensor for name, tensor in tensors.items()}


def _strides(**tensors: Tensor) -> dict[str, Any]:
    return {f"strides_{name}": tensor.stride() for name, tensor in tensors.items()}


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of its scores.

    Args:
        q, k, v: (B, H, N, D), any strides.
        scale: factor on the scores, not negative: the kernel takes the maximum of a row before it scales.

    Returns:
        The output (B, H, N, D), dtype of `q`, (B, N, H, D) in memory; log2 of the sum of exp(scores) of each row,
        (B, H, N), float32.
    """
    out, lse = _empty_outputs(q)
    args = {
        **_pointers(q=q, k=k, v=v, out=out, lse=lse),
        **_strides(q=q, k=k, v=v, out=out),
        **_sizes(q),
        "scale_log2": scale * LOG2_E,
    }
    configs = _forward_configs(q.shape, q.dtype)
    dispatch.launch(attention_forward_kernel, lambda config: (_num_blocks(q, config),), args, configs, _key(q))
    return out, lse


def _make_delta(out: Tensor, dout: Tensor) -> Tensor:
    delta = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    args = {
        **_pointers(out=out, dout=dout, delta=delta),
        **_strides(out=out, dout=dout),
        **_sizes(out),
    }
    configs = [{"BLOCK_M": block, "num_warps": 4, "num_stages": 1} for block in (32, 64, 16)]
    dispatch.launch(attention_delta_kernel, lambda config: (_num_blocks(out, config),), args, configs, _key(out))
    return delta


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention.

    Args:
        q, k, v, scale: as in the forward. out, lse: what it returned.
        dout: gradient of `out`, (B, H, N, D), any strides.

    Returns:
        dq, dk, dv: (B, H, N, D), dtype of `q`, (B, N, H, D) in memory.
    """
    delta = _make_delta(out, dout) if q.shape[2] > DELTA_IN_KERNEL_MAX else None
    dq, dk, dv = _empty_like(q), _empty_like(q), _empty_like(q)
    args = {
        **_pointers(q=q, k=k, v=v, out=out, dout=dout, lse=lse, delta=delta, dq=dq, dk=dk, dv=dv),
        **_strides(q=q, k=k, v=v, out=out, dout=dout, grad=dq),
        **_sizes(q),
        "scale": scale,
        "scale_log2": scale * LOG2_E,
    }
    configs = _backward_configs(q.shape, q.dtype)
    dispatch.launch(attention_backward_kernel, lambda config: (2 * _num_blocks(q, config),), args, configs, _key(q))
    return dq, dk, dv


_forward_op = torch.library.custom_op("glioforge::attention_forward", mutates_args=())(attention_forward)
_backward_op = torch.library.custom_op("glioforge::attention_backward", mutates_args=())(attention_backward)


@_forward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q)


@_backward_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(q), _empty_like(q), _empty_like(q)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse)


def _backward(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None]:
    q, k, v, out, lse = ctx.saved_tensors
    return *_backward_op(q, k, v, out, lse, dout, ctx.scale), None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}; attention takes tensors: torch.as_tensor({name})")
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
    if scale is not None and not (isinstance(scale, Real) and abs(scale) < math.inf):
        raise ValueError(f"scale {scale!r} must be a finite number; leave it out for features ** -0.5")


def flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Exact softmax attention, differentiable once in q, k and v.

    Args:
        q, k, v: (B, H, N, D) of one shape, dtype and device; D up to 128; any strides (views of a fused projection).
        scale: factor on the scores; None = D ** -0.5.

    Returns:
        (B, H, N, D), dtype of `q`; accumulated in float32.

    Raises:
        ValueError: wrong rank, shapes, dtypes or devices that differ, D over 128, a scale that is no finite number.
    """
    _check(q, k, v, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if torch.compiler.is_exporting():  # a graph holds plain operations, and leaves open the batch size that a key needs
        return attention_reference(q, k, v, scale)
    key = _key(q)
    path = dispatch.path("flash_attention", q, key)
    if path == "triton":
        if scale < 0:
            q, scale = -q, -scale
        return _forward_op(q, k, v, scale)[0]
    if path == "torch":
        backends = dispatch.sdpa_backends("flash_attention", q, key)
        with torch.autocast(q.device.type, enabled=False), sdpa_kernel(backends, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return attention_reference(q, k, v, scale)
