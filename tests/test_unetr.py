"""What the UNETRs take. test_models.py compares them with their references."""

from __future__ import annotations

import pytest
import torch
from test_models import IMG_SIZE, SMALL, volumes

from models import build_model


def test_autocast_takes_as_many_modalities_as_features() -> None:
    """The one residual block whose skip is then the float32 volume itself."""
    model = build_model("unetr", 2, img_size=IMG_SIZE, **{**SMALL["unetr"], "feature_size": 2})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(volumes()).isfinite().all()


@pytest.mark.parametrize("name", ["unetr", "unetr_monai"])
def test_unetr_refuses_a_volume_of_another_size(name: str) -> None:
    model = build_model(name, 2, img_size=IMG_SIZE, **SMALL[name])
    with pytest.raises(
        ValueError, match=r"volumes of \(32, 48, 16\) voxels .* img_size \(48, 32, 16\).*sliding window"
    ):
        model(torch.zeros(1, 2, 32, 48, 16))
