"""How many sliding windows a network takes in one call.

On a CPU two, whose activations stay in cache. A GPU is only busy with more: the largest power of two whose activations,
as `engine.memory` estimates them, fit into half of what is free, and half as many where memory runs out all the same.
Powers of two, because cuDNN searches for its algorithms once for each size of a call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from engine.memory import forward_bytes
from engine.ranks.memory_limits import first_line, is_out_of_memory
from engine.sliding_window import WINDOWS_AT_ONCE

log = logging.getLogger(__name__)
T = TypeVar("T")
MOST = 16  # windows: with more a GPU is no faster
SHARE = 0.5  # of free memory: cuDNN's workspaces and the volume with its logits need the rest


class WindowsAtOnce:
    """The number of windows in a call of one network, for all volumes.

    Args:
        network: on its device. window: its input size in voxels. channels: of its input.
    """

    def __init__(self, network: torch.nn.Module, window: Sequence[int], channels: int) -> None:
        self._network, self._window, self._channels = network, window, channels
        self._count = 0  # not chosen yet: what is free is known when the first volume comes

    def run(self, predict: Callable[[int], T]) -> T:
        """What `predict` returns for a number of windows; with half as many where it runs out of memory.

        Raises:
            Exception: as `predict` raised it; out of memory only for a single window, and on a CPU.
        """
        self._count = self._count or self._choose()
        while True:
            count = self._count
            try:
                return predict(count)
            except Exception as error:
                if count == 1 or self._device.type == "cpu" or not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            # Here, where the error no longer holds the tensors.
            self._count = count // 2
            torch.cuda.empty_cache()
            log.warning("%d windows at once don't fit (%s): predicting %d at once", count, reason, self._count)

    @property
    def _device(self) -> torch.device:
        return next(self._network.parameters()).device

    def _choose(self) -> int:
        if self._device.type == "cpu":
            return WINDOWS_AT_ONCE
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        room = SHARE * (torch.cuda.mem_get_info(self._device)[0] + unused)
        fits = int(room / forward_bytes(self._network, self._window, self._channels))
        return 1 << (max(1, min(fits, MOST)).bit_length() - 1)
