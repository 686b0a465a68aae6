"""Dice + cross-entropy of overlapping tumour regions, straight from the uint8 label map.

With x the logits, p = sigmoid(x), t(r, v) = 1 where the label of voxel v belongs to region r, e = 2 if `squared_pred`
else 1, w the weights of the regions (1 without `weight`), and sums over voxels (and samples, if `batch`):

    dice(b, r) = 1 - (2 sum_v p t + smooth_nr) / (sum_v p^e + sum_v t + smooth_dr)
    dice       = mean over samples and regions of w_r dice(b, r)
    loss       = dice_weight * dice + ce_weight * ce

The cross-entropy comes in three kinds, because the published figures and MONAI of today disagree:

    "multihot"  - mean_v sum_r w_r t_r log softmax(x)_r
                MONAI DiceCELoss(to_onehot_y=False, sigmoid=True) since October 2022
    "argmax"    - sum_v w_c log softmax(x)_c / sum_v w_c, c = the first region that holds the voxel, region 0 where none
                does (`torch.argmax(target, dim=1)`: MONAI before its pull request 5292)
    "bce"       mean over voxels and regions of - w_r t log p - (1 - t) log(1 - p): the one that overlapping regions
                call for; w is the `pos_weight` of torch

In "multihot" a background voxel has no term, and a voxel of three regions has three. With a single region MONAI
turns to "bce" there and leaves the weight out of the Dice, and so does this. "argmax" is 0 / 0 = nan, as torch's, where
no voxel's target has a weight.

Labels travel as one byte a voxel, and a table of 256 words says what each value belongs to. A value that is in no
region and not in `background` is an error of the data; unreported, its voxels are background. On a CPU the labels are
counted before the loss is computed, 2.5 ms for 2 x 128 x 128 x 64 on one core. On a GPU nothing waits for that: the
table marks such values, the forward notes whether it met one, that number is copied to the host behind it, and the
first call to find it there raises the error, the next one as a rule.

Algorithm. Three launches. Each reads what it needs once, and nothing but the gradient is as large as a volume:

    forward   a program per chunk of a sample: for each region its sums of p t and of p^e + t, and that of the
              cross-entropy, in registers, then into a buffer (no atomics: each run gives the same bits)
    combine   one program adds the partial sums in a fixed order: loss, dice, ce, and the two derivatives of the Dice of
              each sample and region, by sum p t and by sum p^e, which are all that the backward needs of the forward
    backward  derivatives times upstream gradients, all read on the device; logits and labels again; the gradient

    bytes a voxel            R = 3, bfloat16   R = 3, float32
    forward   R * s + 1              7               13
    backward  2 R * s + 1           13               25        s = bytes of a logit; `bytes_moved` counts them

Keeping p for the backward instead of reading the logits again would move more. At 7 bytes a voxel the forward meets the
limit of instructions before that of memory, exponentials, roots and logarithms above all, hence: logits are scaled by
log2(e) once, for exp2 compiles to one instruction and exp to five; one exp(-|x|) serves sigmoid, its derivative and
softplus; one reciprocal a voxel, of the product of all 1 + exp(-|x_r|), gives every region's by multiplication, and
one logarithm of it the whole softplus of "bce". That leaves 5 such instructions of 64 a voxel for "bce", 8 of 70 for
"multihot" and 8 of 76 for "argmax" (sm_90, R = 3, bfloat16). Labels become bits by a table, because that costs the
same for every coding; it stays in the first-level cache.

Channels-last logits are read in place: narrow loads with a stride of R, which share their cache lines. Layouts whose
space is no single progression are copied first. Sums are float32 whatever the dtype of the logits (float64 for float64
logits, for checks of gradients). `dice_ce_loss_reference` states the loss in plain PyTorch: the oracle that the kernels
are compared with.

Shape suffixes: B samples, R regions, X Y Z space. In the kernels a chunk's voxels are tiles of ROWS x VEC, VEC
neighbours for each lane.

Sources: Milletari et al., V-Net, https://arxiv.org/abs/1606.04797; MONAI `DiceCELoss`; the single reciprocal is
Montgomery's simultaneous inversion (Mathematics of Computation 48, 1987).
"""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Iterable, Sequence
from functools import cache, reduce
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from triton.language.extra import libdevice

from kernels import dispatch

CrossEntropy = Literal["multihot", "argmax", "bce"]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_REGIONS = 31  # bits of half a word of the table beside its sign; more take the reference
PROGRAMS, MIN_CHUNK, CHUNK_STEP = 2048, 4096, 2048
"""Aim, by the shape alone, at 2048 programs for the sums (two waves of an H100), each of 4096 voxels or more."""

Regions = tuple[tuple[int, ...], ...]

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
PAD_LOGIT = tl.constexpr(-60000.0)  # p = 0, in any dtype finite
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


def bytes_moved(logits: Tensor) -> tuple[int, int]:
    """Bytes of device memory that forward and backward have to move: logits and labels read, the gradient written."""
    read = logits.numel() * logits.element_size() + logits.numel() // logits.shape[1]
    return read, read + logits.numel() * logits.element_size()


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
    """In one instruction (absolute error 2^-22 around 1), which the interpreter does not have."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@triton.jit
def _reciprocal(x):
    """1 / x of x >= 1 to 3e-7; a division compiles to nine instructions, this to two."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _targets(labels_ptr, table_ptr, index, mask, CE: tl.constexpr):
    """Bits of the regions that hold each voxel, and of those that the cross-entropy counts."""
    label = tl.load(labels_ptr + index, mask=mask, other=0)
    word = tl.load(table_ptr + label.to(tl.int32), mask=mask, other=0)
    members = word.to(tl.int32)
    return members, (word >> 32).to(tl.int32) if CE == "argmax" else members


@triton.jit
def _logits(x_ptr, mask, stride_xr, R: tl.constexpr):
    """log2(e) times the logits of each region, from pointers to those of the first."""
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
    x_ptr, labels_ptr, table_ptr, partial_ptr, voxels, chunk, stride_xb, stride_xr, stride_xs, weight,
    R: tl.constexpr, CE: tl.constexpr, SQUARED: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Sums over one chunk of one sample; grid (chunks, B), partial_ptr (2 R + 3, B, chunks) float32."""
    start = tl.program_id(0).to(tl.int64) * chunk
    sample = tl.program_id(1).to(tl.int64)
    x_ptr += sample * stride_xb + start * stride_xs
    labels_ptr += sample * voxels + start
    count = tl.minimum(chunk, voxels - start).to(tl.int32)
    tile = tl.arange(0, ROWS)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    overlap = (tl.zeros((ROWS,), tl.float32),) * R
    union = overlap
    ce, held = overlap[0], overlap[0]
    least = tl.zeros((ROWS,), tl.int32)  # of the words: negative where a label is unknown
    for offset in range(0, count, ROWS * VEC):
        index = offset + tile
        mask = index < count
        members, counted = _targets(labels_ptr, table_ptr, index, mask, CE)
        least = tl.minimum(least, tl.min(members, 1))
        xs = _logits(x_ptr + index * stride_xs, mask, stride_xr, R)
        es, before, product = _denominators(xs, R)
        inverse = _reciprocal(product)
        if CE == "bce":
            # log2(1 + exp(-|x|)), of all regions in one where none has a weight
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
    tl.store(partial_ptr + (2 * R + 1) * step, (tl.min(least) < 0).to(tl.float32))
    if CE == "argmax" and weight is not None:
        tl.store(partial_ptr + (2 * R + 2) * step, tl.sum(held))


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
    partial_ptr, coefficients_ptr, loss_ptr, dice_ptr, ce_ptr, rows, columns, rows_per_region, programs, dice_weight,
    ce_weight, smooth_nr, smooth_dr, ce_scale, weight, R: tl.constexpr, CE: tl.constexpr, SQUARED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program; a row is what makes one Dice, (region, sample) or a region where the batch counts as one."""
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
    last = tl.arange(0, 4)  # rows of the cross-entropy, of unknown labels, and of the weights of a weighted argmax
    last_ptr = partial_ptr + 2 * rows * columns + last * programs
    sums = _row_sums(last_ptr, last < (3 if HELD else 2), programs, 4, ROWS * COLUMNS)
    if HELD:
        ce_scale = 1 / tl.sum(tl.where(last == 2, sums, 0.0))
    ce = ce_scale * tl.sum(tl.where(last == 0, sums, 0.0))
    tl.store(coefficients_ptr + 2 * rows, ce_scale)
    tl.store(coefficients_ptr + 2 * rows + 1, tl.sum(tl.where(last == 1, sums, 0.0)))
    tl.store(dice_ptr, dice)
    tl.store(ce_ptr, ce)
    tl.store(loss_ptr, dice_weight * dice + ce_weight * ce)


@triton.jit
def dice_ce_backward_kernel(
    dloss_ptr, ddice_ptr, dce_ptr, x_ptr, labels_ptr, table_ptr, coefficients_ptr, dx_ptr, voxels, stride_xb,
    stride_xr, stride_xs, stride_dxb, stride_dxr, stride_dxs, rows, rows_per_region, row_stride_b, dice_weight,
    ce_weight, weight, R: tl.constexpr, CE: tl.constexpr, SQUARED: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """One tile of one sample; grid (tiles, B). A gradient that nobody asked for comes as None."""
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
    """`x` with its spatial axes one arithmetic progression in memory, copied if need be; strides of B, R and voxels."""
    _, _, nx, ny, nz = x.shape
    axes = [(size, stride) for size, stride in zip((nx, ny, nz), x.stride()[2:]) if size > 1]
    if any(outer[1] != inner[0] * inner[1] for outer, inner in zip(axes, axes[1:])):
        x = x.contiguous()
        axes = [(1, 1)]
    return x, (x.stride(0), x.stride(1), axes[-1][1] if axes else 1)


@torch.compiler.assume_constant_result
def _table(regions: Regions, background: tuple[int, ...], device: torch.device) -> Tensor:
    """What the kernels ask about a label value: 256 words of 64 bits.

    In the lower half the regions that hold it, and the sign where neither they nor `background` do; in the upper half
    the first of the regions, or the first of all. A compiled graph holds the table as a constant, made before and
    outside of the memory of its CUDA graphs.
    """
    if _get_current_dispatch_mode() is not None:  # fake tensors must not outlive their mode
        return _make_table(regions, background, device)
    return _cached_table(regions, background, device)


def _make_table(regions: Regions, background: tuple[int, ...], device: torch.device) -> Tensor:
    words = []
    for value in range(256):
        members = sum(1 << r for r, region in enumerate(regions) if value in region)
        is_unknown = members == 0 and value not in background
        words.append(members | is_unknown << 31 | max(members & -members, 1) << 32)
    with torch.inference_mode(False):  # the backward of a later call may keep it
        return torch.tensor(words, dtype=torch.int64, device=device)


_cached_table = cache(_make_table)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)  # `triton.cdiv` takes some microseconds


def _chunks(batch: int, voxels: int) -> tuple[int, int]:
    """Number and length of the chunks of a sample, of the shape alone so that results don't depend on the GPU."""
    chunks = max(1, min(_ceil_div(voxels, MIN_CHUNK), PROGRAMS // batch))
    chunk = _ceil_div(_ceil_div(voxels, chunks), CHUNK_STEP) * CHUNK_STEP
    return _ceil_div(voxels, chunk), chunk


@cache
def _candidates(R: int, itemsize: int, voxels: int, stride: int) -> list[dispatch.Config]:
    """Tiles: loads of 16 bytes where voxels are aligned neighbours, narrower where regions would fill the registers."""
    lane = max(1, min(16 // itemsize, 2 ** int(math.log2(32 / R))))  # voxels
    shapes = [(128, lane, 4), (256, lane, 8), (64, lane, 2), (128, max(1, lane // 2), 4)]
    if stride > 1 or voxels % 16:
        lane = min(4, lane)
        shapes = [(128 * lane, 1, 4), (128 * lane, 1, 8), (64 * lane, 1, 4), (64 * lane, 1, 2)]
    return [{"ROWS": rows, "VEC": vec, "num_warps": warps, "num_stages": 1} for rows, vec, warps in shapes]


def _key(logits: Tensor, ce: str) -> str:
    """What the choice of a path and of a configuration depends on; all voxels, rounded up to a power of two."""
    batch, regions, *space = logits.shape
    voxels, power = math.prod(space), 1
    while power < batch * voxels:  # where sizes are symbols they stay so, within these bounds
        power *= 2
    odd = " odd" if voxels % 16 else ""  # as `_candidates` asks
    layout = "channels_last" if logits.stride(1) == 1 and regions > 1 else "contiguous"
    return f"R{regions} voxels{power}{odd} {ce} {str(logits.dtype).removeprefix('torch.')} {layout}"


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
        table: what each label value means, 256 words (`_table`).
        factors: dice_weight, ce_weight, smooth_nr and smooth_dr; torch takes microseconds for each argument.
        others: as `dice_ce_loss`.

    Returns:
        loss, dice, ce, and float32: the derivatives that `dice_ce_backward` needs, 2 rows + 1, and last how many
        programs met a label that is unknown.
    """
    x, strides = _in_lines(logits)
    args = _operands(x, strides, labels, table, weight, ce, squared_pred)
    B, R, voxels, key = x.shape[0], x.shape[1], args["voxels"], _key(x, ce)
    chunks, chunk = _chunks(B, voxels)
    partial = x.new_empty((2 * R + 3) * B * chunks, dtype=torch.float32)
    candidates = _candidates(R, x.element_size(), voxels, strides[2])
    args |= {"partial_ptr": partial, "chunk": chunk}
    dispatch.launch(dice_ce_forward_kernel, lambda config: (chunks, B), args, candidates, key)

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
    tile_rows = min(1 << (rows - 1).bit_length(), 64)
    tile_columns = min(1 << (columns - 1).bit_length(), 2048 // tile_rows)
    config = {"ROWS": tile_rows, "COLUMNS": tile_columns, "num_warps": 4, "num_stages": 1}
    dispatch.launch(
        dice_ce_combine_kernel, lambda config: (1,), args, [config], f"rows{tile_rows} columns{tile_columns}"
    )
    return loss, dice, total_ce, coefficients


def _forward_outputs(x: Tensor, batch: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[1] * (1 if batch else x.shape[0])
    loss, dice, ce = (x.new_empty((), dtype=torch.float32) for _ in range(3))
    return loss, dice, ce, x.new_empty(2 * rows + 2, dtype=torch.float32)


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
        dloss, ddice, dce: gradients of what the forward returned, None for zero.
        coefficients: what it returned last.
        others: as `dice_ce_forward`.
    """
    x, strides = _in_lines(logits)
    dx, (stride_dxb, stride_dxr, stride_dxs) = _in_lines(torch.empty_like(x))
    args = _operands(x, strides, labels, table, weight, ce, squared_pred)
    B, R, voxels = x.shape[0], x.shape[1], args["voxels"]
    args |= {
        "dloss_ptr": dloss, "ddice_ptr": ddice, "dce_ptr": dce, "coefficients_ptr": coefficients, "dx_ptr": dx,
        "stride_dxb": stride_dxb, "stride_dxr": stride_dxr, "stride_dxs": stride_dxs, "rows": R if batch else R * B,
        "rows_per_region": 1 if batch else B, "row_stride_b": 0 if batch else 1, "dice_weight": factors[0],
        "ce_weight": factors[1],
    }  # fmt: skip
    candidates = _candidates(R, x.element_size(), voxels, strides[2])

    def grid(config: dispatch.Config) -> tuple[int, int]:
        return _ceil_div(voxels, config["ROWS"] * config["VEC"]), B

    dispatch.launch(dice_ce_backward_kernel, grid, args, candidates, _key(x, ce))
    return dx


_forward_op = torch.library.custom_op("glioforge::dice_ce_forward", mutates_args=())(dice_ce_forward)
_backward_op = torch.library.custom_op("glioforge::dice_ce_backward", mutates_args=())(dice_ce_backward)


@_forward_op.register_fake
def _(logits: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward_outputs(logits, options[-1])


@_backward_op.register_fake
def _(dloss: Tensor | None, ddice: Tensor | None, dce: Tensor | None, logits: Tensor, *options: Any) -> Tensor:
    return torch.empty_like(_in_lines(logits)[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, table, *options = inputs
    ctx.save_for_backward(logits, labels, table, output[3])
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)
    ctx.options = options


def _backward(ctx: Any, dloss: Tensor | None, ddice: Tensor | None, dce: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return _backward_op(dloss, ddice, dce, *ctx.saved_tensors, *ctx.options), *[None] * 7


_forward_op.register_autograd(_backward, setup_context=_setup_context)


@cache
def _compiled_reference() -> Any:
    # Made anew for every shape: what was measured faster was. Dynamo would go back to eager after 8 of them.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(dice_ce_loss_reference, dynamic=False)


def _check_tensors(logits: Tensor, labels: Tensor) -> None:
    for name, tensor in (("logits", logits), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} are {type(tensor).__name__}; the loss takes tensors: torch.as_tensor({name})")
    if logits.dim() != 5 or 0 in logits.shape:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}; the loss takes (batch, regions, X, Y, Z), five "
            "axes, none of them empty"
        )
    if logits.dtype not in DTYPES:
        raise ValueError(f"logits are {logits.dtype}; the loss takes floating point: convert with logits.float()")
    if labels.dtype != torch.uint8:
        raise ValueError(
            f"labels are {labels.dtype}; the loss takes the label map as uint8, not one channel per "
            "region: convert with labels.to(torch.uint8)"
        )
    if labels.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; for logits {tuple(logits.shape)} they must have "
            f"{(logits.shape[0], *logits.shape[2:])}, without a channel axis"
        )
    if labels.device != logits.device:
        raise ValueError(f"labels are on {labels.device} but logits on {logits.device}; move both to one device")


def _check_values(values: Iterable[int]) -> tuple[int, ...] | None:
    """Label values as plain integers; None for anything else."""
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
        raise ValueError(f"regions {regions!r} must be label values, a sequence for each channel: ((2, 3), (3,)), say")
    checked = []
    for region in regions:
        values = _check_values(region)
        if not values:
            raise ValueError(
                f"region {region!r} must name at least one label value, integers from 0 to 255, in a sequence of "
                "its own: ((1,), (2,)) for regions of one label each"
            )
        checked.append(values)
    if len(checked) != channels:
        raise ValueError(
            f"{len(checked)} regions {regions} for logits of {channels} channels; give one region "
            "for each channel, or build the model with as many output channels as regions"
        )
    outside = _check_values(background)
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
            raise ValueError(f"{name} {factor!r} must be zero or a positive finite number; leave it out if unsure")


def _check_weight(weight: Sequence[float] | None, channels: int) -> list[float] | None:
    """Weights of the regions as plain numbers."""
    if weight is None:
        return None
    try:
        weights = [float(value) for value in weight]
    except (TypeError, ValueError):
        weights = []
    if len(weights) != channels or not all(0 <= value < math.inf for value in weights):
        raise ValueError(
            f"weight {weight!r} must be {channels} numbers, one for each region, zero or positive and finite; None "
            "weighs all alike"
        )
    return weights


def _check_labels(labels: Tensor, regions: Regions, background: tuple[int, ...], whose: str = "") -> None:
    known = _known(regions, background)
    counts = torch.bincount(labels.reshape(-1), minlength=256)
    unknown = [value for value in counts.nonzero().flatten().tolist() if value not in known]
    if unknown:
        raise ValueError(
            f"labels{whose} hold {', '.join(map(str, unknown))}, in none of the regions {regions} and not background "
            f"{background}; check the coding of the data, or name what counts as background: "
            f"background={(*background, *unknown)}"
        )


def _known(regions: Regions, background: tuple[int, ...]) -> set[int]:
    return {*background, *(value for region in regions for value in region)}


class _Note(NamedTuple):
    """How many unknown labels a call on a GPU met, on its way to the host, and what to say of them."""

    unknown: Tensor
    arrived: torch.cuda.Event
    labels: Tensor
    regions: Regions
    background: tuple[int, ...]


_notes: deque[_Note] = deque()


def _note(unknown: Tensor, labels: Tensor, regions: Regions, background: tuple[int, ...]) -> None:
    """Send `unknown`, a scalar, to the host without waiting for it."""
    on_host = torch.empty_like(unknown, device="cpu", pin_memory=True).copy_(unknown, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(unknown.device))
    _notes.append(_Note(on_host, arrived, labels, regions, background))


def _read_notes() -> None:
    """Raise for unknown labels of an earlier call, if it is known by now that it had any."""
    while _notes and _notes[0].arrived.query():
        unknown, _, labels, regions, background = _notes.popleft()
        if unknown.item():
            _check_labels(labels, regions, background, " of an earlier call")
            raise ValueError(
                f"labels of an earlier call held a value in none of the regions {regions} and not background "
                f"{background}, and were overwritten since; check_labels=True names it, at once"
            )


def _when_to_look(check_labels: bool | None, device: torch.device) -> Literal["now", "later", "never"]:
    """When the labels of a call are looked at. CUDA graphs and `torch.compile` would not repeat a note, and the fake
    tensors of a dispatch mode have nothing to note.
    """
    if check_labels is not None:
        return "now" if check_labels else "never"
    if torch.compiler.is_compiling():
        return "never"
    if device.type != "cuda":
        return "now"
    notes_nothing = _get_current_dispatch_mode() is not None or torch.cuda.is_current_stream_capturing()
    return "never" if notes_nothing else "later"


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
    check_labels: bool | None = None,
) -> DiceCE:
    """Sigmoid Dice plus cross-entropy, differentiable once in the logits.

    Args:
        logits: (B, R, X, Y, Z), before any sigmoid, one channel for each region.
        labels: (B, X, Y, Z) uint8 label values; values in no region are background.
        regions: the label values of each region, in the order of the channels; regions may overlap.
        ce: kind of cross-entropy: "multihot", "argmax" or "bce" (see above).
        dice_weight, ce_weight: factors of the two terms in the loss.
        squared_pred: squared probabilities in the Dice denominator.
        batch: one Dice over the whole batch instead of one for each sample.
        smooth_nr, smooth_dr: added to numerator and denominator; they decide the Dice of an empty region.
        weight: a fixed number for each region, in the Dice (of several regions) and in the cross-entropy (see above).
        background: label values that may occur outside every region.
        check_labels: whether to look for labels that are neither in a region nor background. None looks on a CPU
            before all else, and on a GPU without waiting for it, so that a later call raises the error, but not inside
            `torch.compile` nor while a CUDA graph is captured. True always looks before all else, which on a GPU waits
            for the device at each call, and inside `torch.compile` breaks the graph. False never looks.

    Returns:
        loss, dice and ce, scalars in float32, each with its gradient.

    Raises:
        ValueError: wrong rank, dtype, shape or device of a tensor; a number of regions or weights other than that of
            the channels; an unknown `ce`; a negative or infinite factor or weight; unknown labels, where looked for.
    """
    _check_tensors(logits, labels)
    channels = logits.shape[1]
    regions, background = _check_regions(regions, background, channels)
    factors = {"dice_weight": dice_weight, "ce_weight": ce_weight, "smooth_nr": smooth_nr, "smooth_dr": smooth_dr}
    _check_options(ce, channels, **factors)
    weight = _check_weight(weight, channels)
    look = _when_to_look(check_labels, labels.device)
    if look == "now":
        _check_labels(labels, regions, background)
    elif look == "later":
        _read_notes()
    chosen = dispatch.path("dice_ce", logits, _key(logits, ce)) if channels <= MAX_REGIONS else "reference"
    if chosen == "triton":
        options = (weight, ce, list(factors.values()), squared_pred, batch)
        *values, coefficients = _forward_op(logits, labels, _table(regions, background, labels.device), *options)
        if look == "later":
            _note(coefficients[-1], labels, regions, background)
        return DiceCE(*values)
    if look == "later":
        known = region_masks(labels, [sorted(_known(regions, background))])
        _note(known.logical_not().any(), labels, regions, background)
    compiled = chosen == "torch" and not torch.compiler.is_compiling()
    loss = _compiled_reference() if compiled else dice_ce_loss_reference
    return loss(logits, labels, regions, ce, dice_weight, ce_weight, squared_pred, batch, smooth_nr, smooth_dr, weight)
