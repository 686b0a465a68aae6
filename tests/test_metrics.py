"""Dice against MONAI's DiceMetric on the same masks."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from monai.metrics import DiceMetric

from engine.inference import compose_labels
from engine.metrics import CaseDice, case_dice, scored_regions, summarise, written_regions
from pipelines.layouts.labels import (
    CODINGS,
    TUTORIAL,
    Coding,
    coding_from_dataset_json,
    regions_from_labels,
    tutorial_coding,
)


def random_cases() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Masks (3, X, Y, Z) of four cases: ordinary, an empty truth that is predicted, one that is not, all empty."""
    generator = torch.Generator().manual_seed(0)
    cases = [(torch.rand(3, 7, 6, 5, generator=generator) > 0.6, torch.rand(3, 7, 6, 5, generator=generator) > 0.7)
             for _ in range(4)]  # fmt: skip
    cases[1][1][2] = False
    cases[2][1][2] = False
    cases[2][0][2] = False
    cases[3][1][:] = False
    return cases


def test_each_case_and_region_equals_monai_with_empty_truths_ignored() -> None:
    monai = DiceMetric(include_background=True, reduction="none", ignore_empty=True)
    for prediction, truth in random_cases():
        expected = monai(prediction[None].float(), truth[None].float())[0].tolist()
        assert case_dice("case", prediction, truth).dice() == pytest.approx(expected, nan_ok=True)


def test_the_challenge_convention_scores_empty_truths_as_monai_does() -> None:
    monai = DiceMetric(include_background=True, reduction="none", ignore_empty=False)
    for prediction, truth in random_cases():
        expected = monai(prediction[None].float(), truth[None].float())[0].tolist()
        assert case_dice("case", prediction, truth).dice(empty_as_one=True) == pytest.approx(expected)


def codings() -> dict[str, Coding]:
    """Every coding, the tutorial's, and of `dataset.json` files: with necrosis, and with no core but what enhances."""
    labels = {"0": "background", "1": "edema", "2": "enhancing tumour"}
    with pytest.warns(UserWarning, match="label 2 is scored"):
        tutorial = tutorial_coding(CODINGS["decathlon"])
    plain, necrosis = (coding_from_dataset_json(each) for each in (labels, labels | {"4": "necrotic core"}))
    return CODINGS | {TUTORIAL: tutorial, "plain": plain, "necrosis": necrosis}


def test_the_scored_regions_are_those_of_the_written_label_map_in_every_coding() -> None:
    masks = torch.tensor(list(product([False, True], repeat=3))).T.reshape(3, 2, 2, 2)  # each way to overlap
    for name, coding in codings().items():
        labels = compose_labels(masks.numpy(), coding)
        assert set(labels.flat) <= set(coding.values)
        written = torch.from_numpy(regions_from_labels(labels, coding))
        assert torch.equal(written_regions(masks, coding), written), name
        assert torch.equal(scored_regions(masks, coding, "label_map"), written)
        assert torch.equal(scored_regions(masks, coding, "masks"), masks) and not torch.equal(written, masks)
        core, whole, enhancing = written
        assert not (enhancing & ~core).any() and not (core & ~whole).any()
        assert torch.equal(whole, masks.any(0)), name  # no voxel of a tumour becomes background


def test_a_regions_dice_is_the_mean_over_the_cases_that_have_it() -> None:
    cases = [case_dice(str(i), *masks) for i, masks in enumerate(random_cases())]
    monai = DiceMetric(include_background=True, reduction="mean_batch", ignore_empty=True)
    for prediction, truth in random_cases():
        monai(prediction[None].float(), truth[None].float())
    summary = summarise(cases)
    regions = [summary[name] for name in ("TC", "WT", "ET")]
    assert regions == pytest.approx(monai.aggregate().tolist())
    assert summary["mean"] == pytest.approx(sum(regions) / 3)
    assert summary["empty_truths"] == {"TC": 1, "WT": 1, "ET": 3}
    assert summary["false_positives"] == {"TC": 1, "WT": 1, "ET": 2}


def test_a_region_that_no_case_has_is_none_and_excluded_from_the_mean() -> None:
    cases = [CaseDice("a", (4, 6, 0), (5, 8, 0), (5, 8, 0)), CaseDice("b", (2, 6, 0), (5, 8, 3), (5, 8, 0))]
    summary = summarise(cases)
    assert summary["ET"] is None
    assert summary["mean"] == pytest.approx(((0.8 + 0.4) / 2 + 0.75) / 2)
    assert summary["false_positives"]["ET"] == 1
    assert summarise(cases, empty_as_one=True)["ET"] == pytest.approx(0.5)
    assert summarise([])["mean"] is None


def test_masks_of_different_shapes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"case_7.*same shape"):
        case_dice("case_7", torch.zeros(3, 2, 2, 2, dtype=torch.bool), torch.zeros(3, 2, 2, 3, dtype=torch.bool))


def test_a_cases_mean_is_over_the_regions_that_its_truth_has() -> None:
    assert CaseDice("a", (9, 5, 0), (10, 10, 7), (10, 10, 0)).mean() == pytest.approx(0.7)
    assert math.isnan(CaseDice("a", (0, 0, 0), (1, 1, 1), (0, 0, 0)).mean())


def test_an_empty_truth_is_nan_by_default() -> None:
    assert all(map(math.isnan, CaseDice("a", (0, 0, 0), (1, 0, 2), (0, 0, 0)).dice()))
