"""Doubling of a 3D feature map: transposed convolution of kernel and stride 2 without bias, as matrix products.

    y[b, o, 2x + i, 2y + j, 2z + k] = sum_c x[b, c, x, y, z] * weight[c, o, i, j, k]          i, j, k in {0, 1}

Each input voxel makes 8 output voxels that no other one touches, so nothing overlaps and nothing is summed over
voxels. With x as a matrix of M = B * X * Y * Z rows and the weight as one of 8 * C_out columns n = (i, j, k, o):

    y[m, n]  = sum_c x[m, c] * weight[c, n]       the epilogue shuffles: voxel of m, then tap (i, j, k), then channel
    dx[m, c] = sum_n dy[m, n] * weight[c, n]      dy is gathered where the forward scatters
    dw[c, n] = sum_m x[m, c] * dy[m, n]

Most doublings are bound by memory. Passes, beside cuDNN with `torch.cat`, and megabytes of a UNETR's last doubling,
(2, 32, 64, 64, 32) to 16 channels in bf16: x 17 MB, y 67 MB.

                         here                     cuDNN and cat (the half of y)
    forward              reads x, writes y   84   reads x, writes y; reads y, writes its half of the buffer         218
    gradient of x        reads dy, writes dx 84   reads and writes dy (a dense copy of the slice); reads it,        218
                                                  writes dx
    gradient of weight   reads x and dy      84   reads x and the copy of dy                                         84

- y may be a slice of channels of a wider buffer, whose other half is the skip connection: a decoder concatenates
  without a copy. x and dy may be slices too. In a dense map the taps k = 0, 1 of all channels are one run of
  2 * C_out values, in a slice two runs of C_out.
- Forward and gradient of x take one launch each, the gradient of the weight two: chunks of rows give float32 partial
  sums, which the second joins in a fixed order. Chunks depend on the shape alone, and there are no atomics: the same
  bits on every run. That product has n as its rows, 64 or more even where C_in is small: sm_90's tensor cores want 64.
- A weight in channels_last_3d memory is that matrix (C_in, 8 * C_out) already; any other is copied to it each way.
- Products run on tensor cores with float32 sums; float32 inputs take three TF32 products ("tf32x3"), for an error near
  float32's own.
- C_out is a compile-time constant: columns become taps and channels by shifts, and runs of channels are accessed 16
  bytes at a time.

Legend: B batch; C_in, C_out channels; X, Y, Z voxels of x; a row is the channels of one voxel, `stride_x` and
`stride_y` the elements from one row to the next.

Source: Dumoulin and Visin, A guide to convolution arithmetic for deep learning, https://arxiv.org/abs/1603.07285.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import dispatch
from .autocast import as_operands
from .checks import check_floats, check_is_tensor, check_same_device
from .dispatch import ceil_div, next_power_of_two

LAST = torch.channels_last_3d
ENOUGH_PROGRAMS = 128
"""Programs that fill a GPU: an A100 has 108 multiprocessors, an H100 132."""
WEIGHT_PROGRAMS = 264
"""Programs that the gradient of the weight is split into, two for each of an H100's multiprocessors; not measured."""
LEAST_CHUNK, CHUNK_STEP = 256, 128
"""Rows of a chunk: no fewer than the first, unless there are fewer in all, and a multiple of the second."""
WEIGHT_BLOCK_C, WEIGHT_BLOCK_N = 64, 128
"""The tile of the weight for which the chunks are chosen, the largest of its configurations."""
CUDNN = "cuDNN"
"""What path "torch" takes, as the reference does: `F.conv_transpose3d`."""
JOIN_TILE = 2048
"""Partial sums that a program of the last launch holds at once."""
Blocks = tuple[int, int, int, int, int]
"""BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages."""
HALF_BLOCKS: tuple[Blocks, ...] = ((128, 128, 64, 8, 3), (128, 64, 64, 8, 3), (64, 64, 64, 4, 4), (64, 32, 64, 4, 4))
FLOAT_BLOCKS: tuple[Blocks, ...] = ((64, 64, 32, 8, 3), (64, 32, 32, 8, 3), (32, 32, 32, 4, 3))
NARROW_BLOCKS: tuple[Blocks, ...] = ((64, 32, 32, 4, 2), (32, 32, 32, 4, 2))
"""Where channels can't be accessed 16 bytes at a time, which takes more registers."""
WEIGHT_HALF_BLOCKS: tuple[Blocks, ...] = ((128, 64, 32, 8, 4), (128, 64, 64, 8, 2), (64, 64, 64, 4, 4))
WEIGHT_FLOAT_BLOCKS: tuple[Blocks, ...] = ((64, 32, 32, 8, 2), (64, 32, 32, 8, 3), (32, 32, 32, 4, 2))


def up_conv_reference(x_BCXYZ: Tensor, weight: Tensor) -> Tensor:
    """The equation at the head of this file in plain PyTorch; arguments as `up_conv`, unchecked."""
    if x_BCXYZ.is_cpu and not torch.compiler.is_compiling():
        x_BCXYZ = x_BCXYZ.contiguous()  # as the result is in any case, but for a fake tensor
    return F.conv_transpose3d(x_BCXYZ, weight, stride=2)


@triton.jit
def _dot(a, b, acc):
    return tl.dot(a, b, acc, input_precision="tf32x3")  # matters for float32 only


@triton.jit
def _first_voxel(m, Y, Z):
    """Of the 8 output voxels of each row, the one of i = j = k = 0, counted from the first of the batch; int64."""
    line = m // Z  # (b * X + x) * Y + y
    plane = line // Y  # b * X + x
    return (line + plane * Y).to(tl.int64) * (4 * Z) + 2 * (m - line * Z)


@triton.jit
def _column_offset(n, Y, Z, stride_y, C_OUT: tl.constexpr):
    """Elements from the first output voxel's first channel to column n = (i, j, k, o); int64."""
    tap = n // C_OUT
    voxel = (tap // 4).to(tl.int64) * (4 * Y * Z) + (tap // 2 % 2) * (2 * Z) + tap % 2
    return voxel * stride_y + n % C_OUT


@triton.jit
def up_conv_forward_kernel(
    x_ptr,  # (M, C_in), rows stride_x apart
    weight_ptr,  # (C_in, 8 * C_OUT)
    y_ptr,  # (8 * M, C_OUT), rows stride_y apart
    stride_x, stride_y, M, Y, Z, C_in,
    C_OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y of BLOCK_M rows and BLOCK_N columns; grid (ceil(M / BLOCK_M) * ceil(8 * C_OUT / BLOCK_N),)."""
    N: tl.constexpr = 8 * C_OUT
    BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first = tl.program_id(0) // BLOCKS_N * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # 64 bits for the tile's beginning alone: a 64-bit offset for each element takes registers that some GPUs lack here.
    x_ptr += first.to(tl.int64) * stride_x
    x_tile = tl.arange(0, BLOCK_M)[:, None] * stride_x + k[None, :]
    weight_tile = k[:, None] * N + n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, C_in, BLOCK_K):
        is_channel = k < C_in - start
        x = tl.load(x_ptr + x_tile, mask=(m < M)[:, None] & is_channel[None, :], other=0.0)
        weight = tl.load(weight_ptr + weight_tile, mask=is_channel[:, None] & (n < N)[None, :], other=0.0)
        acc = _dot(x, weight, acc)
        x_ptr += BLOCK_K
        weight_ptr += BLOCK_K * N
    y_ptrs = y_ptr + (_first_voxel(m, Y, Z) * stride_y)[:, None] + _column_offset(n, Y, Z, stride_y, C_OUT)[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def up_conv_gradient_kernel(
    dy_ptr,  # (8 * M, C_OUT), rows stride_y apart
    weight_ptr,  # (C_in, 8 * C_OUT)
    dx_ptr,  # (M, C_in), dense
    stride_y, M, Y, Z, C_in,
    C_OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx of BLOCK_M rows and BLOCK_N channels; grid (ceil(M / BLOCK_M) * ceil(C_in / BLOCK_N),)."""
    N: tl.constexpr = 8 * C_OUT
    blocks_n = tl.cdiv(C_in, BLOCK_N)
    m = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    dy_ptrs = dy_ptr + (_first_voxel(m, Y, Z) * stride_y)[:, None]
    weight_ptrs = weight_ptr + c.to(tl.int64)[:, None] * N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, N, BLOCK_K):
        n = start + tl.arange(0, BLOCK_K)
        dy = tl.load(
            dy_ptrs + _column_offset(n, Y, Z, stride_y, C_OUT)[None, :],
            mask=(m < M)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        weight = tl.load(weight_ptrs + n[None, :], mask=(c < C_in)[:, None] & (n < N)[None, :], other=0.0)
        acc = _dot(dy, tl.trans(weight), acc)
    dx_ptrs = dx_ptr + m.to(tl.int64)[:, None] * C_in + c[None, :]
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=(m < M)[:, None] & (c < C_in)[None, :])


@triton.jit
def up_conv_weight_gradient_kernel(
    x_ptr,  # (M, C_in), rows stride_x apart
    dy_ptr,  # (8 * M, C_OUT), rows stride_y apart
    partial_ptr,  # (splits, C_in, 8 * C_OUT) float32
    stride_x, stride_y, M, Y, Z, C_in, chunk,
    C_OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A chunk's sums of BLOCK_M columns of the weight and BLOCK_N of its rows; BLOCK_K rows of x at a time.

    Grid (ceil(8 * C_OUT / BLOCK_M) * ceil(C_in / BLOCK_N), splits).
    """
    N: tl.constexpr = 8 * C_OUT
    BLOCKS_M: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    n = tl.program_id(0) % BLOCKS_M * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(0) // BLOCKS_M * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * chunk
    dy_ptrs = dy_ptr + _column_offset(n, Y, Z, stride_y, C_OUT)[:, None]
    x_ptrs = x_ptr + c[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, tl.minimum(begin + chunk, M), BLOCK_K):
        m = start + tl.arange(0, BLOCK_K)
        # Loaded as it is multiplied: transposed afterwards, it is not copied asynchronously on sm_80 and 120.
        dy = tl.load(
            dy_ptrs + (_first_voxel(m, Y, Z) * stride_y)[None, :], mask=(n < N)[:, None] & (m < M)[None, :], other=0.0
        )
        x = tl.load(x_ptrs + m.to(tl.int64)[:, None] * stride_x, mask=(m < M)[:, None] & (c < C_in)[None, :], other=0.0)
        acc = _dot(dy, x, acc)
    partial_ptr += tl.program_id(1).to(tl.int64) * C_in * N
    tl.store(partial_ptr + c.to(tl.int64)[None, :] * N + n[:, None], acc, mask=(n < N)[:, None] & (c < C_in)[None, :])


@triton.jit
def up_conv_join_kernel(
    partial_ptr,  # (splits, C_in, 8 * C_OUT) float32, of up_conv_weight_gradient
    dweight_ptr,  # (C_in, C_OUT, 8), strides as given
    stride_c, stride_o, stride_tap, splits, elements,
    C_OUT: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dweight of BLOCK of its `elements`, summed over the chunks; grid (ceil(elements / BLOCK),)."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, BLOCK_SPLITS)
    partial_ptrs = partial_ptr + split.to(tl.int64)[:, None] * elements + element[None, :]
    acc = tl.zeros((BLOCK_SPLITS, BLOCK), tl.float32)
    for start in range(0, splits, BLOCK_SPLITS):
        inside = (split < splits - start)[:, None] & (element < elements)[None, :]
        acc += tl.load(partial_ptrs, mask=inside, other=0.0)
        partial_ptrs += elements * BLOCK_SPLITS
    c, n = element // (8 * C_OUT), element % (8 * C_OUT)
    dweight_ptrs = dweight_ptr + c.to(tl.int64) * stride_c + n % C_OUT * stride_o + n // C_OUT * stride_tap
    tl.store(dweight_ptrs, tl.sum(acc, axis=0).to(dweight_ptr.dtype.element_ty), mask=element < elements)


def _fitted(blocks: Blocks, rows: int, columns: int, depth: int) -> Blocks:
    """Blocks no larger, and stages no more, than a product needs; tensor cores take blocks of 16 or more."""
    m, n, k = (min(block, max(16, next_power_of_two(size))) for block, size in zip(blocks, (rows, columns, depth)))
    return m, n, k, blocks[3], min(blocks[4], ceil_div(depth, k))


def _table(
    c_in: int, c_out: int, dtype: torch.dtype, half: tuple[Blocks, ...], float32: tuple[Blocks, ...]
) -> tuple[Blocks, ...]:
    if c_in * dtype.itemsize % 16 or c_out * dtype.itemsize % 16:
        return NARROW_BLOCKS
    return float32 if dtype == torch.float32 else half


def _as_configs(blocks: list[Blocks]) -> list[dispatch.Config]:
    names = "BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"
    return [dict(zip(names, each, strict=True)) for each in dict.fromkeys(blocks)]


@cache
def _product_configs(rows: int, c_in: int, c_out: int, dtype: torch.dtype, is_forward: bool) -> list[dispatch.Config]:
    """At most three configurations of y = x weight or of dx = dy weight^T, best first.

    The default has the largest blocks that fill a GPU with programs, or else the smallest; the others are its
    neighbours. `rows` is rounded up to a power of two, as in the key.
    """
    rows = next_power_of_two(rows)
    columns, depth = (8 * c_out, c_in) if is_forward else (c_in, 8 * c_out)
    table = _table(c_in, c_out, dtype, HALF_BLOCKS, FLOAT_BLOCKS)
    blocks = list(dict.fromkeys(_fitted(each, rows, columns, depth) for each in table))
    programs = [ceil_div(rows, m) * ceil_div(columns, n) for m, n, *_ in blocks]
    default = next((i for i, count in enumerate(programs) if count >= ENOUGH_PROGRAMS), len(blocks) - 1)
    first = max(0, min(default - 1, len(blocks) - 3))
    return _as_configs([blocks[default], *blocks[first : first + 3]])


@cache
def _weight_configs(c_in: int, c_out: int, chunk: int, dtype: torch.dtype) -> list[dispatch.Config]:
    """Configurations of `up_conv_weight_gradient_kernel`, best first."""
    table = _table(c_in, c_out, dtype, WEIGHT_HALF_BLOCKS, WEIGHT_FLOAT_BLOCKS)
    return _as_configs([_fitted(each, 8 * c_out, c_in, chunk) for each in table])


def _chunk(rows: int, c_in: int, c_out: int) -> int:
    """Rows of x that one program of the weight's gradient sums over."""
    tiles = ceil_div(c_in, WEIGHT_BLOCK_C) * ceil_div(8 * c_out, WEIGHT_BLOCK_N)
    rows_each = max(LEAST_CHUNK, ceil_div(rows, ceil_div(WEIGHT_PROGRAMS, tiles)))
    return ceil_div(rows_each, CHUNK_STEP) * CHUNK_STEP


def _row_stride(x_BCXYZ: Tensor) -> int | None:
    """Elements from one voxel to the next; None where channels are not adjacent or voxels not evenly spaced."""
    channels = x_BCXYZ.shape[1]
    if channels > 1 and x_BCXYZ.stride(1) != 1:
        return None
    stride, voxels = None, 1
    for axis in (4, 3, 2, 0):
        size = x_BCXYZ.shape[axis]
        if size == 1:
            continue
        if stride is None:
            stride = x_BCXYZ.stride(axis)
        elif x_BCXYZ.stride(axis) != stride * voxels:
            return None
        voxels *= size
    if stride is None:
        return channels
    return stride if stride >= channels else None


def _with_rows(x: Tensor) -> tuple[Tensor, int]:
    """A map and its row stride; copied to channels_last_3d where it has none."""
    stride = _row_stride(x)
    return (x, stride) if stride is not None else (x.contiguous(memory_format=LAST), x.shape[1])


@dispatch.once_per_shape
def _key(shape: torch.Size, c_out: int, dtype: torch.dtype, is_slice: bool) -> str:
    """What the best path and configuration depend on; rows rounded up to a power of two."""
    batch, c_in, *space = [int(size) for size in shape]
    rows = next_power_of_two(batch * math.prod(space))
    return f"C{c_in} O{c_out} M{rows} {str(dtype).removeprefix('torch.')}{' slice' if is_slice else ''}"


def _sizes(x: Tensor, weight: Tensor) -> dict[str, int]:
    batch, c_in, *space = x.shape
    return {"M": batch * math.prod(space), "Y": space[1], "Z": space[2], "C_in": c_in, "C_OUT": weight.shape[1]}


def _empty_output(x: Tensor, weight: Tensor) -> Tensor:
    batch, _, *space = x.shape
    shape = (batch, weight.shape[1], *(2 * size for size in space))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAST)


def up_conv_forward_into(x: Tensor, weight: Tensor, y: Tensor) -> None:
    """Launch the forward into `y`, whose channels are adjacent and whose voxels are evenly spaced."""
    x, stride_x = _with_rows(x)
    stride_y = _row_stride(y)
    sizes = _sizes(x, weight)
    rows, c_in, c_out = sizes["M"], sizes["C_in"], sizes["C_OUT"]
    args: dict[str, Any] = {"x_ptr": x, "weight_ptr": weight.contiguous(memory_format=LAST), "y_ptr": y}
    args |= {"stride_x": stride_x, "stride_y": stride_y, **sizes}

    def grid(config: dispatch.Config) -> tuple[int]:
        return (ceil_div(rows, config["BLOCK_M"]) * ceil_div(8 * c_out, config["BLOCK_N"]),)

    key = _key(x.shape, c_out, x.dtype, stride_y != c_out)
    dispatch.launch(up_conv_forward_kernel, grid, args, _product_configs(rows, c_in, c_out, x.dtype, True), key)


def up_conv_forward(x: Tensor, weight: Tensor) -> Tensor:
    """Launch the forward.

    Args:
        x: (B, C_in, X, Y, Z); copied unless its channels are adjacent and its voxels evenly spaced.
        weight: (C_in, C_out, 2, 2, 2), dtype of `x`; copied unless channels_last_3d.

    Returns:
        y, (B, C_out, 2X, 2Y, 2Z), channels_last_3d.
    """
    y = _empty_output(x, weight)
    up_conv_forward_into(x, weight, y)
    return y


def _backward_outputs(x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised dx, channels_last_3d, and dweight, in the weight's memory format; of no elements if unneeded."""
    of_weight = LAST if weight.is_contiguous(memory_format=LAST) else torch.contiguous_format
    dx = torch.empty_like(x, memory_format=LAST) if needs_x else x.new_empty(0)
    return dx, torch.empty_like(weight, memory_format=of_weight) if needs_weight else weight.new_empty(0)


def up_conv_backward(dy: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool) -> tuple[Tensor, Tensor]:
    """Launch the backward: one kernel for dx, two for dweight.

    Args:
        dy: gradient of y; copied as x in the forward.
        x, weight: as in the forward.
        needs_x, needs_weight: which gradients to compute.

    Returns:
        dx, channels_last_3d; dweight, in the memory format of `weight`. One that is not needed has no elements.
    """
    dx, dweight = _backward_outputs(x, weight, needs_x, needs_weight)
    dy, stride_y = _with_rows(dy)
    key = _key(x.shape, weight.shape[1], x.dtype, stride_y != weight.shape[1])
    if needs_x:
        _write_dx(dy, stride_y, weight, dx, key)
    if needs_weight:
        _write_dweight(dy, stride_y, x, dweight, key)
    return dx, dweight


def _write_dx(dy: Tensor, stride_y: int, weight: Tensor, dx: Tensor, key: str) -> None:
    sizes = _sizes(dx, weight)
    rows, c_in, c_out = sizes["M"], sizes["C_in"], sizes["C_OUT"]
    args = {"dy_ptr": dy, "weight_ptr": weight.contiguous(memory_format=LAST), "dx_ptr": dx, "stride_y": stride_y}

    def grid(config: dispatch.Config) -> tuple[int]:
        return (ceil_div(rows, config["BLOCK_M"]) * ceil_div(c_in, config["BLOCK_N"]),)

    configs = _product_configs(rows, c_in, c_out, dx.dtype, False)
    dispatch.launch(up_conv_gradient_kernel, grid, args | sizes, configs, key)


def _write_dweight(dy: Tensor, stride_y: int, x: Tensor, dweight: Tensor, key: str) -> None:
    x, stride_x = _with_rows(x)
    sizes = _sizes(x, dweight)
    rows, c_in, c_out = sizes["M"], sizes["C_in"], sizes["C_OUT"]
    chunk = _chunk(rows, c_in, c_out)
    splits = ceil_div(rows, chunk)
    partial = torch.empty((splits, c_in, 8 * c_out), dtype=torch.float32, device=x.device)
    args = {"x_ptr": x, "dy_ptr": dy, "partial_ptr": partial, "stride_x": stride_x, "stride_y": stride_y}
    args |= {"chunk": chunk, **sizes}

    def grid(config: dispatch.Config) -> tuple[int, int]:
        return ceil_div(8 * c_out, config["BLOCK_M"]) * ceil_div(c_in, config["BLOCK_N"]), splits

    configs = _weight_configs(c_in, c_out, chunk, x.dtype)
    dispatch.launch(up_conv_weight_gradient_kernel, grid, args, configs, key)
    block_splits = min(next_power_of_two(splits), 32)
    elements, block = dweight.numel(), JOIN_TILE // block_splits
    stride_c, stride_o, *_, stride_tap = dweight.stride()
    args = {"partial_ptr": partial, "dweight_ptr": dweight, "splits": splits, "elements": elements, "C_OUT": c_out}
    args |= {"stride_c": stride_c, "stride_o": stride_o, "stride_tap": stride_tap}
    args |= {"BLOCK_SPLITS": block_splits, "BLOCK": block}
    configs = [{"num_warps": 4, "num_stages": 1}]
    dispatch.launch(up_conv_join_kernel, lambda config: (ceil_div(elements, block),), args, configs, key)


_forward_op = dispatch.operator(up_conv_forward)
_backward_op = dispatch.operator(up_conv_backward)


@_forward_op.register_fake
def _(x, weight):
    return _empty_output(x, weight)


@_backward_op.register_fake
def _(dy, x, weight, needs_x, needs_weight):
    return _backward_outputs(x, weight, needs_x, needs_weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(run: Callable[..., Any], ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    dx, dweight = run(dy, x, weight, needs_x, needs_weight)
    return dispatch.gradients(up_conv_forward, x=dx if needs_x else None, weight=dweight if needs_weight else None)


_up_conv = dispatch.differentiable(_forward_op, _backward_op, _setup_context, _backward)


class _IntoSlice(torch.autograd.Function):
    """The kernels with a destination, which is in a list to hide it from autograd: y has its memory and no history."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, destination: list[Tensor]) -> Tensor:
        y = destination[0].detach()
        up_conv_forward_into(x, weight, y)
        return y

    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(_backward_op if torch.is_grad_enabled() else up_conv_backward, ctx, dy), None


def _check(x: Any, weight: Any) -> None:
    check_floats("x", x, "batch, channels, X, Y, Z")
    check_is_tensor("weight", weight)
    c_in = x.shape[1]
    if weight.dim() != 5 or weight.shape[0] != c_in or weight.shape[1] == 0 or weight.shape[2:] != (2, 2, 2):
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} must be ({c_in}, C_out, 2, 2, 2), for the {c_in} channels of x: "
            "that of nn.ConvTranspose3d(kernel_size=2, stride=2)"
        )
    if weight.dtype != x.dtype:
        raise ValueError(f"weight of {weight.dtype} but x of {x.dtype}: convert one, or call it under torch.autocast")
    check_same_device("weight", weight, "x", x)


def _check_out(out: Any, x: Tensor, weight: Tensor) -> None:
    check_is_tensor("out", out)
    shape = (x.shape[0], weight.shape[1], *(2 * size for size in x.shape[2:]))
    if tuple(out.shape) != shape or out.dtype != x.dtype:
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype}; the result is {shape} {x.dtype} (under torch.autocast in its "
            "dtype), so out must be too"
        )
    check_same_device("out", out, "x", x)
    if out.requires_grad:
        raise ValueError("out requires a gradient; it is only memory to write to: give out.detach()")
    if _row_stride(out) is None:
        raise ValueError(
            f"out has strides {out.stride()}; its channels must be adjacent and its voxels evenly spaced: take a slice "
            "of channels of torch.empty(..., memory_format=torch.channels_last_3d)"
        )


def _takes_kernels(x: Tensor, weight: Tensor, is_slice: bool) -> bool:
    if torch.compiler.is_exporting() or _row_stride(x) is None:  # an exported graph has plain operations
        return False
    return dispatch.path("up_conv", x, _key(x.shape, weight.shape[1], x.dtype, is_slice)) == "triton"


def _into_half(x: Tensor, weight: Tensor) -> Tensor:
    """`up_conv_into` the first half of a buffer of its own."""
    batch, _, *space = x.shape
    shape = (batch, 2 * weight.shape[1], *(2 * size for size in space))
    buffer = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAST)
    return up_conv_into(x, weight, buffer[:, : weight.shape[1]])


def up_conv(x: Tensor, weight: Tensor) -> Tensor:
    """`F.conv_transpose3d(x, weight, stride=2)` for a kernel of 2, differentiable once in both.

    Args:
        x: (B, C_in, X, Y, Z). The kernels take a map whose channels are adjacent and whose voxels are evenly spaced:
            channels_last_3d, or a slice of channels of one. PyTorch's convolution takes any other.
        weight: (C_in, C_out, 2, 2, 2), dtype of `x`, as `nn.ConvTranspose3d` has it; in channels_last_3d memory it is
            read in place.

    Returns:
        (B, C_out, 2X, 2Y, 2Z), dtype of `x`, channels_last_3d from the kernels; accumulated in float32. Under autocast
        x and weight are converted first, as for a convolution.

    Raises:
        ValueError: a wrong rank, shape, dtype or device of a tensor.
    """
    x, weight = as_operands(x, weight)
    _check(x, weight)
    if not torch.compiler.is_exporting() and _row_stride(x) is not None:
        dispatch.compare("up_conv", _key(x.shape, weight.shape[1], x.dtype, False), up_conv, (x, weight), (CUDNN,))
    return _up_conv(x, weight) if _takes_kernels(x, weight, False) else up_conv_reference(x, weight)


def up_conv_into(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """`up_conv` into given memory, such as the slice of a wider buffer whose other channels are a skip connection.

    The kernels write `out` directly and read a strided slice of the gradient; PyTorch's convolution is copied to it.
    Under `torch.compile` the result is copied too.

    Args:
        x, weight: as `up_conv`.
        out: (B, C_out, 2X, 2Y, 2Z) without gradient, in the dtype of the result: channels adjacent, voxels evenly
            spaced, for example `buffer[:, :C_out]` of a channels_last_3d buffer. Elsewhere the buffer stays as it is.

    Returns:
        a tensor in the memory of `out`, differentiable once in x and weight.

    Raises:
        ValueError: as `up_conv`; an `out` of another shape, dtype, device or layout, or that requires a gradient.
    """
    x, weight = as_operands(x, weight)
    _check(x, weight)
    _check_out(out, x, weight)
    if torch.compiler.is_compiling():
        return out.detach().copy_(up_conv(x, weight))
    if not torch.compiler.is_exporting() and _row_stride(x) is not None:
        key = _key(x.shape, weight.shape[1], x.dtype, _row_stride(out) != weight.shape[1])
        dispatch.compare("up_conv", key, _into_half, (x, weight), (CUDNN,))
    if _takes_kernels(x, weight, _row_stride(out) != weight.shape[1]):
        return _IntoSlice.apply(x, weight, [out])
    return out.detach().copy_(up_conv_reference(x, weight))
