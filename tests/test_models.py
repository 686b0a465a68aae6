"""The three models against the packages that define them: outputs, gradients, sizes and initial weights."""

from __future__ import annotations

import functools
import importlib.util
import sys
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from monai.networks import nets
from torch import Tensor, nn

from models import NETWORKS, build_model, check_img_size, from_reference, parameter_count, to_reference

IMG_SIZE = (48, 32, 16)
TOLERANCES = {"float32": 1e-5, "float64": 1e-12, "bf16": 0.05}
"""Largest difference relative to the norm of what is expected."""
HEADS = {"unetr": 6, "unetr_monai": 4, "unet": 10}
UNUSED = "norm_cross_attn"
SMALL: dict[str, dict[str, int]] = {
    "unetr": {"feature_size": 4, "hidden_size": 40, "mlp_dim": 56, "num_heads": 6},  # heads of 6, 36 features in all
    "unetr_monai": {"feature_size": 4, "hidden_size": 40, "mlp_dim": 56, "num_heads": 4},
    "unet": {"feature_size": 4},
}


@functools.cache
def reference_unetr() -> type[nn.Module]:
    """self-attention-cv's UNETR. The package imports torchvision for one ResNet that UNETR does not use."""
    if importlib.util.find_spec("self_attention_cv") is None:
        pytest.skip("self_attention_cv is not installed: pip install --no-deps self-attention-cv==1.2.3")
    stand_in = ModuleType("torchvision.models")
    stand_in.resnet50 = None  # type: ignore[attr-defined]
    stubs = {} if importlib.util.find_spec("torchvision") else {"torchvision": ModuleType("torchvision")}
    with mock.patch.dict(sys.modules, {**stubs, "torchvision.models": stand_in}):
        from self_attention_cv.UnetTr import UNETR
    return UNETR


def build_reference(
    name: str,
    in_channels: int,
    img_size: tuple[int, ...],
    feature_size: int = 16,
    hidden_size: int | None = None,
    mlp_dim: int | None = None,
    num_heads: int | None = None,
    **options: Any,
) -> nn.Module:
    if name == "unetr":
        return reference_unetr()(
            img_shape=img_size,
            input_dim=in_channels,
            output_dim=3,
            embed_dim=hidden_size or 512,
            num_heads=num_heads or 10,
            base_filters=feature_size,
            dim_linear_block=mlp_dim or 2048,
        )
    if name == "unetr_monai":
        widths = {"hidden_size": hidden_size or 768, "mlp_dim": mlp_dim or 3072, "num_heads": num_heads or 12}
        return nets.UNETR(in_channels, 3, img_size, feature_size, **widths, **options)
    channels = [feature_size * 2**level for level in range(5)]
    return nets.UNet(3, in_channels, 3, channels, (2, 2, 2, 2), num_res_units=2)


def build_pair(name: str, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """(ours, the reference), small, with the same weights."""
    torch.manual_seed(seed)
    reference = build_reference(name, 2, IMG_SIZE, **SMALL[name])
    ours = build_model(name, 2, img_size=IMG_SIZE, **SMALL[name])
    ours.load_state_dict(from_reference(name, reference.state_dict(), HEADS[name]))
    return ours, reference


def volumes(seed: int = 0, dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 2, *IMG_SIZE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(ours: Tensor, expected: Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", NETWORKS)
def test_output_equals_the_reference_with_the_same_weights(name: str) -> None:
    ours, reference = build_pair(name)
    x = volumes()
    with torch.no_grad():
        assert relative(ours(x), reference(x)) < TOLERANCES["float32"]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_gradient_equals_the_reference_in_float64(name: str) -> None:
    ours, reference = (model.double() for model in build_pair(name))
    x, their_x = volumes(dtype=torch.float64).requires_grad_(), volumes(dtype=torch.float64).requires_grad_()
    cotangent = torch.randn(2, 3, *IMG_SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (ours(x) * cotangent).sum().backward()
    (reference(their_x) * cotangent).sum().backward()
    # A frozen bias stands for a gradient of zero, which its reference must then have.
    found = {key: torch.zeros_like(parameter) for key, parameter in ours.named_parameters()}
    found |= {key: parameter.grad for key, parameter in ours.named_parameters() if parameter.grad is not None}
    mine = to_reference(name, found, HEADS[name])
    theirs = {key: parameter.grad for key, parameter in reference.named_parameters() if parameter.grad is not None}
    assert {key for key in mine if UNUSED not in key} == set(theirs)
    scale = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    worst = {key: ((mine[key] - gradient).norm() / scale).item() for key, gradient in theirs.items()}
    assert max(worst.values()) < TOLERANCES["float64"], max(worst, key=lambda key: worst[key])
    assert x.grad is not None and their_x.grad is not None
    assert relative(x.grad, their_x.grad) < TOLERANCES["float64"]


def test_every_network_has_its_small_sizes_here() -> None:
    assert SMALL.keys() == HEADS.keys() == NETWORKS.keys()


def test_parameter_counts_are_the_published_ones() -> None:
    with torch.device("meta"):
        counts = {name: parameter_count(build_model(name, 4)) for name in NETWORKS}
        monai = build_reference("unetr_monai", 4, (128, 128, 64))
        unet = build_reference("unet", 4, (128, 128, 64))
    unused = sum(parameter.numel() for key, parameter in monai.named_parameters() if UNUSED in key)
    assert unused == 18_432
    assert counts["unetr"] == 49_667_123
    assert counts["unetr_monai"] == parameter_count(monai) - unused
    assert counts["unet"] == parameter_count(unet)


@pytest.mark.parametrize("name", NETWORKS)
def test_initial_weights_have_the_distribution_of_the_reference(name: str) -> None:
    torch.manual_seed(0)
    ours = to_reference(name, build_model(name, 2, img_size=IMG_SIZE, **SMALL[name]).state_dict(), HEADS[name])
    reference = build_reference(name, 2, IMG_SIZE, **SMALL[name]).state_dict()
    for key, weights in reference.items():
        count = weights.numel()
        if bool((weights == weights.flatten()[0]).all()):
            assert torch.equal(ours[key], weights), key
        elif count >= 64:  # five standard errors of a ratio of two normal samples' deviations
            spread = weights.std().item()
            assert ours[key].std().item() == pytest.approx(spread, rel=5 / count**0.5), key
            assert abs(ours[key].mean().item()) < 5 * spread / count**0.5, key
            assert ours[key].abs().max().item() == pytest.approx(weights.abs().max().item(), rel=0.4), key


@pytest.mark.parametrize("name", NETWORKS)
def test_bf16_autocast_stays_near_float32(name: str) -> None:
    ours, _ = build_pair(name)
    with torch.no_grad():
        expected = ours(volumes())
        with torch.autocast("cpu", torch.bfloat16):
            out = ours(volumes())
    assert out.dtype == torch.bfloat16
    assert relative(out.float(), expected) < TOLERANCES["bf16"]


@pytest.mark.parametrize("name", ["unetr_monai", "unet"])  # which hold every module that "unetr" has
def test_models_trace_as_one_graph(name: str) -> None:
    model = build_model(name, 2, img_size=IMG_SIZE, **SMALL[name])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(volumes()), model(volumes()))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_smallest_volume_trains(name: str) -> None:
    model = build_model(name, 1, img_size=(16, 16, 16), **SMALL[name])
    model(torch.randn(1, 1, 16, 16, 16)).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("img_size", "nearest"),
    [
        ((96, 96, 90), (96, 96, 96)),
        ((100, 7, 64), (96, 16, 64)),
        ((104, 16, 1), (112, 16, 16)),
        ((0, -3, 16), (16, 16, 16)),
    ],
)
def test_the_error_for_a_wrong_size_suggests_the_nearest_valid_one(
    img_size: tuple[int, ...], nearest: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError) as error:
        check_img_size(img_size, 16)
    assert str(error.value) == f"img_size {img_size} must be divisible by 16 on every axis; try {nearest}"
    check_img_size(nearest, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "segresnet"}, "model 'segresnet' must be one of unetr, unetr_monai, unet"),
        ({"img_size": (96, 96, 90)}, r"try \(96, 96, 96\)"),
        ({"img_size": (96, 96)}, r"img_size \(96, 96\) must have three axes"),
        ({"in_channels": 0}, "in_channels 0 must be at least 1"),
        ({"feature_size": 0}, "feature_size 0 must be at least 1"),
        ({"dropout": 1.0}, "dropout 1.0 must be a probability"),
        ({"hidden_size": 8}, "num_heads 10 must be at most hidden_size 8"),
        ({"hidden_size": 768, "num_heads": 4}, "is 192 features each; the limit is 128: use num_heads 6 or more"),
        ({"name": "unetr_monai", "hidden_size": 256}, "256 must be divisible by num_heads 12 .* try hidden_size 264"),
        (
            {"name": "unet", "hidden_size": 64, "dropout": 0.1},
            "hidden_size 64, dropout 0.1: unet does not have this option; it takes feature_size",
        ),
    ],
)
def test_options_that_no_network_can_have_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(**{"name": "unetr", "in_channels": 4, **options})
