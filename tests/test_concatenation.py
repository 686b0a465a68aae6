"""A room for two maps gives what `torch.cat` gives, forward and backward, and copies no map that is in its half."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_paths import DEVICES, needs_kernels
from torch import Tensor

from kernels import dispatch
from kernels.instance_norm import instance_norm, instance_norm_into
from models import build_model
from models.concatenation import Room, join, room_for

pytestmark = pytest.mark.kernel

SHAPE = (2, 3, 4, 2, 6)
BELOW = (2, 5, 2, 1, 3)
FIRST, LAST = torch.contiguous_format, torch.channels_last_3d
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}
"""Relative to the norm of what is expected."""


def randn(seed: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(device, dtype).contiguous(memory_format=LAST)


def below(device: str) -> Tensor:
    return torch.zeros(BELOW, device=device).contiguous(memory_format=LAST)


def room(dtype: torch.dtype = torch.float64, device: str = "cpu") -> Room:
    """A room made by hand, for dtypes and devices without a kernel too."""
    batch, channels, *space = SHAPE
    whole = torch.full((batch, 2 * channels, *space), float("nan"), dtype=dtype, device=device)
    whole = whole.contiguous(memory_format=LAST)
    return Room(whole, whole.data[:, :channels], whole.data[:, channels:])


class _Into(torch.autograd.Function):
    """x * 3 in a given place, as an operation of ours writes it."""

    @staticmethod
    def forward(ctx: object, x: Tensor, out: tuple[Tensor]) -> Tensor:
        return out[0].copy_(x * 3)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * 3, None


def joined(x: Tensor, z: Tensor, in_place: str) -> Tensor:
    """tanh(3 x) beside tanh(3 z)."""
    place = room(x.dtype)
    left = _Into.apply(x, (place.left,)) if in_place in ("left", "both") else x * 3
    right = _Into.apply(z, (place.right,)) if in_place in ("right", "both") else z * 3
    return join(left, right, place).tanh()


@pytest.mark.parametrize("in_place", ["none", "left", "right", "both"])
def test_a_room_gives_what_cat_gives_twice_in_a_row(in_place: str) -> None:
    for seed in (0, 1):
        x, z = randn(seed).requires_grad_(), randn(seed + 2).requires_grad_()
        expected = torch.cat([x * 3, z * 3], dim=1).tanh()
        out = joined(x, z, in_place)
        assert torch.equal(out, expected)
        cotangent = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, (x, z), cotangent)
        for found, want in zip(torch.autograd.grad(out, (x, z), cotangent), wanted, strict=True):
            torch.testing.assert_close(found, want, rtol=TOLERANCES[torch.float64], atol=0)


def test_a_map_in_its_half_is_not_copied() -> None:
    place = room()
    left = _Into.apply(randn(0), (place.left,))
    whole = join(left, randn(1), place)
    assert whole.data_ptr() == left.data_ptr() == place.whole.data_ptr()
    assert place.left._version == 1  # the producer's own writing
    swapped = room()
    right = _Into.apply(randn(0), (swapped.right,))
    expected = torch.cat([right.clone(), randn(1)], dim=1)
    assert torch.equal(join(right, randn(1), swapped), expected)  # it was in the other half


def test_the_gradients_of_the_halves_are_views_of_the_rooms() -> None:
    x, z = randn(0).requires_grad_(), randn(1).requires_grad_()
    cotangent = room().whole.zero_()
    pair = torch.autograd.grad(join(x, z, room()), (x, z), cotangent)
    assert [gradient.untyped_storage().data_ptr() for gradient in pair] == 2 * [cotangent.data_ptr()]


@pytest.mark.parametrize("device", DEVICES)
def test_there_is_a_room_where_our_kernels_write_channels_last_maps_and_only_there(device: str) -> None:
    x = below(device)
    place = room_for(x, 3)
    assert (place is None) == (dispatch.path("instance_norm", x, "") != "triton")
    if place is not None:
        assert place.left.shape == place.right.shape == SHAPE and place.whole.dtype == torch.float32
    assert room_for(x.contiguous(), 3) is None and room_for(x.double(), 3) is None
    with dispatch.using("reference", device):
        assert room_for(x, 3) is None


@pytest.mark.parametrize("device", DEVICES)
def test_a_room_has_the_dtype_of_convolutions_under_autocast(device: str) -> None:
    needs_kernels(device)
    with torch.autocast(device, torch.float16):
        place = room_for(below(device), 3)
    assert place is not None and place.whole.dtype == torch.float16


@pytest.mark.parametrize("device", DEVICES)
def test_writing_one_half_does_not_pass_for_a_change_of_the_other(device: str) -> None:
    needs_kernels(device)
    x, z = (randn(seed, torch.float32, device).requires_grad_() for seed in (0, 1))
    place = room_for(below(device), 3)
    assert place is not None
    left, right = _Into.apply(x, (place.left,)), _Into.apply(z, (place.right,))
    found = torch.autograd.grad(join(left, right, place).sum(), (x, z))
    assert all((gradient == 3).all() for gradient in found)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms_write_both_halves_and_read_both_halves_of_the_gradient(device: str, dtype: torch.dtype) -> None:
    needs_kernels(device)
    x, z, r = (randn(seed, dtype, device).requires_grad_() for seed in range(3))

    def in_room() -> Tensor:
        place = room_for(below(device).to(dtype), 3)
        assert place is not None
        left = instance_norm_into(place.left, x, negative_slope=0.1)
        right = instance_norm_into(place.right, z, negative_slope=0.1, residual=r, residual_norm=True)
        assert right.data_ptr() == place.right.data_ptr()
        return join(left, right, place)

    def by_cat(x: Tensor, z: Tensor, r: Tensor) -> Tensor:
        right = instance_norm(z, negative_slope=0.1, residual=r, residual_norm=True)
        return torch.cat([instance_norm(x, negative_slope=0.1), right], dim=1)

    exact = [tensor.detach().double().requires_grad_() for tensor in (x, z, r)]
    expected = by_cat(*exact)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    cotangent = cotangent.contiguous(memory_format=LAST)
    wanted = torch.autograd.grad(expected, exact, cotangent.double())
    for _ in range(2):
        out = in_room()
        found = torch.autograd.grad(out, (x, z, r), cotangent)
        for ours, theirs in zip((out, *found), (expected, *wanted), strict=True):
            assert (ours.double() - theirs).norm() < TOLERANCES[dtype] * theirs.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["unetr", "unetr_monai"])
def test_a_decoder_with_rooms_has_the_gradients_of_one_with_cat(
    device: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_kernels(device)
    torch.manual_seed(0)
    heads = {"unetr": 6, "unetr_monai": 5}[name]
    widths = {"feature_size": 2, "hidden_size": 40, "mlp_dim": 56, "num_heads": heads}
    model = build_model(name, 2, img_size=(32, 16, 16), **widths).to(device)
    image = torch.randn(1, 2, 32, 16, 16).to(device)
    written: list[bool] = []

    # Convolutions on a CPU give contiguous maps.
    def into(out: Tensor | None, x: Tensor, **options: Any) -> Tensor:
        y = instance_norm_into(out, x.contiguous(memory_format=LAST), **options)
        if out is not None:
            written.append(y.data_ptr() == out.data_ptr())
        return y

    def run(make: Callable[[Tensor, int], Room | None]) -> list[Tensor]:
        monkeypatch.setattr("models.unetr.room_for", make)
        out = model(image)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [out, *torch.autograd.grad(out.sin().sum(), trained)]

    monkeypatch.setattr("models.unetr.instance_norm_into", into)
    expected = run(lambda *_: None)
    found = run(lambda x, channels: room_for(x.contiguous(memory_format=LAST), channels))
    assert written == {"unetr": [True], "unetr_monai": [True] * 3}[name]  # the stem, and two skips that end in a block
    scale = torch.stack([gradient.norm() for gradient in expected[1:]]).norm()
    torch.testing.assert_close(found[0], expected[0])
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert (ours - theirs).norm() < TOLERANCES[torch.float32] * scale
