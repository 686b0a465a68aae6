"""Instance norm, affine, residual and leaky ReLU of a 3D feature map, as one operation.

    mean, var  over the voxels of each sample and channel (var biased)
    xhat = (x - mean) / sqrt(var + eps)
    r    = residual, or rhat = (residual - mean_r) / sqrt(var_r + eps) where `residual_norm`
    z    = xhat * weight + bias + r
    y    = leaky_relu(z)                                 leaky_relu(z) = z where z > 0, slope * z elsewhere

With g = dL/dy * (1 where z > 0, slope elsewhere) and S voxels:

    dx = weight * rstd * (g - mean(g) - xhat * mean(g * xhat))       dweight = sum(g * xhat)      dbias = sum(g)
    dresidual = g, or as dx without weight, by the residual's statistics         dslope = sum of dL/dy * z where z <= 0

Statistics are float32 whatever the dtype (float64 for float64): a bf16 sum over 10^6 voxels keeps two digits. A channel
of one voxel, the deepest level of a 16^3 crop, is its own mean: xhat = 0, where `torch.nn.InstanceNorm3d` refuses.

The kernels are bound by memory, so passes over the feature map count. A large map does not fit a multiprocessor: x is
read once for its statistics and once more to be normalised, in three launches each way:

    norm_statistics        a program walks a chunk of voxels; each lane keeps a Welford mean and M2, joined at the end
    norm_combine           joins the chunks of each sample and channel: mean, rstd
    norm_apply             reads x (and the residual), writes y

    norm_gradient_sums     walks x, dy (and the residual): sums of g, g * xhat, g * rhat, dy * z where z <= 0
    norm_gradient_combine  joins chunks and samples: means of g, g * xhat, g * rhat; dweight, dbias, dslope
    norm_gradient_apply    reads x, g (and the residual), writes dx (and dresidual)

Where a sample and channel fits the registers of one program, one launch reads once and writes once: the one_tile
kernels (backward plus norm_gradient_combine where a parameter has a gradient). z is recomputed, not stored. A raw
residual's gradient is g: norm_gradient_sums writes it and norm_gradient_apply reads it back, one pass fewer. The second
walk goes backwards, to start with what is still in the L2 cache. Welford with exact joining (Chan et al.) holds where
E[x^2] - E[x]^2 loses every digit (mean 10^4, std 1). No atomics, and chunks depend on the shape alone: the same bits on
every run. `benchmarks/bench_instance_norm.py` compares the passes with eager PyTorch and torch.compile.

Legend: N samples, C channels, S voxels of a sample. A map is (N, C, S) of strides (C * S, S, 1) if contiguous and
(S * C, 1, C) if channels_last_3d; a tile is BLOCK_S voxels of BLOCK_C channels (contiguous: of one channel). y and dy
may be a slice of the channels of a wider channels_last_3d map, strides (S * stride, 1, stride): a concatenation is then
written in place, and its gradient read in place (`instance_norm_into`).

Sources: Ulyanov et al., https://arxiv.org/abs/1607.08022; Welford 1962; Chan, Golub, LeVeque 1979.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch
from .checks import FLOATS, check_alike, check_floats, check_is_tensor, check_same_device
from .dispatch import ceil_div, next_power_of_two

PROGRAMS = 1056
"""Programs that a walk over a large map is split into: 8 for each of an H100's 132 multiprocessors."""
CHUNK_STEP = 4096
"""A program's chunk is a multiple of this many elements: whole tiles, 16-byte steps, enough work."""
COMBINE_TILE = 1024
"""Partial results that a program of the middle launch holds at once, unless one channel has more."""
LARGE_BLOCK_C = 64
"""Most channels of a tile in channels_last_3d: 128 bytes of bf16, one line of the cache."""
ONE_TILE_BLOCK_C = 16
"""The same with one tile: fewer, for more programs; 16 channels of bf16 are one sector of 32 bytes."""
ONE_TILE = 32 * 1024
"""Most bytes of all maps that a program reads as one tile: 64 for each of 512 threads."""


def _is_channels_last(x: Tensor) -> bool:
    """Whether a map is channels_last_3d; one that is both, of one channel or one voxel, counts as contiguous."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d)


def _normalise(x_BCXYZ: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if math.prod(x_BCXYZ.shape[2:]) > 1:
        return F.instance_norm(x_BCXYZ, weight=weight, bias=bias, eps=eps)
    y = x_BCXYZ - x_BCXYZ
    if weight is not None:
        y = y * weight.view(-1, 1, 1, 1)
    return y if bias is None else y + bias.view(-1, 1, 1, 1)


def instance_norm_reference(
    x_BCXYZ: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    negative_slope: float | Tensor | None = None,
    residual: Tensor | None = None,
    residual_norm: bool = False,
) -> Tensor:
    """The equation at the head of this file in plain PyTorch; arguments as `instance_norm`, unchecked."""
    compute = torch.promote_types(x_BCXYZ.dtype, torch.float32)
    weight = None if weight is None else weight.to(compute)
    bias = None if bias is None else bias.to(compute)
    with torch.autocast(x_BCXYZ.device.type, enabled=False):  # it would lower F.prelu to half precision
        y = _normalise(x_BCXYZ.to(compute), weight, bias, eps)
        if residual is not None:
            residual = residual.to(compute)
            y = y + (_normalise(residual, None, None, eps) if residual_norm else residual)
        if isinstance(negative_slope, Tensor):
            y = F.prelu(y, negative_slope.to(compute))
        elif negative_slope is not None:
            y = F.leaky_relu(y, negative_slope)
    y = y.to(x_BCXYZ.dtype)
    # F.instance_norm returns a contiguous map whatever its input.
    return y.contiguous(memory_format=torch.channels_last_3d) if _is_channels_last(x_BCXYZ) else y


@triton.jit
def _program(pid, C, S, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels of a program (1, BLOCK_C), their rows in an (N, C) buffer, and the offset of its first voxel."""
    blocks = tl.cdiv(C, BLOCK_C)
    n = pid // blocks
    first = pid % blocks * BLOCK_C
    c = first + tl.arange(0, BLOCK_C)[None, :]
    offset = n.to(tl.int64) * C * S + first.to(tl.int64) * (1 if CHANNELS_LAST else S)
    return c, n * C + c, offset


@triton.jit
def _tile(C, S, CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """Voxels of a tile (BLOCK_S, 1), and the offsets of its elements from the first, 32 bits."""
    s = tl.arange(0, BLOCK_S)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    return s, (s * C + c if CHANNELS_LAST else s + c * S)


@triton.jit
def _slice(pid, C, S, stride, offset, tile, CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offset, tile and step between voxels of a map: dense if `stride` is None, else a slice of channels."""
    step = C if CHANNELS_LAST else 1
    if stride is not None:
        blocks = tl.cdiv(C, BLOCK_C)
        offset = (pid // blocks).to(tl.int64) * S * stride + pid % blocks * BLOCK_C
        tile = tl.arange(0, BLOCK_S)[:, None] * stride + tl.arange(0, BLOCK_C)[None, :]
        step = stride
    return offset, tile, step


@triton.jit
def _parameter(ptr, index, mask, default: tl.constexpr):
    """Float32 values of a parameter of each channel; `default` without one."""
    return default if ptr is None else tl.load(ptr + index, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _statistics(stats_ptr, row, rows, mask, NORMALISED: tl.constexpr):
    """mean and rstd of x, and of a normalised residual (without one, of x again)."""
    mean, rstd = _parameter(stats_ptr, row, mask, 0.0), _parameter(stats_ptr + rows, row, mask, 0.0)
    mean_r, rstd_r = mean, rstd
    if NORMALISED:
        mean_r = _parameter(stats_ptr + 2 * rows, row, mask, 0.0)
        rstd_r = _parameter(stats_ptr + 3 * rows, row, mask, 0.0)
    return mean, rstd, mean_r, rstd_r


@triton.jit
def _join(count, mean, m2, total):
    """Mean and M2 of a union along axis 0: exact, and the second step takes out the rounding of the first."""
    centre = tl.sum(count * mean, axis=0, keep_dims=True) / total
    centre += tl.sum(count * (mean - centre), axis=0, keep_dims=True) / total
    off = mean - centre
    return centre, tl.sum(m2 + count * off * off, axis=0, keep_dims=True)


@triton.jit
def _pre_activation(xhat, rhat, weight, bias):
    """z; one expression for both directions, so that they agree on its sign."""
    z = xhat * weight + bias
    if rhat is not None:
        z += rhat
    return z


@triton.jit
def _normalised_gradient(g, xhat, mean_g, mean_gxhat, rstd):
    """Gradient of the input of xhat."""
    return rstd * (g - mean_g - xhat * mean_gxhat)


@triton.jit
def norm_forward_one_tile_kernel(
    x_ptr,  # (N, C, S)
    r_ptr,  # (N, C, S): residual, or None
    y_ptr,  # (N, C, S), or a slice
    stats_ptr,  # (2 or 4, N, C) float32: mean and rstd of x, of a normalised residual
    weight_ptr,  # (C,), or None
    bias_ptr,  # (C,), or None
    slope_ptr,  # (C,) or (1,), or None
    slope, slope_stride, y_stride, eps, rows, C, S,
    NORMALISED: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Statistics and y of BLOCK_C channels of one sample; grid (N * ceil(C / BLOCK_C),)."""
    pid = tl.program_id(0)
    c, row, offset = _program(pid, C, S, CHANNELS_LAST, BLOCK_C)
    s, tile = _tile(C, S, CHANNELS_LAST, BLOCK_S, BLOCK_C)
    y_offset, y_tile, _ = _slice(pid, C, S, y_stride, offset, tile, CHANNELS_LAST, BLOCK_S, BLOCK_C)
    in_c, in_s = c < C, s < S
    inside = in_s & in_c
    count = in_s.to(tl.float32)
    x = tl.load(x_ptr + offset + tile, mask=inside, other=0.0).to(tl.float32)
    mean, m2 = _join(count, x, 0.0, S)
    rstd = tl.rsqrt(m2 / S + eps)
    tl.store(stats_ptr + row, mean, mask=in_c)
    tl.store(stats_ptr + rows + row, rstd, mask=in_c)
    rhat = None
    if r_ptr is not None:
        rhat = tl.load(r_ptr + offset + tile, mask=inside, other=0.0).to(tl.float32)
    if NORMALISED:
        mean_r, m2_r = _join(count, rhat, 0.0, S)
        rstd_r = tl.rsqrt(m2_r / S + eps)
        rhat = (rhat - mean_r) * rstd_r
        tl.store(stats_ptr + 2 * rows + row, mean_r, mask=in_c)
        tl.store(stats_ptr + 3 * rows + row, rstd_r, mask=in_c)
    weight, bias = _parameter(weight_ptr, c, in_c, 1.0), _parameter(bias_ptr, c, in_c, 0.0)
    z = _pre_activation((x - mean) * rstd, rhat, weight, bias)
    if slope_ptr is not None:
        slope = _parameter(slope_ptr, c * slope_stride, in_c, 0.0)
    y = z if slope is None else tl.where(z > 0, z, z * slope)
    tl.store(y_ptr + y_offset + y_tile, y, mask=inside)


@triton.jit
def norm_statistics_kernel(
    x_ptr,  # (N, C, S)
    r_ptr,  # (N, C, S): residual to normalise, or None
    partial_ptr,  # (1 or 2 maps, 2, N, C, splits) float32: mean and M2 of each chunk
    rows, C, S, chunk,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, num_stages: tl.constexpr,
):  # fmt: skip
    """Mean and M2 of one chunk of BLOCK_C channels; grid (N * ceil(C / BLOCK_C), splits, maps)."""
    c, row, offset = _program(tl.program_id(0), C, S, CHANNELS_LAST, BLOCK_C)
    s, tile = _tile(C, S, CHANNELS_LAST, BLOCK_S, BLOCK_C)
    split, splits = tl.program_id(1), tl.num_programs(1)
    if r_ptr is not None:  # noqa: SIM102, the compiler decides this one, the program the next
        if tl.program_id(2) == 1:
            x_ptr = r_ptr
            partial_ptr += 2 * rows * splits
    in_c = c < C
    begin = split * chunk
    end = tl.minimum(begin + chunk, S)
    stride = C if CHANNELS_LAST else 1
    # Whole tiles in pairs: Welford on twice the mean of a pair takes 7 operations for two values instead of 10, with
    # half as many lanes to join. All lanes have seen the same number of values, so the division is one scalar.
    twice_mean = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    twice_m2 = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    pairs = (end - begin) // (2 * BLOCK_S)
    for i in tl.range(0, pairs, num_stages=num_stages):
        at = offset + (begin + 2 * i * BLOCK_S).to(tl.int64) * stride
        x0 = tl.load(x_ptr + at + tile, mask=in_c, other=0.0).to(tl.float32)
        x1 = tl.load(x_ptr + at + BLOCK_S * stride + tile, mask=in_c, other=0.0).to(tl.float32)
        delta = x0 + x1 - twice_mean
        twice_mean += delta * (1.0 / (i + 1))
        twice_m2 += (x0 - x1) * (x0 - x1) + delta * (x0 + x1 - twice_mean)
    mean, m2 = 0.5 * twice_mean, 0.5 * twice_m2
    for i in range(2 * pairs, tl.cdiv(end - begin, BLOCK_S)):
        start = begin + i * BLOCK_S
        inside = (start + s < end) & in_c
        at = offset + start.to(tl.int64) * stride
        x = tl.load(x_ptr + at + tile, mask=inside, other=0.0).to(tl.float32)
        delta = tl.where(inside, x - mean, 0.0)
        mean += delta * (1.0 / (i + 1))
        m2 += delta * (x - mean)
    count = tl.maximum((end - begin - s + BLOCK_S - 1) // BLOCK_S, 0).to(tl.float32)
    mean, m2 = _join(count, mean, m2, end - begin)
    tl.store(partial_ptr + row * splits + split, mean, mask=in_c)
    tl.store(partial_ptr + (rows + row) * splits + split, m2, mask=in_c)


@triton.jit
def norm_combine_kernel(
    partial_ptr,  # (maps, 2, N, C, splits) float32, of norm_statistics
    stats_ptr,  # (maps, 2, N, C) float32: mean and rstd
    eps, rows, S, chunk, splits,
    BLOCK_ROWS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Mean and rstd of BLOCK_ROWS rows, samples and channels; grid (ceil(N * C / BLOCK_ROWS), maps)."""
    partial_ptr += 2 * rows * splits * tl.program_id(1)
    stats_ptr += 2 * rows * tl.program_id(1)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
    split = tl.arange(0, BLOCK_SPLITS)[:, None]
    inside = (split < splits) & (row < rows)
    mean = tl.load(partial_ptr + row * splits + split, mask=inside, other=0.0)
    m2 = tl.load(partial_ptr + (rows + row) * splits + split, mask=inside, other=0.0)
    count = tl.where(split < splits, tl.minimum(S - split * chunk, chunk), 0).to(tl.float32)
    mean, m2 = _join(count, mean, m2, S)
    tl.store(stats_ptr + row, mean, mask=row < rows)
    tl.store(stats_ptr + rows + row, tl.rsqrt(m2 / S + eps), mask=row < rows)


@triton.jit
def norm_apply_kernel(
    x_ptr,  # (N, C, S)
    r_ptr,  # (N, C, S): residual, or None
    y_ptr,  # (N, C, S), or a slice
    stats_ptr,  # (2 or 4, N, C) float32: mean and rstd of x, of a normalised residual
    weight_ptr,  # (C,), or None
    bias_ptr,  # (C,), or None
    slope_ptr,  # (C,) or (1,), or None
    slope, slope_stride, y_stride, rows, C, S, chunk,
    NORMALISED: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    num_stages: tl.constexpr,
):  # fmt: skip
    """y of one chunk of BLOCK_C channels; grid (N * ceil(C / BLOCK_C), splits)."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    c, row, offset = _program(pid, C, S, CHANNELS_LAST, BLOCK_C)
    s, tile = _tile(C, S, CHANNELS_LAST, BLOCK_S, BLOCK_C)
    y_offset, y_tile, y_step = _slice(pid, C, S, y_stride, offset, tile, CHANNELS_LAST, BLOCK_S, BLOCK_C)
    in_c = c < C
    mean, rstd, mean_r, rstd_r = _statistics(stats_ptr, row, rows, in_c, NORMALISED)
    weight, bias = _parameter(weight_ptr, c, in_c, 1.0), _parameter(bias_ptr, c, in_c, 0.0)
    if slope_ptr is not None:
        slope = _parameter(slope_ptr, c * slope_stride, in_c, 0.0)
    begin = (tl.num_programs(1) - 1 - tl.program_id(1)) * chunk
    end = tl.minimum(begin + chunk, S)
    tiles = tl.cdiv(end - begin, BLOCK_S)
    for i in tl.range(0, tiles, num_stages=num_stages):
        start = begin + (tiles - 1 - i) * BLOCK_S
        inside = (start + s < end) & in_c
        at = offset + start.to(tl.int64) * (C if CHANNELS_LAST else 1)
        # The last read: evict it before data that is still to be read. Triton drops this hint from pipelined loads, and
        # half of the traffic here is writes, so the default is one stage.
        x = tl.load(x_ptr + at + tile, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        rhat = None
        if r_ptr is not None:
            rhat = tl.load(r_ptr + at + tile, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
            if NORMALISED:
                rhat = (rhat - mean_r) * rstd_r
        z = _pre_activation((x - mean) * rstd, rhat, weight, bias)
        y = z if slope is None else tl.where(z > 0, z, z * slope)
        y_at = y_offset + start.to(tl.int64) * y_step
        tl.store(y_ptr + y_at + y_tile, y, mask=inside)


@triton.jit
def norm_backward_one_tile_kernel(
    x_ptr,  # (N, C, S)
    dy_ptr,  # (N, C, S), or a slice
    r_ptr,  # (N, C, S): residual, or None
    dx_ptr,  # (N, C, S)
    dr_ptr,  # (N, C, S), or None
    stats_ptr,  # (2 or 4, N, C) float32: mean and rstd of x, of a normalised residual
    weight_ptr,  # (C,), or None
    bias_ptr,  # (C,), or None
    slope_ptr,  # (C,) or (1,), or None
    sums_ptr,  # (4, N, C, splits) float32: sums of g, g * xhat, g * rhat, dy * z where z <= 0
    slope, slope_stride, dy_stride, rows, C, S,
    NORMALISED: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_C channels of one sample; grid (N * ceil(C / BLOCK_C),)."""
    pid = tl.program_id(0)
    c, row, offset = _program(pid, C, S, CHANNELS_LAST, BLOCK_C)
    s, tile = _tile(C, S, CHANNELS_LAST, BLOCK_S, BLOCK_C)
    dy_offset, dy_tile, _ = _slice(pid, C, S, dy_stride, offset, tile, CHANNELS_LAST, BLOCK_S, BLOCK_C)
    in_c = c < C
    inside = (s < S) & in_c
    mean, rstd, mean_r, rstd_r = _statistics(stats_ptr, row, rows, in_c, NORMALISED)
    weight, bias = _parameter(weight_ptr, c, in_c, 1.0), _parameter(bias_ptr, c, in_c, 0.0)
    if slope_ptr is not None:
        slope = _parameter(slope_ptr, c * slope_stride, in_c, 0.0)
    xhat = (tl.load(x_ptr + offset + tile, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
    g = tl.load(dy_ptr + dy_offset + dy_tile, mask=inside, other=0.0).to(tl.float32)
    rhat = None
    if r_ptr is not None:
        rhat = tl.load(r_ptr + offset + tile, mask=inside, other=0.0).to(tl.float32)
    if NORMALISED:
        rhat = (rhat - mean_r) * rstd_r
    if slope is not None:
        z = _pre_activation(xhat, rhat, weight, bias)
        if slope_ptr is not None:
            dslope = tl.sum(tl.where(z > 0, 0.0, g * z), axis=0, keep_dims=True)
            tl.store(sums_ptr + 3 * rows + row, dslope, mask=in_c)
        g = tl.where(z > 0, g, g * slope)
    g_sum = tl.sum(g, axis=0, keep_dims=True)
    gxhat_sum = tl.sum(g * xhat, axis=0, keep_dims=True)
    tl.store(sums_ptr + row, g_sum, mask=in_c)
    tl.store(sums_ptr + rows + row, gxhat_sum, mask=in_c)
    dx = weight * _normalised_gradient(g, xhat, g_sum / S, gxhat_sum / S, rstd)
    tl.store(dx_ptr + offset + tile, dx, mask=inside)
    if NORMALISED:
        grhat_sum = tl.sum(g * rhat, axis=0, keep_dims=True)
        g = _normalised_gradient(g, rhat, g_sum / S, grhat_sum / S, rstd_r)
    if dr_ptr is not None:
        tl.store(dr_ptr + offset + tile, g, mask=inside)


@triton.jit
def norm_gradient_sums_kernel(
    x_ptr,  # (N, C, S)
    dy_ptr,  # (N, C, S), or a slice
    r_ptr,  # (N, C, S): residual, or None
    g_ptr,  # (N, C, S): gradient of a raw residual, or None
    stats_ptr,  # (2 or 4, N, C) float32: mean and rstd of x, of a normalised residual
    weight_ptr,  # (C,), or None
    bias_ptr,  # (C,), or None
    slope_ptr,  # (C,) or (1,), or None
    sums_ptr,  # (4, N, C, splits) float32: sums of g, g * xhat, g * rhat, dy * z where z <= 0
    slope, slope_stride, dy_stride, rows, C, S, chunk,
    NORMALISED: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    num_stages: tl.constexpr,
):  # fmt: skip
    """Sums over one chunk of BLOCK_C channels; grid (N * ceil(C / BLOCK_C), splits)."""
    pid = tl.program_id(0)
    c, row, offset = _program(pid, C, S, CHANNELS_LAST, BLOCK_C)
    s, tile = _tile(C, S, CHANNELS_LAST, BLOCK_S, BLOCK_C)
    dy_offset, dy_tile, dy_step = _slice(pid, C, S, dy_stride, offset, tile, CHANNELS_LAST, BLOCK_S, BLOCK_C)
    split, splits = tl.program_id(1), tl.num_programs(1)
    in_c = c < C
    mean, rstd, mean_r, rstd_r = _statistics(stats_ptr, row, rows, in_c, NORMALISED)
    weight, bias = _parameter(weight_ptr, c, in_c, 1.0), _parameter(bias_ptr, c, in_c, 0.0)
    if slope_ptr is not None:
        slope = _parameter(slope_ptr, c * slope_stride, in_c, 0.0)
    g_sum = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    gxhat_sum = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    grhat_sum = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    dslope_sum = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    begin = split * chunk
    end = tl.minimum(begin + chunk, S)
    for i in tl.range(0, tl.cdiv(end - begin, BLOCK_S), num_stages=num_stages):
        start = begin + i * BLOCK_S
        inside = (start + s < end) & in_c
        at = offset + start.to(tl.int64) * (C if CHANNELS_LAST else 1)
        xhat = (tl.load(x_ptr + at + tile, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        dy_at = dy_offset + start.to(tl.int64) * dy_step
        g = tl.load(dy_ptr + dy_at + dy_tile, mask=inside, other=0.0).to(tl.float32)
        rhat = None
        if r_ptr is not None:
            rhat = tl.load(r_ptr + at + tile, mask=inside, other=0.0).to(tl.float32)
            if NORMALISED:
                rhat = (rhat - mean_r) * rstd_r
        if slope is not None:
            z = _pre_activation(xhat, rhat, weight, bias)
            if slope_ptr is not None:
                dslope_sum += tl.where(z > 0, 0.0, g * z)
            g = tl.where(z > 0, g, g * slope)
        if g_ptr is not None:
            # norm_gradient_apply_kernel will read this rounded g, so the sums must be of it too.
            g = g.to(g_ptr.dtype.element_ty)
            tl.store(g_ptr + at + tile, g, mask=inside)
            g = g.to(tl.float32)
        g_sum += g
        gxhat_sum += g * xhat
        if NORMALISED:
            grhat_sum += g * rhat
    tl.store(sums_ptr + row * splits + split, tl.sum(g_sum, axis=0, keep_dims=True), mask=in_c)
    at = sums_ptr + (rows + row) * splits + split
    tl.store(at, tl.sum(gxhat_sum, axis=0, keep_dims=True), mask=in_c)
    if NORMALISED:
        at = sums_ptr + (2 * rows + row) * splits + split
        tl.store(at, tl.sum(grhat_sum, axis=0, keep_dims=True), mask=in_c)
    if slope_ptr is not None:
        at = sums_ptr + (3 * rows + row) * splits + split
        tl.store(at, tl.sum(dslope_sum, axis=0, keep_dims=True), mask=in_c)


@triton.jit
def norm_gradient_combine_kernel(
    sums_ptr,  # (4, N, C, splits) float32, of norm_gradient_sums
    means_ptr,  # (4, N, C) float32: means of g, g * xhat, g * rhat; or None
    dweight_ptr,  # (C,), or None
    dbias_ptr,  # (C,), or None
    dslope_ptr,  # (C,), or None
    N, C, S, splits,
    NORMALISED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Means and parameter gradients of one channel; grid (C,)."""
    c = tl.program_id(0)
    rows = N * C
    split = tl.arange(0, BLOCK_SPLITS)[None, :]
    dbias = tl.zeros((BLOCK_N, 1), tl.float32)
    dweight = tl.zeros((BLOCK_N, 1), tl.float32)
    dslope = tl.zeros((BLOCK_N, 1), tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)[:, None]
        row = n * C + c
        inside = (n < N) & (split < splits)
        at = sums_ptr + row * splits + split
        g_sum = tl.sum(tl.load(at, mask=inside, other=0.0), axis=1, keep_dims=True)
        gxhat_sum = tl.sum(tl.load(at + rows * splits, mask=inside, other=0.0), axis=1, keep_dims=True)
        dbias += g_sum
        dweight += gxhat_sum
        if means_ptr is not None:
            tl.store(means_ptr + row, g_sum / S, mask=n < N)
            tl.store(means_ptr + rows + row, gxhat_sum / S, mask=n < N)
        if NORMALISED:
            grhat_sum = tl.sum(tl.load(at + 2 * rows * splits, mask=inside, other=0.0), axis=1, keep_dims=True)
            tl.store(means_ptr + 2 * rows + row, grhat_sum / S, mask=n < N)
        if dslope_ptr is not None:
            dslope += tl.sum(tl.load(at + 3 * rows * splits, mask=inside, other=0.0), axis=1, keep_dims=True)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + c, tl.sum(dweight))
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, tl.sum(dbias))
    if dslope_ptr is not None:
        tl.store(dslope_ptr + c, tl.sum(dslope))


@triton.jit
def norm_gradient_apply_kernel(
    x_ptr,  # (N, C, S)
    g_ptr,  # (N, C, S), or a slice: g if slope is None, else dy
    r_ptr,  # (N, C, S): residual, or None
    dx_ptr,  # (N, C, S)
    dr_ptr,  # (N, C, S), or None
    stats_ptr,  # (2 or 4, N, C) float32: mean and rstd of x, of a normalised residual
    means_ptr,  # (4, N, C) float32, of norm_gradient_combine
    weight_ptr,  # (C,), or None
    bias_ptr,  # (C,), or None
    slope_ptr,  # (C,) or (1,), or None
    slope, slope_stride, g_stride, rows, C, S, chunk,
    NORMALISED: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    num_stages: tl.constexpr,
):  # fmt: skip
    """dx and a normalised residual's gradient, one chunk; grid (N * ceil(C / BLOCK_C), splits)."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    c, row, offset = _program(pid, C, S, CHANNELS_LAST, BLOCK_C)
    s, tile = _tile(C, S, CHANNELS_LAST, BLOCK_S, BLOCK_C)
    g_offset, g_tile, g_step = _slice(pid, C, S, g_stride, offset, tile, CHANNELS_LAST, BLOCK_S, BLOCK_C)
    in_c = c < C
    mean, rstd, mean_r, rstd_r = _statistics(stats_ptr, row, rows, in_c, NORMALISED)
    mean_g, mean_gxhat = _parameter(means_ptr, row, in_c, 0.0), _parameter(means_ptr + rows, row, in_c, 0.0)
    if NORMALISED:
        mean_grhat = _parameter(means_ptr + 2 * rows, row, in_c, 0.0)
    weight, bias = _parameter(weight_ptr, c, in_c, 1.0), _parameter(bias_ptr, c, in_c, 0.0)
    if slope_ptr is not None:
        slope = _parameter(slope_ptr, c * slope_stride, in_c, 0.0)
    begin = (tl.num_programs(1) - 1 - tl.program_id(1)) * chunk
    end = tl.minimum(begin + chunk, S)
    tiles = tl.cdiv(end - begin, BLOCK_S)
    for i in tl.range(0, tiles, num_stages=num_stages):
        start = begin + (tiles - 1 - i) * BLOCK_S
        inside = (start + s < end) & in_c
        at = offset + start.to(tl.int64) * (C if CHANNELS_LAST else 1)
        # As in norm_apply_kernel.
        x = tl.load(x_ptr + at + tile, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        g_at = g_offset + start.to(tl.int64) * g_step
        g = tl.load(g_ptr + g_at + g_tile, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        xhat = (x - mean) * rstd
        rhat = None
        if NORMALISED:
            r = tl.load(r_ptr + at + tile, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
            rhat = (r - mean_r) * rstd_r
        if slope is not None:
            g = tl.where(_pre_activation(xhat, rhat, weight, bias) > 0, g, g * slope)
        dx = weight * _normalised_gradient(g, xhat, mean_g, mean_gxhat, rstd)
        tl.store(dx_ptr + at + tile, dx, mask=inside)
        if NORMALISED:
            dr = _normalised_gradient(g, rhat, mean_g, mean_grhat, rstd_r)
            tl.store(dr_ptr + at + tile, dr, mask=inside)


class _Plan(NamedTuple):
    """How a feature map is divided among programs, by its shape, dtype and layout alone."""

    samples: int
    channels: int
    voxels: int
    kib: int  # voxels of a program's channels in one KiB
    blocks: int  # programs of one chunk each that cover all samples and channels
    splits: int  # chunks
    chunk: int  # voxels that one program walks
    one_tile: bool  # whether a program holds all voxels of its channels at once
    sizes: dict[str, Any]  # arguments that every kernel over the map takes

    def grid(self, config: dispatch.Config) -> tuple[int, int]:
        return self.blocks, self.splits

    def configs(self, *walks: tuple[int, int, int]) -> list[dispatch.Config]:
        """Candidates for one tile, or for walks of (KiB of one map in a tile, warps, stages)."""
        if self.one_tile:
            return _one_tile_configs(self.sizes["BLOCK_S"] * self.sizes["BLOCK_C"])
        return _walk_configs(self.kib, walks)


@cache
def _one_tile_configs(values: int) -> list[dispatch.Config]:
    warps = min(max(values // 256, 1), 16)
    return [{"num_warps": n, "num_stages": 1} for n in (warps, 2 * warps) if n <= 16]


@cache
def _walk_configs(voxels: int, walks: tuple[tuple[int, int, int], ...]) -> list[dispatch.Config]:
    """From the voxels in one KiB."""
    return [{"BLOCK_S": kib * voxels, "num_warps": warps, "num_stages": stages} for kib, warps, stages in walks]


@cache
def _plan(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, maps: int) -> _Plan:
    """The plan of a dense map; one tile if a sample and channel block of all `maps` to read fits."""
    samples, channels = shape[:2]
    voxels = math.prod(shape[2:])
    most = next_power_of_two(channels) if channels_last else 1
    block_c = min(most, ONE_TILE_BLOCK_C)
    # Values that can't be loaded 16 bytes at a time need a register each.
    size = dtype.itemsize if (channels if channels_last else voxels) % 16 == 0 else 4
    one_tile = next_power_of_two(voxels) * block_c * size * maps <= ONE_TILE
    if one_tile:
        chunk, own = voxels, {"BLOCK_S": next_power_of_two(voxels)}
    else:
        block_c = min(most, LARGE_BLOCK_C)
        splits = max(1, PROGRAMS // (samples * ceil_div(channels, block_c)))
        step = ceil_div(CHUNK_STEP, block_c)
        chunk = ceil_div(ceil_div(voxels, splits), step) * step
        own = {"chunk": chunk}
    sizes = {"rows": samples * channels, "C": channels, "S": voxels, "CHANNELS_LAST": channels_last, "BLOCK_C": block_c}
    kib, blocks = 1024 // dtype.itemsize // block_c, samples * ceil_div(channels, block_c)
    return _Plan(samples, channels, voxels, kib, blocks, ceil_div(voxels, chunk), chunk, one_tile, sizes | own)


def _dense(x: Tensor) -> Tensor:
    return x if _is_channels_last(x) else x.contiguous()


def _format(x: Tensor) -> torch.memory_format:
    """The memory format of `_dense(x)`."""
    return torch.channels_last_3d if _is_channels_last(x) else torch.contiguous_format


def _like(tensor: Tensor, x: Tensor) -> Tensor:
    """`tensor` in the memory format of a dense `x`; a copy where it has another."""
    return tensor.contiguous(memory_format=_format(x))


def _slice_stride(tensor: Tensor, x: Tensor) -> int | None:
    """Elements between voxels of a slice of channels, where `x` is channels_last_3d; None for all other tensors."""
    _, channels, size_x, size_y, size_z = tensor.shape
    stride = tensor.stride(4)
    strides = (size_x * size_y * size_z * stride, 1, size_y * size_z * stride, size_z * stride, stride)
    return stride if stride > channels and tensor.stride() == strides and _is_channels_last(x) else None


@dispatch.once_per_shape
def _key(shape: torch.Size, dtype: torch.dtype, channels_last: bool, residual: str) -> str:
    """What the best path and configuration depend on; samples and voxels rounded up to powers of two."""
    samples, channels, *space = [int(size) for size in shape]
    voxels = math.prod(space)
    odd = " odd" if voxels % 16 else ""  # as in `_plan`
    layout = "channels_last" if channels_last else "contiguous"
    sizes = f"N{next_power_of_two(samples)} C{channels} S{next_power_of_two(voxels)}{odd}"
    return f"{sizes} {layout} {str(dtype).removeprefix('torch.')}{residual}"


def _key_of(x: Tensor, residual: Tensor | None, residual_norm: bool) -> str:
    kind = "" if residual is None else " normalised" if residual_norm else " residual"
    return _key(x.shape, x.dtype, _is_channels_last(x), kind)


def _parameters(
    weight: Tensor | None, bias: Tensor | None, slope_tensor: Tensor | None, slope: float | None
) -> dict[str, Any]:
    """Arguments of every kernel that computes z."""
    slope_tensor = None if slope_tensor is None else slope_tensor.contiguous()
    return {
        "weight_ptr": None if weight is None else weight.contiguous(),
        "bias_ptr": None if bias is None else bias.contiguous(),
        "slope_ptr": slope_tensor,
        "slope": slope,
        "slope_stride": 0 if slope_tensor is None or slope_tensor.shape[0] == 1 else 1,
    }


def _statistics_of(x: Tensor, residual_norm: bool) -> Tensor:
    """Uninitialised statistics."""
    return x.new_empty((4 if residual_norm else 2, *x.shape[:2]), dtype=torch.float32)


def instance_norm_write(
    y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    slope_tensor: Tensor | None,
    slope: float | None,
    residual: Tensor | None,
    residual_norm: bool,
) -> Tensor:
    """Launch the forward into `y`: one kernel where a sample and channel fits a program, else three.

    Args:
        y: in the memory format of `x`; or, where that is channels_last_3d, a slice of the channels of a wider map.
        slope_tensor, slope: the negative slope as a tensor of 1 or C elements or as a number; at most one of them.
        x, weight, bias, eps, residual, residual_norm: as `instance_norm`.

    Returns:
        float32 statistics, (2, N, C): mean and rstd, or (4, N, C) with `residual_norm`: the residual's after them.
    """
    x = _dense(x)
    residual = None if residual is None else _like(residual, x)
    stats = _statistics_of(x, residual_norm)
    plan = _plan(x.shape, x.dtype, _is_channels_last(x), 1 if residual is None else 2)
    key = _key_of(x, residual, residual_norm)
    common = {"x_ptr": x, "r_ptr": residual, **plan.sizes}
    write = {"y_ptr": y, "y_stride": _slice_stride(y, x), "stats_ptr": stats, "NORMALISED": residual_norm}
    write |= _parameters(weight, bias, slope_tensor, slope)
    if plan.one_tile:
        args = {**common, **write, "eps": eps}
        dispatch.launch(norm_forward_one_tile_kernel, lambda config: (plan.blocks,), args, plan.configs(), key)
        return stats
    partial = x.new_empty((*stats.shape, plan.splits), dtype=torch.float32)
    args = {**common, "r_ptr": residual if residual_norm else None, "partial_ptr": partial}
    configs = plan.configs((4, 4, 3), (4, 4, 1), (8, 8, 3), (8, 8, 1), (4, 8, 3), (8, 4, 2))
    maps = stats.shape[0] // 2
    dispatch.launch(norm_statistics_kernel, lambda config: (plan.blocks, plan.splits, maps), args, configs, key)
    _combine_statistics(partial, stats, eps, plan, key)
    configs = plan.configs((4, 4, 1), (4, 4, 3), (8, 8, 1), (8, 8, 2), (2, 4, 1))
    dispatch.launch(norm_apply_kernel, plan.grid, {**common, **write}, configs, key)
    return stats


def instance_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    slope_tensor: Tensor | None,
    slope: float | None,
    residual: Tensor | None,
    residual_norm: bool,
) -> tuple[Tensor, Tensor]:
    """y, in the memory format of `x`, and its statistics; arguments as `instance_norm_write`."""
    x = _dense(x)
    y = torch.empty_like(x)
    return y, instance_norm_write(y, x, weight, bias, eps, slope_tensor, slope, residual, residual_norm)


def _combine_statistics(partial: Tensor, stats: Tensor, eps: float, plan: _Plan, key: str) -> None:
    rows, block_splits = plan.samples * plan.channels, next_power_of_two(plan.splits)
    block_rows = min(next_power_of_two(rows), max(COMBINE_TILE // block_splits, 1))
    args = {"partial_ptr": partial, "stats_ptr": stats, "eps": eps, "rows": rows, "S": plan.voxels}
    args |= {"chunk": plan.chunk, "splits": plan.splits, "BLOCK_ROWS": block_rows, "BLOCK_SPLITS": block_splits}
    grid = ceil_div(rows, block_rows), stats.shape[0] // 2
    dispatch.launch(norm_combine_kernel, lambda config: grid, args, [{"num_warps": 4, "num_stages": 1}], key)


def _backward_outputs(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, slope_tensor: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised dx, dweight, dbias, dslope and dresidual for a dense `x`; of no elements without that input."""

    def gradient(given: Tensor | None) -> Tensor:
        return x.new_empty(0) if given is None else given.new_empty(given.shape)

    dresidual = x.new_empty(0) if residual is None else torch.empty_like(x)
    return torch.empty_like(x), gradient(weight), gradient(bias), gradient(slope_tensor), dresidual


def instance_norm_backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope_tensor: Tensor | None,
    slope: float | None,
    residual: Tensor | None,
    residual_norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward: one or two kernels where a sample and channel fits a program, else three.

    Args:
        dy: gradient of y, any strides; all but a slice of channels (as y) are copied if not in the format of `x`.
        stats: from `instance_norm_forward`.
        others: as `instance_norm_forward`, but a raw residual only with an activation: without one its gradient is dy.

    Returns:
        dx, dweight, dbias, dslope, dresidual: the maps in the memory format of `x`, the others as their parameters; of
        no elements where the input is None.
    """
    x = _dense(x)
    dy_stride = _slice_stride(dy, x)
    dy = dy if dy_stride else _like(dy, x)
    residual = None if residual is None else _like(residual, x)
    dx, dweight, dbias, dslope, dresidual = _backward_outputs(x, weight, bias, slope_tensor, residual)
    plan = _plan(x.shape, x.dtype, _is_channels_last(x), 2 if residual is None else 3)
    key = _key_of(x, residual, residual_norm)
    sums = x.new_empty((4, *x.shape[:2], plan.splits), dtype=torch.float32)
    common = {"x_ptr": x, "r_ptr": residual, "stats_ptr": stats, "NORMALISED": residual_norm, **plan.sizes}
    common |= _parameters(weight, bias, slope_tensor, slope)
    write = {"dx_ptr": dx, "dr_ptr": None if residual is None else dresidual}
    # A single slope belongs to all channels: torch sums it, below.
    of_channels = dweight, dbias, x.new_empty(0) if dslope.shape[0] == 1 else dslope
    if plan.one_tile:
        args = {**common, **write, "dy_ptr": dy, "dy_stride": dy_stride, "sums_ptr": sums}
        dispatch.launch(norm_backward_one_tile_kernel, lambda config: (plan.blocks,), args, plan.configs(), key)
        if any(gradient.numel() for gradient in of_channels):
            _combine_gradients(sums, None, of_channels, False, plan, key)
    else:
        means = sums.new_empty(sums.shape[:3])
        writes_g = residual is not None and not residual_norm
        args = {**common, "dy_ptr": dy, "dy_stride": dy_stride, "sums_ptr": sums}
        args["g_ptr"] = dresidual if writes_g else None
        tile = 2 if residual_norm else 4  # registers for a third map and one more sum
        configs = plan.configs((tile, 4, 3), (tile, 4, 1), (tile, 8, 3), (2 * tile, 8, 2), (2, 4, 2))
        dispatch.launch(norm_gradient_sums_kernel, plan.grid, args, configs, key)
        _combine_gradients(sums, means, of_channels, residual_norm, plan, key)
        args = {**common, **write, "g_ptr": dy, "g_stride": dy_stride, "means_ptr": means}
        if writes_g:
            args |= {"g_ptr": dresidual, "g_stride": None, "r_ptr": None, "dr_ptr": None}
            args |= {"slope_ptr": None, "slope": None}
        configs = plan.configs((4, 4, 1), (4, 4, 2), (2, 4, 1), (4, 8, 2), (4, 8, 3))
        dispatch.launch(norm_gradient_apply_kernel, plan.grid, args, configs, key)
    if dslope.shape[0] == 1:
        dslope = sums[3].sum().view(1).to(dslope.dtype)
    return dx, dweight, dbias, dslope, dresidual


def _combine_gradients(
    sums: Tensor, means: Tensor | None, of_channels: tuple[Tensor, ...], residual_norm: bool, plan: _Plan, key: str
) -> None:
    """Means, and the gradients of weight, bias and slope that have elements."""
    block_splits = next_power_of_two(plan.splits)
    args = {"sums_ptr": sums, "means_ptr": means, "N": plan.samples, "C": plan.channels, "S": plan.voxels}
    for name, gradient in zip(("dweight_ptr", "dbias_ptr", "dslope_ptr"), of_channels):
        args[name] = gradient if gradient.numel() else None
    args |= {"splits": plan.splits, "NORMALISED": residual_norm, "BLOCK_SPLITS": block_splits}
    args |= {"BLOCK_N": min(next_power_of_two(plan.samples), max(COMBINE_TILE // block_splits, 1))}
    configs = [{"num_warps": 4, "num_stages": 1}]
    dispatch.launch(norm_gradient_combine_kernel, lambda config: (plan.channels,), args, configs, key)


_forward_op = dispatch.operator(instance_norm_forward)
_backward_op = dispatch.operator(instance_norm_backward)


@_forward_op.register_fake
def _(x, weight, bias, eps, slope_tensor, slope, residual, residual_norm):
    x = _dense(x)
    return torch.empty_like(x), _statistics_of(x, residual_norm)


@_backward_op.register_fake
def _(dy, x, stats, weight, bias, slope_tensor, slope, residual, residual_norm):
    return _backward_outputs(_dense(x), weight, bias, slope_tensor, residual)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, slope_tensor, slope, residual, residual_norm = inputs
    stats = output[1]
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)  # else a launch fills the gradient of stats with zeros
    ctx.slope, ctx.residual_norm = slope, residual_norm
    # Without an activation g = dy: a raw residual is not needed, and its gradient is dy.
    ctx.passes_dy = residual is not None and not residual_norm and slope is None and slope_tensor is None
    kept = None if ctx.passes_dy else residual
    ctx.save_for_backward(x, stats, weight, bias, slope_tensor, kept)


def _backward(run: Callable[..., Any], ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, stats, weight, bias, slope_tensor, residual = ctx.saved_tensors
    dx, dweight, dbias, dslope, dresidual = run(
        dy, x, stats, weight, bias, slope_tensor, ctx.slope, residual, ctx.residual_norm
    )
    return dispatch.gradients(
        instance_norm_forward,
        x=dx,
        weight=None if weight is None else dweight,
        bias=None if bias is None else dbias,
        slope_tensor=None if slope_tensor is None else dslope,
        residual=dy if ctx.passes_dy else None if residual is None else dresidual,
    )


_instance_norm = dispatch.differentiable(_forward_op, _backward_op, _setup_context, _backward)


class _IntoSlice(torch.autograd.Function):
    """The kernels with a destination, in a list that hides it from autograd: y has its memory and no history."""

    @staticmethod
    def forward(destination: list[Tensor], *inputs: Any) -> tuple[Tensor, Tensor]:
        y = destination[0].detach()
        return y, instance_norm_write(y, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _setup_context(ctx, inputs[1:], output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
        return None, *_backward(instance_norm_backward, ctx, dy, _)


def _on_cpu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    negative_slope: float | Tensor | None,
    residual: Tensor | None,
    residual_norm: bool,
) -> Tensor:
    """The reference by PyTorch's group norm, one channel a group; arguments as `instance_norm`, unchecked.

    On a CPU the statistics of contiguous maps take half to a fifth of the time, and half precision is read without a
    copy. Residuals and slope tensors are float32, as in the reference.
    """
    if not x.is_contiguous() or math.prod(x.shape[2:]) == 1:
        return instance_norm_reference(x, weight, bias, eps, negative_slope, residual, residual_norm)
    compute = x.dtype if residual is None and not isinstance(negative_slope, Tensor) else torch.float32
    # Without a float32 weight PyTorch keeps half-precision statistics in half, and fails with a bias.
    weight = torch.ones(x.shape[1]) if weight is None else weight.float()
    bias = None if bias is None else bias.float()
    with torch.autocast("cpu", enabled=False):
        y = _group_norm(x.to(compute), weight, bias, eps)
        if residual is not None:
            residual = residual.to(compute)
            y = y + (_group_norm(residual, None, None, eps) if residual_norm else residual)
        if isinstance(negative_slope, Tensor):
            y = F.prelu(y, negative_slope.to(compute))
        elif negative_slope is not None:
            y = F.leaky_relu(y, negative_slope)
    return y.to(x.dtype)


def _group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    # Flat: for channels_last_3d PyTorch computes the variance as E[x^2] - E[x]^2, in float32.
    return torch.group_norm(x.flatten(2), x.shape[1], weight, bias, eps).view(x.shape)


def _check_channels(name: str, tensor: Tensor | None, x: Tensor, sizes: tuple[int, ...]) -> None:
    if tensor is None:
        return
    check_is_tensor(name, tensor)
    if tensor.dim() != 1 or tensor.shape[0] not in sizes or tensor.dtype not in FLOATS:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype}; x has {x.shape[1]} channels, so it must be "
            f"floating point of shape {' or '.join(f'({size},)' for size in dict.fromkeys(sizes))}"
        )
    check_same_device(name, tensor, "x", x)


def _check(x: Any, weight: Any, bias: Any, eps: Any, negative_slope: Any, residual: Any, residual_norm: bool) -> None:
    check_floats("x", x, "batch, channels, X, Y, Z")
    if not isinstance(eps, Real) or not 0 < float(eps) < math.inf:
        rule = "must be a positive number: a constant channel has variance 0"
        raise ValueError(f"eps {eps!r} {rule}; the usual value is 1e-5")
    channels = x.shape[1]
    _check_channels("weight", weight, x, (channels,))
    _check_channels("bias", bias, x, (channels,))
    if isinstance(negative_slope, Tensor):
        _check_channels("negative_slope", negative_slope, x, (1, channels))
    elif negative_slope is not None and not (
        isinstance(negative_slope, Real) and abs(float(negative_slope)) < math.inf
    ):
        rule = f"must be a finite number, or a tensor of 1 or {channels}"
        raise ValueError(f"negative_slope {negative_slope!r} {rule}; None means no activation")
    if residual is not None:
        check_is_tensor("residual", residual)
        check_alike("residual", residual, "x", x)
    elif residual_norm:
        raise ValueError("residual_norm is True but there is no residual: give one, or omit residual_norm")


def instance_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    negative_slope: float | Tensor | None = None,
    residual: Tensor | None = None,
    residual_norm: bool = False,
) -> Tensor:
    """leaky_relu(IN(x) * weight + bias + residual), differentiable once in every tensor given.

    Args:
        x: (B, C, X, Y, Z), contiguous or channels_last_3d; any other strides cost a copy to contiguous.
        weight, bias: (C,), each optional.
        eps: added to the variance.
        negative_slope: None = no activation; a number = leaky ReLU; a tensor of 1 or C elements = PReLU.
        residual: same shape and dtype as `x`, added before the activation; copied if its memory format differs from
            that of `x`, and so is the incoming gradient.
        residual_norm: normalise the residual by its own statistics first (without affine).

    Returns:
        Shape, dtype and memory format of `x`; statistics in float32.

    Raises:
        ValueError: a wrong rank, dtype, shape or device of a tensor; an eps that is not positive; a slope that is not
            finite; `residual_norm` without a residual.
    """
    _check(x, weight, bias, eps, negative_slope, residual, residual_norm)
    if torch.compiler.is_exporting():  # an exported graph has plain operations, and any batch size; a key needs one
        return instance_norm_reference(x, weight, bias, eps, negative_slope, residual, residual_norm)
    key, args = _key_of(x, residual, residual_norm), (x, weight, bias, eps, negative_slope, residual, residual_norm)
    dispatch.compare("instance_norm", key, instance_norm, args, ("torch.compile",))
    chosen = dispatch.path("instance_norm", x, key)
    if chosen == "triton":
        slope_tensor, slope = (negative_slope, None) if isinstance(negative_slope, Tensor) else (None, negative_slope)
        return _instance_norm(x, weight, bias, eps, slope_tensor, slope, residual, residual_norm)[0]
    function: Callable[..., Tensor] = instance_norm_reference
    if chosen == "torch" and not torch.compiler.is_compiling():  # else it is compiled with what is around it
        function = _on_cpu if x.is_cpu else dispatch.compiled(instance_norm_reference, x.shape)
    return function(x, weight, bias, eps, negative_slope, residual, residual_norm)


def writes_slices(x: Tensor) -> bool:
    """Whether `instance_norm_into` can write into a slice: an eager call of our kernels, on a channels_last_3d map."""
    if torch.compiler.is_compiling() or not _is_channels_last(x):
        return False
    return dispatch.path("instance_norm", x, _key_of(x, None, False)) == "triton"


def instance_norm_into(
    out: Tensor | None,
    x: Tensor,
    eps: float = 1e-5,
    negative_slope: float | None = None,
    residual: Tensor | None = None,
    residual_norm: bool = False,
) -> Tensor:
    """`instance_norm` written where a concatenation wants it, if `writes_slices(x)`, and a new map otherwise.

    Args:
        out: a slice of the channels of a wider channels_last_3d map, of the shape and dtype of `x`; unknown to
            autograd. None: nowhere.
        x, eps, negative_slope, residual, residual_norm: as `instance_norm`.

    Returns:
        y, as a view with the memory of `out` or as a new tensor. Its gradient may be a slice too, and is not copied.

    Raises:
        ValueError: as `instance_norm`; `out` of another shape, dtype or device than `x`.
    """
    args = (x, None, None, eps, negative_slope, residual, residual_norm)
    if out is None or not writes_slices(x):
        return instance_norm(*args)
    _check(*args)
    check_alike("out", out, "x", x)
    key = _key_of(x, residual, residual_norm)
    dispatch.compare("instance_norm", key, instance_norm, args, ("torch.compile",))
    if dispatch.path("instance_norm", x, key) != "triton":
        return instance_norm(*args)
    return _IntoSlice.apply([out], x, None, None, eps, None, negative_slope, residual, residual_norm)[0]
