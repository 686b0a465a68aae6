"""The MONAI transforms of the published tutorial: the oracle that the store and the DALI pipelines are compared with.

The chain, under MONAI's current names (`AsChannelFirstd` became `EnsureChannelFirstd`, `ToTensord` is not needed):

    load, channel first, labels to regions, Spacing 1.5 x 1.5 x 2.0 mm, Orientation RAS             `prepare_steps`
    training: random crop, flip of the first axis, z-score of the non-zero voxels, scale, shift     `train_steps`
    validation: centre crop, z-score of the non-zero voxels                                         `val_steps`

As in the tutorial, a label map is split into regions before it is resampled: three binary float channels, nearest
neighbour. The engine resamples the label map and splits it in the loss; both must agree on every voxel.

The regions come from the release's coding. MONAI's transform of nearly the same name,
`ConvertToMultiChannelBasedOnBratsClassesd`, knows only the codes 1, 2 and 4 (or 3), and finds no ET in Decathlon.
Source: https://github.com/Project-MONAI/tutorials, 3d_segmentation/brats_segmentation_3d.ipynb.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    MapTransform,
    NormalizeIntensityd,
    Orientationd,
    RandFlipd,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSpatialCropd,
    Spacingd,
    Transform,
)

from pipelines.layouts.cases import Case
from pipelines.layouts.labels import Coding
from pipelines.scans.geometry import DEFAULT_SPACING

SPACING_MM = DEFAULT_SPACING.mm
KEYS = ("image", "label")


class SelectChannelsd(Transform):
    """Keep the modalities of a 4D image that `case_to_dict` lists under "channels", in that order."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        out = dict(data)
        if out["channels"] is not None:
            out["image"] = out["image"][list(out["channels"])]
        return out


class LabelsToRegionsd(MapTransform):
    """Split a label map (1, X, Y, Z) into TC, WT and ET: float32 (3, X, Y, Z), 0 or 1.

    Args:
        keys: of the label maps.
        coding: which values belong to which region.
    """

    def __init__(self, keys: Sequence[str], coding: Coding) -> None:
        super().__init__(keys)
        self.coding = coding

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        out = dict(data)
        for key in self.key_iterator(out):
            label = torch.round(out[key])
            out[key] = torch.cat([torch.isin(label, torch.tensor(values)) for values in self.coding.regions]).float()
        return out


def case_to_dict(case: Case) -> dict[str, Any]:
    """A case as MONAI's dictionary: "name", "image" (one path or one per modality), "channels", "label".

    "label" is missing for a case without one; the transforms need it.
    """
    images = [str(path) for path in case.images]
    entry: dict[str, Any] = {"name": case.name, "image": images, "channels": case.channels}
    if case.channels is not None:
        entry["image"] = images[0]
    if case.label is not None:
        entry["label"] = str(case.label)
    return entry


def prepare_steps(coding: Coding, spacing_mm: Sequence[float] = SPACING_MM) -> list[Any]:
    """From files to (C, X, Y, Z) image and (3, X, Y, Z) regions at `spacing_mm`, in RAS; the store does this once."""
    return [
        LoadImaged(keys=KEYS),
        EnsureChannelFirstd(keys=KEYS),
        SelectChannelsd(),
        LabelsToRegionsd(keys=["label"], coding=coding),
        Spacingd(keys=KEYS, pixdim=tuple(spacing_mm), mode=("bilinear", "nearest")),
        Orientationd(keys=KEYS, axcodes="RAS", labels=None),
    ]


def train_steps(crop_size: Sequence[int]) -> list[Any]:
    """Crop, flip, z-score, scale and shift of one training sample, as in the DALI pipeline."""
    return [
        RandSpatialCropd(keys=KEYS, roi_size=tuple(crop_size), random_size=False),
        RandFlipd(keys=KEYS, prob=0.5, spatial_axis=0),
        NormalizeIntensityd(keys="image", nonzero=True, channel_wise=True),
        RandScaleIntensityd(keys="image", factors=0.1, prob=0.5),
        RandShiftIntensityd(keys="image", offsets=0.1, prob=0.5),
    ]


def val_steps(crop_size: Sequence[int]) -> list[Any]:
    """Centre crop and z-score of one validation sample."""
    return [
        CenterSpatialCropd(keys=KEYS, roi_size=tuple(crop_size)),
        NormalizeIntensityd(keys="image", nonzero=True, channel_wise=True),
    ]


def seed_transforms(
    coding: Coding, crop_size: Sequence[int], spacing_mm: Sequence[float] = SPACING_MM, train: bool = True
) -> Compose:
    """The tutorial's whole chain, for the dictionaries of `case_to_dict`.

    Args:
        coding: of the label maps.
        crop_size: (X, Y, Z) in voxels. MONAI does not pad: a smaller volume gives a smaller crop.
        spacing_mm: voxel size after resampling, along the axes of the files.
        train: random crop and augmentation, or the centre crop of validation.

    Returns:
        A transform to {"image": float32 (C, X, Y, Z), "label": float32 (3, X, Y, Z) of TC, WT, ET, ...}.
    """
    steps = train_steps(crop_size) if train else val_steps(crop_size)
    return Compose([*prepare_steps(coding, spacing_mm), *steps])
