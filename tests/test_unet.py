"""What the UNet takes. test_models.py compares it with MONAI's."""

from __future__ import annotations

import pytest
import torch
from test_models import IMG_SIZE, SMALL

from models import build_model


def test_unet_takes_any_multiple_of_16_and_refuses_the_rest() -> None:
    model = build_model("unet", 2, img_size=IMG_SIZE, **SMALL["unet"])
    with torch.no_grad():
        assert model(torch.zeros(1, 2, 32, 16, 48)).shape == (1, 3, 32, 16, 48)
    with pytest.raises(ValueError, match=r"volumes of \(32, 16, 40\) voxels .* multiple of 16"):
        model(torch.zeros(1, 2, 32, 16, 40))
