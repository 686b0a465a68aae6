"""Dice + CE from the label map: against MONAI's losses on the multi-hot target, and the kernels against the reference.

The public function takes whichever path there is (see `kernel_paths`); float64, and bfloat16 in the interpreter, take
the reference.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from kernel_paths import COMPILED, DEVICES, needs_kernels, not_interpreted, runs_kernels
from monai.losses import DiceCELoss, DiceLoss
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import dice_ce, dispatch
from kernels.dice_ce import CrossEntropy, DiceCE, dice_ce_loss, dice_ce_loss_reference, region_masks

pytestmark = pytest.mark.kernel


SHAPE = (2, 3, 8, 7, 6)
DECATHLON = ((2, 3), (1, 2, 3), (3,))
CODINGS = {"decathlon": DECATHLON, "brats2018": ((1, 4), (1, 2, 4), (4,)), "tutorial": ((2, 3), (1, 2, 3), (2,))}
VALUES = (0, 1, 2, 3, 4)
"""All label values of these tests; each coding lacks some."""
WEIGHT = (0.5, 2.0, 3.0)
CE = get_args(CrossEntropy)
KINDS = [("multihot", None), ("argmax", WEIGHT), ("bce", WEIGHT)]
"""Each cross-entropy, and both ways of weighting."""
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-6, 2e-6),
    torch.float16: (2e-6, 1e-3),
    torch.bfloat16: (2e-6, 8e-3),
}
"""Of values, and of the norm of a gradient, which is rounded to the dtype: against float64 on the same logits."""
# With squared_pred MONAI takes the overlap as a difference of three sums. Where the target is empty it cancels, which
# leaves rounding beside a true gradient of 1e-7 in all; gradients with a target are of the order 0.01.
GRADIENT_FLOOR = 1e-3
LABELS = ("random", "no enhancing tumour", "background only", "one sample background")
# (B, R, X, Y, Z): one voxel, odd and even sizes, several chunks and tiles with a ragged end, one region to five
SIZES = ((1, 2, 1, 1, 1), (2, 3, 8, 7, 6), (3, 1, 4, 4, 4), (1, 3, 16, 20, 13), (2, 5, 9, 4, 3))


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


def make_case(
    size: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor, tuple[tuple[int, ...], ...]]:
    """Logits, labels from 0 to 5 and overlapping regions; only the first has label 1."""
    generator = torch.Generator().manual_seed(sum(size))
    logits = (3 * torch.randn(size, generator=generator)).to(device, dtype)
    labels = torch.randint(0, 6, (size[0], *size[2:]), generator=generator, dtype=torch.uint8).to(device)
    regions = tuple((1, 5, 4) if r == 0 else tuple(range(2 + r % 3, 6)) for r in range(size[1]))
    return logits, labels, regions


def loss_of(logits: Tensor, labels: Tensor, regions: Any, *args: Any, **options: Any) -> DiceCE:
    return dice_ce_loss(logits, labels, regions, *args, background=(0, 1, 2, 3, 4, 5), **options)


def multi_hot(labels: Tensor, regions: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> Tensor:
    masks = [np.isin(labels.numpy(), region) for region in regions]
    return torch.from_numpy(np.stack(masks, axis=1)).to(dtype)


def assert_equal_with_gradient(ours: Tensor, logits: Tensor, expected: Tensor, their_logits: Tensor) -> None:
    tolerance, _ = TOLERANCES[logits.dtype]
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=0)
    mine = torch.autograd.grad(ours, logits)[0]
    theirs = torch.autograd.grad(expected, their_logits)[0]
    assert (mine - theirs).norm() <= tolerance * max(theirs.norm().item(), GRADIENT_FLOOR)


def assert_equals_float64(
    logits: Tensor, labels: Tensor, regions: Any, atol: float = 1e-7, factors: Any = (1.0, 0.5, -0.25), **options: Any
) -> Tensor:
    """Values and the gradient of a combination of loss, dice and ce against the reference in float64.

    Zero factors leave an output out of the combination. Returns the gradient.
    """
    rtol, gradient_tolerance = TOLERANCES[logits.dtype]
    given = logits.detach().requires_grad_()
    exact = logits.detach().double().requires_grad_()
    ours = loss_of(given, labels, regions, **options)
    expected = dice_ce_loss_reference(exact, labels, regions, **options)
    for value, target in zip(ours, expected):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), target, rtol=rtol, atol=atol)
    mine, theirs = (
        torch.autograd.grad(sum(factor * value for factor, value in zip(factors, values) if factor), x)[0]
        for values, x in ((ours, given), (expected, exact))
    )
    assert mine.dtype == logits.dtype and mine.shape == logits.shape
    assert (mine.double() - theirs).norm() <= gradient_tolerance * max(theirs.norm().item(), 10 * atol)
    return mine


# Against MONAI


@not_interpreted
@pytest.mark.parametrize("squared_pred", [False, True])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("kind", LABELS)
def test_multihot_equals_monai_dice_ce(squared_pred: bool, batch: bool, kind: str) -> None:
    labels = make_labels(kind)
    logits, their_logits = make_logits(torch.float64), make_logits(torch.float64)
    options = {"squared_pred": squared_pred, "batch": batch, "smooth_nr": 0.02, "smooth_dr": 0.5}
    ours = loss_of(logits, labels, DECATHLON, dice_weight=0.7, ce_weight=1.3, **options)
    monai = DiceCELoss(to_onehot_y=False, sigmoid=True, lambda_dice=0.7, lambda_ce=1.3, **options)
    expected = monai(their_logits, multi_hot(labels, DECATHLON, torch.float64))
    assert_equal_with_gradient(ours.loss, logits, expected, their_logits)


@pytest.mark.parametrize("coding", list(CODINGS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_seeds_loss_equals_monai_under_every_coding(coding: str, dtype: torch.dtype) -> None:
    labels, regions = make_labels("random"), CODINGS[coding]
    logits, their_logits = make_logits(dtype), make_logits(dtype)
    expected = DiceCELoss(to_onehot_y=False, sigmoid=True)(their_logits, multi_hot(labels, regions, dtype))
    assert_equal_with_gradient(loss_of(logits, labels, regions).loss, logits, expected, their_logits)


@not_interpreted
@pytest.mark.parametrize("batch", [False, True])
def test_weights_of_regions_equal_monais(batch: bool) -> None:
    labels = make_labels("random")
    logits, their_logits = make_logits(torch.float64), make_logits(torch.float64)
    monai = DiceCELoss(sigmoid=True, weight=torch.tensor(WEIGHT, dtype=torch.float64), batch=batch)
    expected = monai(their_logits, multi_hot(labels, DECATHLON, torch.float64))
    ours = loss_of(logits, labels, DECATHLON, weight=WEIGHT, batch=batch)
    assert_equal_with_gradient(ours.loss, logits, expected, their_logits)


@not_interpreted
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("kind", LABELS)
def test_argmax_equals_monai_before_pull_request_5292(kind: str, weight: tuple[float, ...] | None) -> None:
    labels = make_labels(kind)
    logits, their_logits = make_logits(torch.float64), make_logits(torch.float64)
    target = multi_hot(labels, DECATHLON, torch.float64)
    weights = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    expected = DiceLoss(sigmoid=True, weight=weight)(their_logits, target)
    expected = expected + nn.CrossEntropyLoss(weight=weights)(their_logits, target.argmax(dim=1))
    ours = loss_of(logits, labels, DECATHLON, ce="argmax", weight=weight)
    assert_equal_with_gradient(ours.loss, logits, expected, their_logits)


@not_interpreted
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("kind", LABELS)
def test_bce_equals_monai_dice_and_torch_bce(kind: str, weight: tuple[float, ...] | None) -> None:
    labels = make_labels(kind)
    logits, their_logits = make_logits(torch.float64), make_logits(torch.float64)
    target = multi_hot(labels, DECATHLON, torch.float64)
    pos_weight = None if weight is None else torch.tensor(weight, dtype=torch.float64).view(3, 1, 1, 1)
    expected = DiceLoss(sigmoid=True, weight=weight)(their_logits, target)
    expected = expected + nn.BCEWithLogitsLoss(pos_weight=pos_weight)(their_logits, target)
    ours = loss_of(logits, labels, DECATHLON, ce="bce", weight=weight)
    assert_equal_with_gradient(ours.loss, logits, expected, their_logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weight", [None, (2.5,)])
def test_one_region_equals_monai_which_turns_to_bce(dtype: torch.dtype, weight: tuple[float] | None) -> None:
    labels = make_labels("random")
    logits, their_logits = (make_logits(dtype, (2, 1, 8, 7, 6)) for _ in range(2))
    monai = DiceCELoss(sigmoid=True, weight=None if weight is None else torch.tensor(weight, dtype=dtype))
    expected = monai(their_logits, multi_hot(labels, ((1, 2),), dtype))
    ours = loss_of(logits, labels, ((1, 2),), weight=weight)
    assert_equal_with_gradient(ours.loss, logits, expected, their_logits)


# What the loss is, on every path


def test_loss_is_the_weighted_sum_of_its_parts() -> None:
    result = loss_of(make_logits(torch.float32), make_labels("random"), DECATHLON, dice_weight=0.3, ce_weight=2.0)
    torch.testing.assert_close(result.loss, 0.3 * result.dice + 2.0 * result.ce)
    torch.testing.assert_close(torch.autograd.grad(result.dice, result.dice, retain_graph=True)[0], torch.tensor(1.0))


@pytest.mark.parametrize("ce", ["multihot", "argmax", "bce"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(ce: str, dtype: torch.dtype) -> None:
    logits, labels = make_logits(dtype), make_labels("random")
    result = loss_of(logits, labels, DECATHLON, ce=ce)
    expected = loss_of(logits.detach().float(), labels, DECATHLON, ce=ce)
    assert result.loss.dtype == result.dice.dtype == result.ce.dtype == torch.float32
    torch.testing.assert_close(torch.stack(result), torch.stack(expected), rtol=1e-6, atol=0)
    result.loss.backward()
    assert logits.grad is not None and logits.grad.dtype == dtype


def test_regions_equal_numpy_membership() -> None:
    labels = make_labels("random")
    for regions in CODINGS.values():
        assert torch.equal(region_masks(labels, regions), multi_hot(labels, regions, torch.bool))


def test_a_perfect_confident_prediction_costs_nothing_in_bce() -> None:
    labels = make_labels("random")
    logits = 60 * (2 * multi_hot(labels, DECATHLON, torch.float32) - 1)
    assert loss_of(logits, labels, DECATHLON, ce="bce").loss < 1e-6


def test_any_label_value_may_be_of_a_region_zero_and_255_too() -> None:
    labels = torch.tensor([0, 128, 255, 5], dtype=torch.uint8).view(1, 4, 1, 1)
    assert_equals_float64(make_logits(torch.float32, (1, 2, 4, 1, 1)), labels, ((0, 128), (255,)), ce="argmax")


def test_an_unknown_label_counts_as_background_if_labels_are_not_checked() -> None:
    labels = make_labels("random")
    unknown = torch.where(labels == 0, torch.tensor(200, dtype=torch.uint8), labels)
    logits = make_logits(torch.float32)
    ours, theirs = (dice_ce_loss(logits, given, DECATHLON, check_labels=False) for given in (unknown, labels))
    assert torch.equal(torch.stack(ours), torch.stack(theirs))


def test_an_unknown_label_is_named() -> None:
    labels = make_labels("random")
    labels[0, 0, 0, :2] = torch.tensor([9, 200], dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"labels contain 4, 9, 200, in none of .*; .*background=\(0, 4, 9, 200\)"):
        dice_ce_loss(make_logits(torch.float32), labels, DECATHLON)
    dice_ce_loss(make_logits(torch.float32), labels, DECATHLON, background=(0, 4, 9, 200))


def test_background_replaces_the_default() -> None:
    labels = make_labels("random") + 1
    with pytest.raises(ValueError, match="labels contain 4, 5, in none"):
        dice_ce_loss(make_logits(torch.float32), labels, DECATHLON)
    with pytest.raises(ValueError, match="labels contain 4, in none"):
        dice_ce_loss(make_logits(torch.float32), labels, DECATHLON, background=(5,))


def test_labels_are_not_checked_while_a_graph_is_traced_or_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = make_logits(torch.float32), make_labels("random")
    compiled = torch.compile(dice_ce_loss, backend="eager", fullgraph=True)
    expected = dice_ce_loss(logits, labels, DECATHLON, check_labels=False)
    torch.testing.assert_close(compiled(logits, labels, DECATHLON), expected)
    on_gpu: Any = SimpleNamespace(is_cuda=True)  # and without values
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    dice_ce._check_labels(on_gpu, (), ())
    with pytest.raises(ValueError, match="labels contain"):
        dice_ce._check_labels(labels, (), ())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(AttributeError):
        dice_ce._check_labels(on_gpu, (), ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 8, 7)}, r"logits of shape \(2, 3, 8, 7\) .* axes \(batch, regions, X, Y, Z\)"),
        ({"labels": [[0]]}, "labels must be a tensor, not list"),
        ({"labels": torch.zeros(2, 8, 7, 6)}, "labels of torch.float32.*uint8"),
        (
            {"labels": torch.zeros(2, 1, 8, 7, 6, dtype=torch.uint8)},
            r"labels of shape \(2, 1, 8, 7, 6\).*\(2, 8, 7, 6\)",
        ),
        ({"labels": torch.zeros(2, 8, 7, 6, dtype=torch.uint8, device="meta")}, "labels on meta but logits on cpu"),
        ({"regions": ((1,), (2,))}, "2 regions .* 3 channels"),
        ({"regions": ((1,), (), (2,))}, r"region \(\) must name at least one label value"),
        ({"regions": ((1,), (256,), (2,))}, r"region \(256,\) .* integers from 0 to 255"),
        ({"regions": [1, 2, 3]}, r"region 1 must name .*a sequence of its own: \(\(1,\), \(2,\)\)"),
        ({"regions": ((1,), (2.0,), (3,))}, r"region \(2.0,\) must name .* integers from 0 to 255"),
        ({"regions": 3}, "regions 3 must be a sequence of label values per channel"),
        ({"background": 0}, r"background 0 must be a sequence of label values.*: \(0,\)"),
        ({"background": (-1,)}, r"background \(-1,\) must be .* from 0 to 255"),
        ({"ce": "softmax"}, "ce 'softmax' must be one of multihot, argmax, bce"),
        ({"logits": torch.zeros(2, 1, 8, 7, 6), "regions": ((1,),), "ce": "argmax"}, "single region is always zero"),
        ({"ce_weight": -1.0}, "ce_weight -1.0 must be a finite number, zero or positive"),
        ({"smooth_dr": float("nan")}, "smooth_dr nan must be"),
        ({"dice_weight": "1"}, "dice_weight '1' must be"),
        ({"weight": (1.0, 2.0)}, r"weight \(1.0, 2.0\) must be 3 finite numbers, .* one per region"),
        ({"weight": 2.0}, "weight 2.0 must be 3 finite numbers.*None"),
        ({"weight": ("a", 1.0, 1.0)}, "weight .'a', 1.0, 1.0. must be 3 finite numbers"),
        ({"weight": (1.0, -2.0, 1.0)}, "weight .* zero or positive"),
        ({"weight": (1.0, float("inf"), 1.0)}, "weight .* finite"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str) -> None:
    arguments = {"logits": torch.zeros(SHAPE), "labels": make_labels("random"), "regions": DECATHLON, **change}
    with pytest.raises(ValueError, match=message):
        dice_ce_loss(**arguments)


# Whatever path there is, against float64


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "ce"), [*((torch.float32, ce) for ce in CE), (torch.float16, "multihot"), (torch.bfloat16, "bce")]
)
@pytest.mark.parametrize("size", SIZES)
def test_every_size_kind_and_dtype_equals_float64(
    size: tuple[int, ...], dtype: torch.dtype, ce: str, device: str
) -> None:
    if ce == "argmax" and size[1] == 1:
        pytest.skip("argmax over one region is refused")
    logits, labels, regions = make_case(size, dtype, device)
    assert_equals_float64(logits, labels, regions, ce=ce)


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dtype", dispatch.DTYPES)
@pytest.mark.parametrize("ce", CE)
def test_the_models_logits_equal_float64_and_themselves(
    ce: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    needs_kernels("cuda")
    logits, labels, regions = make_case((2, 3, 128, 128, 64), dtype, "cuda")
    logits = logits.to(memory_format=memory_format)
    first, second = (assert_equals_float64(logits, labels, regions, ce=ce) for _ in range(2))
    assert torch.equal(first, second) and first.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("squared_pred", "batch"), [(False, False), (True, True)])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("ce", CE)
def test_every_combination_of_options_equals_float64(
    ce: str, weight: tuple[float, ...] | None, batch: bool, squared_pred: bool, device: str
) -> None:
    logits, labels, regions = make_case((3, 3, 5, 8, 6), torch.float32, device)
    factors = {"dice_weight": 0.7, "ce_weight": 1.3, "smooth_nr": 0.02, "smooth_dr": 0.5}
    assert_equals_float64(
        logits, labels, regions, ce=ce, weight=weight, batch=batch, squared_pred=squared_pred, **factors
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("used", [used for used in itertools.product((0, 1), repeat=3) if any(used)])
def test_loss_dice_and_ce_each_have_a_gradient_alone_and_together(used: tuple[int, ...], device: str) -> None:
    logits, labels, regions = make_case(SHAPE, torch.float32, device)
    factors = [factor * use for factor, use in zip((0.3, 2.0, -1.5), used)]
    assert_equals_float64(logits, labels, regions, factors=factors, dice_weight=0.4, ce_weight=0.9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "sliced channels_last", "strided space", "expanded"])
def test_every_memory_layout_equals_float64_and_is_kept(layout: str, device: str) -> None:
    logits, labels, regions = make_case((2, 3, 5, 8, 6), torch.float32, device)
    if "sliced" in layout:
        logits = torch.cat([torch.full_like(logits[:, :1], torch.nan), logits], dim=1)
    if "channels_last" in layout:
        logits = logits.to(memory_format=torch.channels_last_3d)
    if "sliced" in layout:
        logits = logits[:, 1:]
    elif layout == "strided space":
        logits = logits.repeat_interleave(2, dim=3)[:, :, :, ::2]
        labels = labels.repeat_interleave(2, dim=2)[:, :, ::2]
    elif layout == "expanded":
        logits = logits[:, :, :1, :1, :1].expand(2, 3, 5, 8, 6)
    gradient = assert_equals_float64(logits, labels, regions)
    if "channels_last" in layout and runs_kernels(device):
        assert gradient.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("ce", "channels_last"), [("multihot", False), ("argmax", True), ("bce", False)])
def test_many_voxels_are_summed_as_in_float64(ce: str, channels_last: bool, device: str) -> None:
    size = (1, 3, 128, 127, 65) if device == "cuda" else (1, 3, 24, 31, 17)
    logits, labels, regions = make_case(size, torch.float32, device)
    if channels_last:
        logits = logits.to(memory_format=torch.channels_last_3d)
    assert_equals_float64(logits, labels, regions, ce=ce)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [60.0, 1e4])
@pytest.mark.parametrize("ce", CE)
def test_saturated_logits_stay_finite_and_equal_float64(ce: str, size: float, device: str) -> None:
    logits, labels, regions = make_case(SHAPE, torch.float32, device)
    assert_equals_float64(logits.sign() * size, labels, regions, ce=ce)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ce", CE)
def test_empty_regions_equal_float64(ce: str, device: str) -> None:
    logits, labels, _ = make_case(SHAPE, torch.float32, device)
    assert_equals_float64(logits, labels, ((7,), (2, 3), (9,)), ce=ce)


@pytest.mark.parametrize("device", DEVICES)
def test_a_region_with_voxels_needs_no_smoothing(device: str) -> None:
    logits, labels, regions = make_case(SHAPE, torch.float32, device)
    assert_equals_float64(logits, labels, regions, smooth_nr=0.0, smooth_dr=0.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ce", CE)
def test_a_nan_among_the_logits_is_not_hidden(ce: str, device: str) -> None:
    logits, labels, regions = make_case(SHAPE, torch.float32, device)
    logits[1, 1, 2, 3, 4] = torch.nan
    assert loss_of(logits, labels, regions, ce=ce).loss.isnan()


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
def test_argmax_without_a_weighted_target_is_nan_as_torchs() -> None:
    logits, labels = make_logits(torch.float32), make_labels("background only")
    assert loss_of(logits, labels, DECATHLON, ce="argmax", weight=(0.0, 1.0, 1.0)).ce.isnan()


@pytest.mark.parametrize("device", DEVICES)
def test_a_second_call_gives_the_same_bits(device: str) -> None:
    logits, labels, regions = make_case((2, 3, 8, 12, 24), torch.float32, device)
    results = []
    for _ in range(2):
        given = logits.clone().requires_grad_()
        result = loss_of(given, labels, regions, ce="argmax", weight=WEIGHT)  # all the sums there are
        results.append([*result, *torch.autograd.grad(result.loss, given)])
    assert all(torch.equal(first, second) for first, second in zip(*results))


@pytest.mark.parametrize("device", DEVICES)
def test_under_autocast_the_loss_is_float32_of_the_logits_as_they_come(device: str) -> None:
    logits, labels, regions = make_case(SHAPE, torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        assert_equals_float64(logits, labels, regions)
        assert_equals_float64(logits.bfloat16(), labels, regions)


def test_over_31_regions_take_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "launch", None)
    logits, labels, regions = make_case((1, 32, 3, 2, 2))
    assert_equals_float64(logits, labels, regions)


@not_interpreted
@pytest.mark.parametrize(("device", "backend"), COMPILED)
@pytest.mark.parametrize(("ce", "weight"), KINDS)
def test_pytorchs_own_path_is_the_reference_compiled_as_one_graph(
    ce: str, weight: tuple[float, ...] | None, device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(dispatch, "path", lambda op, x, key: "torch")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    monkeypatch.setattr(dispatch, "compiled", dispatch.compiled.__wrapped__)  # without its cache
    for size in (SHAPE, (1, *SHAPE[1:])):
        logits, labels, regions = make_case(size, torch.float32, device)
        assert_equals_float64(logits, labels, regions, ce=ce, weight=weight)


# Under torch.compile


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("ce", "weight"), KINDS)
def test_the_loss_traces_as_one_graph(ce: CrossEntropy, weight: tuple[float, ...] | None, device: str) -> None:
    logits, labels, regions = make_case(SHAPE, torch.float32, device)
    compiled = torch.compile(dice_ce_loss, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, loss_of):
        given = logits.clone().requires_grad_()
        result = function(given, labels, regions, ce, weight=weight)
        results.append([*result, *torch.autograd.grad(result.loss + result.ce, given)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_has_the_table_as_a_constant_made_once(
    dynamic: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "path", lambda *_: "triton")
    monkeypatch.setattr(dispatch, "launch", lambda *_: None)
    dice_ce._cached_table.cache_clear()
    tables: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        ops = [node for node in graph.graph.nodes if node.target is torch.ops.glioforge.dice_ce.default]
        tables.extend(op.args[2].op for op in ops)
        return aot_eager(graph, inputs)

    torch.compiler.reset()
    compiled = torch.compile(dice_ce_loss, backend=backend, fullgraph=True, dynamic=dynamic)
    logits, labels, regions = make_case(SHAPE, torch.float32, device)
    for _ in range(2):
        torch.autograd.grad(compiled(logits.requires_grad_(), labels, regions).loss, logits)
    assert set(tables) == {"get_attr"} and dice_ce._cached_table.cache_info().misses == 1
    compiled(logits, labels, ((5, 4), *regions[1:]))
    assert set(tables) == {"get_attr"} and dice_ce._cached_table.cache_info().misses == 2


def test_a_table_made_in_inference_mode_or_beside_fake_tensors_serves_later_calls() -> None:
    needs_kernels("cpu")
    logits, labels, regions = make_case(SHAPE)
    dice_ce._cached_table.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss_of(torch.empty(SHAPE), torch.empty(2, *SHAPE[2:], dtype=torch.uint8), regions, check_labels=False)
    with torch.inference_mode():
        loss_of(logits, labels, regions)
    assert_equals_float64(logits, labels, regions)


@pytest.mark.parametrize("device", DEVICES)
def test_sizes_may_be_symbols(device: str) -> None:
    compiled = torch.compile(dice_ce_loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in ((2, 3, 4, 6, 5), (3, 3, 7, 4, 8)):
        logits, labels, regions = make_case(size, torch.float32, device)
        torch.testing.assert_close(compiled(logits, labels, regions), loss_of(logits, labels, regions))


@pytest.mark.parametrize("device", DEVICES)
def test_inductor_gives_the_eager_loss_and_gradient(device: str) -> None:
    needs_kernels(device)
    logits, labels, regions = make_case(SHAPE, torch.float32, device)

    def step(logits: Tensor) -> Tensor:
        return dice_ce_loss(logits * 2, labels, regions, background=VALUES).loss

    results = []
    for function in (torch.compile(step, fullgraph=True), step):
        given = logits.clone().requires_grad_()
        loss = function(given)
        results.append([loss, *torch.autograd.grad(loss, given)])
    torch.testing.assert_close(*results)


@pytest.mark.gpu
def test_a_compiled_cuda_graph_repeats_the_eager_loss_and_gradient() -> None:
    """In a process of its own, in which nothing has made the table before."""
    code = """if True:
        import torch
        from kernels.dice_ce import dice_ce_loss

        logits = torch.randn(2, 3, 16, 16, 32, device="cuda", requires_grad=True)
        labels = torch.randint(0, 4, (2, 16, 16, 32), device="cuda", dtype=torch.uint8)

        def step(logits, labels):
            return dice_ce_loss(2 * logits, labels, ((2, 3), (1, 2, 3), (3,))).loss

        compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
        for _ in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            loss = compiled(logits, labels)
            (gradient,) = torch.autograd.grad(loss, logits)
            loss, gradient = loss.detach().clone(), gradient.clone()
        expected = step(logits, labels)
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(gradient, *torch.autograd.grad(expected, logits))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "skipping cudagraphs" not in done.stderr


@pytest.mark.gpu
def test_a_captured_cuda_graph_repeats_the_eager_loss_and_gradient() -> None:
    logits, labels, regions = make_case(SHAPE, torch.float32, "cuda")
    logits.requires_grad_()

    def step() -> list[Tensor]:
        loss = loss_of(logits, labels, regions).loss
        return [loss, *torch.autograd.grad(loss, logits)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles the kernels and makes the table
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        logits *= -1
    graph.replay()
    torch.testing.assert_close(captured, step(), rtol=0, atol=0)


# The kernels themselves


@pytest.mark.parametrize("device", DEVICES)
def test_forward_takes_two_launches_and_backward_one(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_kernels(device)
    logits, labels, regions = make_case(SHAPE, torch.float32, device)
    launched: list[str] = []
    absent: list[str] = []
    launch = dispatch.launch

    def spy(kernel: Any, grid: Any, args: dict[str, Any], *others: Any) -> None:
        launched.append(kernel.fn.__name__)
        absent[:] = [name for name, value in args.items() if value is None]
        launch(kernel, grid, args, *others)

    monkeypatch.setattr(dispatch, "launch", spy)
    result = loss_of(logits.requires_grad_(), labels, regions)
    assert launched == ["dice_ce_forward_kernel", "dice_ce_combine_kernel"]
    (result.loss + result.dice).backward()
    assert launched[2:] == ["dice_ce_backward_kernel"]
    assert set(absent) == {"dce_ptr", "weight"}  # no zeros are written for what has no gradient


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_candidate_gives_the_default_ones_result(
    channels_last: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_kernels(device)
    logits, labels, regions = make_case((2, 3, 8, 8, 9), torch.float32, device)
    if channels_last:
        logits = logits.to(memory_format=torch.channels_last_3d)
    launch = dispatch.launch

    def run(nth: int) -> list[Tensor]:
        monkeypatch.setattr(dispatch, "launch", lambda k, g, a, c, key: launch(k, g, a, [c[nth % len(c)]], key))
        given = logits.clone().requires_grad_()
        result = loss_of(given, labels, regions)
        return [*result, *torch.autograd.grad(result.loss, given)]

    for nth in range(1, 4):
        torch.testing.assert_close(run(nth), run(0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [False, True])
def test_partial_sums_of_several_tiles_are_all_combined(
    batch: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_kernels(device)
    logits, labels, regions = make_case((2, 3, 8, 8, 7), torch.float32, device)
    monkeypatch.setattr(dice_ce, "MIN_CHUNK", 64)
    monkeypatch.setattr(dice_ce, "CHUNK_STEP", 64)  # seven chunks of a sample
    launch = dispatch.launch

    def in_small_tiles(kernel: Any, grid: Any, args: Any, candidates: Any, key: str) -> None:
        small = [{"ROWS": 2, "COLUMNS": 2, "num_warps": 4, "num_stages": 1}]
        launch(kernel, grid, args, small if "COLUMNS" in candidates[0] else candidates, key)

    monkeypatch.setattr(dispatch, "launch", in_small_tiles)
    assert_equals_float64(logits, labels, regions, ce="argmax", weight=WEIGHT, batch=batch)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("regions", [7, 31])
def test_as_many_regions_as_a_word_has_bits_equal_float64(regions: int, device: str) -> None:
    needs_kernels(device)
    logits, labels, of_values = make_case((1, regions, 5, 4, 3), torch.float32, device)
    weight = [0.5 + r for r in range(regions)]
    for ce in get_args(CrossEntropy):
        assert_equals_float64(logits, labels, of_values, ce=ce, weight=weight)


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_may_pass_two_to_the_31_elements(device: str) -> None:
    needs_kernels(device)
    logits, labels, regions = make_case((3, 2, 4, 4, 4), torch.float16, device)
    storage = torch.empty(2**31 + 256, dtype=torch.float16, device=device)  # on a CPU no memory until it is touched
    far = storage.as_strided(logits.shape, (2**30, 64, 16, 4, 1)).copy_(logits)
    assert torch.equal(torch.stack(loss_of(far, labels, regions)), torch.stack(loss_of(logits, labels, regions)))
    assert_equals_float64(far, labels, regions)


@pytest.mark.parametrize("device", DEVICES)
def test_the_operators_pass_opcheck(device: str) -> None:
    needs_kernels(device)
    logits, labels, regions = make_case(SHAPE, torch.float32, device)
    table = dice_ce._table(regions, labels.device)
    options = (list(WEIGHT), "multihot", [0.7, 1.3, 1e-5, 1e-5], True, False)
    torch.library.opcheck(dice_ce._forward_op, (logits.clone().requires_grad_(), labels, table, *options))
    *_, coefficients = dice_ce._forward_op(logits, labels, table, *options)
    upstream = torch.ones((), device=device)
    args = (upstream, None, upstream, logits, labels, table, coefficients, None, *options[1:])
    torch.library.opcheck(dice_ce._backward_op, args)


def test_shapes_that_are_tuned_separately_have_different_keys() -> None:
    def key(*shape: int, dtype: torch.dtype = torch.bfloat16, last: bool = False) -> str:
        logits = torch.empty(shape, dtype=dtype, device="meta")
        return dice_ce._key_of(logits.to(memory_format=torch.channels_last_3d) if last else logits, "bce")

    crop = (3, 128, 128, 64)
    assert key(2, *crop) == "R3 voxels2097152 bce bfloat16 contiguous"
    assert key(3, *crop) == key(4, *crop)
    others = [key(16, *crop), key(2, 4, *crop[1:]), key(2, *crop, dtype=torch.float32), key(2, *crop, last=True)]
    assert len({key(2, *crop), key(2, 3, 127, 127, 63), *others}) == 6


def test_launches_need_shapes_only() -> None:
    launched: list[dispatch.Launch] = []
    logits = torch.empty(2, 3, 128, 128, 64, dtype=torch.bfloat16, device="meta")
    labels = torch.empty(2, 128, 128, 64, dtype=torch.uint8, device="meta")
    table = torch.empty(256, dtype=torch.int64, device="meta")
    options = (None, "multihot", [1.0, 1.0, 1e-5, 1e-5], False, False)
    with dispatch.observed(launched.append):
        loss, *_, coefficients = dice_ce.dice_ce_forward(logits, labels, table, *options)
        dx = dice_ce.dice_ce_backward(loss, None, None, logits, labels, table, coefficients, *options)
    assert dx.shape == logits.shape and dx.dtype == logits.dtype
    forward, _, backward = launched
    assert forward.grid(forward.candidates[0]) == (256, 2)
    assert backward.grid(backward.candidates[0]) == (1024, 2)
