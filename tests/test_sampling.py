"""Draws and order of an epoch, against the statistics they should have and the crops that MONAI can draw."""

from __future__ import annotations

import monai.transforms as mt
import numpy as np
import pytest
from monai.transforms.utils import correct_crop_centers

from pipelines.loading.sampling import CropDraw, Size, draw_sample, epoch_order

TOLERANCES = {"share": 0.02, "share of foreground": 0.03, "mean": 0.005, "correlation": 0.05}  # of 6,000 draws


def test_order_is_padded_from_its_own_start_and_fresh_each_epoch() -> None:
    order = epoch_order(seed=1, epoch=0, samples=10, multiple=4)
    assert len(order) == 12
    assert sorted(order[:10]) == list(range(10))
    np.testing.assert_array_equal(order[10:], order[:2])
    np.testing.assert_array_equal(order, epoch_order(1, 0, 10, 4))
    assert not np.array_equal(order, epoch_order(1, 1, 10, 4))
    assert not np.array_equal(order, epoch_order(2, 0, 10, 4))
    assert len(epoch_order(0, 0, samples=3, multiple=8)) == 8


def draws(n: int, shape: Size, crop: Size, foreground: list[Size] | None = None, prob: float = 0.0) -> list[CropDraw]:
    voxels = np.empty((0, 3), np.int32) if foreground is None else np.asarray(foreground, np.int32)
    return [draw_sample(0, 1, position, shape, crop, voxels, prob) for position in range(n)]


def test_crop_starts_are_uniform_over_all_that_fit_ends_included() -> None:
    starts = np.array([d.start for d in draws(6000, (19, 16, 10), (16, 16, 8))])
    for axis, room in enumerate((3, 0, 2)):
        counts = np.bincount(starts[:, axis], minlength=room + 1)
        assert len(counts) == room + 1
        np.testing.assert_allclose(counts / 6000, 1 / (room + 1), atol=TOLERANCES["share"])
    monai = mt.RandSpatialCrop((16, 16, 8), random_size=False).set_random_state(0)
    reached = set()
    for _ in range(300):
        monai.randomize((19, 16, 10))
        reached.add(tuple(s.start for s in monai._slices))
    assert reached == {tuple(start) for start in starts.tolist()}


def test_flip_scale_and_shift_have_the_probabilities_and_ranges_of_the_chain() -> None:
    sample = draws(6000, (16, 16, 8), (16, 16, 8))
    assert np.mean([d.flip for d in sample]) == pytest.approx(0.5, abs=TOLERANCES["share"])
    for values in (np.array([d.scale for d in sample]), np.array([d.shift for d in sample])):
        drawn = values[values != 0]
        assert len(drawn) / 6000 == pytest.approx(0.5, abs=TOLERANCES["share"])
        assert np.abs(drawn).max() <= 0.1
        assert drawn.min() < -0.099
        assert drawn.max() > 0.099
        assert drawn.mean() == pytest.approx(0, abs=TOLERANCES["mean"])
    pairs = np.array([(d.flip, d.scale != 0, d.shift != 0) for d in sample], float)
    # Independent of each other:
    np.testing.assert_allclose(
        np.corrcoef(pairs.T), np.eye(3), atol=TOLERANCES["correlation"]
    )  # independent of each other


def test_foreground_crops_hold_the_tumour_voxel_at_their_centre_or_are_clamped() -> None:
    middle, corner = (20, 18, 12), (0, 39, 1)
    assert {d.start for d in draws(50, (40, 40, 24), (16, 16, 8), [middle], 1.0)} == {(12, 10, 8)}
    assert {d.start for d in draws(50, (40, 40, 24), (16, 16, 8), [corner], 1.0)} == {(0, 24, 0)}
    share = np.mean([d.start == (12, 10, 8) for d in draws(3000, (40, 40, 24), (16, 16, 8), [middle], 0.7)])
    assert share == pytest.approx(0.7, abs=TOLERANCES["share of foreground"])


@pytest.mark.parametrize("crop", [(16, 16, 8), (15, 40, 7), (1, 17, 24)])
def test_foreground_crops_are_those_of_monai_about_the_same_voxel(crop: Size) -> None:
    """MONAI's RandCropByPosNegLabel crops about a voxel once it has moved it so that the crop fits."""
    shape = (40, 41, 24)
    for voxel in np.random.default_rng(0).integers(0, shape, (200, 3)).tolist():
        (draw,) = draws(1, shape, crop, [voxel], 1.0)
        centre = correct_crop_centers(voxel, crop, shape)
        expected = mt.SpatialCrop(roi_center=centre, roi_size=crop)
        assert draw.start == tuple(s.start for s in expected.slices)


def test_a_case_without_tumour_gets_uniform_crops_even_if_all_are_asked_on_the_tumour() -> None:
    assert len({d.start for d in draws(200, (40, 40, 24), (16, 16, 8), None, 1.0)}) > 150
