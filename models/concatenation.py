"""Two maps side by side on the channel axis, written where they end up.

`torch.cat` reads and writes both maps, and whoever takes a half of its gradient copies that half to make it dense.
Instead: a room for both, which a producer writes its half of (`kernels.instance_norm.instance_norm_into`), and views of
the room's gradient, which the norm's backward reads as they are.

    room = room_for(below, channels)                None where a half can't be written: then `torch.cat`
    both = join(double(below), produce(x, out=room.right), room)

A map that is not in its half yet is copied there. Autograd knows the room only as the output of `join`; each half has a
version counter of its own, so that writing the one does not pass for a change of the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.autocast import product_dtype
from kernels.instance_norm import writes_slices


class Room(NamedTuple):
    """An uninitialised map (B, 2 C, X, Y, Z), channels_last_3d, and its halves (B, C, X, Y, Z) in the same memory."""

    whole: Tensor
    left: Tensor
    right: Tensor


def room_for(below: Tensor, channels: int) -> Room | None:
    """Room for two maps at twice the resolution of the one below.

    Args:
        below: (B, D, X / 2, Y / 2, Z / 2). channels: C, of each of the two, which convolutions compute.

    Returns:
        None where halves can't be written, as on a CPU and under `torch.compile`.
    """
    if not writes_slices(below):
        return None
    shape = len(below), 2 * channels, *(2 * size for size in below.shape[2:])
    dtype = product_dtype(below)
    whole = torch.empty(shape, dtype=dtype, device=below.device, memory_format=torch.channels_last_3d)
    # `.data` gives each half its own version counter.
    return Room(whole, whole.data.narrow(1, 0, channels), whole.data.narrow(1, channels, channels))


def join(left: Tensor, right: Tensor, room: Room | None) -> Tensor:
    """Both maps as one, (B, 2 C, X, Y, Z): the room, or a new map without one. They may have no other consumer."""
    return torch.cat([left, right], dim=1) if room is None else _Join.apply(left, right, room)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, room: Room) -> Tensor:
        for half, tensor in ((room.left, left), (room.right, right)):
            if not _shares_memory(half, tensor):
                half.copy_(tensor)
        return room.whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        left, right = gradient.chunk(2, dim=1)
        return left, right, None


def _shares_memory(half: Tensor, tensor: Tensor) -> bool:
    storages = half.untyped_storage(), tensor.untyped_storage()
    return storages[0]._cdata == storages[1]._cdata and half.storage_offset() == tensor.storage_offset()
