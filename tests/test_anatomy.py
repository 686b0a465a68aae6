"""A drawn head: smooth fields, ramps as wide as a voxel, a tumour inside the brain whose parts are nested."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.anatomy import CENTRE_MM, HEAD_MM, SEMI_AXES_MM, Field, draw_anatomy, draw_seat, draw_tumour

VOXEL_MM = 5.0
AXES = [np.arange(VOXEL_MM / 2, extent, VOXEL_MM, dtype=np.float32) for extent in HEAD_MM]
GRID = [axis - centre for axis, centre in zip(np.meshgrid(*AXES, indexing="ij", sparse=True), CENTRE_MM, strict=True)]


def field(seed: int) -> Field:
    return Field(np.random.default_rng(seed), (AXES[0], AXES[1], AXES[2]), VOXEL_MM)


def test_smooth_fields_have_mean_0_and_deviation_1() -> None:
    f = field(0)
    values = np.stack([f.smooth(20) for _ in range(20)])
    assert values.shape[1:] == f.shape
    assert abs(values.mean()) < 0.05 and values.std() == pytest.approx(1, abs=0.1)
    assert np.abs(np.diff(values, axis=1)).mean() < 0.5 * values.std()


def test_a_ramp_is_at_least_a_voxel_wide() -> None:
    depth = np.array([-10, -2.5, 0, 2.5, 10], np.float32)
    np.testing.assert_array_equal(field(0).ramp(depth), [0, 0, 0.5, 1, 1])
    np.testing.assert_array_equal(field(0).ramp(depth, 20), [0, 0.375, 0.5, 0.625, 1])


def test_a_tumour_sits_inside_the_head() -> None:
    for seed in range(200):
        seat = draw_seat(np.random.default_rng(seed))
        assert np.linalg.norm(np.array(seat.centre) / SEMI_AXES_MM) <= 0.72 + 1e-9
        assert 11 <= seat.core_mm <= 22 and seat.whole_mm > 1.3 * seat.core_mm


@pytest.mark.parametrize("enhances", [True, False])
def test_parts_of_a_tumour_are_nested_in_the_brain(enhances: bool) -> None:
    f = field(3)
    seat = draw_seat(f.rng)
    anatomy = draw_anatomy(f, GRID)
    tumour = draw_tumour(f, GRID, seat, anatomy, enhances)
    core, rim = tumour.core > 0, tumour.rim > 0
    assert (tumour.oedema > 0)[core].all() and core[rim].all() and rim.any() == enhances
    assert anatomy.brain[tumour.oedema > 0].all()
    assert np.unique(tumour.label).tolist() == [0, 1, 2, 3][: 4 if enhances else 3]
