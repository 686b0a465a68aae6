"""Host time of a call, forward + backward, on the two ways to our kernels: autograd.Function, and operator.

The launches are observed and not run, so the figures hold on a machine without a GPU: everything but the launches.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from kernels import attention, dispatch, instance_norm

CALLS = 50
ROUNDS = 20


def norm(run: Callable[..., tuple[Tensor, ...]], x: Tensor) -> None:
    """An instance norm with activation of x (B, C, X, Y, Z)."""
    run(x, None, None, 1e-5, None, 0.01, None, False)[0].backward(x)


def attend(run: Callable[..., tuple[Tensor, ...]], q: Tensor) -> None:
    """Self-attention of q (B, H, N, D)."""
    run(q, q, q, 1.0)[0].backward(q)


OPERATIONS = {
    "instance norm": (norm, instance_norm._instance_norm, instance_norm._forward_op, (1, 16, 8, 8, 8)),
    "attention": (attend, attention._attention, attention._forward_op, (1, 2, 16, 16)),
}


@pytest.mark.parametrize("way", ["autograd.Function", "operator"])
@pytest.mark.parametrize("name", OPERATIONS)
def bench_host_time(name: str, way: str, benchmark: BenchmarkFixture) -> None:
    call, function, operator, shape = OPERATIONS[name]
    x = torch.zeros(shape, requires_grad=True)
    run = function if way == "autograd.Function" else operator
    benchmark.group = f"host time of {CALLS} calls: {name}"

    def calls() -> None:
        for _ in range(CALLS):
            call(run, x)

    with dispatch.observed(lambda launch: None):
        benchmark.pedantic(calls, rounds=ROUNDS, warmup_rounds=2)
