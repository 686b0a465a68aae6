"""Dice + cross-entropy of overlapping tumour regions, straight from the uint8 label map.

With x the logits, p = sigmoid(x), t(r, v) = 1 where the label of voxel v belongs to region r, e = 2 if `squared_pred`
else 1, and sums over voxels (and samples, if `batch`):

    dice(b, r) = 1 - (2 sum_v p t + smooth_nr) / (sum_v p^e + sum_v t + smooth_dr)
    dice       = mean over samples and regions
    loss       = dice_weight * dice + ce_weight * ce

The cross-entropy comes in three kinds, because the published figures and MONAI of today disagree:

    "multihot"  - mean_v sum_r t log softmax(x)_r
                MONAI DiceCELoss(to_onehot_y=False, sigmoid=True) since October 2022
    "argmax"    - mean_v log softmax(x)_c, c = the first region that holds the voxel, region 0 where none does
                (`torch.argmax(target, dim=1)`: MONAI before its pull request 5292)
    "bce"       mean over voxels and regions of the binary cross-entropy: the one that overlapping regions call for

In "multihot" a background voxel has no term, and a voxel of three regions has three. With a single region MONAI
turns to "bce" there, and so does this.

Labels travel as one byte a voxel; membership is one comparison of bytes for each label value, as fast on a CPU as a
gather from a table (both about 20 ms for 2 x 128 x 128 x 64) and with no table to keep on each device. A label
outside the coding belongs to no region and so counts as background: noticing it would cost a reduction and a wait for
the device at each step, so labels are checked when the data are prepared instead.

Sums are float32 whatever the dtype of the logits (float64 for float64 logits, for checks of gradients).
`dice_ce_loss_reference` states this in plain PyTorch: the oracle that everything faster is compared with.

Sources: Milletari et al., V-Net, https://arxiv.org/abs/1606.04797; MONAI `DiceCELoss`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

CrossEntropy = Literal["multihot", "argmax", "bce"]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


def _cross_entropy(logits_BRXYZ: Tensor, target_BRXYZ: Tensor, kind: CrossEntropy) -> Tensor:
    if kind == "bce" or (kind == "multihot" and logits_BRXYZ.shape[1] == 1):
        return F.binary_cross_entropy_with_logits(logits_BRXYZ, target_BRXYZ)
    if kind == "argmax":
        return F.cross_entropy(logits_BRXYZ, target_BRXYZ.argmax(dim=1))
    return F.cross_entropy(logits_BRXYZ, target_BRXYZ)


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
) -> DiceCE:
    """The equation at the head of this file in plain PyTorch; arguments as `dice_ce_loss`, unchecked."""
    logits = logits_BRXYZ.to(torch.promote_types(logits_BRXYZ.dtype, torch.float32))
    target = region_masks(labels_BXYZ, regions).to(logits.dtype)
    probability = logits.sigmoid()
    axes = (0, 2, 3, 4) if batch else (2, 3, 4)
    overlap = (probability * target).sum(axes)
    predicted = (probability.square() if squared_pred else probability).sum(axes)
    dice = (1 - (2 * overlap + smooth_nr) / (predicted + target.sum(axes) + smooth_dr)).mean()
    cross_entropy = _cross_entropy(logits, target, ce)
    return DiceCE(dice_weight * dice + ce_weight * cross_entropy, dice, cross_entropy)


def _check_tensors(logits: Tensor, labels: Tensor) -> None:
    if logits.dim() != 5 or 0 in logits.shape:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}; the loss takes (batch, regions, X, Y, Z), five "
            "axes, none of them empty"
        )
    if logits.dtype not in DTYPES:
        raise ValueError(f"logits are {logits.dtype}; the loss takes floating point")
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


def _check_options(logits: Tensor, regions: Sequence[Sequence[int]], ce: str, **factors: float) -> None:
    if len(regions) != logits.shape[1]:
        raise ValueError(
            f"{len(regions)} regions {regions} for logits of {logits.shape[1]} channels; give one region "
            "for each channel, or build the model with as many output channels as regions"
        )
    for region in regions:
        if len(region) == 0 or not all(isinstance(value, int) and 0 <= value <= 255 for value in region):
            raise ValueError(f"region {region!r} must name at least one label value, integers from 0 to 255")
    if ce not in get_args(CrossEntropy):
        raise ValueError(f"ce {ce!r} must be one of {', '.join(get_args(CrossEntropy))}")
    if ce == "argmax" and len(regions) == 1:
        raise ValueError("ce 'argmax' over a single region is always zero; use 'bce'")
    for name, factor in factors.items():
        if not 0 <= factor < math.inf:
            raise ValueError(f"{name} {factor} must be zero or a positive finite number")


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
) -> DiceCE:
    """Sigmoid Dice plus cross-entropy, differentiable in the logits.

    Args:
        logits: (B, R, X, Y, Z), before any sigmoid, one channel for each region.
        labels: (B, X, Y, Z) uint8 label values; values in no region are background, unknown ones too (see above).
        regions: the label values of each region, in the order of the channels; regions may overlap.
        ce: kind of cross-entropy: "multihot", "argmax" or "bce" (see above).
        dice_weight, ce_weight: factors of the two terms in the loss.
        squared_pred: squared probabilities in the Dice denominator.
        batch: one Dice over the whole batch instead of one for each sample.
        smooth_nr, smooth_dr: added to numerator and denominator; they decide the Dice of an empty region.

    Returns:
        loss, dice and ce, scalars in float32, each with its gradient.

    Raises:
        ValueError: wrong rank, dtype, shape or device of a tensor; a number of regions other than that of the channels;
            an unknown `ce`; a negative or infinite factor.
    """
    _check_tensors(logits, labels)
    _check_options(
        logits, regions, ce, dice_weight=dice_weight, ce_weight=ce_weight, smooth_nr=smooth_nr, smooth_dr=smooth_dr
    )
    return dice_ce_loss_reference(
        logits, labels, regions, ce, dice_weight, ce_weight, squared_pred, batch, smooth_nr, smooth_dr
    )
