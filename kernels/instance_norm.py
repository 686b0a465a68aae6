"""Instance norm, affine, residual and leaky ReLU of a 3D feature map, as one operation.

    mean, var  over the voxels of each sample and channel (var biased)
    xhat = (x - mean) / sqrt(var + eps)
    r    = residual, or rhat = (residual - mean_r) / sqrt(var_r + eps) where `residual_norm`
    z    = xhat * weight + bias + r
    y    = leaky_relu(z)                                 leaky_relu(z) = z where z > 0, slope * z elsewhere

With g = dL/dy * (1 where z > 0, slope elsewhere) and S voxels:

    dx = weight * rstd * (g - mean(g) - xhat * mean(g * xhat))       dweight = sum(g * xhat)      dbias = sum(g)
    dresidual = g, or what dx is without weight, by the residual's statistics
    dslope = sum of dL/dy * z where z <= 0

The three uses: conv + norm + activation (slope 0.01), the end of UNETR's residual block, whose skip branch has a
convolution and a norm of its own (`residual_norm`), and the UNet's PReLU (`negative_slope` a parameter). Statistics are
float32 whatever the input's dtype: a bf16 sum over 10^6 voxels keeps two digits (float64 inputs keep float64).

A channel of one single voxel is its own mean, so xhat = 0 and y = leaky_relu(bias + r). `torch.nn.InstanceNorm3d`
refuses that case in training; here it is defined, because the deepest level of a 16 x 16 x 16 crop is one voxel.

`instance_norm_reference` states this with `torch.nn.functional`: the oracle that everything faster is compared with.

The kernels are bound by memory, so what counts is how often a feature map passes over the bus. A large one does not fit
a multiprocessor: x is read once for its statistics and once more to be normalised. Each direction is three launches
(kernels, here without the `_kernel` of their names):

    norm_statistics        a program walks one chunk of the voxels; each lane (element of its tile) keeps a Welford mean
                           and M2 in registers, joined across lanes once, at the end
    norm_combine           joins the chunks of each sample and channel: mean, rstd
    norm_apply             reads x (and the residual), writes y

    norm_gradient_sums     the same walk over x, dy (and the residual): sums of g, g * xhat, g * rhat, dy * z at z <= 0
    norm_gradient_combine  joins chunks and samples: means of g, g * xhat, g * rhat; dweight, dbias, dslope
    norm_gradient_apply    reads x, g (and the residual), writes dx (and dresidual)

Where a whole sample and channel fits the registers of one program, one launch reads once and writes once:
norm_forward_one_tile, and norm_backward_one_tile (plus norm_gradient_combine where a parameter has a gradient).

z is recomputed rather than stored. A raw residual's gradient is g itself: norm_gradient_sums writes it as it goes, and
norm_gradient_apply reads it instead of the residual and dy, one pass fewer. The second walk goes backwards, to start
with what the first left in the L2 cache. Welford, and the exact joining of means and M2 (Chan et al.), hold where
E[x^2] - E[x]^2 loses every digit (mean 10^4, std 1), and where a shift by the first voxel does (that voxel an outlier).
No atomics, and the chunks depend on the shape alone: the same bits on every run.

Reads and writes of one feature map, forward + backward, with an activation (`PASSES`):

    residual      eager     torch.compile   these kernels
    none          5 + 8         3 + 5           3 + 5
    raw           8 + 8         4 + 8           4 + 7
    normalised   11 + 13        5 + 8           5 + 8

Eager: maps contiguous and in one dtype, batch_norm 2 reads 1 write (backward 4 + 1), add 2 + 1 (backward an alias),
leaky_relu 1 + 1 (backward 2 + 1). Of a channels_last_3d map `F.instance_norm` first makes a contiguous copy, 2 passes
more, and its output stays contiguous. torch.compile: the least it can do with one kernel for each reduction and one for
each pointwise end. Without an activation a raw residual's gradient is dy, and these kernels' backward 5. One launch
takes 2 + 3, 3 + 5 and 3 + 5.

Memory layout: a map is (N, S, C) of strides (C * S, 1, S) if contiguous, (S * C, C, 1) if channels_last_3d; a tile is
BLOCK_S voxels of BLOCK_C channels (contiguous: of one channel). Loads and stores are 16 bytes wide where S (contiguous)
or C (channels_last_3d) is a multiple of 16.

Legend: N samples, C channels, S voxels of one sample (B, X, Y, Z of `x_BCXYZ`: N = B, S = X * Y * Z).

Sources: Ulyanov et al., Instance Normalization, https://arxiv.org/abs/1607.08022; Welford, Note on a Method for
Calculating Corrected Sums of Squares and Products, 1962; Chan, Golub, LeVeque, Updating Formulae and a Pairwise
Algorithm for Computing Sample Variances, 1979.
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

from kernels import dispatch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

PASSES = {"none": (3, 5), "raw": (4, 7), "normalised": (5, 8)}
"""Reads and writes of one large feature map, (forward, backward), by kind of residual and with an activation."""

PROGRAMS = 1056
"""Programs that a walk over a large map is split into: 8 for each of an H100's 132 multiprocessors."""
CHUNK_STEP = 4096
"""Elements of which a program's chunk is a multiple: whole tiles, 16-byte steps, enough work for a program."""
COMBINE_TILE = 1024
"""Partial results that a program of the middle launch holds at once, where one channel has not more of them."""
LARGE_BLOCK_C = 64
"""Most channels of a tile in channels_last_3d: 128 bytes of bf16, one line of the cache."""
ONE_TILE_BLOCK_C = 16
"""The same where one tile is all: fewer, for more programs; 16 channels of bf16 are one sector of 32 bytes."""
ONE_TILE = 32 * 1024
"""Most bytes that one program holds where one tile is all, of all maps that it reads: 64 a thread of 512."""


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
    # F.instance_norm returns contiguous whatever it is given.
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
def _parameter(ptr, index, mask, default: tl.constexpr):
    """Float32 values of a parameter of each channel; `default` where it is not given."""
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
    return rstd * (g - mean_g - xhat * mean_gxhat)


@triton.jit
def norm_forward_one_tile_kernel(
    x_ptr, r_ptr, y_ptr, stats_ptr, weight_ptr, bias_ptr, slope_ptr, slope, slope_stride, eps, rows, C, S,
    NORMALISED: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    c, row, offset = _program(tl.program_id(0), C, S, CHANNELS_LAST, BLOCK_C)
    s, tile = _tile(C, S, CHANNELS_LAST, BLOCK_S, BLOCK_C)
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
    tl.store(y_ptr + offset + tile, y, mask=inside)


@triton.jit
def norm_statistics_kernel(
    x_ptr, r_ptr, partial_ptr, rows, C, S, chunk,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, num_stages: tl.constexpr,
):  # fmt: skip
    c, row, offset = _program(tl.program_id(0), C, S, CHANNELS_LAST, BLOCK_C)
    s, tile = _tile(C, S, CHANNELS_LAST, BLOCK_S, BLOCK_C)
    split, splits = tl.program_id(1), tl.num_programs(1)
    if r_ptr is not None:  # noqa: SIM102, decided by the compiler, the other by the program
        if tl.program_id(2) == 1:
            x_ptr = r_ptr
            partial_ptr += 2 * rows * splits
    in_c = c < C
    begin = split * chunk
    end = tl.minimum(begin + chunk, S)
    stride = C if CHANNELS_LAST else 1
    # Whole tiles two by two: Welford on twice the mean of a pair costs 7 operations for two values instead of 10, and
    # there are half as many lanes to join. All have seen equally many values, so the division is one scalar.
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
    partial_ptr, stats_ptr, eps, rows, S, chunk, splits, BLOCK_ROWS: tl.constexpr, BLOCK_SPLITS: tl.constexpr
):  # fmt: skip
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
    x_ptr, r_ptr, y_ptr, stats_ptr, weight_ptr, bias_ptr, slope_ptr, slope, slope_stride, rows, C, S, chunk,
    NORMALISED: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    num_stages: tl.constexpr,
):  # fmt: skip
    c, row, offset = _program(tl.num_programs(0) - 1 - tl.program_id(0), C, S, CHANNELS_LAST, BLOCK_C)
    s, tile = _tile(C, S, CHANNELS_LAST, BLOCK_S, BLOCK_C)
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
        # Read for the last time: let it leave the L2 cache before what is still to be read. Triton drops this hint from
        # pipelined loads, and half of the traffic here are writes, so the default is one stage.
        x = tl.load(x_ptr + at + tile, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        rhat = None
        if r_ptr is not None:
            rhat = tl.load(r_ptr + at + tile, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
            if NORMALISED:
                rhat = (rhat - mean_r) * rstd_r
        z = _pre_activation((x - mean) * rstd, rhat, weight, bias)
        y = z if slope is None else tl.where(z > 0, z, z * slope)
        tl.store(y_ptr + at + tile, y, mask=inside)


@triton.jit
def norm_backward_one_tile_kernel(
    x_ptr, dy_ptr, r_ptr, dx_ptr, dr_ptr, stats_ptr, weight_ptr, bias_ptr, slope_ptr, slope, slope_stride, sums_ptr,
    rows, C, S,
    NORMALISED: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    c, row, offset = _program(tl.program_id(0), C, S, CHANNELS_LAST, BLOCK_C)
    s, tile = _tile(C, S, CHANNELS_LAST, BLOCK_S, BLOCK_C)
    in_c = c < C
    inside = (s < S) & in_c
    mean, rstd, mean_r, rstd_r = _statistics(stats_ptr, row, rows, in_c, NORMALISED)
    weight, bias = _parameter(weight_ptr, c, in_c, 1.0), _parameter(bias_ptr, c, in_c, 0.0)
    if slope_ptr is not None:
        slope = _parameter(slope_ptr, c * slope_stride, in_c, 0.0)
    xhat = (tl.load(x_ptr + offset + tile, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
    g = tl.load(dy_ptr + offset + tile, mask=inside, other=0.0).to(tl.float32)
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
    x_ptr, dy_ptr, r_ptr, g_ptr, stats_ptr, weight_ptr, bias_ptr, slope_ptr, slope, slope_stride, sums_ptr,
    rows, C, S, chunk,
    NORMALISED: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    num_stages: tl.constexpr,
):  # fmt: skip
    c, row, offset = _program(tl.program_id(0), C, S, CHANNELS_LAST, BLOCK_C)
    s, tile = _tile(C, S, CHANNELS_LAST, BLOCK_S, BLOCK_C)
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
        g = tl.load(dy_ptr + at + tile, mask=inside, other=0.0).to(tl.float32)
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
            # norm_gradient_apply_kernel will read this rounded g: the sums must be those of what it reads.
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
    sums_ptr, means_ptr, dweight_ptr, dbias_ptr, dslope_ptr, N, C, S, splits,
    NORMALISED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
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
    x_ptr, g_ptr, r_ptr, dx_ptr, dr_ptr, stats_ptr, means_ptr, weight_ptr, bias_ptr, slope_ptr, slope, slope_stride,
    rows, C, S, chunk,
    NORMALISED: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    num_stages: tl.constexpr,
):  # fmt: skip
    c, row, offset = _program(tl.num_programs(0) - 1 - tl.program_id(0), C, S, CHANNELS_LAST, BLOCK_C)
    s, tile = _tile(C, S, CHANNELS_LAST, BLOCK_S, BLOCK_C)
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
        g = tl.load(g_ptr + at + tile, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
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


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)  # `triton.cdiv` takes some microseconds


def _power_of_two(n: int) -> int:
    """The least that is not below `n`."""
    return 1 << (n - 1).bit_length()


class _Plan(NamedTuple):
    """How a feature map is divided among programs; by its shape, dtype and layout alone."""

    samples: int
    channels: int
    voxels: int
    itemsize: int
    block_c: int
    chunk: int
    """Voxels that one program walks."""
    one_tile: bool
    """Whether a program holds all voxels of its channels at once."""
    sizes: dict[str, Any]
    """Arguments that every kernel over the map takes."""

    @property
    def rows(self) -> int:
        return self.samples * self.channels

    @property
    def blocks(self) -> int:
        return self.samples * _ceil_div(self.channels, self.block_c)

    @property
    def splits(self) -> int:
        return _ceil_div(self.voxels, self.chunk)

    def grid(self, config: dispatch.Config) -> tuple[int, int]:
        return self.blocks, self.splits

    def configs(self, *walks: tuple[int, int, int]) -> list[dispatch.Config]:
        """Candidates: of a walk from (KiB of one map in a tile, warps, stages); of one tile by its elements."""
        if self.one_tile:
            return _one_tile_configs(_power_of_two(self.voxels) * self.block_c)
        return _walk_configs(1024 // self.itemsize // self.block_c, walks)


@cache
def _one_tile_configs(elements: int) -> list[dispatch.Config]:
    warps = min(max(elements // 256, 1), 16)
    return [{"num_warps": n, "num_stages": 1} for n in (warps, 2 * warps) if n <= 16]


@cache
def _walk_configs(voxels: int, walks: tuple[tuple[int, int, int], ...]) -> list[dispatch.Config]:
    return [{"BLOCK_S": kib * voxels, "num_warps": warps, "num_stages": stages} for kib, warps, stages in walks]


@cache
def _plan(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, maps: int) -> _Plan:
    """The division of a dense map; one tile holds a sample and channel block whole where all `maps` to be read fit."""
    samples, channels = shape[:2]
    voxels = math.prod(shape[2:])
    most = _power_of_two(channels) if channels_last else 1
    block_c = min(most, ONE_TILE_BLOCK_C)
    # Values that can't be loaded 16 bytes at a time take a register each.
    size = dtype.itemsize if (channels if channels_last else voxels) % 16 == 0 else 4
    one_tile = _power_of_two(voxels) * block_c * size * maps <= ONE_TILE
    if one_tile:
        chunk, own = voxels, {"BLOCK_S": _power_of_two(voxels)}
    else:
        block_c = min(most, LARGE_BLOCK_C)
        splits = max(1, PROGRAMS // (samples * _ceil_div(channels, block_c)))
        step = _ceil_div(CHUNK_STEP, block_c)
        chunk = _ceil_div(_ceil_div(voxels, splits), step) * step
        own = {"chunk": chunk}
    sizes = {"rows": samples * channels, "C": channels, "S": voxels, "CHANNELS_LAST": channels_last, "BLOCK_C": block_c}
    return _Plan(samples, channels, voxels, dtype.itemsize, block_c, chunk, one_tile, sizes | own)


def _dense(x: Tensor) -> Tensor:
    return x if _is_channels_last(x) else x.contiguous()


def _like(tensor: Tensor, x: Tensor) -> Tensor:
    """`tensor` in the memory format of a dense `x`; a copy where it has another."""
    return tensor.contiguous(memory_format=torch.channels_last_3d if _is_channels_last(x) else torch.contiguous_format)


def _key(x: Tensor, residual: Tensor | None, residual_norm: bool) -> str:
    """What the choice of a path and of a configuration depends on; samples and voxels rounded up to powers of two."""
    samples, channels, *space = [int(size) for size in x.shape]
    voxels = math.prod(space)
    odd = " odd" if voxels % 16 else ""  # as `_plan` asks
    layout = "channels_last" if _is_channels_last(x) else "contiguous"
    kind = "" if residual is None else " normalised" if residual_norm else " residual"
    sizes = f"N{_power_of_two(samples)} C{channels} S{_power_of_two(voxels)}{odd}"
    return f"{sizes} {layout} {str(x.dtype).removeprefix('torch.')}{kind}"


def _parameters(
    weight: Tensor | None, bias: Tensor | None, slope_tensor: Tensor | None, slope: float | None
) -> dict[str, Any]:
    """Arguments that every kernel that meets z takes."""
    slope_tensor = None if slope_tensor is None else slope_tensor.contiguous()
    return {
        "weight_ptr": None if weight is None else weight.contiguous(),
        "bias_ptr": None if bias is None else bias.contiguous(),
        "slope_ptr": slope_tensor,
        "slope": slope,
        "slope_stride": 0 if slope_tensor is None or slope_tensor.shape[0] == 1 else 1,
    }


def _forward_outputs(x: Tensor, residual_norm: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised y and statistics for a dense `x`."""
    return torch.empty_like(x), x.new_empty((4 if residual_norm else 2, *x.shape[:2]), dtype=torch.float32)


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
    """Launch the forward kernels: one where a sample and channel fits a program, else three.

    Args:
        slope_tensor, slope: the negative slope as a tensor of 1 or C elements, or as a number; at most one of them.
        x, weight, bias, eps, residual, residual_norm: as `instance_norm`.

    Returns:
        y, in the memory format of `x`, and the statistics, float32: (2, N, C) mean and rstd, and where `residual_norm`
        (4, N, C) with those of the residual behind.
    """
    x = _dense(x)
    residual = None if residual is None else _like(residual, x)
    y, stats = _forward_outputs(x, residual_norm)
    plan = _plan(x.shape, x.dtype, _is_channels_last(x), 1 if residual is None else 2)
    key = _key(x, residual, residual_norm)
    common = {"x_ptr": x, "r_ptr": residual, **plan.sizes}
    write = {"y_ptr": y, "stats_ptr": stats, "NORMALISED": residual_norm}
    write |= _parameters(weight, bias, slope_tensor, slope)
    if plan.one_tile:
        args = {**common, **write, "eps": eps}
        dispatch.launch(norm_forward_one_tile_kernel, lambda config: (plan.blocks,), args, plan.configs(), key)
        return y, stats
    partial = x.new_empty((*stats.shape, plan.splits), dtype=torch.float32)
    args = {**common, "r_ptr": residual if residual_norm else None, "partial_ptr": partial}
    configs = plan.configs((4, 4, 3), (4, 4, 1), (8, 8, 3), (8, 8, 1), (4, 8, 3), (8, 4, 2))
    maps = stats.shape[0] // 2
    dispatch.launch(norm_statistics_kernel, lambda config: (plan.blocks, plan.splits, maps), args, configs, key)
    _combine_statistics(partial, stats, eps, plan, key)
    configs = plan.configs((4, 4, 1), (4, 4, 3), (8, 8, 1), (8, 8, 2), (2, 4, 1))
    dispatch.launch(norm_apply_kernel, plan.grid, {**common, **write}, configs, key)
    return y, stats


def _combine_statistics(partial: Tensor, stats: Tensor, eps: float, plan: _Plan, key: str) -> None:
    block_splits = _power_of_two(plan.splits)
    block_rows = min(_power_of_two(plan.rows), max(COMBINE_TILE // block_splits, 1))
    args = {"partial_ptr": partial, "stats_ptr": stats, "eps": eps, "rows": plan.rows, "S": plan.voxels}
    args |= {"chunk": plan.chunk, "splits": plan.splits, "BLOCK_ROWS": block_rows, "BLOCK_SPLITS": block_splits}
    grid = _ceil_div(plan.rows, block_rows), stats.shape[0] // 2
    dispatch.launch(norm_combine_kernel, lambda config: grid, args, [{"num_warps": 4, "num_stages": 1}], key)


def _backward_outputs(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, slope_tensor: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised dx, dweight, dbias, dslope and dresidual for a dense `x`; empty where there is no such input."""

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
    """Launch the backward kernels: one or two where a sample and channel fits a program, else three.

    Args:
        dy: gradient of y, any strides.
        stats: as `instance_norm_forward` returned them.
        others: as `instance_norm_forward`, but a raw residual only with an activation: without one its gradient is dy.

    Returns:
        dx, dweight, dbias, dslope, dresidual: the maps in the memory format of `x`, the others in shape and dtype of
        their parameters; of zero elements where the input is None.
    """
    x = _dense(x)
    dy = _like(dy, x)
    residual = None if residual is None else _like(residual, x)
    dx, dweight, dbias, dslope, dresidual = _backward_outputs(x, weight, bias, slope_tensor, residual)
    plan = _plan(x.shape, x.dtype, _is_channels_last(x), 2 if residual is None else 3)
    key = _key(x, residual, residual_norm)
    sums = x.new_empty((4, *x.shape[:2], plan.splits), dtype=torch.float32)
    common = {"x_ptr": x, "r_ptr": residual, "stats_ptr": stats, "NORMALISED": residual_norm, **plan.sizes}
    common |= _parameters(weight, bias, slope_tensor, slope)
    write = {"dx_ptr": dx, "dr_ptr": None if residual is None else dresidual}
    # A single slope belongs to all channels: torch sums it, below.
    of_channels = dweight, dbias, x.new_empty(0) if dslope.shape[0] == 1 else dslope
    if plan.one_tile:
        args = {**common, **write, "dy_ptr": dy, "sums_ptr": sums}
        dispatch.launch(norm_backward_one_tile_kernel, lambda config: (plan.blocks,), args, plan.configs(), key)
        if any(gradient.numel() for gradient in of_channels):
            _combine_gradients(sums, None, *of_channels, False, plan, key)
    else:
        means = sums.new_empty(sums.shape[:3])
        writes_g = residual is not None and not residual_norm
        args = {**common, "dy_ptr": dy, "g_ptr": dresidual if writes_g else None, "sums_ptr": sums}
        tile = 2 if residual_norm else 4  # a third map and one more sum, or the registers do not suffice
        configs = plan.configs((tile, 4, 3), (tile, 4, 1), (tile, 8, 3), (2 * tile, 8, 2), (2, 4, 2))
        dispatch.launch(norm_gradient_sums_kernel, plan.grid, args, configs, key)
        _combine_gradients(sums, means, *of_channels, residual_norm, plan, key)
        args = {**common, **write, "g_ptr": dy, "means_ptr": means}
        if writes_g:
            args |= {"g_ptr": dresidual, "r_ptr": None, "dr_ptr": None, "slope_ptr": None, "slope": None}
        configs = plan.configs((4, 4, 1), (4, 4, 2), (2, 4, 1), (4, 8, 2), (4, 8, 3))
        dispatch.launch(norm_gradient_apply_kernel, plan.grid, args, configs, key)
    if dslope.shape[0] == 1:
        dslope = sums[3].sum().view(1).to(dslope.dtype)
    return dx, dweight, dbias, dslope, dresidual


def _combine_gradients(
    sums: Tensor,
    means: Tensor | None,
    dweight: Tensor,
    dbias: Tensor,
    dslope: Tensor,
    residual_norm: bool,
    plan: _Plan,
    key: str,
) -> None:
    block_splits = _power_of_two(plan.splits)
    args = {"sums_ptr": sums, "means_ptr": means, "N": plan.samples, "C": plan.channels, "S": plan.voxels}
    for name, gradient in (("dweight_ptr", dweight), ("dbias_ptr", dbias), ("dslope_ptr", dslope)):
        args[name] = gradient if gradient.numel() else None
    args |= {"splits": plan.splits, "NORMALISED": residual_norm, "BLOCK_SPLITS": block_splits}
    args |= {"BLOCK_N": min(_power_of_two(plan.samples), max(COMBINE_TILE // block_splits, 1))}
    configs = [{"num_warps": 4, "num_stages": 1}]
    dispatch.launch(norm_gradient_combine_kernel, lambda config: (plan.channels,), args, configs, key)


_forward_op = torch.library.custom_op("glioforge::instance_norm", mutates_args=())(instance_norm_forward)
_backward_op = torch.library.custom_op("glioforge::instance_norm_backward", mutates_args=())(instance_norm_backward)


@_forward_op.register_fake
def _(x, weight, bias, eps, slope_tensor, slope, residual, residual_norm):
    return _forward_outputs(_dense(x), residual_norm)


@_backward_op.register_fake
def _(dy, x, stats, weight, bias, slope_tensor, slope, residual, residual_norm):
    return _backward_outputs(_dense(x), weight, bias, slope_tensor, residual)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, slope_tensor, slope, residual, residual_norm = inputs
    y, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.slope, ctx.residual_norm = slope, residual_norm
    # g = dy without an activation: a raw residual is neither needed nor kept, and its gradient is dy.
    ctx.passes_dy = residual is not None and not residual_norm and slope is None and slope_tensor is None
    kept = None if ctx.passes_dy else residual
    ctx.save_for_backward(x, stats, weight, bias, slope_tensor, kept)


def _backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, stats, weight, bias, slope_tensor, residual = ctx.saved_tensors
    dx, dweight, dbias, dslope, dresidual = _backward_op(
        dy, x, stats, weight, bias, slope_tensor, ctx.slope, residual, ctx.residual_norm
    )
    return (
        dx,
        None if weight is None else dweight,
        None if bias is None else dbias,
        None,
        None if slope_tensor is None else dslope,
        None,
        dy if ctx.passes_dy else None if residual is None else dresidual,
        None,
    )


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _on_cpu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    negative_slope: float | Tensor | None,
    residual: Tensor | None,
    residual_norm: bool,
) -> Tensor:
    """What the reference is, by PyTorch's group norm of one channel a group; arguments as `instance_norm`, unchecked.

    Of contiguous maps its statistics take a CPU a half to a fifth of the time, and it reads half precision without a
    copy. What is added to a map and slopes that are tensors are float32, as in the reference.
    """
    if not x.is_contiguous() or math.prod(x.shape[2:]) == 1:
        return instance_norm_reference(x, weight, bias, eps, negative_slope, residual, residual_norm)
    compute = x.dtype if residual is None and not isinstance(negative_slope, Tensor) else torch.float32
    # Without a float32 weight PyTorch keeps the statistics of half precision in half, and fails where there is a bias.
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
    # Flat: of what is channels_last_3d PyTorch takes the variance as E[x^2] - E[x]^2, in float32.
    return torch.group_norm(x.flatten(2), x.shape[1], weight, bias, eps).view(x.shape)


@cache
def _compiled_reference() -> Callable[..., Tensor]:
    # Made anew for every shape: what was measured faster was. Dynamo would go back to eager after 8 of them.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(instance_norm_reference, dynamic=False)


def _check_channels(name: str, tensor: Tensor | None, x: Tensor, sizes: tuple[int, ...]) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} {tensor!r} must be a tensor, on {x.device}: torch.tensor({name}, device=x.device)")
    if tensor.dim() != 1 or tensor.shape[0] not in sizes or tensor.dtype not in DTYPES:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype}; x has {x.shape[1]} channels, so it must be "
            f"floating point of shape {' or '.join(f'({size},)' for size in dict.fromkeys(sizes))}"
        )
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}; move both to one device")


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    negative_slope: float | Tensor | None,
    residual: Tensor | None,
    residual_norm: bool,
) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"x is a {type(x).__name__}; instance_norm takes tensors: torch.as_tensor(x)")
    if x.dim() != 5 or 0 in x.shape:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; instance_norm takes (batch, channels, X, Y, Z), five axes, "
            "none of them empty"
        )
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; instance_norm takes floating point: convert with x.float()")
    if not isinstance(eps, Real) or not 0 < eps < math.inf:
        raise ValueError(
            f"eps {eps!r} must be a positive number: a constant channel has variance 0; the usual value is 1e-5"
        )
    channels = x.shape[1]
    _check_channels("weight", weight, x, (channels,))
    _check_channels("bias", bias, x, (channels,))
    if isinstance(negative_slope, Tensor):
        _check_channels("negative_slope", negative_slope, x, (1, channels))
    elif negative_slope is not None and not (isinstance(negative_slope, Real) and abs(negative_slope) < math.inf):
        raise ValueError(
            f"negative_slope {negative_slope!r} must be a finite number, or a tensor of 1 or {channels}; None leaves "
            "the activation out"
        )
    if residual is None:
        if residual_norm:
            raise ValueError("residual_norm is True but there is no residual: give one, or leave residual_norm out")
    elif not isinstance(residual, Tensor):
        raise ValueError(
            f"residual is a {type(residual).__name__}; it must be a tensor as x is: torch.as_tensor(residual)"
        )
    elif (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"residual is {tuple(residual.shape)} {residual.dtype} on {residual.device} but x is "
            f"{tuple(x.shape)} {x.dtype} on {x.device}; they must agree in all three"
        )


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
        residual: same shape and dtype as `x`, added before the activation; copied if its memory format is another
            than that of `x`, and so is the incoming gradient.
        residual_norm: normalise the residual by its own statistics first (without affine).

    Returns:
        Shape, dtype and memory format of `x`; statistics in float32.

    Raises:
        ValueError: wrong rank, dtype, shape or device of a tensor, eps not positive, a slope that is no finite number,
            `residual_norm` without a residual.
    """
    _check(x, weight, bias, eps, negative_slope, residual, residual_norm)
    if torch.compiler.is_exporting():  # a graph holds plain operations, and leaves open the batch size that a key needs
        return instance_norm_reference(x, weight, bias, eps, negative_slope, residual, residual_norm)
    chosen = dispatch.path("instance_norm", x, _key(x, residual, residual_norm))
    if chosen == "triton":
        slope_tensor, slope = (negative_slope, None) if isinstance(negative_slope, Tensor) else (None, negative_slope)
        return _forward_op(x, weight, bias, eps, slope_tensor, slope, residual, residual_norm)[0]
    # Inside somebody's torch.compile the reference is traced and compiled with the rest.
    function: Callable[..., Tensor] = instance_norm_reference
    if chosen == "torch" and not torch.compiler.is_compiling():
        function = _on_cpu if x.is_cpu else _compiled_reference()
    return function(x, weight, bias, eps, negative_slope, residual, residual_norm)
