"""Dice + cross-entropy of overlapping tumour regions, straight from the uint8 label map.

With x the logits, p = sigmoid(x), t(r, v) = 1 where the label of voxel v belongs to region r, e = 2 if `squared_pred`
else 1, w the weights of the regions (1 without `weight`), and sums over voxels (and samples, if `batch`):

    dice(b, r) = 1 - (2 sum_v p t + smooth_nr) / (sum_v p^e + sum_v t + smooth_dr)
    dice       = mean over samples and regions of w_r dice(b, r)
    loss       = dice_weight * dice + ce_weight * ce

The cross-entropy comes in three kinds, because the published figures and today's MONAI disagree:

    "multihot"  - mean_v sum_r w_r t_r log softmax(x)_r
                MONAI's DiceCELoss(to_onehot_y=False, sigmoid=True) since October 2022; with one region it is "bce", and
                the weight is not in the Dice
    "argmax"    - sum_v w_c log softmax(x)_c / sum_v w_c, c = the first region that has the voxel, region 0 if none has
                (`torch.argmax(target, dim=1)`: MONAI before its pull request 5292); nan if no w_c is above zero
    "bce"       mean over voxels and regions of - w_r t log p - (1 - t) log(1 - p): the one for overlapping regions; w
                is torch's `pos_weight`

Three launches. Each reads its inputs once, and only the gradient is as large as a volume:

    forward   a program per chunk of a sample: sums of p t, p^e + t and the cross-entropy, in registers, then into a
              buffer (no atomics: the same bits on every run); reads R * s + 1 bytes a voxel, s = bytes of a logit
    combine   one program adds the partial sums in a fixed order: loss, dice, ce, and the derivatives of each Dice by
              sum p t and by sum p^e, all that the backward needs of the forward
    backward  derivatives times upstream gradients, read on the device; logits and labels again, which moves less than
              keeping p would; writes the gradient: 2 R * s + 1 bytes a voxel

At 7 bytes a voxel (R = 3, bfloat16) the forward is bound by instructions before memory. Hence logits are scaled by
log2(e) once (exp2 is one instruction, exp five); one exp(-|x|) serves sigmoid, its derivative and softplus; one
reciprocal a voxel, of the product of all 1 + exp(-|x_r|), gives every region's by multiplication (Montgomery's
simultaneous inversion, Mathematics of Computation 48, 1987), and one logarithm of it all softplus of "bce".

Logits are read in place, channels last too (with a stride of R); a space that is not evenly strided is copied first.
Sums are float32 (float64 for float64 logits, to check gradients). B samples, R regions, X Y Z space; in the kernels the
voxels of a chunk are tiles of ROWS x VEC. Source: Milletari et al., V-Net, https://arxiv.org/abs/1606.04797.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial, reduce
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from triton.language.extra import libdevice

from . import dispatch
from .checks import check_floats, check_is_tensor, check_same_device
from .dispatch import ceil_div, next_power_of_two

CrossEntropy = Literal["multihot", "argmax", "bce"]
MAX_REGIONS = 31  # bits of half a word of the table, without its sign; more regions take the reference
PROGRAMS, MIN_CHUNK, CHUNK_STEP = 2048, 4096, 2048
"""Aim, by the shape alone, at 2048 programs for the sums (two waves on an H100) of at least 4096 voxels each."""

Regions = tuple[tuple[int, ...], ...]

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
PAD_LOGIT = tl.constexpr(-60000.0)  # p = 0; finite in every dtype
INTERPRETED = tl.constexpr(dispatch.INTERPRETED)


class DiceCE(NamedTuple):
    """loss = dice_weight * dice + ce_weight * ce; scalars, float32 (float64 for float64 logits)."""

    loss: Tensor
    dice: Tensor
    ce: Tensor


def region_masks(labels_BXYZ: Tensor, regions: Sequence[Sequence[int]]) -> Tensor:
    """Membership of each voxel in each region, bool (B, R, X, Y, Z), from label values (B, X, Y, Z)."""
    of_value = {value: labels_BXYZ == value for region in regions for value in region}
    masks = [reduce(torch.logical_or, [of_value[value] for value in region]) for region in regions]
    return torch.stack(masks, dim=1)


def _cross_entropy(logits_BRXYZ: Tensor, target_BRXYZ: Tensor, kind: CrossEntropy, weight_R: Tensor | None) -> Tensor:
    if _kind(kind, logits_BRXYZ.shape[1]) == "bce":
        pos_weight = None if weight_R is None else weight_R.view(-1, 1, 1, 1)
        return F.binary_cross_entropy_with_logits(logits_BRXYZ, target_BRXYZ, pos_weight=pos_weight)
    if kind == "argmax":
        return F.cross_entropy(logits_BRXYZ, target_BRXYZ.argmax(dim=1), weight=weight_R)
    return F.cross_entropy(logits_BRXYZ, target_BRXYZ, weight=weight_R)


def dice_ce_loss_reference(
    logits_BRXYZ: Tensor,
    labels_BXYZ: Tensor,
    regions: Sequence[Sequence[int]],
    ce: CrossEntropy = "multihot",
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
    squared_pred: bool = False,
    batch: bool = False,
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    weight: Sequence[float] | None = None,
) -> DiceCE:
    """The equation at the head of this file in plain PyTorch; arguments as `dice_ce_loss`, unchecked."""
    logits = logits_BRXYZ.to(torch.promote_types(logits_BRXYZ.dtype, torch.float32))
    target = region_masks(labels_BXYZ, regions).to(logits.dtype)
    weight_R = None if weight is None else torch.tensor(weight, dtype=logits.dtype, device=logits.device)
    probability = logits.sigmoid()
    axes = (0, 2, 3, 4) if batch else (2, 3, 4)
    overlap = (probability * target).sum(axes)
    predicted = (probability.square() if squared_pred else probability).sum(axes)
    dice = 1 - (2 * overlap + smooth_nr) / (predicted + target.sum(axes) + smooth_dr)
    if weight_R is not None and len(regions) > 1:
        dice = dice * weight_R
    dice = dice.mean()
    cross_entropy = _cross_entropy(logits, target, ce, weight_R)
    return DiceCE(dice_weight * dice + ce_weight * cross_entropy, dice, cross_entropy)


@triton.jit
def _log2(x):
    """One instruction (absolute error 2^-22 around 1), which the interpreter lacks."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@triton.jit
def _reciprocal(x):
    """1 / x for x >= 1, to 3e-7, in two instructions; a division takes nine."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _targets(labels_ptr, table_ptr, index, mask, CE: tl.constexpr):
    """Bits of the regions of each voxel, and of those that the cross-entropy counts."""
    label = tl.load(labels_ptr + index, mask=mask, other=0)
    word = tl.load(table_ptr + label.to(tl.int32), mask=mask, other=0)
    members = word.to(tl.int32)
    return members, (word >> 32).to(tl.int32) if CE == "argmax" else members


@triton.jit
def _logits(x_ptr, mask, stride_xr, R: tl.constexpr):
    """log2(e) times the logits of each region, from pointers to the first region's."""
    xs = ()
    for _ in tl.static_range(R):
        xs = xs + (tl.load(x_ptr, mask=mask, other=PAD_LOGIT).to(tl.float32) * LOG2E,)  # type: ignore[assignment]
        x_ptr += stride_xr
    return xs


@triton.jit
def _denominators(xs, R: tl.constexpr):
    """exp(-|x|) of each region, and the products of 1 + exp(-|x|) over the regions before each and over all."""
    es = [tl.exp2(-tl.abs(x)) for x in xs]
    before, product = (1.0,), 1 + es[0]
    for r in tl.static_range(1, R):
        before = before + (product,)  # type: ignore[assignment]
        product += product * es[r]
    return es, before, product


@triton.jit
def _softmax(xs, R: tl.constexpr):
    """Differences to the largest logit, their powers of two, and the sum of these."""
    largest = xs[0]
    for r in tl.static_range(1, R):
        largest = tl.maximum(largest, xs[r])
    zs = [x - largest for x in xs]
    powers = [tl.exp2(z) for z in zs]
    total = powers[0]
    for r in tl.static_range(1, R):
        total += powers[r]
    return zs, powers, total


@triton.jit
def dice_ce_forward_kernel(
    x_ptr,  # (B, R, voxels), stride_x*: logits
    labels_ptr,  # (B, voxels) uint8, contiguous
    table_ptr,  # (256,) int64: regions of each label value
    partial_ptr,  # (2 R + 2, B, chunks) float32: overlap and union of each region, cross-entropy, weights of argmax
    voxels, chunk, stride_xb, stride_xr, stride_xs,
    weight,  # a tuple of R numbers, or None
    R: tl.constexpr, CE: tl.constexpr, SQUARED: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Sums over one chunk of one sample; grid (chunks, B)."""
    start = tl.program_id(0).to(tl.int64) * chunk
    sample = tl.program_id(1).to(tl.int64)
    x_ptr += sample * stride_xb + start * stride_xs
    labels_ptr += sample * voxels + start
    count = tl.minimum(chunk, voxels - start).to(tl.int32)
    tile = tl.arange(0, ROWS)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    overlap = (tl.zeros((ROWS,), tl.float32),) * R
    union = overlap
    ce, held = overlap[0], overlap[0]
    for offset in range(0, count, ROWS * VEC):
        index = offset + tile
        mask = index < count
        members, counted = _targets(labels_ptr, table_ptr, index, mask, CE)
        xs = _logits(x_ptr + index * stride_xs, mask, stride_xr, R)
        es, before, product = _denominators(xs, R)
        inverse = _reciprocal(product)
        if CE == "bce":
            # log2(1 + exp(-|x|)) of all regions at once, unless they are weighted
            nll = _log2(product) if weight is None else tl.zeros_like(product)
        else:
            zs, _, total = _softmax(xs, R)
            log_total = _log2(total)
            nll = tl.zeros_like(product)
        overlaps, unions = overlap, union
        overlap, union = (), ()
        for r in tl.static_range(R - 1, -1, -1):
            inside = (members & (1 << r)) != 0
            t = tl.where(inside, 1.0, 0.0)
            larger = inverse * before[r]  # of p and 1 - p
            p = tl.where(xs[r] >= 0, larger, es[r] * larger)
            inverse += inverse * es[r]
            overlap = (overlaps[r] + tl.sum(t * p, 1),) + overlap
            union = (unions[r] + tl.sum(t + (p * p if SQUARED else p), 1),) + union
            if CE == "bce":
                wrong_by = tl.maximum(tl.where(inside, -xs[r], xs[r]), 0.0)
                if weight is not None:
                    wrong_by = (wrong_by + _log2(1 + es[r])) * tl.where(inside, weight[r], 1.0)
                nll += wrong_by
            else:
                w = tl.where((counted & (1 << r)) != 0, 1.0 if weight is None else weight[r], 0.0)
                nll += w * (log_total - zs[r])
                if CE == "argmax" and weight is not None:
                    held += tl.sum(w, 1)
        ce += tl.sum(nll, 1)
    step = tl.num_programs(0) * tl.num_programs(1)
    partial_ptr += tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    for r in tl.static_range(R):
        tl.store(partial_ptr + r * step, tl.sum(overlap[r]))
        tl.store(partial_ptr + (R + r) * step, tl.sum(union[r]))
    tl.store(partial_ptr + 2 * R * step, tl.sum(ce) * LN2)
    if CE == "argmax" and weight is not None:
        tl.store(partial_ptr + (2 * R + 1) * step, tl.sum(held))


@triton.jit
def _row_sums(rows_ptr, mask, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum of each of ROWS rows of partial sums."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        total += tl.load(rows_ptr[:, None] + column, mask=mask[:, None] & (column < columns), other=0.0)
    return tl.sum(total, 1)


@triton.jit
def dice_ce_combine_kernel(
    partial_ptr,  # (2 R + 2, B, chunks) float32, of the forward
    coefficients_ptr,  # (2 rows + 1,) float32: derivatives by overlap and by p^e, scale of the cross-entropy
    loss_ptr,  # () float32, as the next two
    dice_ptr,
    ce_ptr,
    rows, columns, rows_per_region, programs, dice_weight, ce_weight, smooth_nr, smooth_dr, ce_scale,
    weight,  # a tuple of R numbers, or None
    R: tl.constexpr, CE: tl.constexpr, SQUARED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """All sums and the loss; grid (1,). A row makes one Dice: of (region, sample), or of a region with `batch`."""
    dice = 0.0
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = row < rows
        row_ptr = partial_ptr + row * columns
        overlap = _row_sums(row_ptr, mask, columns, ROWS, COLUMNS)
        union = _row_sums(row_ptr + rows * columns, mask, columns, ROWS, COLUMNS)
        share = tl.full((ROWS,), 1.0, tl.float32) / rows
        if weight is not None:
            for r in tl.static_range(R):
                share = tl.where(row // rows_per_region == r, share * weight[r], share)
        denominator = tl.where(mask, union + smooth_dr, 1.0)
        score = (2 * overlap + smooth_nr) / denominator
        dice += tl.sum(tl.where(mask, share * (1 - score), 0.0))
        by_overlap = -2 * share / denominator
        by_predicted = (2 if SQUARED else 1) * share * score / denominator
        tl.store(coefficients_ptr + row, by_overlap, mask=mask)
        tl.store(coefficients_ptr + rows + row, by_predicted, mask=mask)
    HELD: tl.constexpr = CE == "argmax" and weight is not None
    last = tl.arange(0, 2)  # the last rows: cross-entropy, and the weights of a weighted argmax
    last_ptr = partial_ptr + 2 * rows * columns + last * programs
    sums = _row_sums(last_ptr, last < (2 if HELD else 1), programs, 2, ROWS * COLUMNS)
    if HELD:
        ce_scale = 1 / tl.sum(tl.where(last == 1, sums, 0.0))
    ce = ce_scale * tl.sum(tl.where(last == 0, sums, 0.0))
    tl.store(coefficients_ptr + 2 * rows, ce_scale)
    tl.store(dice_ptr, dice)
    tl.store(ce_ptr, ce)
    tl.store(loss_ptr, dice_weight * dice + ce_weight * ce)


@triton.jit
def dice_ce_backward_kernel(
    dloss_ptr,  # () float32, or None for zero, as the next two
    ddice_ptr,
    dce_ptr,
    x_ptr,  # (B, R, voxels), stride_x*: logits
    labels_ptr,  # (B, voxels) uint8, contiguous
    table_ptr,  # (256,) int64: regions of each label value
    coefficients_ptr,  # (2 rows + 1,) float32, of the combine
    dx_ptr,  # (B, R, voxels), stride_dx*
    voxels, stride_xb, stride_xr, stride_xs, stride_dxb, stride_dxr, stride_dxs, rows, rows_per_region,
    row_stride_b, dice_weight, ce_weight,
    weight,  # a tuple of R numbers, or None
    R: tl.constexpr, CE: tl.constexpr, SQUARED: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of one sample; grid (tiles, B)."""
    ddice, dce = 0.0, 0.0
    if ddice_ptr is not None:
        ddice += tl.load(ddice_ptr)
    if dce_ptr is not None:
        dce += tl.load(dce_ptr)
    if dloss_ptr is not None:
        ddice += dice_weight * tl.load(dloss_ptr)
        dce += ce_weight * tl.load(dloss_ptr)
    dce *= tl.load(coefficients_ptr + 2 * rows)
    coefficients_ptr += tl.program_id(1) * row_stride_b

    start = tl.program_id(0).to(tl.int64) * (ROWS * VEC)
    sample = tl.program_id(1).to(tl.int64)
    index = tl.arange(0, ROWS)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    mask = index < tl.minimum(voxels - start, ROWS * VEC).to(tl.int32)
    x_ptr += sample * stride_xb + start * stride_xs
    dx_ptr += sample * stride_dxb + start * stride_dxs
    members, counted = _targets(labels_ptr + sample * voxels + start, table_ptr, index, mask, CE)
    xs = _logits(x_ptr + index * stride_xs, mask, stride_xr, R)
    es, before, product = _denominators(xs, R)
    if CE == "bce":
        inverse = _reciprocal(product)
    else:
        _, powers, total = _softmax(xs, R)
        held = tl.zeros_like(total)
        for r in tl.static_range(R):
            held += tl.where((counted & (1 << r)) != 0, 1.0 if weight is None else weight[r], 0.0)
        inverse = _reciprocal(product * total)
        per_power = dce * held * inverse * product
        inverse *= total
    dxs = ()
    for r in tl.static_range(R - 1, -1, -1):
        by_overlap = ddice * tl.load(coefficients_ptr + r * rows_per_region)
        by_predicted = ddice * tl.load(coefficients_ptr + rows + r * rows_per_region)
        inside = (members & (1 << r)) != 0
        larger = inverse * before[r]  # of p and 1 - p
        smaller = es[r] * larger
        inverse += inverse * es[r]
        p = tl.where(xs[r] >= 0, larger, smaller)
        if SQUARED:
            dp = tl.where(inside, by_overlap, 0.0) + by_predicted * p
        else:
            dp = tl.where(inside, by_overlap + by_predicted, by_predicted)
        if CE == "bce":
            scale = dce if weight is None else tl.where(inside, dce * weight[r], dce)
            dx = scale * (p - tl.where(inside, 1.0, 0.0))
        else:
            w = dce if weight is None else dce * weight[r]
            dx = per_power * powers[r] - tl.where((counted & (1 << r)) != 0, w, 0.0)
        dxs = (dx + dp * (smaller * larger),) + dxs  # type: ignore[assignment]
    dx_ptr += index * stride_dxs
    for r in tl.static_range(R):
        tl.store(dx_ptr, dxs[r].to(dx_ptr.dtype.element_ty), mask=mask)
        dx_ptr += stride_dxr


def _kind(ce: str, regions: int) -> str:
    return "bce" if ce == "multihot" and regions == 1 else ce


def _in_lines(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """`x` with its voxels evenly strided, copied if need be; strides of B, R and voxels."""
    _, _, nx, ny, nz = x.shape
    axes = [(size, stride) for size, stride in zip((nx, ny, nz), x.stride()[2:]) if size > 1]
    if any(outer[1] != inner[0] * inner[1] for outer, inner in zip(axes, axes[1:])):
        x = x.contiguous()
        axes = [(1, 1)]
    return x, (x.stride(0), x.stride(1), axes[-1][1] if axes else 1)


@dispatch.constant_when_compiled
def _table(regions: Regions, device: torch.device) -> Tensor:
    """256 words of 64 bits: the regions of each label value, and above them the first of these (or of all) alone.

    A compiled graph has the table as a constant, made before its CUDA graphs and outside of their memory.
    """
    if _get_current_dispatch_mode() is not None:  # fake tensors must not outlive their mode
        return _make_table(regions, device)
    return _cached_table(regions, device)


def _make_table(regions: Regions, device: torch.device) -> Tensor:
    words = []
    for value in range(256):
        members = sum(1 << r for r, region in enumerate(regions) if value in region)
        words.append(members | max(members & -members, 1) << 32)
    with torch.inference_mode(False):  # the backward of a later call may keep it
        return torch.tensor(words, dtype=torch.int64, device=device)


_cached_table = cache(_make_table)


def _chunks(batch: int, voxels: int) -> tuple[int, int]:
    """Number and length of a sample's chunks, by the shape alone so that results don't depend on the GPU."""
    chunks = max(1, min(ceil_div(voxels, MIN_CHUNK), PROGRAMS // batch))
    chunk = ceil_div(ceil_div(voxels, chunks), CHUNK_STEP) * CHUNK_STEP
    return ceil_div(voxels, chunk), chunk


@cache
def _candidates(R: int, itemsize: int, voxels: int, stride: int) -> list[dispatch.Config]:
    """Tiles: 16-byte loads where voxels are aligned neighbours, narrower where many regions fill the registers."""
    lane = max(1, min(16 // itemsize, 2 ** int(math.log2(32 / R))))  # voxels
    shapes = [(128, lane, 4), (256, lane, 8), (64, lane, 2), (128, max(1, lane // 2), 4)]
    if stride > 1 or voxels % 16:
        lane = min(4, lane)
        shapes = [(128 * lane, 1, 4), (128 * lane, 1, 8), (64 * lane, 1, 4), (64 * lane, 1, 2)]
    return [{"ROWS": rows, "VEC": vec, "num_warps": warps, "num_stages": 1} for rows, vec, warps in shapes]


@dispatch.once_per_shape
def _key(shape: torch.Size, dtype: torch.dtype, channels_last: bool, ce: str) -> str:
    """What the best path and configuration depend on; all voxels, rounded up to a power of two."""
    batch, regions, *space = shape
    voxels, power = math.prod(space), 1
    while power < batch * voxels:  # symbolic sizes stay symbolic, within these bounds
        power *= 2
    odd = " odd" if voxels % 16 else ""  # as in `_candidates`
    layout = "channels_last" if channels_last else "contiguous"
    return f"R{regions} voxels{power}{odd} {ce} {str(dtype).removeprefix('torch.')} {layout}"


def _key_of(logits: Tensor, ce: str) -> str:
    return _key(logits.shape, logits.dtype, logits.stride(1) == 1 and logits.shape[1] > 1, ce)


def _operands(
    x: Tensor,
    strides: tuple[int, int, int],
    labels: Tensor,
    table: Tensor,
    weight: list[float] | None,
    ce: str,
    squared_pred: bool,
) -> dict[str, Any]:
    """Arguments that both kernels over the voxels take."""
    R = x.shape[1]
    return {
        "x_ptr": x, "labels_ptr": labels.contiguous(), "table_ptr": table, "voxels": math.prod(x.shape[2:]),
        "stride_xb": strides[0], "stride_xr": strides[1], "stride_xs": strides[2],
        "weight": None if weight is None else tuple(weight), "R": R, "CE": _kind(ce, R), "SQUARED": squared_pred,
    }  # fmt: skip


def dice_ce_forward(
    logits: Tensor,
    labels: Tensor,
    table: Tensor,
    weight: list[float] | None,
    ce: str,
    factors: list[float],
    squared_pred: bool,
    batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward.

    Args:
        table: the regions of each label value, 256 words (`_table`).
        factors: dice_weight, ce_weight, smooth_nr and smooth_dr; torch takes microseconds for each argument.
        others: as `dice_ce_loss`.

    Returns:
        loss, dice, ce, and the coefficients that `dice_ce_backward` needs, (2 rows + 1,) float32.
    """
    x, strides = _in_lines(logits)
    args = _operands(x, strides, labels, table, weight, ce, squared_pred)
    B, R, voxels = x.shape[0], x.shape[1], args["voxels"]
    chunks, chunk = _chunks(B, voxels)
    partial = x.new_empty((2 * R + 2) * B * chunks, dtype=torch.float32)
    candidates = _candidates(R, x.element_size(), voxels, strides[2])
    args |= {"partial_ptr": partial, "chunk": chunk}
    dispatch.launch(dice_ce_forward_kernel, lambda config: (chunks, B), args, candidates, _key_of(x, ce))

    dice_weight, ce_weight, smooth_nr, smooth_dr = factors
    rows, columns = (R, B * chunks) if batch else (R * B, chunks)
    loss, dice, total_ce, coefficients = _forward_outputs(x, batch)
    ce_scale = 1 / (B * voxels * (R if args["CE"] == "bce" else 1))
    args = {
        "partial_ptr": partial, "coefficients_ptr": coefficients, "loss_ptr": loss, "dice_ptr": dice,
        "ce_ptr": total_ce, "rows": rows, "columns": columns, "rows_per_region": rows // R, "programs": B * chunks,
        "dice_weight": dice_weight, "ce_weight": ce_weight, "smooth_nr": smooth_nr, "smooth_dr": smooth_dr,
        "ce_scale": ce_scale, "weight": args["weight"] if R > 1 else None, "R": R, "CE": args["CE"],
        "SQUARED": squared_pred,
    }  # fmt: skip
    tile_rows = min(next_power_of_two(rows), 64)
    tile_columns = min(next_power_of_two(columns), 2048 // tile_rows)
    config = {"ROWS": tile_rows, "COLUMNS": tile_columns, "num_warps": 4, "num_stages": 1}
    key = f"rows{tile_rows} columns{tile_columns}"
    dispatch.launch(dice_ce_combine_kernel, lambda config: (1,), args, [config], key)
    return loss, dice, total_ce, coefficients


def _forward_outputs(x: Tensor, batch: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[1] * (1 if batch else x.shape[0])
    loss, dice, ce = (x.new_empty((), dtype=torch.float32) for _ in range(3))
    return loss, dice, ce, x.new_empty(2 * rows + 1, dtype=torch.float32)


def dice_ce_backward(
    dloss: Tensor | None,
    ddice: Tensor | None,
    dce: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    table: Tensor,
    coefficients: Tensor,
    weight: list[float] | None,
    ce: str,
    factors: list[float],
    squared_pred: bool,
    batch: bool,
) -> Tensor:
    """Launch the backward: the gradient of the logits, in their dtype and memory format.

    Args:
        dloss, ddice, dce: gradients of the forward's results, None for zero.
        coefficients: its last result.
        others: as `dice_ce_forward`.
    """
    x, strides = _in_lines(logits)
    dx, (stride_dxb, stride_dxr, stride_dxs) = _in_lines(torch.empty_like(x))
    args = _operands(x, strides, labels, table, weight, ce, squared_pred)
    B, R, voxels = x.shape[0], x.shape[1], args["voxels"]
    dice_weight, ce_weight, _, _ = factors
    args |= {
        "dloss_ptr": dloss, "ddice_ptr": ddice, "dce_ptr": dce, "coefficients_ptr": coefficients, "dx_ptr": dx,
        "stride_dxb": stride_dxb, "stride_dxr": stride_dxr, "stride_dxs": stride_dxs, "rows": R if batch else R * B,
        "rows_per_region": 1 if batch else B, "row_stride_b": 0 if batch else 1, "dice_weight": dice_weight,
        "ce_weight": ce_weight,
    }  # fmt: skip
    candidates = _candidates(R, x.element_size(), voxels, strides[2])

    def grid(config: dispatch.Config) -> tuple[int, int]:
        return ceil_div(voxels, config["ROWS"] * config["VEC"]), B

    dispatch.launch(dice_ce_backward_kernel, grid, args, candidates, _key_of(x, ce))
    return dx


_forward_op = dispatch.operator(dice_ce_forward)
_backward_op = dispatch.operator(dice_ce_backward)


@_forward_op.register_fake
def _(logits, labels, table, weight, ce, factors, squared_pred, batch):
    return _forward_outputs(logits, batch)


@_backward_op.register_fake
def _(dloss, ddice, dce, logits, labels, table, coefficients, weight, ce, factors, squared_pred, batch):
    return torch.empty_like(_in_lines(logits)[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, table, *ctx.options = inputs
    coefficients = output[-1]
    ctx.save_for_backward(logits, labels, table, coefficients)
    ctx.mark_non_differentiable(coefficients)
    ctx.set_materialize_grads(False)


def _backward(
    run: Callable[..., Any], ctx: Any, dloss: Tensor | None, ddice: Tensor | None, dce: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    dlogits = run(dloss, ddice, dce, *ctx.saved_tensors, *ctx.options)
    return dispatch.gradients(dice_ce_forward, logits=dlogits)


_dice_ce = dispatch.differentiable(_forward_op, _backward_op, _setup_context, _backward)


def _check_tensors(logits: Tensor, labels: Tensor) -> None:
    check_floats("logits", logits, "batch, regions, X, Y, Z")
    check_is_tensor("labels", labels)
    if labels.dtype != torch.uint8:
        rule = "must be a uint8 label map, not one channel per region"
        raise ValueError(f"labels of {labels.dtype} {rule}: convert with labels.to(torch.uint8)")
    expected = (logits.shape[0], *logits.shape[2:])
    if labels.shape != expected:
        given, shape = tuple(labels.shape), tuple(logits.shape)
        raise ValueError(f"labels of shape {given} must have {expected} for logits of {shape}, without a channel axis")
    check_same_device("labels", labels, "logits", logits)


def _label_values(values: Iterable[int]) -> tuple[int, ...] | None:
    """Label values as plain integers; None if they are anything else."""
    try:
        plain = tuple(operator.index(value) for value in values)  # constants under torch.compile too
    except TypeError:
        return None
    return plain if all(0 <= value <= 255 for value in plain) else None


def _check_regions(
    regions: Sequence[Sequence[int]], background: Sequence[int], channels: int
) -> tuple[Regions, tuple[int, ...]]:
    """Regions and background as tuples of plain integers."""
    if not isinstance(regions, Iterable):
        raise ValueError(f"regions {regions!r} must be a sequence of label values per channel, such as ((2, 3), (3,))")
    checked = []
    for region in regions:
        values = _label_values(region)
        if not values:
            rule = "must name at least one label value, integers from 0 to 255, in a sequence of its own"
            raise ValueError(f"region {region!r} {rule}: ((1,), (2,)) for regions of one label each")
        checked.append(values)
    if len(checked) != channels:
        fault = f"{len(checked)} regions {regions} for logits of {channels} channels"
        remedy = "give one region per channel, or build the model with as many output channels as regions"
        raise ValueError(f"{fault}; {remedy}")
    outside = _label_values(background)
    if outside is None:
        raise ValueError(f"background {background!r} must be a sequence of label values, integers from 0 to 255: (0,)")
    return tuple(checked), outside


def _check_options(ce: str, channels: int, **factors: float) -> None:
    if ce not in get_args(CrossEntropy):
        raise ValueError(f"ce {ce!r} must be one of {', '.join(get_args(CrossEntropy))}")
    if ce == "argmax" and channels == 1:
        raise ValueError("ce 'argmax' over a single region is always zero; use 'bce'")
    for name, factor in factors.items():
        if not isinstance(factor, Real) or not 0 <= factor < math.inf:
            raise ValueError(f"{name} {factor!r} must be a finite number, zero or positive; omit it if unsure")


def _check_weight(weight: Sequence[float] | None, channels: int) -> list[float] | None:
    """Weights of the regions as plain numbers."""
    if weight is None:
        return None
    try:
        weights = [float(value) for value in weight]
    except (TypeError, ValueError):
        weights = []
    if len(weights) != channels or not all(0 <= value < math.inf for value in weights):
        rule = f"must be {channels} finite numbers, zero or positive, one per region"
        raise ValueError(f"weight {weight!r} {rule}; None weights all equally")
    return weights


def _check_labels(labels: Tensor, regions: Regions, background: tuple[int, ...]) -> None:
    if torch.compiler.is_compiling() or (labels.is_cuda and torch.cuda.is_current_stream_capturing()):
        return  # no value can be read
    known = {*background, *(value for region in regions for value in region)}
    found = torch.bincount(labels.reshape(-1), minlength=256).nonzero().flatten().tolist()
    unknown = [value for value in found if value not in known]
    if unknown:
        raise ValueError(
            f"labels contain {', '.join(map(str, unknown))}, in none of the regions {regions} and not background "
            f"{background}; check the coding of the data, or declare them background: "
            f"background={(*background, *unknown)}"
        )


def dice_ce_loss(
    logits: Tensor,
    labels: Tensor,
    regions: Sequence[Sequence[int]],
    ce: CrossEntropy = "multihot",
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
    squared_pred: bool = False,
    batch: bool = False,
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    *,
    weight: Sequence[float] | None = None,
    background: Sequence[int] = (0,),
    check_labels: bool = True,
) -> DiceCE:
    """Sigmoid Dice plus cross-entropy, differentiable once in the logits.

    Args:
        logits: (B, R, X, Y, Z), before any sigmoid, one channel for each region.
        labels: (B, X, Y, Z) uint8 label values; values in no region are background.
        regions: the label values of each region, in the order of the channels; regions may overlap.
        ce: kind of cross-entropy: "multihot", "argmax" or "bce" (see the head of this file).
        dice_weight, ce_weight: factors of the two terms in the loss.
        squared_pred: squared probabilities in the Dice denominator.
        batch: one Dice over the whole batch instead of one per sample.
        smooth_nr, smooth_dr: added to numerator and denominator; they decide the Dice of an empty region.
        weight: a number per region, in the Dice (of several regions) and in the cross-entropy.
        background: label values that may occur outside all regions.
        check_labels: refuse labels that are neither in a region nor background. On a GPU this waits for the device at
            every call: pass False where labels were checked when they were read. No check happens while a CUDA graph
            is captured, or under `torch.compile` and `torch.export`.

    Returns:
        loss, dice and ce, scalars in float32, each with its gradient.

    Raises:
        ValueError: a wrong rank, dtype, shape or device of a tensor; a number of regions or weights that is not the
            number of channels; an unknown `ce`; a negative or infinite factor or weight; unknown labels, if checked.
    """
    _check_tensors(logits, labels)
    channels = logits.shape[1]
    regions, background = _check_regions(regions, background, channels)
    factors = {"dice_weight": dice_weight, "ce_weight": ce_weight, "smooth_nr": smooth_nr, "smooth_dr": smooth_dr}
    _check_options(ce, channels, **factors)
    weight = _check_weight(weight, channels)
    if check_labels:
        _check_labels(labels, regions, background)
    chosen: dispatch.OpPath = "reference"
    if channels <= MAX_REGIONS:
        key = _key_of(logits, ce)
        options: dict[str, Any] = {"ce": ce, "squared_pred": squared_pred, "batch": batch, "weight": weight, **factors}
        loss_of = partial(dice_ce_loss, regions=regions, background=background, check_labels=False, **options)
        dispatch.compare("dice_ce", key, loss_of, (logits, labels), ("torch.compile",))
        chosen = dispatch.path("dice_ce", logits, key)
    if chosen == "triton":
        table = _table(regions, labels.device)
        *values, _ = _dice_ce(logits, labels, table, weight, ce, list(factors.values()), squared_pred, batch)
        return DiceCE(*values)
    loss = dice_ce_loss_reference
    if chosen == "torch" and not torch.compiler.is_compiling():  # else it is compiled with what is around it
        loss = dispatch.compiled(loss, logits.shape)
    return loss(logits, labels, regions, ce, dice_weight, ce_weight, squared_pred, batch, smooth_nr, smooth_dr, weight)
