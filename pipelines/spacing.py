"""Voxel size of a prepared volume, and along whose axes it is counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

SpacingAxes = Literal["patient", "file"]


@dataclass(frozen=True)
class Spacing:
    """Voxel size of a prepared volume.

    Args:
        mm: along three axes.
        axes: "patient": R, A and S, each assigned to the file's axis nearest to it by nibabel's `io_orientation` (the
            axis closest to one of the patient's chooses first; of two equally close, the first). "file": the file's
            first, second and third, as in MONAI.

    Raises:
        ValueError: a size that is not positive.
    """

    mm: tuple[float, float, float] = (1.5, 1.5, 2.0)
    axes: SpacingAxes = "patient"

    def __post_init__(self) -> None:
        if len(self.mm) != 3 or not all(math.isfinite(s) and s > 0 for s in self.mm):
            raise ValueError(f"spacing_mm {tuple(self.mm)} must be three positive numbers of mm; 1.5 1.5 2.0 is usual")
        x, y, z = (float(s) for s in self.mm)
        object.__setattr__(self, "mm", (x, y, z))  # 1 and 1.0 give a store the same key

    def __str__(self) -> str:
        along = "R, A, S" if self.axes == "patient" else "the axes of the file"
        return f"{' x '.join(f'{s:g}' for s in self.mm)} mm along {along}"


DEFAULT_SPACING = Spacing()


def patient_spacing(value: Spacing | Sequence[float]) -> Spacing:
    """A spacing as it is; three plain numbers are along R, A and S. Raises ValueError as `Spacing`."""
    return value if isinstance(value, Spacing) else Spacing(tuple(value))  # type: ignore[arg-type]


def file_spacing(value: Spacing | Sequence[float]) -> Spacing:
    """A spacing as it is; three plain numbers are along the file's axes (MONAI's). Raises ValueError as `Spacing`."""
    return value if isinstance(value, Spacing) else Spacing(tuple(value), "file")  # type: ignore[arg-type]
