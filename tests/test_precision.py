"""Switches of the whole process: set by a run, put back after a library's call."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_step import batch, make_step

from engine.precision import set_up_torch
from engine.ranks.distributed import Ranks

ROOT = Path(__file__).resolve().parent.parent


def test_float32_means_ieee_products_and_deterministic_means_all() -> None:
    try:
        set_up_torch("tf32", deterministic=True)
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    finally:
        set_up_torch("float32", deterministic=False)
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    assert not torch.are_deterministic_algorithms_enabled()


def switches() -> tuple[str, ...]:
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn  # type: ignore[attr-defined]
    return tuple(backend.fp32_precision for backend in backends)


BEFORE = {
    "nothing": "",
    "the older functions": "torch.set_float32_matmul_precision('medium'); torch.backends.cudnn.allow_tf32 = True",
    "the backends": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
}


@pytest.mark.parametrize("set_by", BEFORE)
def test_tf32_ends_with_its_context(set_by: str) -> None:
    """In a process of its own, because PyTorch's defaults can't be put back by its functions."""
    script = f"""
import torch
from engine.precision import tf32
from test_precision import switches
{BEFORE[set_by]}
before = switches()
with tf32(True):
    assert switches() == ("tf32", "tf32", "tf32"), switches()
    with tf32(False):
        assert switches()[0] == "ieee" and "tf32" not in switches(), switches()
    assert switches() == ("tf32", "tf32", "tf32"), switches()
assert switches() == before, (switches(), before)
try:
    with tf32(True):
        raise KeyError
except KeyError:
    assert switches() == before, (switches(), before)
if {set_by == "the older functions"}:
    assert torch.get_float32_matmul_precision() == "medium" and torch.backends.cudnn.allow_tf32
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_step_leaves_the_switches_of_the_process_alone(ranks: Ranks) -> None:
    before = switches(), torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    make_step(ranks, precision="tf32", deterministic=True)(*batch(0))
    assert (switches(), torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()) == before
