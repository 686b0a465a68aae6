"""Residual stream and LayerNorm of a pre-norm transformer, as one operation.

    x = tokens + update
    xhat = (x - mean) / sqrt(var + eps)                  over the features of a token (var biased)
    y = xhat * weight + bias                             rounded for the product that follows
    s = x + stream_bias                                  the residual stream

The bias of the stream, if there is one, is that of the linear layer whose product is added next: here it costs nothing,
and its gradient is summed with the others. With dy the gradient of y, ds that of s from elsewhere and g = dy * weight:

    dtokens = dupdate = ds + rstd * (g - mean(g) - xhat * mean(g * xhat))
    dweight = sum over tokens of dy * xhat               dbias = sum of dy          dstream_bias = sum of ds

The backward has x from s - stream_bias, instead of a further map: off by one rounding of s, 6e-8 of it in float32.

Bytes for each element in bf16 autocast, where the stream is float32, update and y are bf16:

                eager PyTorch                                            here
    forward     add 6 + 4, norm 4 + 4, cast 4 + 2                  24    6 + 6     12
    backward    cast 2 + 4, norm twice 8 and 4, add 8 + 4,         44    10 + 6    16
                cast 4 + 2 (read + written)

    layer_norm_forward    a few tokens a program: adds, statistics in two passes over registers, y
    layer_norm_backward   up to ONE_LAUNCH_ROWS tokens: some programs take a few tokens, for dtokens and dupdate; the
                          others a few features of all tokens, for the sums. These read the maps again, from the cache
    layer_norm_chunks     more tokens: a program walks a chunk of them, for dtokens, dupdate and its part of the sums
    layer_norm_combine    joins the sums of the chunks

Two or three launches for forward and backward, instead of eight. Sums are float32 (float64 for float64). Their order
depends on the shape and the configuration alone and there are no atomics: the same bits on every run. A token must fit
the registers of a program: at most MAX_FEATURES.

Legend: B batch, N tokens, D features, R = B * N rows of a stream, P chunks.

Source: Ba et al., Layer Normalization, https://arxiv.org/abs/1607.06450.
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

from . import dispatch
from .checks import FLOATS, check_floats, check_is_tensor, check_same_device
from .dispatch import ceil_div, next_power_of_two

MAX_FEATURES = 4096
PROGRAMS = 264
"""Most chunks of the backward: 2 for each of an H100's 132 multiprocessors."""
ONE_LAUNCH_ROWS = 1024
"""Most rows of a backward in one launch. A program reads 8 features of all of them: 100 KB, 1.5 us at the 40 bytes a
cycle that a multiprocessor has from the L2 cache, where a second launch costs 2 us. Computed, not measured."""
MIN_CHUNK = 4
"""Least rows of a chunk: its float32 sums are as large as two rows."""
THREAD_ELEMENTS = 8
"""Elements of a tensor that a thread holds, if one row has no more: with 16 the backward of some GPUs spills."""
COLUMNS = 8
"""Features of a program that sums over all rows: in float32 a sector of memory, 32 bytes."""
COMBINE_BLOCK = {"BLOCK_P": 64, "BLOCK_D": 32}
"""Chunks and features that a program of the last launch holds at once."""


def residual_layer_norm_reference(
    tokens_BND: Tensor,
    update_BND: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    stream_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The equation at the head of this file in plain PyTorch; arguments as `residual_layer_norm`, unchecked."""
    stream_BND = tokens_BND if update_BND is None else tokens_BND + update_BND
    compute = torch.promote_types(stream_BND.dtype, torch.float32)
    with torch.autocast(tokens_BND.device.type, enabled=False):
        y_BND = F.layer_norm(stream_BND.to(compute), weight.shape, weight.to(compute), bias.to(compute), eps)
    if stream_bias is not None:
        stream_BND = stream_BND + stream_bias.to(stream_BND.dtype)
    return stream_BND, y_BND.to(dtype)


@triton.jit
def _tile(start, end, first_column, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_R rows before `end`, BLOCK_D columns: rows, columns, offsets and mask."""
    row, column = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_D)[None, :]
    rows, columns = start + row, first_column + column
    # One number of the tile, and offsets from it that the compiler makes immediate.
    offsets = tl.cast(start, tl.int64) * D + first_column + (row.to(tl.int64) * D + column)
    return rows, columns, offsets, (rows < end) & (columns < D)


@triton.jit
def _load_row(ptr, columns, D: tl.constexpr):
    return tl.load(ptr + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def layer_norm_forward_kernel(
    tokens_ptr,  # (T, D); T is R, or N where all volumes have the same
    update_ptr,  # (R, D), or None
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    stream_bias_ptr,  # (D,), or None
    stream_ptr,  # (R, D), dtype of tokens; None with neither update nor bias of the stream
    y_ptr,  # (R, D)
    stats_ptr,  # (2, R) float32: mean, rstd
    eps,
    T,
    R,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_R rows; grid (ceil(R / BLOCK_R),)."""
    rows, columns, offsets, mask = _tile(tl.program_id(0) * BLOCK_R, R, 0, D, BLOCK_R, BLOCK_D)
    weight = _load_row(weight_ptr, columns, D)
    bias = _load_row(bias_ptr, columns, D)
    x = tl.load(tokens_ptr + (rows % T).to(tl.int64) * D + columns, mask=mask, other=0.0).to(tl.float32)
    if update_ptr is not None:
        x += tl.load(update_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x = x.to(stream_ptr.dtype.element_ty).to(tl.float32)
    if stream_ptr is not None:
        stream = x
        if stream_bias_ptr is not None:
            # Rounded as the sum in the stream's dtype is.
            stream += _load_row(stream_bias_ptr, columns, D).to(stream_ptr.dtype.element_ty).to(tl.float32)
        tl.store(stream_ptr + offsets, stream.to(stream_ptr.dtype.element_ty), mask=mask)
    mean = tl.sum(x, 1, keep_dims=True) / D
    centred = tl.where(columns < D, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1, keep_dims=True) / D + eps)
    y = centred * rstd * weight + bias
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(stats_ptr + rows, mean, mask=rows < R)
    tl.store(stats_ptr + R + rows, rstd, mask=rows < R)


@triton.jit
def _load_backward(
    dstream_ptr, dy_ptr, stream_ptr, stream_bias_ptr, stats_ptr, rows, columns, offsets, mask, R, D: tl.constexpr
):
    """The gradients of a tile, xhat and rstd, zero outside of it; dstream is zero, too, where there is none."""
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(stream_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if stream_bias_ptr is not None:
        x -= _load_row(stream_bias_ptr, columns, D)
    if dstream_ptr is not None:
        dstream = tl.load(dstream_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        dstream = tl.zeros_like(x)
    mean = tl.load(stats_ptr + rows, mask=rows < R, other=0.0)
    rstd = tl.load(stats_ptr + R + rows, mask=rows < R, other=0.0)
    return dstream, dy, tl.where(mask, (x - mean) * rstd, 0.0), rstd


@triton.jit
def _store_dtokens(dtokens_ptr, dupdate_ptr, dstream, g, xhat, rstd, offsets, mask, D: tl.constexpr):
    """The gradient of whole rows, in one dtype or two."""
    dx = g - tl.sum(g, 1, keep_dims=True) / D - xhat * (tl.sum(g * xhat, 1, keep_dims=True) / D)
    dx = dx * rstd + dstream
    tl.store(dtokens_ptr + offsets, dx.to(dtokens_ptr.dtype.element_ty), mask=mask)
    if dupdate_ptr is not None:
        tl.store(dupdate_ptr + offsets, dx.to(dupdate_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_sum(ptr, x, first_column, D, BLOCK: tl.constexpr):
    columns = first_column + tl.arange(0, BLOCK)
    tl.store(ptr + columns, x.to(ptr.dtype.element_ty), mask=columns < D)


@triton.jit
def _sum_columns(
    dstream_ptr, dy_ptr, stream_ptr, stream_bias_ptr, stats_ptr, dweight_ptr, dbias_ptr, dstream_bias_ptr,
    first_column, R, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sums over all rows, BLOCK_K at a time, of BLOCK_C columns."""
    dweight = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    dstream_bias = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for start in range(0, R, BLOCK_K):
        rows, columns, offsets, mask = _tile(start, R, first_column, D, BLOCK_K, BLOCK_C)
        dstream, dy, xhat, _ = _load_backward(
            dstream_ptr, dy_ptr, stream_ptr, stream_bias_ptr, stats_ptr, rows, columns, offsets, mask, R, D
        )
        dweight += dy * xhat
        dbias += dy
        if dstream_bias_ptr is not None:
            dstream_bias += dstream
    _store_sum(dweight_ptr, tl.sum(dweight, 0), first_column, D, BLOCK_C)
    _store_sum(dbias_ptr, tl.sum(dbias, 0), first_column, D, BLOCK_C)
    if dstream_bias_ptr is not None:
        _store_sum(dstream_bias_ptr, tl.sum(dstream_bias, 0), first_column, D, BLOCK_C)


@triton.jit
def layer_norm_backward_kernel(
    dstream_ptr,  # (R, D), dtype of the stream, or None
    dy_ptr,  # (R, D)
    stream_ptr,  # (R, D)
    stream_bias_ptr,  # (D,), or None
    stats_ptr,  # (2, R) float32, of the forward
    weight_ptr,  # (D,)
    dtokens_ptr,  # (R, D), dtype of the stream
    dupdate_ptr,  # (R, D), or None where it equals dtokens
    dweight_ptr,  # (D,)
    dbias_ptr,  # (D,)
    dstream_bias_ptr,  # (D,), or None
    R,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of BLOCK_C columns, BLOCK_K rows at a time, or dtokens of BLOCK_R rows.

    Grid (ceil(D / BLOCK_C) + ceil(R / BLOCK_R),): the sums take longer and begin first.
    """
    SUMS: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    if tl.program_id(0) < SUMS:
        _sum_columns(
            dstream_ptr, dy_ptr, stream_ptr, stream_bias_ptr, stats_ptr, dweight_ptr, dbias_ptr, dstream_bias_ptr,
            tl.program_id(0) * BLOCK_C, R, D, BLOCK_K, BLOCK_C,
        )  # fmt: skip
    else:
        start = (tl.program_id(0) - SUMS) * BLOCK_R
        rows, columns, offsets, mask = _tile(start, R, 0, D, BLOCK_R, BLOCK_D)
        dstream, dy, xhat, rstd = _load_backward(
            dstream_ptr, dy_ptr, stream_ptr, stream_bias_ptr, stats_ptr, rows, columns, offsets, mask, R, D
        )
        g = dy * _load_row(weight_ptr, columns, D)
        _store_dtokens(dtokens_ptr, dupdate_ptr, dstream, g, xhat, rstd, offsets, mask, D)


@triton.jit
def layer_norm_chunks_kernel(
    dstream_ptr,  # (R, D), dtype of the stream, or None
    dy_ptr,  # (R, D)
    stream_ptr,  # (R, D)
    stream_bias_ptr,  # (D,), or None
    stats_ptr,  # (2, R) float32, of the forward
    weight_ptr,  # (D,)
    dtokens_ptr,  # (R, D), dtype of the stream
    dupdate_ptr,  # (R, D), or None where it equals dtokens
    sums_ptr,  # (2, P, D) float32: of dy * xhat, of dy; with a bias of the stream (3, P, D), also of dstream
    R,
    chunk,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A chunk of rows, BLOCK_R at a time; grid (P,)."""
    first = tl.program_id(0) * chunk
    end = tl.minimum(first + chunk, R)
    weight = _load_row(weight_ptr, tl.arange(0, BLOCK_D)[None, :], D)
    dweight = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    dbias = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    dstream_bias = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(first, end, BLOCK_R):
        rows, columns, offsets, mask = _tile(start, end, 0, D, BLOCK_R, BLOCK_D)
        dstream, dy, xhat, rstd = _load_backward(
            dstream_ptr, dy_ptr, stream_ptr, stream_bias_ptr, stats_ptr, rows, columns, offsets, mask, R, D
        )
        dweight += dy * xhat
        dbias += dy
        if stream_bias_ptr is not None:
            dstream_bias += dstream
        _store_dtokens(dtokens_ptr, dupdate_ptr, dstream, dy * weight, xhat, rstd, offsets, mask, D)
    sums_ptr += tl.program_id(0).to(tl.int64) * D + tl.arange(0, BLOCK_D)
    size = tl.num_programs(0).to(tl.int64) * D
    mask = tl.arange(0, BLOCK_D) < D
    tl.store(sums_ptr, tl.sum(dweight, 0), mask=mask)
    tl.store(sums_ptr + size, tl.sum(dbias, 0), mask=mask)
    if stream_bias_ptr is not None:
        tl.store(sums_ptr + 2 * size, tl.sum(dstream_bias, 0), mask=mask)


@triton.jit
def layer_norm_combine_kernel(
    sums_ptr,  # (2, P, D) float32, or (3, P, D)
    dweight_ptr,  # (D,)
    dbias_ptr,  # (D,)
    dstream_bias_ptr,  # (D,), or None
    P,
    D,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One of the sums over the chunks for BLOCK_D features; grid (ceil(D / BLOCK_D), 2 or 3)."""
    first_column = tl.program_id(0) * BLOCK_D
    columns = first_column + tl.arange(0, BLOCK_D)[None, :]
    sums_ptr += tl.program_id(1).to(tl.int64) * P * D
    parts = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for first in range(0, P, BLOCK_P):
        chunks = first + tl.arange(0, BLOCK_P)[:, None]
        mask = (chunks < P) & (columns < D)
        parts += tl.load(sums_ptr + chunks.to(tl.int64) * D + columns, mask=mask, other=0.0)
    total = tl.sum(parts, 0)
    if tl.program_id(1) == 0:
        _store_sum(dweight_ptr, total, first_column, D, BLOCK_D)
    elif tl.program_id(1) == 1:
        _store_sum(dbias_ptr, total, first_column, D, BLOCK_D)
    elif dstream_bias_ptr is not None:
        _store_sum(dstream_bias_ptr, total, first_column, D, BLOCK_D)


@cache
def _configs(features: int, most_rows: int) -> list[dispatch.Config]:
    """Configurations, best first: a warp for each 128 features, and registers for a few rows."""
    block = next_power_of_two(features)
    warps = min(max(block // 128, 1), 16)
    rows = min(most_rows, max(THREAD_ELEMENTS * 32 * warps // block, 1))
    pairs = [(rows, warps), (1, max(warps // 2, 1)), (1, 2 * warps), (rows, 2 * warps)]
    fits = [(r, w) for r, w in pairs[1:] if r * block <= THREAD_ELEMENTS * 32 * w and w <= 16]
    names = ("BLOCK_R", "num_warps", "num_stages")
    return [dict(zip(names, (*pair, 1), strict=True)) for pair in dict.fromkeys([pairs[0], *fits])]


@cache
def _one_launch_configs(features: int) -> list[dispatch.Config]:
    """Configurations of the backward in one launch, best first: more warps than rows need, for the sums."""
    block = next_power_of_two(features)
    warps = 8 if block <= 256 else 16
    found: list[dispatch.Config] = []
    for num_warps, columns in ((warps, COLUMNS), (warps // 2, COLUMNS), (warps, 2 * COLUMNS)):
        elements = max(THREAD_ELEMENTS // 2 * 32 * num_warps, block)
        sizes = {"BLOCK_R": elements // block, "BLOCK_K": elements // columns, "BLOCK_C": columns}
        if elements <= THREAD_ELEMENTS * 32 * num_warps:
            found.append({**sizes, "num_warps": num_warps, "num_stages": 1})
    return found


@dispatch.once_per_shape
def _key(shape: torch.Size, tokens: torch.dtype, update: torch.dtype | None, y: torch.dtype) -> str:
    """What the best path and configuration depend on; rows rounded up to a power of two."""
    names = [str(dtype).removeprefix("torch.") for dtype in (tokens, update, y) if dtype is not None]
    return f"rows{next_power_of_two(shape[0] * shape[1])} D{shape[2]} {' '.join(names)}"


def _sizes(shape: torch.Size) -> dict[str, int]:
    batch, tokens, features = shape
    return {"R": batch * tokens, "D": features, "BLOCK_D": next_power_of_two(features)}


def _forward_outputs(tokens: Tensor, has_stream: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised stream, y and statistics; a stream of no elements where it is the tokens."""
    stream = tokens.new_empty(tokens.shape if has_stream else 0)
    stats = tokens.new_empty((2, tokens.shape[0] * tokens.shape[1]), dtype=torch.float32)
    return stream, tokens.new_empty(tokens.shape, dtype=dtype), stats


def layer_norm_forward(
    tokens: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    stream_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward; arguments as `residual_layer_norm`, and an update that does not widen the tokens' dtype.

    Returns:
        the stream, dtype of `tokens`, or no elements with neither an update nor a bias of the stream; y of `dtype`,
        both (B, N, D) and contiguous; float32 statistics (2, B * N): mean and rstd.
    """
    has_stream = update is not None or stream_bias is not None
    stream, y, stats = _forward_outputs(tokens, has_stream, dtype)
    is_shared = tokens.stride(0) == 0  # expanded over the batch, as position embeddings are
    args = {
        "tokens_ptr": (tokens[:1] if is_shared else tokens).contiguous(),
        "update_ptr": None if update is None else update.contiguous(),
        "weight_ptr": weight,
        "bias_ptr": bias,
        "stream_bias_ptr": stream_bias,
        "stream_ptr": stream if has_stream else None,
        "y_ptr": y,
        "stats_ptr": stats,
        "eps": eps,
        "T": tokens.shape[1] if is_shared else stats.shape[1],
        **_sizes(tokens.shape),
    }
    rows = stats.shape[1]
    key = _key(tokens.shape, tokens.dtype, None if update is None else update.dtype, dtype)
    configs = _configs(tokens.shape[2], 1 if rows <= 4 * PROGRAMS else 4)
    dispatch.launch(layer_norm_forward_kernel, lambda config: (ceil_div(rows, config["BLOCK_R"]),), args, configs, key)
    return stream, y, stats


def _backward_outputs(
    stream: Tensor, weight: Tensor, bias: Tensor, stream_bias: Tensor | None, update_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised dtokens, dupdate, dweight, dbias and dstream_bias; no elements where there is nothing to write."""
    is_apart = update_dtype not in (None, stream.dtype)
    dupdate = stream.new_empty(stream.shape if is_apart else 0, dtype=update_dtype)
    dstream_bias = weight.new_empty(0) if stream_bias is None else stream_bias.new_empty(stream_bias.shape)
    dweight, dbias = weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    return stream.new_empty(stream.shape), dupdate, dweight, dbias, dstream_bias


def layer_norm_backward(
    dstream: Tensor | None,
    dy: Tensor,
    stream: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    stream_bias: Tensor | None,
    update_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward: one kernel, or two where there are more than ONE_LAUNCH_ROWS rows.

    Args:
        dstream, dy: gradients of the stream, if it has one, and of y, (B, N, D), any strides.
        stream, stats: from the forward.
        weight, bias, stream_bias: as in the forward.
        update_dtype: of the update; None without one.

    Returns:
        dtokens, (B, N, D), dtype of `stream`; dupdate, the same in `update_dtype`, of no elements where the two dtypes
        are one or there is no update; dweight; dbias; dstream_bias, of no elements without a bias of the stream.
    """
    outputs = _backward_outputs(stream, weight, bias, stream_bias, update_dtype)
    dtokens, dupdate, dweight, dbias, dstream_bias = outputs
    sizes = _sizes(stream.shape)
    rows, features = sizes["R"], sizes["D"]
    args = {
        "dstream_ptr": None if dstream is None else dstream.contiguous(),
        "dy_ptr": dy.contiguous(),
        "stream_ptr": stream.contiguous(),
        "stream_bias_ptr": stream_bias,
        "stats_ptr": stats,
        "weight_ptr": weight,
        "dtokens_ptr": dtokens,
        "dupdate_ptr": dupdate if dupdate.numel() else None,
        **sizes,
    }
    sums = {
        "dweight_ptr": dweight,
        "dbias_ptr": dbias,
        "dstream_bias_ptr": None if stream_bias is None else dstream_bias,
    }
    key = _key(stream.shape, stream.dtype, update_dtype, dy.dtype)
    if rows > ONE_LAUNCH_ROWS:
        _launch_chunks(args, sums, key)
        return outputs

    def grid(config: dispatch.Config) -> tuple[int]:
        return (ceil_div(features, config["BLOCK_C"]) + ceil_div(rows, config["BLOCK_R"]),)

    dispatch.launch(layer_norm_backward_kernel, grid, {**args, **sums}, _one_launch_configs(features), key)
    return outputs


def _launch_chunks(args: dict[str, Any], sums: dict[str, Tensor | None], key: str) -> None:
    """The backward of many rows: arguments of the chunks' kernel without its own, and the sums to write."""
    rows, features = args["R"], args["D"]
    chunk = max(ceil_div(rows, PROGRAMS), MIN_CHUNK)
    chunks = ceil_div(rows, chunk)
    count = sum(each is not None for each in sums.values())
    parts = args["stats_ptr"].new_empty((count, chunks, features))
    args = {**args, "sums_ptr": parts, "chunk": chunk}
    dispatch.launch(layer_norm_chunks_kernel, lambda config: (chunks,), args, _configs(features, MIN_CHUNK), key)
    args = {"sums_ptr": parts, **sums, "P": chunks, "D": features, **COMBINE_BLOCK}
    grid = (ceil_div(features, COMBINE_BLOCK["BLOCK_D"]), count)
    dispatch.launch(layer_norm_combine_kernel, lambda config: grid, args, [{"num_warps": 4, "num_stages": 1}], key)


_forward_op = dispatch.operator(layer_norm_forward)
_backward_op = dispatch.operator(layer_norm_backward)


@_forward_op.register_fake
def _(tokens, update, weight, bias, eps, dtype, stream_bias):
    return _forward_outputs(tokens, update is not None or stream_bias is not None, dtype)


@_backward_op.register_fake
def _(dstream, dy, stream, stats, weight, bias, stream_bias, update_dtype):
    return _backward_outputs(stream, weight, bias, stream_bias, update_dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, update, weight, bias, _, _, stream_bias = inputs
    stream, _, stats = output
    has_stream = update is not None or stream_bias is not None
    ctx.mark_non_differentiable(*((stats,) if has_stream else (stream, stats)))
    ctx.set_materialize_grads(False)  # else a launch fills the gradient of an output that is not used with zeros
    ctx.save_for_backward(stream if has_stream else tokens, stats, weight, bias, stream_bias)
    ctx.update_dtype = None if update is None else update.dtype


def _backward(
    run: Callable[..., Any], ctx: Any, dstream: Tensor | None, dy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    stream, stats, weight, bias, stream_bias = ctx.saved_tensors
    if dy is None:
        dupdate = None if dstream is None or ctx.update_dtype is None else dstream.to(ctx.update_dtype)
        dstream_bias = None
        if dstream is not None and stream_bias is not None:
            dstream_bias = dstream.sum((0, 1)).to(stream_bias.dtype)
        return dispatch.gradients(layer_norm_forward, tokens=dstream, update=dupdate, stream_bias=dstream_bias)
    gradients = run(dstream, dy, stream, stats, weight, bias, stream_bias, ctx.update_dtype)
    dtokens, dupdate, dweight, dbias, dstream_bias = gradients
    return dispatch.gradients(
        layer_norm_forward,
        tokens=dtokens,
        update=None if ctx.update_dtype is None else dtokens if ctx.update_dtype == stream.dtype else dupdate,
        weight=dweight,
        bias=dbias,
        stream_bias=None if stream_bias is None else dstream_bias,
    )


_layer_norm = dispatch.differentiable(_forward_op, _backward_op, _setup_context, _backward)


def _check(tokens: Any, update: Any, weight: Any, bias: Any, eps: Any, dtype: Any, stream_bias: Any) -> None:
    check_floats("tokens", tokens, "batch, tokens, features")
    if update is not None:
        check_floats("update", update, "batch, tokens, features")
        check_same_device("update", update, "tokens", tokens)
        if update.shape != tokens.shape:
            raise ValueError(f"update is {tuple(update.shape)} but tokens are {tuple(tokens.shape)}; they must agree")
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_is_tensor(name, tensor)
        if tensor.shape != tokens.shape[2:] or tensor.dtype not in FLOATS or tensor.dtype != weight.dtype:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}; tokens have {tokens.shape[2]} features, so weight "
                f"and bias must be floating point of shape ({tokens.shape[2]},), both of one dtype"
            )
        check_same_device(name, tensor, "tokens", tokens)
    if stream_bias is not None:
        check_is_tensor("stream_bias", stream_bias)
        if stream_bias.shape != tokens.shape[2:] or stream_bias.dtype not in FLOATS:
            raise ValueError(
                f"stream_bias is {tuple(stream_bias.shape)} {stream_bias.dtype}; tokens have {tokens.shape[2]} "
                f"features, so it must be floating point of shape ({tokens.shape[2]},), or None"
            )
        check_same_device("stream_bias", stream_bias, "tokens", tokens)
    if not isinstance(eps, Real) or not 0 < float(eps) < math.inf:
        rule = "must be a positive number: a constant token has variance 0"
        raise ValueError(f"eps {eps!r} {rule}; the usual value is 1e-5")
    if dtype not in FLOATS:
        raise ValueError(f"dtype {dtype!r} must be one of {', '.join(map(str, FLOATS))}")


def _path(tokens: Tensor, others: tuple[Tensor | None, ...], dtype: torch.dtype, key: str) -> dispatch.OpPath:
    """By the dtypes of all that is read or written; `dispatch.path` sees that of the tokens alone."""
    dtypes = {tokens.dtype, dtype, *(other.dtype for other in others if other is not None)}
    allowed = set(dispatch.DTYPES) - ({torch.bfloat16} if dispatch.INTERPRETED else set())
    if tokens.shape[2] > MAX_FEATURES or not dtypes <= allowed:
        return "reference"
    return dispatch.path("layer_norm", tokens, key)


def residual_layer_norm(
    tokens: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    stream_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens + update, and their LayerNorm; differentiable once in every tensor given.

    Args:
        tokens: (B, N, D), the residual stream, float32 in training; contiguous, or one volume's that are expanded over
            the batch; other strides cost a copy.
        update: what a layer adds to it, (B, N, D), often of lower precision; None: nothing, as before the first layer.
        weight, bias: (D,), of the norm.
        eps: added to the variance.
        dtype: of the second result, that of the product that reads it.
        stream_bias: (D,), added to the first result alone, whose dtype it does not widen: the bias that the next
            update lacks. None: nothing.

    Returns:
        tokens + update + stream_bias, in the wider dtype of the first two (`tokens` itself with neither of the
        others); the norm of tokens + update in `dtype`, with statistics in float32.

    Raises:
        ValueError: a wrong rank, dtype, shape or device of a tensor; an eps that is not positive.
    """
    _check(tokens, update, weight, bias, eps, dtype, stream_bias)
    if torch.compiler.is_exporting():  # an exported graph has plain operations, and any batch size; a key needs one
        return residual_layer_norm_reference(tokens, update, weight, bias, eps, dtype, stream_bias)
    if update is not None:
        tokens = tokens.to(torch.promote_types(tokens.dtype, update.dtype))
    key = _key(tokens.shape, tokens.dtype, None if update is None else update.dtype, dtype)
    if tokens.shape[2] <= MAX_FEATURES:
        args = (tokens, update, weight, bias, eps, dtype, stream_bias)
        dispatch.compare("layer_norm", key, residual_layer_norm, args, ("torch.compile",))
    chosen = _path(tokens, (update, stream_bias), dtype, key)
    if chosen == "triton":
        stream, y, _ = _layer_norm(tokens, update, weight, bias, eps, dtype, stream_bias)
        return (tokens if update is None and stream_bias is None else stream), y
    function: Callable[..., tuple[Tensor, Tensor]] = residual_layer_norm_reference
    if chosen == "torch" and not torch.compiler.is_compiling():  # else it is compiled with what is around it
        function = dispatch.compiled(residual_layer_norm_reference, tokens.shape)
    return function(tokens, update, weight, bias, eps, dtype, stream_bias)
