"""The shapes of a synthetic head with a tumour, drawn from distances in mm; `pipelines.phantom` makes scans of them.

Everything is made of smooth random fields, distances and ramps: a surface is where a distance is zero, and a tissue's
occupancy rises from 0 to 1 over at least a voxel around it. All draws come from one generator in the order of the code,
so a seed always gives the same head, and another order of the code would give other heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

HEAD_MM = (240.0, 240.0, 155.0)
CENTRE_MM = (119.5, 124.0, 76.0)
SEMI_AXES_MM = (64.0, 83.0, 71.0)


@dataclass
class Field:
    """Smooth random fields on a box of the head's grid.

    `axes` are the voxel centres in mm along x, y, z; `voxel_mm` is the mean voxel edge, the minimum width of a ramp.
    """

    rng: np.random.Generator
    axes: Sequence[np.ndarray]
    voxel_mm: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels of the box along x, y, z."""
        return tuple(map(len, self.axes))

    def smooth(self, cell_mm: float) -> np.ndarray:
        """A field of mean 0 and deviation about 1 that varies over cell_mm: B-splines, applied one axis at a time."""
        weights = [_bspline_matrix(axis, extent, cell_mm) for axis, extent in zip(self.axes, HEAD_MM, strict=True)]
        grid = self.rng.standard_normal([w.shape[1] for w in weights], dtype=np.float32)
        for weight in weights:  # contract the first axis and put the new one last: x, y, z are in order after three
            grid = np.tensordot(grid, weight, axes=(0, 1))
        return grid / np.float32(0.47930**1.5)  # 151/315, the mean sum of squared cubic B-spline weights, per axis

    def ramp(self, depth_mm: np.ndarray, width_mm: float = 0.0) -> np.ndarray:
        """Occupancy from 0 to 1 by the signed depth inside a surface, over a width of at least a voxel."""
        return np.clip(depth_mm * np.float32(1 / max(width_mm, self.voxel_mm)) + np.float32(0.5), 0, 1)


def _bspline_matrix(axis_mm: np.ndarray, extent_mm: float, cell_mm: float) -> np.ndarray:
    """Cubic B-spline weights (len(axis), nodes) float32 of nodes cell_mm apart."""
    position = axis_mm / cell_mm + 1
    distance = np.abs(position[:, None] - np.arange(int(np.ceil(extent_mm / cell_mm)) + 3))
    inner = 2 / 3 - distance**2 + distance**3 / 2
    outer = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, inner, outer).astype(np.float32)


def _ellipsoid(p: Sequence[np.ndarray], centre: Sequence[float], semi_axes: Sequence[float]) -> np.ndarray:
    """Approximate depth in mm below the surface of an ellipsoid, positive inside."""
    square = sum(((a - c) / s) ** 2 for a, c, s in zip(p, centre, semi_axes, strict=True))
    return (1 - np.sqrt(square)) * np.float32(min(semi_axes))


@dataclass
class Anatomy:
    """Occupancies from 0 to 1 over the box, and the distances that the tumour depends on."""

    brain: np.ndarray  # bool mask
    csf: np.ndarray
    grey: np.ndarray  # white matter is the rest of the brain
    ventricle: np.ndarray  # depth in mm inside the ventricles
    surface: np.ndarray  # depth in mm below the brain's surface
    pial: np.ndarray  # distance in mm to the nearest surface, sulci included
    choroid: np.ndarray  # occupancy of the choroid plexus


def draw_anatomy(f: Field, p: Sequence[np.ndarray]) -> Anatomy:
    """The healthy brain at coordinates p (x to the left, y to the back, z up; mm from the centre)."""
    x, y, z = p
    a, b, c = SEMI_AXES_MM
    wide = a * (1 + 0.07 * np.clip(y / b, -1, 1))  # brains are wider at the back, flat below
    height = np.where(z > 0, np.float32(c), np.float32(0.80 * c))
    radius = np.sqrt((x / wide) ** 2 + (y / b) ** 2 + (z / height) ** 2)
    cerebrum = (1 - radius) * np.float32(75) + 1.5 * f.smooth(16)
    cerebellum = _ellipsoid((np.abs(x), y, z), (20, 45, -42), (32, 30, 24))
    stem = _ellipsoid(p, (0, 18, -58), (13, 13, 34))
    surface = np.maximum(np.maximum(cerebrum, cerebellum), stem)

    sheet = np.abs(f.smooth(12)) * np.float32(7.5)  # mm, about, to a sulcus
    sulcus = np.minimum(sheet, np.abs(f.smooth(9)) * np.float32(5.5) + 1) + 0.4 * np.clip(surface - 15, 0, None)
    fissure = np.abs(x) + 0.6 * np.clip(44 - np.hypot(y, z + 6), 0, None)  # the callosum joins the hemispheres
    pial = np.minimum(np.minimum(surface, sulcus), fissure)

    side = np.abs(x)
    spread = f.rng.uniform(0.75, 1.3)
    bend = 0.0045 * (y - 4) ** 2
    horn = _ellipsoid((side - 10 - 0.8 * bend, y - 4, z - 9 + 0.6 * bend), (0, 0, 0), (6.5 * spread, 38, 11 * spread))
    third = _ellipsoid(p, (0, 8, -8), (2.2 * spread, 14, 11))
    ventricle = np.maximum(horn + 0.5 * f.smooth(14), third)
    nuclei = np.maximum(
        _ellipsoid((side, y, z), (12, 12, -4), (9, 14, 9)), _ellipsoid((side, y, z), (26, -4, -4), (6, 18, 10))
    )
    csf = np.maximum(f.ramp(0.6 - pial), f.ramp(ventricle))
    cortex = f.ramp(3.3 + 0.5 * f.smooth(10) - pial, 1.2)
    grey = np.maximum(cortex, 0.75 * f.ramp(nuclei, 2.0)) * (1 - csf)
    choroid = f.ramp(_ellipsoid((side, y, z), (16, 24, 4), (3, 6, 3)) + 0.8 * f.smooth(6)) * f.ramp(ventricle)
    return Anatomy(surface > 0, csf, grey, ventricle, surface, pial, choroid)


@dataclass
class Tumour:
    """Depths in mm of the nested tumour, positive inside, and its label map."""

    oedema: np.ndarray
    core: np.ndarray
    rim: np.ndarray
    necrosis: np.ndarray
    label: np.ndarray


@dataclass(frozen=True)
class Seat:
    """Where a tumour sits: centre in mm from the head's centre, radii in mm of the core and of the whole."""

    centre: list[float]
    core_mm: float
    whole_mm: float
    stretch: list[float]


def draw_seat(rng: np.random.Generator) -> Seat:
    """A random seat, in a hemisphere's white matter or near its cortex."""
    side = 1 if rng.random() < 0.5 else -1
    centre = np.array([side * rng.uniform(20, 44), rng.uniform(-50, 46), rng.uniform(-18, 38)])
    reach = np.sqrt(np.sum((centre / SEMI_AXES_MM) ** 2))
    centre *= min(1.0, 0.72 / reach)
    core = rng.uniform(11, 22)
    stretch = np.exp(rng.uniform(-0.2, 0.2, 3))
    return Seat(centre.tolist(), core, core * rng.uniform(1.35, 1.9), stretch.tolist())


def draw_tumour(f: Field, p: Sequence[np.ndarray], seat: Seat, anatomy: Anatomy, enhances: bool) -> Tumour:
    """The tumour at coordinates p, inside the brain and outside the ventricles."""
    distance = np.sqrt(sum(((a - c) / s) ** 2 for a, c, s in zip(p, seat.centre, seat.stretch, strict=True)))
    rough = f.smooth(18) * np.float32(0.28) + f.smooth(8) * np.float32(0.09)
    room = np.minimum(anatomy.surface - 2, 1.5 - anatomy.ventricle)
    core = seat.core_mm * (1 + rough) - distance
    margin = np.minimum(core + 2.5, room)  # oedema all around, except at the surface and the ventricles
    core = np.minimum(core, room)
    fingers = f.smooth(24) * np.float32(0.24) + f.smooth(9) * np.float32(0.10)
    oedema = seat.whole_mm * (1 + fingers) - distance - np.float32(0.14 * seat.whole_mm) * anatomy.grey
    oedema = np.maximum(np.minimum(oedema, room - 1.5 * anatomy.csf), margin)
    shell = np.float32(f.rng.uniform(3, 6.5)) * (1 + 0.6 * f.smooth(11))
    rim = np.minimum(core, shell - core) if enhances else np.full_like(core, -1e3)
    necrosis = core - np.maximum(shell, 2) - f.rng.uniform(0, 3) - np.clip(2 * f.smooth(12), -1, 3)
    label = (oedema > 0).astype(np.uint8)
    label[core > 0] = 2
    label[(core > 0) & (rim > 0)] = 3
    label[~anatomy.brain] = 0
    return Tumour(oedema, core, rim, necrosis, label)


def draw_distractors(f: Field, p: Sequence[np.ndarray], anatomy: Anatomy) -> tuple[np.ndarray, np.ndarray]:
    """Occupancies of bright structures that are not tumour: white-matter lesions with ventricular caps, and vessels."""
    spots = np.full(f.shape, -1e3, dtype=np.float32)
    for _ in range(f.rng.integers(2, 9)):
        side = 1 if f.rng.random() < 0.5 else -1
        centre = (side * f.rng.uniform(16, 42), f.rng.uniform(-48, 52), f.rng.uniform(-8, 40))
        spots = np.maximum(spots, _ellipsoid(p, centre, f.rng.uniform(2.0, 6.5, 3).tolist()))
    caps = f.rng.uniform(-2, 0.5) + anatomy.ventricle + 1.5 * np.clip(f.smooth(15), -2, 2)
    lesion = np.maximum(f.ramp(spots, 2.0), f.ramp(np.minimum(caps, 6.0), 3.0)) * (1 - anatomy.grey - anatomy.csf)
    first, second = f.smooth(26), f.smooth(26)
    tube = 1.4 - np.hypot(first, second) * np.float32(16)  # two fields are both zero along curves
    sinus = 2.6 - np.hypot(p[0], anatomy.surface - 2.5) + np.clip(0.2 * p[2], None, 0)
    vessel = np.maximum(f.ramp(np.minimum(tube, 8 - anatomy.pial)), f.ramp(sinus))
    return lesion, np.maximum(vessel, anatomy.choroid)
