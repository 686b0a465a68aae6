"""The reference packages load our weights, and theirs in each form that differs from ours are taken."""

from __future__ import annotations

import pytest
import torch
from test_models import HEADS, IMG_SIZE, SMALL, TOLERANCES, build_pair, build_reference, relative, volumes

from models import NETWORKS, build_model
from models.convert import from_reference, to_reference


@pytest.mark.parametrize("name", NETWORKS)
def test_the_reference_loads_trained_weights_strictly(name: str) -> None:
    ours, reference = build_pair(name)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    reference.load_state_dict(to_reference(name, ours.state_dict(), HEADS[name]), strict=True)
    with torch.no_grad():
        assert relative(reference(volumes()), ours(volumes())) < TOLERANCES["float32"]


def test_a_perceptron_patch_embedding_becomes_an_equal_convolution() -> None:
    torch.manual_seed(0)
    perceptron = build_reference("unetr_monai", 2, IMG_SIZE, **SMALL["unetr_monai"], proj_type="perceptron")
    ours = build_model("unetr_monai", 2, img_size=IMG_SIZE, **SMALL["unetr_monai"])
    ours.load_state_dict(from_reference("unetr_monai", perceptron.state_dict()))
    with torch.no_grad():
        assert relative(ours(volumes()), perceptron(volumes())) < TOLERANCES["float32"]


def test_heads_that_do_not_fit_and_unknown_names_are_refused() -> None:
    weights = build_model("unetr", 2, img_size=IMG_SIZE, **SMALL["unetr"]).state_dict()
    with pytest.raises(ValueError, match="num_heads 10 does not fit a projection of 108 rows"):
        to_reference("unetr", weights)
    with pytest.raises(ValueError, match="model 'vnet' must be one of unetr, unetr_monai, unet"):
        from_reference("vnet", weights)
