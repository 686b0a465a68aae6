"""A GPU for tests of measurements: tensors stay on the CPU, and a table says how long each thing takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import dispatch, self_tuning
from kernels.self_tuning import Choices

CANDIDATES = [{"BLOCK": 128, "num_warps": 4}, {"BLOCK": 64, "num_warps": 8}, {"BLOCK": 32, "num_warps": 4}]


def a_kernel() -> None: ...


class FakeGpu:
    """What was run, in order, and how many milliseconds each takes: 1 unless `times` says otherwise.

    Attributes:
        ran: labels of all runs: the BLOCK of a kernel, the name of a way.
        timed: labels of what was measured.
        wrong, broken: labels whose result is wrong, or that raise.
    """

    def __init__(self, patch: pytest.MonkeyPatch, name: str = "NVIDIA H100") -> None:
        self.name = name
        self.ran: list[Any] = []
        self.timed: list[Any] = []
        self.times: dict[Any, float] = {}
        self.wrong: set[Any] = set()
        self.broken: set[Any] = set()
        self.is_capturing = False
        self.fn = a_kernel
        patch.setattr(dispatch, "INTERPRETED", False)
        patch.setattr(dispatch, "_refusal", lambda device: "")
        patch.setattr(dispatch, "_capability", lambda device: "sm_90")
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: self.name)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.is_capturing)
        patch.setattr(self_tuning, "_gpu_name", lambda device: self.name)
        patch.setattr(self_tuning, "_has_memory", lambda tensor: tensor.device.type != "meta")
        patch.setattr(self_tuning, "milliseconds", self._milliseconds)
        patch.setattr(dispatch, "_choices", Choices())
        patch.setattr(dispatch, "_taken", {})

    def start_again(self, patch: pytest.MonkeyPatch) -> None:
        """As in another process."""
        patch.setattr(dispatch, "_choices", Choices())
        dispatch._taken.clear()
        self.timed.clear()

    def _milliseconds(self, run: Callable[[], Any], device: torch.device) -> float:
        run()
        self.timed.append(self.ran[-1])
        return self.times.get(self.ran[-1], 1.0)

    def result(self, label: Any, right: Tensor) -> Tensor:
        """Note a run; what it gives."""
        self.ran.append(label)
        if label in self.broken:
            raise RuntimeError("out of resource: shared memory\nmore")
        return right + 1 if label in self.wrong else right

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        """As a kernel that adds x to y, in place."""

        def kernel(x_ptr: Tensor, y_ptr: Tensor, BLOCK: int, num_warps: int) -> None:
            y_ptr += self.result(BLOCK, x_ptr)

        return kernel

    def launch(self, x: Tensor, key: str = "N256", **options: Any) -> int:
        """Launch the kernel; returns the BLOCK that ran last. y becomes x."""
        y = torch.zeros_like(x)
        dispatch.launch(self, lambda config: (1,), {"x_ptr": x, "y_ptr": y}, CANDIDATES, key, **options)
        last = self.ran[-1]
        assert x.device.type == "meta" or torch.equal(y, x + (last in self.wrong))
        return last

    def double(self, x: Tensor) -> Tensor:
        """An operation with our path, two ways of PyTorch, and a reference."""
        dispatch.compare("double", "N256", self.double, (x,), ("FLASH_ATTENTION", "MATH"))
        path = dispatch.path("double", x, "N256")
        return self.result(dispatch.sdpa_backends("double", x, "N256")[0].name if path == "torch" else path, 2 * x)
