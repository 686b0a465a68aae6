"""Weights between ours and the reference packages: exact both ways, complete, and refused where they do not belong."""

from __future__ import annotations

import pytest
import torch
from test_models import HEADS, IMG_SIZE, SMALL, TOLERANCES, build_pair, build_reference, relative, volumes

from models import NETWORKS, build_model, from_reference, to_reference


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


@pytest.mark.parametrize("name", NETWORKS)
def test_a_round_trip_changes_no_bit(name: str) -> None:
    weights = build_model(name, 2, img_size=IMG_SIZE, **SMALL[name]).state_dict()
    back = from_reference(name, to_reference(name, weights, HEADS[name]), HEADS[name])
    assert set(back) == set(weights)
    assert all(torch.equal(back[key], value) for key, value in weights.items())


@pytest.mark.parametrize("name", NETWORKS)
def test_reference_weights_survive_a_round_trip(name: str) -> None:
    reference = build_reference(name, 2, IMG_SIZE, **SMALL[name]).state_dict()
    back = to_reference(name, from_reference(name, reference, HEADS[name]), HEADS[name])
    assert set(back) == set(reference)
    assert all(torch.equal(back[key], value) for key, value in reference.items())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_stem_without_projection_converts_both_ways(name: str) -> None:
    """The residual block of the stem has no projection then, ours and the references' alike."""
    widths = {**SMALL[name], "feature_size": 2}
    torch.manual_seed(0)
    ours, reference = build_model(name, 2, img_size=IMG_SIZE, **widths), build_reference(name, 2, IMG_SIZE, **widths)
    ours.load_state_dict(from_reference(name, reference.state_dict(), HEADS[name]), strict=True)
    with torch.no_grad():
        assert relative(ours(volumes()), reference(volumes())) < TOLERANCES["float32"]
        for parameter in ours.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        reference.load_state_dict(to_reference(name, ours.state_dict(), HEADS[name]), strict=True)
        assert relative(reference(volumes()), ours(volumes())) < TOLERANCES["float32"]


@pytest.mark.parametrize(
    ("name", "theirs"), [("unetr", "init_conv.conv_down.0"), ("unetr_monai", "encoder1.layer.conv3")]
)
def test_a_missing_or_unexpected_stem_projection_is_refused(name: str, theirs: str) -> None:
    wide = to_reference(name, build_model(name, 2, img_size=IMG_SIZE, **SMALL[name]).state_dict(), HEADS[name])
    projection = {key: value for key, value in wide.items() if key.startswith(theirs)}
    with pytest.raises(ValueError, match=rf"{len(projection)} keys missing \({theirs}.*, 0 unexpected"):
        from_reference(name, {key: wide[key] for key in wide if key not in projection}, HEADS[name])
    equal = build_model(name, 2, img_size=IMG_SIZE, **{**SMALL[name], "feature_size": 2}).state_dict()
    with pytest.raises(ValueError, match=rf"0 keys missing, {len(projection)} unexpected \({theirs}"):
        from_reference(name, {**to_reference(name, equal, HEADS[name]), **projection}, HEADS[name])


def test_weights_of_another_architecture_are_refused_by_name() -> None:
    unet = build_reference("unet", 2, IMG_SIZE, **SMALL["unet"]).state_dict()
    with pytest.raises(
        ValueError, match=r"not the weights of the reference of 'unetr': .*missing \(embed\..*unexpected \(model\."
    ):
        from_reference("unetr", unet)
    ours = build_model("unet", 2, img_size=IMG_SIZE, **SMALL["unet"]).state_dict()
    with pytest.raises(ValueError, match=r"not the weights of our 'unetr_monai': .*unexpected \(bottom\."):
        to_reference("unetr_monai", ours)


@pytest.mark.parametrize("name", NETWORKS)
def test_one_missing_or_foreign_key_is_enough(name: str) -> None:
    weights = to_reference(name, build_model(name, 2, img_size=IMG_SIZE, **SMALL[name]).state_dict(), HEADS[name])
    gone = next(key for key in weights if "norm_cross_attn" not in key)
    with pytest.raises(ValueError, match=f"1 keys missing \\({gone}\\), 0 unexpected"):
        from_reference(name, {key: value for key, value in weights.items() if key != gone}, HEADS[name])
    with pytest.raises(ValueError, match=r"0 keys missing, 1 unexpected \(module\.x\)"):
        from_reference(name, {**weights, "module.x": torch.zeros(1)}, HEADS[name])
