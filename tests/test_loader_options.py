"""Options of the loaders: values that make no sense are refused, with the value."""

from __future__ import annotations

import pytest
import torch

from pipelines.loading.loader_options import CropOptions, LoaderOptions

CROP = (16, 12, 8)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"crop_size": (16, 16)}, r"crop_size \(16, 16\) must be 3 whole numbers"),
        ({"batch_size": 0}, "batch_size 0 must be at least 1"),
        ({"crops_per_case": 0}, "crops_per_case 0 must be at least 1"),
        ({"accumulate_steps": 0}, "accumulate_steps 0 must be at least 1"),
        ({"foreground_prob": 1.5}, "foreground_prob 1.5 must be at most 1"),
    ],
)
def test_crops_that_make_no_sense_are_refused_with_the_value(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CropOptions(**({"crop_size": CROP} | setting))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"device": torch.device("meta")}, "device meta must be a CPU or a CUDA GPU"),
        ({"rank": 2, "world_size": 2}, "rank 2 must be at least 0 and below world_size 2"),
        ({"rank": -1}, "rank -1 must be at least 0"),
    ],
)
def test_a_rank_or_device_that_there_is_not_is_refused(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoaderOptions(**setting)
