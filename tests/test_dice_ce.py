"""Dice + CE from the label map against MONAI's losses on the multi-hot target, values and gradients."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss, DiceLoss
from torch import Tensor, nn

from kernels.dice_ce import CrossEntropy, dice_ce_loss, region_masks

SHAPE = (2, 3, 8, 7, 6)
DECATHLON = ((2, 3), (1, 2, 3), (3,))
CODINGS = {"decathlon": DECATHLON, "brats2018": ((1, 4), (1, 2, 4), (4,)), "tutorial": ((2, 3), (1, 2, 3), (2,))}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
# With squared_pred MONAI takes the overlap as a difference of three sums. Where the target is empty it cancels, and
# leaves rounding beside a true gradient of 1e-7 in all; gradients with a target are of the order 0.01.
GRADIENT_FLOOR = 1e-3
LABELS = ("random", "no enhancing tumour", "background only", "one sample background")


def make_labels(kind: str) -> Tensor:
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 5, (2, 8, 7, 6), dtype=np.uint8))
    if kind == "no enhancing tumour":
        labels[labels >= 3] = 1
    elif kind == "background only":
        labels[:] = 0
    elif kind == "one sample background":
        labels[1] = 0
    return labels


def make_logits(dtype: torch.dtype, shape: tuple[int, ...] = SHAPE) -> Tensor:
    logits = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return logits.to(dtype).requires_grad_()


def multi_hot(labels: Tensor, regions: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> Tensor:
    masks = [np.isin(labels.numpy(), region) for region in regions]
    return torch.from_numpy(np.stack(masks, axis=1)).to(dtype)


def assert_equal_with_gradient(ours: Tensor, logits: Tensor, expected: Tensor, their_logits: Tensor) -> None:
    tolerance = TOLERANCE[logits.dtype]
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=0)
    mine = torch.autograd.grad(ours, logits)[0]
    theirs = torch.autograd.grad(expected, their_logits)[0]
    assert (mine - theirs).norm() <= tolerance * max(theirs.norm().item(), GRADIENT_FLOOR)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("squared_pred", [False, True])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("kind", LABELS)
def test_multihot_equals_monai_dice_ce(dtype: torch.dtype, squared_pred: bool, batch: bool, kind: str) -> None:
    labels = make_labels(kind)
    logits, their_logits = make_logits(dtype), make_logits(dtype)
    options = {"squared_pred": squared_pred, "batch": batch, "smooth_nr": 0.02, "smooth_dr": 0.5}
    ours = dice_ce_loss(logits, labels, DECATHLON, dice_weight=0.7, ce_weight=1.3, **options)  # type: ignore[arg-type]
    monai = DiceCELoss(to_onehot_y=False, sigmoid=True, lambda_dice=0.7, lambda_ce=1.3, **options)
    expected = monai(their_logits, multi_hot(labels, DECATHLON, dtype))
    assert_equal_with_gradient(ours.loss, logits, expected, their_logits)


@pytest.mark.parametrize("coding", list(CODINGS))
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_the_seeds_loss_equals_monai_under_every_coding(coding: str, dtype: torch.dtype) -> None:
    labels, regions = make_labels("random"), CODINGS[coding]
    logits, their_logits = make_logits(dtype), make_logits(dtype)
    expected = DiceCELoss(to_onehot_y=False, sigmoid=True)(their_logits, multi_hot(labels, regions, dtype))
    assert_equal_with_gradient(dice_ce_loss(logits, labels, regions).loss, logits, expected, their_logits)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_argmax_equals_monai_before_pull_request_5292(kind: str, dtype: torch.dtype) -> None:
    labels = make_labels(kind)
    logits, their_logits = make_logits(dtype), make_logits(dtype)
    target = multi_hot(labels, DECATHLON, dtype)
    expected = DiceLoss(sigmoid=True)(their_logits, target) + nn.CrossEntropyLoss()(their_logits, target.argmax(dim=1))
    ours = dice_ce_loss(logits, labels, DECATHLON, ce="argmax")
    assert_equal_with_gradient(ours.loss, logits, expected, their_logits)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_bce_equals_monai_dice_and_torch_bce(kind: str, dtype: torch.dtype) -> None:
    labels = make_labels(kind)
    logits, their_logits = make_logits(dtype), make_logits(dtype)
    target = multi_hot(labels, DECATHLON, dtype)
    expected = DiceLoss(sigmoid=True)(their_logits, target) + nn.BCEWithLogitsLoss()(their_logits, target)
    assert_equal_with_gradient(dice_ce_loss(logits, labels, DECATHLON, ce="bce").loss, logits, expected, their_logits)


def test_one_region_equals_monai_which_turns_to_bce() -> None:
    labels = make_labels("random")
    logits, their_logits = (make_logits(torch.float64, (2, 1, 8, 7, 6)) for _ in range(2))
    expected = DiceCELoss(sigmoid=True)(their_logits, multi_hot(labels, ((1, 2),), torch.float64))
    assert_equal_with_gradient(dice_ce_loss(logits, labels, ((1, 2),)).loss, logits, expected, their_logits)


def test_loss_is_the_weighted_sum_of_its_parts() -> None:
    result = dice_ce_loss(make_logits(torch.float32), make_labels("random"), DECATHLON, dice_weight=0.3, ce_weight=2.0)
    torch.testing.assert_close(result.loss, 0.3 * result.dice + 2.0 * result.ce)
    torch.testing.assert_close(torch.autograd.grad(result.dice, result.dice, retain_graph=True)[0], torch.tensor(1.0))


@pytest.mark.parametrize("ce", ["multihot", "argmax", "bce"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(ce: str, dtype: torch.dtype) -> None:
    logits, labels = make_logits(dtype), make_labels("random")
    result = dice_ce_loss(logits, labels, DECATHLON, ce=ce)  # type: ignore[arg-type]
    expected = dice_ce_loss(logits.detach().float(), labels, DECATHLON, ce=ce)  # type: ignore[arg-type]
    assert result.loss.dtype == result.dice.dtype == result.ce.dtype == torch.float32
    assert torch.equal(torch.stack(result), torch.stack(expected))
    result.loss.backward()
    assert logits.grad is not None and logits.grad.dtype == dtype


def test_the_loss_traces_as_one_graph() -> None:
    logits, labels = make_logits(torch.float32), make_labels("random")
    compiled = torch.compile(dice_ce_loss, backend="eager", fullgraph=True)
    for ce in get_args(CrossEntropy):
        torch.testing.assert_close(compiled(logits, labels, DECATHLON, ce), dice_ce_loss(logits, labels, DECATHLON, ce))


def test_a_label_outside_the_coding_counts_as_background() -> None:
    labels = make_labels("random")
    unknown = torch.where(labels == 0, torch.tensor(200, dtype=torch.uint8), labels)
    logits = make_logits(torch.float32)
    ours, theirs = (dice_ce_loss(logits, given, DECATHLON) for given in (unknown, labels))
    assert torch.equal(torch.stack(ours), torch.stack(theirs))


def test_regions_equal_numpy_membership() -> None:
    labels = make_labels("random")
    for regions in CODINGS.values():
        assert torch.equal(region_masks(labels, regions), multi_hot(labels, regions, torch.bool))


def test_a_perfect_confident_prediction_costs_nothing_in_bce() -> None:
    labels = make_labels("random")
    logits = 60 * (2 * multi_hot(labels, DECATHLON, torch.float32) - 1)
    assert dice_ce_loss(logits, labels, DECATHLON, ce="bce").loss < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 8, 7)}, r"logits have shape \(2, 3, 8, 7\).*five axes"),
        ({"logits": torch.zeros(SHAPE, dtype=torch.int32)}, "logits are torch.int32.*floating point"),
        ({"labels": torch.zeros(2, 8, 7, 6)}, "labels are torch.float32.*uint8"),
        (
            {"labels": torch.zeros(2, 1, 8, 7, 6, dtype=torch.uint8)},
            r"labels have shape \(2, 1, 8, 7, 6\).*\(2, 8, 7, 6\)",
        ),
        ({"regions": ((1,), (2,))}, "2 regions .* 3 channels"),
        ({"regions": ((1,), (), (2,))}, r"region \(\) must name at least one label value"),
        ({"regions": ((1,), (256,), (2,))}, r"region \(256,\) .* integers from 0 to 255"),
        ({"ce": "softmax"}, "ce 'softmax' must be one of multihot, argmax, bce"),
        ({"logits": torch.zeros(2, 1, 8, 7, 6), "regions": ((1,),), "ce": "argmax"}, "single region is always zero"),
        ({"ce_weight": -1.0}, "ce_weight -1.0 must be zero or a positive"),
        ({"smooth_dr": float("nan")}, "smooth_dr nan must be"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str) -> None:
    arguments = {"logits": torch.zeros(SHAPE), "labels": make_labels("random"), "regions": DECATHLON, **change}
    with pytest.raises(ValueError, match=message):
        dice_ce_loss(**arguments)
