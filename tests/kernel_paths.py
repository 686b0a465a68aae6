"""Where the kernels run: on a GPU, and on a CPU in Triton's interpreter (`TRITON_INTERPRET=1`), and only there.

The tests of an operation run three times: plainly, where a CPU takes PyTorch; in the interpreter; and on a GPU.
"""

from __future__ import annotations

import pytest

from kernels import dispatch

ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", ON_GPU]
COMPILED = [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=pytest.mark.gpu)]
"""Devices and backends of `torch.compile`."""
not_interpreted = pytest.mark.skipif(dispatch.INTERPRETED, reason="involves no kernel that the interpreter runs")


def runs_kernels(device: str) -> bool:
    """Whether a call on a device may take our kernels."""
    return device == ("cpu" if dispatch.INTERPRETED else "cuda")


def needs_kernels(device: str) -> None:
    """Skip a test where a call on its device would take PyTorch."""
    if not runs_kernels(device):
        pytest.skip("kernels run on a GPU, or with TRITON_INTERPRET=1 on the CPU")
