"""Residual stream and LayerNorm of a pre-norm transformer, as one operation.

    s = tokens + update                                  the residual stream
    xhat = (s - mean) / sqrt(var + eps)                  over the features of a token (var biased)
    y = xhat * weight + bias                             rounded for the product that follows

With dy the gradient of y, ds that of s from elsewhere and g = dy * weight:

    dtokens = dupdate = ds + rstd * (g - mean(g) - xhat * mean(g * xhat))
    dweight = sum over tokens of dy * xhat               dbias = sum of dy

Bytes for each element in bf16 autocast, where the stream is float32, update and y are bf16:

                eager PyTorch                                            here
    forward     add 6 + 4, norm 4 + 4, cast 4 + 2                  24    6 + 6     12
    backward    cast 2 + 4, norm twice 8 and 4, add 8 + 4,         44    10 + 6    16
                cast 4 + 2 (read + written)

    layer_norm_forward    a few tokens a program: adds, statistics in two passes over registers, y
    layer_norm_backward   a program walks a chunk of tokens: dtokens and dupdate in one pass, its sums of dweight, dbias
    layer_norm_combine    joins the sums of the chunks

Three launches for forward and backward, instead of eight. Sums are float32 (float64 for float64). The chunks depend on
the shape alone and there are no atomics: the same bits on every run. A token must fit the registers of a program: at
most MAX_FEATURES.

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
MIN_CHUNK = 4
"""Least rows of a chunk: its float32 sums are as large as two rows."""
THREAD_ELEMENTS = 8
"""Elements of a tensor that a thread holds, if one row has no more: with 16 the backward of some GPUs spills."""
COMBINE_BLOCK = {"BLOCK_P": 64, "BLOCK_D": 32}
"""Chunks and features that a program of the last launch holds at once."""


def residual_layer_norm_reference(
    tokens_BND: Tensor, update_BND: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The equation at the head of this file in plain PyTorch; arguments as `residual_layer_norm`, unchecked."""
    stream_BND = tokens_BND if update_BND is None else tokens_BND + update_BND
    compute = torch.promote_types(stream_BND.dtype, torch.float32)
    with torch.autocast(tokens_BND.device.type, enabled=False):
        y_BND = F.layer_norm(stream_BND.to(compute), weight.shape, weight.to(compute), bias.to(compute), eps)
    return stream_BND, y_BND.to(dtype)


@triton.jit
def _tile(start, end, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_R rows from `start` on, before `end`: rows, columns, offsets and mask."""
    rows = start + tl.arange(0, BLOCK_R)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    return rows, columns, rows.to(tl.int64) * D + columns, (rows < end) & (columns < D)


@triton.jit
def layer_norm_forward_kernel(
    tokens_ptr,  # (R, D)
    update_ptr,  # (R, D), or None
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    stream_ptr,  # (R, D), dtype of tokens; None without an update
    y_ptr,  # (R, D)
    stats_ptr,  # (2, R) float32: mean, rstd
    eps,
    R,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_R rows; grid (ceil(R / BLOCK_R),)."""
    rows, columns, offsets, mask = _tile(tl.program_id(0) * BLOCK_R, R, D, BLOCK_R, BLOCK_D)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    x = tl.load(tokens_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if update_ptr is not None:
        x += tl.load(update_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        stored = x.to(stream_ptr.dtype.element_ty)
        tl.store(stream_ptr + offsets, stored, mask=mask)
        x = stored.to(tl.float32)
    mean = tl.sum(x, 1, keep_dims=True) / D
    centred = tl.where(columns < D, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1, keep_dims=True) / D + eps)
    y = centred * rstd * weight + bias
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(stats_ptr + rows, mean, mask=rows < R)
    tl.store(stats_ptr + R + rows, rstd, mask=rows < R)


@triton.jit
def layer_norm_backward_kernel(
    dstream_ptr,  # (R, D), dtype of the stream, or None
    dy_ptr,  # (R, D)
    stream_ptr,  # (R, D)
    stats_ptr,  # (2, R) float32, of the forward
    weight_ptr,  # (D,)
    dtokens_ptr,  # (R, D), dtype of the stream
    dupdate_ptr,  # (R, D), or None where it equals dtokens
    sums_ptr,  # (2, P, D) float32: of dy * xhat, of dy
    R,
    chunk,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A chunk of rows, BLOCK_R at a time; grid (P,)."""
    first = tl.program_id(0) * chunk
    end = tl.minimum(first + chunk, R)
    columns = tl.arange(0, BLOCK_D)[None, :]
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    dbias = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(first, end, BLOCK_R):
        rows, _, offsets, mask = _tile(start, end, D, BLOCK_R, BLOCK_D)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(stream_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + rows, mask=rows < end, other=0.0)
        rstd = tl.load(stats_ptr + R + rows, mask=rows < end, other=0.0)
        xhat = tl.where(columns < D, (x - mean) * rstd, 0.0)
        dweight += dy * xhat
        dbias += dy
        g = dy * weight
        dx = g - tl.sum(g, 1, keep_dims=True) / D - xhat * (tl.sum(g * xhat, 1, keep_dims=True) / D)
        dx *= rstd
        if dstream_ptr is not None:
            dx += tl.load(dstream_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dtokens_ptr + offsets, dx.to(dtokens_ptr.dtype.element_ty), mask=mask)
        if dupdate_ptr is not None:
            tl.store(dupdate_ptr + offsets, dx.to(dupdate_ptr.dtype.element_ty), mask=mask)
    sums_ptr += tl.program_id(0).to(tl.int64) * D + tl.arange(0, BLOCK_D)
    mask = tl.arange(0, BLOCK_D) < D
    tl.store(sums_ptr, tl.sum(dweight, 0), mask=mask)
    tl.store(sums_ptr + tl.num_programs(0).to(tl.int64) * D, tl.sum(dbias, 0), mask=mask)


@triton.jit
def layer_norm_combine_kernel(
    sums_ptr,  # (2, P, D) float32
    dweight_ptr,  # (D,)
    dbias_ptr,  # (D,)
    P,
    D,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums over the chunks for BLOCK_D features; grid (ceil(D / BLOCK_D),)."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    dweight = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    dbias = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for first in range(0, P, BLOCK_P):
        chunks = first + tl.arange(0, BLOCK_P)[:, None]
        ptrs = sums_ptr + chunks.to(tl.int64) * D + columns[None, :]
        mask = (chunks < P) & (columns[None, :] < D)
        dweight += tl.load(ptrs, mask=mask, other=0.0)
        dbias += tl.load(ptrs + tl.cast(P, tl.int64) * D, mask=mask, other=0.0)
    tl.store(dweight_ptr + columns, tl.sum(dweight, 0).to(dweight_ptr.dtype.element_ty), mask=columns < D)
    tl.store(dbias_ptr + columns, tl.sum(dbias, 0).to(dbias_ptr.dtype.element_ty), mask=columns < D)


@cache
def _configs(features: int, most_rows: int) -> list[dispatch.Config]:
    """Configurations, best first: a warp for each 128 features, and registers for a few rows."""
    block = next_power_of_two(features)
    warps = min(max(block // 128, 1), 16)
    rows = min(most_rows, max(THREAD_ELEMENTS * 32 * warps // block, 1))
    pairs = [(rows, warps), (1, warps), (1, max(warps // 2, 1)), (1, 2 * warps), (rows, 2 * warps)]
    fits = [(r, w) for r, w in pairs[1:] if r * block <= THREAD_ELEMENTS * 32 * w and w <= 16]
    names = ("BLOCK_R", "num_warps", "num_stages")
    return [dict(zip(names, (*pair, 1), strict=True)) for pair in dict.fromkeys([pairs[0], *fits])]


@dispatch.once_per_shape
def _key(shape: torch.Size, tokens: torch.dtype, update: torch.dtype | None, y: torch.dtype) -> str:
    """What the best path and configuration depend on; rows rounded up to a power of two."""
    names = [str(dtype).removeprefix("torch.") for dtype in (tokens, update, y) if dtype is not None]
    return f"rows{next_power_of_two(shape[0] * shape[1])} D{shape[2]} {' '.join(names)}"


def _sizes(shape: torch.Size) -> dict[str, int]:
    batch, tokens, features = shape
    return {"R": batch * tokens, "D": features, "BLOCK_D": next_power_of_two(features)}


def _forward_outputs(tokens: Tensor, update: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised stream, y and statistics; no stream without an update."""
    stream = tokens.new_empty(0 if update is None else tokens.shape)
    stats = tokens.new_empty((2, tokens.shape[0] * tokens.shape[1]), dtype=torch.float32)
    return stream, tokens.new_empty(tokens.shape, dtype=dtype), stats


def layer_norm_forward(
    tokens: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward; arguments as `residual_layer_norm`, and an update that does not widen the tokens' dtype.

    Returns:
        the stream, dtype of `tokens`, or no elements without an update; y of `dtype`, both (B, N, D) and contiguous;
        float32 statistics (2, B * N): mean and rstd.
    """
    stream, y, stats = _forward_outputs(tokens, update, dtype)
    args = {
        "tokens_ptr": tokens.contiguous(),
        "update_ptr": None if update is None else update.contiguous(),
        "weight_ptr": weight,
        "bias_ptr": bias,
        "stream_ptr": None if update is None else stream,
        "y_ptr": y,
        "stats_ptr": stats,
        "eps": eps,
        **_sizes(tokens.shape),
    }
    rows = stats.shape[1]
    key = _key(tokens.shape, tokens.dtype, None if update is None else update.dtype, dtype)
    configs = _configs(tokens.shape[2], 1 if rows <= 4 * PROGRAMS else 4)
    dispatch.launch(layer_norm_forward_kernel, lambda config: (ceil_div(rows, config["BLOCK_R"]),), args, configs, key)
    return stream, y, stats


def _backward_outputs(
    stream: Tensor, weight: Tensor, bias: Tensor, update_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised dtokens, dupdate, dweight and dbias; dupdate has no elements where dtokens serves for it."""
    is_apart = update_dtype not in (None, stream.dtype)
    dupdate = stream.new_empty(stream.shape if is_apart else 0, dtype=update_dtype)
    dtokens = stream.new_empty(stream.shape)
    return dtokens, dupdate, weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def layer_norm_backward(
    dstream: Tensor | None,
    dy: Tensor,
    stream: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    update_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward: two kernels.

    Args:
        dstream, dy: gradients of the stream, if it has one, and of y, (B, N, D), any strides.
        stream, stats: from the forward.
        weight, bias: as in the forward.
        update_dtype: of the update; None without one.

    Returns:
        dtokens, (B, N, D), dtype of `stream`; dupdate, the same in `update_dtype`, of no elements where the two dtypes
        are one or there is no update; dweight; dbias.
    """
    dtokens, dupdate, dweight, dbias = _backward_outputs(stream, weight, bias, update_dtype)
    sizes = _sizes(stream.shape)
    chunk = max(ceil_div(sizes["R"], PROGRAMS), MIN_CHUNK)
    chunks = ceil_div(sizes["R"], chunk)
    sums = stream.new_empty((2, chunks, stream.shape[2]), dtype=torch.float32)
    args = {
        "dstream_ptr": None if dstream is None else dstream.contiguous(),
        "dy_ptr": dy.contiguous(),
        "stream_ptr": stream.contiguous(),
        "stats_ptr": stats,
        "weight_ptr": weight,
        "dtokens_ptr": dtokens,
        "dupdate_ptr": dupdate if dupdate.numel() else None,
        "sums_ptr": sums,
        "chunk": chunk,
        **sizes,
    }
    key = _key(stream.shape, stream.dtype, update_dtype, dy.dtype)
    configs = _configs(stream.shape[2], MIN_CHUNK)
    dispatch.launch(layer_norm_backward_kernel, lambda config: (chunks,), args, configs, key)
    args = {"sums_ptr": sums, "dweight_ptr": dweight, "dbias_ptr": dbias, "P": chunks, "D": sizes["D"], **COMBINE_BLOCK}
    grid = (ceil_div(sizes["D"], COMBINE_BLOCK["BLOCK_D"]),)
    dispatch.launch(layer_norm_combine_kernel, lambda config: grid, args, [{"num_warps": 4, "num_stages": 1}], key)
    return dtokens, dupdate, dweight, dbias


_forward_op = dispatch.operator(layer_norm_forward)
_backward_op = dispatch.operator(layer_norm_backward)


@_forward_op.register_fake
def _(tokens, update, weight, bias, eps, dtype):
    return _forward_outputs(tokens, update, dtype)


@_backward_op.register_fake
def _(dstream, dy, stream, stats, weight, bias, update_dtype):
    return _backward_outputs(stream, weight, bias, update_dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, update, weight, bias, _, _ = inputs
    stream, _, stats = output
    ctx.mark_non_differentiable(*((stream, stats) if update is None else (stats,)))
    ctx.set_materialize_grads(False)  # else a launch fills the gradient of an output that is not used with zeros
    ctx.save_for_backward(tokens if update is None else stream, stats, weight, bias)
    ctx.update_dtype = None if update is None else update.dtype


def _backward(
    run: Callable[..., Any], ctx: Any, dstream: Tensor | None, dy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    stream, stats, weight, bias = ctx.saved_tensors
    if dy is None:
        dupdate = None if dstream is None or ctx.update_dtype is None else dstream.to(ctx.update_dtype)
        return dispatch.gradients(layer_norm_forward, tokens=dstream, update=dupdate)
    dtokens, dupdate, dweight, dbias = run(dstream, dy, stream, stats, weight, bias, ctx.update_dtype)
    return dispatch.gradients(
        layer_norm_forward,
        tokens=dtokens,
        update=None if ctx.update_dtype is None else dtokens if ctx.update_dtype == stream.dtype else dupdate,
        weight=dweight,
        bias=dbias,
    )


_layer_norm = dispatch.differentiable(_forward_op, _backward_op, _setup_context, _backward)


def _check(tokens: Any, update: Any, weight: Any, bias: Any, eps: Any, dtype: Any) -> None:
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
    if not isinstance(eps, Real) or not 0 < float(eps) < math.inf:
        rule = "must be a positive number: a constant token has variance 0"
        raise ValueError(f"eps {eps!r} {rule}; the usual value is 1e-5")
    if dtype not in FLOATS:
        raise ValueError(f"dtype {dtype!r} must be one of {', '.join(map(str, FLOATS))}")


def _path(tokens: Tensor, update: Tensor | None, dtype: torch.dtype, key: str) -> dispatch.OpPath:
    """By the dtypes of all that is read or written; `dispatch.path` sees that of the tokens alone."""
    dtypes = {tokens.dtype, dtype, tokens.dtype if update is None else update.dtype}
    allowed = set(dispatch.DTYPES) - ({torch.bfloat16} if dispatch.INTERPRETED else set())
    if tokens.shape[2] > MAX_FEATURES or not dtypes <= allowed:
        return "reference"
    return dispatch.path("layer_norm", tokens, key)


def residual_layer_norm(
    tokens: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Tokens + update, and their LayerNorm; differentiable once in every tensor given.

    Args:
        tokens: (B, N, D), the residual stream, float32 in training; any strides but contiguous cost a copy.
        update: what a layer adds to it, (B, N, D), often of lower precision; None: nothing, as before the first layer.
        weight, bias: (D,), of the norm.
        eps: added to the variance.
        dtype: of the second result, that of the product that reads it.

    Returns:
        tokens + update, in the wider dtype of the two (`tokens` itself without an update); their norm in `dtype`, with
        statistics in float32.

    Raises:
        ValueError: a wrong rank, dtype, shape or device of a tensor; an eps that is not positive.
    """
    _check(tokens, update, weight, bias, eps, dtype)
    if torch.compiler.is_exporting():  # an exported graph has plain operations, and any batch size; a key needs one
        return residual_layer_norm_reference(tokens, update, weight, bias, eps, dtype)
    if update is not None:
        tokens = tokens.to(torch.promote_types(tokens.dtype, update.dtype))
    key = _key(tokens.shape, tokens.dtype, None if update is None else update.dtype, dtype)
    chosen = _path(tokens, update, dtype, key)
    if chosen == "triton":
        stream, y, _ = _layer_norm(tokens, update, weight, bias, eps, dtype)
        return (tokens if update is None else stream), y
    function: Callable[..., tuple[Tensor, Tensor]] = residual_layer_norm_reference
    if chosen == "torch" and not torch.compiler.is_compiling():  # else it is compiled with what is around it
        function = dispatch.compiled(residual_layer_norm_reference, tokens.shape)
    return function(tokens, update, weight, bias, eps, dtype)
