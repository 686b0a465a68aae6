"""Options of the loaders: impossible values are refused by name."""

from __future__ import annotations

import pytest
import torch

from pipelines.loading.loader_options import LoaderOptions


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"device": torch.device("meta")}, "device meta must be a CPU or a CUDA GPU"),
        ({"rank": 2, "world_size": 2}, "rank 2 must be at least 0 and below world_size 2"),
        ({"rank": -1}, "rank -1 must be at least 0"),
    ],
)
def test_a_rank_or_device_that_does_not_exist_is_refused(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoaderOptions(**setting)
