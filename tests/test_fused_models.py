"""The three models and the loss through the fused kernels, against the same through plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_paths import DEVICES, needs_kernels
from torch import Tensor

from kernels import dispatch
from kernels.dice_ce import dice_ce_loss
from models import build_model

pytestmark = pytest.mark.kernel

IMG_SIZE = (32, 16, 16)
TRANSFORMER = {"hidden_size": 40, "mlp_dim": 56}
WIDTHS: dict[str, dict[str, int]] = {
    "unetr": {"feature_size": 2, "num_heads": 6, **TRANSFORMER},  # heads of int(40 / 6) = 6 features
    "unetr_monai": {"feature_size": 2, "num_heads": 5, **TRANSFORMER},
    "unet": {"feature_size": 2},
}
REGIONS = ((2, 3), (1, 2, 3), (3,))
TOLERANCES = {"loss": 1e-5, "gradient": 1e-3, "bfloat16 loss": 2e-2}
"""Relative; of a gradient by its norm."""


@pytest.fixture(autouse=True)
def precise_convolutions() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


def loss_and_gradients(
    name: str, device: str, kernels: dispatch.Kernels, bfloat16: bool = False
) -> tuple[Tensor, list[Tensor], list[str]]:
    """Loss and gradients of a step, and the names of the launched kernels."""
    torch.manual_seed(0)
    model = build_model(name, in_channels=4, img_size=IMG_SIZE, **WIDTHS[name]).to(device)
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 4, *IMG_SIZE, generator=generator).to(device)
    labels = torch.randint(0, 4, (1, *IMG_SIZE), generator=generator, dtype=torch.uint8).to(device)
    launched: list[str] = []

    def run(launch: dispatch.Launch) -> None:
        launched.append(launch.name)
        launch.run(launch.candidates[0])

    with dispatch.using(kernels, device), dispatch.observed(run):
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            loss = dice_ce_loss(model(image), labels, REGIONS).loss
        loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None], launched


def joined(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", WIDTHS)
def test_a_step_through_the_kernels_equals_a_step_through_pytorch(name: str, device: str) -> None:
    needs_kernels(device)
    loss, gradients, launched = loss_and_gradients(name, device, "triton")
    expected, expected_gradients, launched_by_reference = loss_and_gradients(name, device, "reference")
    assert not launched_by_reference
    torch.testing.assert_close(loss, expected, rtol=TOLERANCES["loss"], atol=0)
    # Each parameter by its own gradient, as that of a PReLU's slope is small; but a bias before a norm has none at all.
    floor = 1e-3 * joined(expected_gradients).norm()
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        assert (mine - theirs).norm() <= TOLERANCES["gradient"] * max(theirs.norm(), floor)
    ops = {"attention_", "dice_ce_", "layer_norm_", "norm_"} - (
        {"attention_", "layer_norm_"} if name == "unet" else set()
    )
    assert all(any(kernel.startswith(op) for kernel in launched) for op in ops), set(launched)


@pytest.mark.gpu
@pytest.mark.parametrize("name", WIDTHS)
def test_in_bfloat16_a_step_through_the_kernels_loses_no_more_than_one_through_pytorch(name: str) -> None:
    true_loss, true_gradients, _ = loss_and_gradients(name, "cuda", "reference")
    truth = joined(true_gradients)
    errors = {}
    for kernels in ("triton", "reference"):
        loss, gradients, launched = loss_and_gradients(name, "cuda", kernels, bfloat16=True)
        assert bool(launched) == (kernels == "triton")
        torch.testing.assert_close(loss, true_loss, rtol=TOLERANCES["bfloat16 loss"], atol=0)
        errors[kernels] = ((joined(gradients) - truth).norm() / truth.norm()).item()
    assert errors["triton"] <= 1.5 * errors["reference"] + 1e-3, errors
