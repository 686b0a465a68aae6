"""The vision transformer within the UNETRs, which test_models.py compares with their references."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from test_models import IMG_SIZE, SMALL, volumes
from torch import Tensor

import models.vit
from models import build_model


@pytest.mark.parametrize("name", ["unetr", "unetr_monai"])
def test_attention_reads_views_of_one_projection(name: str) -> None:
    model = build_model(name, 2, img_size=IMG_SIZE, **SMALL[name])
    seen: list[tuple[Tensor, ...]] = []

    def spy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q, k, v))
        return v

    with mock.patch.object(models.vit, "flash_attention", spy), torch.no_grad():
        model(volumes())
    assert len(seen) == 12
    for views in seen:
        assert len({view.untyped_storage().data_ptr() for view in views}) == 1
        assert all(view.stride(-1) == 1 for view in views)


def test_dropout_acts_only_in_training() -> None:
    torch.manual_seed(0)
    model = build_model("unetr", 2, img_size=IMG_SIZE, dropout=0.5, **SMALL["unetr"])
    x = volumes()
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))
