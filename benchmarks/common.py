"""How an operation is timed, and what its time is compared with.

On a GPU a time is a median of replays of a CUDA graph that holds many calls, so that neither Python nor the launches
are in it; the same calls dispatched eagerly are timed beside it. Calls take turns over several sets of inputs where
the second-level cache must not serve them. On a CPU the calls are timed as they are.

The floor of an operation is the longer of two times: the bytes that it must move over the measured bandwidth of a
large copy, and its arithmetic over the measured rate of a large matrix product. Its share of the roofline is the floor
over the time. Bandwidth and rate are measured in the same run.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
import triton
from torch import Tensor

from kernels import dispatch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IS_GPU = DEVICE.type == "cuda"
DIRECTIONS = ("forward", "forward + backward")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CACHE_BYTES = 200_000_000
"""Sets of inputs that together are larger than this come from memory: four times the cache of an H100."""
GRAPH_SECONDS = 4e-3
"""Work in one replay: long enough that the wait for its end does not count."""


if IS_GPU:
    torch._dynamo.config.recompile_limit = 64  # a shape is a compilation; the default gives up at the ninth


@dataclass(frozen=True)
class Work:
    """The least that an operation must do.

    Fields:
        bytes: to read and write, each tensor once for every pass that the algorithm needs.
        flops: floating-point operations of its matrix products; 0 where memory is the bound.
        dtype: of those products.
    """

    bytes: int
    flops: int = 0
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Roofline:
    """Ceilings of this machine, measured: bytes per second of a copy (read + written), FLOP/s of matrix products."""

    bandwidth: float
    rates: dict[torch.dtype, float]

    def floor(self, work: Work) -> float:
        """Seconds that `work` takes at the ceilings."""
        return max(work.bytes / self.bandwidth, work.flops / self.rates[work.dtype] if work.flops else 0.0)


def measure_roofline() -> Roofline:
    """Copy bandwidth and matrix rates of this machine."""
    return Roofline(_copy_bandwidth(2**30 if IS_GPU else 2**26), {dtype: _matrix_rate(dtype) for dtype in DTYPES})


def _copy_bandwidth(nbytes: int) -> float:
    source, target = (torch.empty(nbytes // 4, device=DEVICE).normal_() for _ in range(2))
    return 2 * nbytes / seconds([lambda: target.copy_(source)])


def _matrix_rate(dtype: torch.dtype) -> float:
    n = 8192 if IS_GPU else 512
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * n**3 / seconds([lambda: a @ b])


class Case(Protocol):
    """What an operation is measured on. `str(case)` names it in the report."""

    def inputs(self) -> list[Tensor]:
        """A new set of inputs, random."""
        ...

    def work(self, direction: str) -> Work:
        """The least bytes and operations, for one of `DIRECTIONS`."""
        ...


def calls_of(op: Callable[..., Tensor], case: Case, direction: str, cached: bool) -> list[Callable[[], Any]]:
    """Calls of `op(*inputs)`, each on inputs of its own.

    Args:
        op: from inputs to a tensor.
        case: where the inputs come from.
        direction: of `DIRECTIONS`; backward takes the gradient of every input that wants one.
        cached: one set of inputs, which the cache may hold; else as many as outgrow it (on a CPU, one).
    """
    sets = [case.inputs()]
    nbytes = sum(tensor.nbytes for tensor in sets[0])
    if IS_GPU and not cached:
        sets += [case.inputs() for _ in range(math.ceil(CACHE_BYTES / nbytes))]
    return [_call(op, inputs, direction) for inputs in sets]


def _call(op: Callable[..., Tensor], inputs: list[Tensor], direction: str) -> Callable[[], Any]:
    if direction == DIRECTIONS[0]:
        return lambda: op(*inputs)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    gradient = torch.randn_like(op(*inputs))
    return lambda: torch.autograd.grad(op(*inputs), wanted, gradient)


def seconds(calls: Sequence[Callable[[], Any]], rounds: int = 10) -> float:
    """Median time of one call, in seconds; a CUDA graph's on a GPU.

    Args:
        calls: the same work on different sets of inputs.
        rounds: repetitions, of which the median is taken.
    """
    replay, count = graph_of(calls) if IS_GPU else (lambda: [call() for call in calls], len(calls))
    return statistics.median(_timed(replay) for _ in range(rounds + 1)) / count


def eager_seconds(calls: Sequence[Callable[[], Any]], rounds: int = 10) -> float:
    """Median time of one call dispatched from Python, in seconds."""
    return statistics.median(_timed(lambda: [call() for call in calls]) for _ in range(rounds + 1)) / len(calls)


def graph_of(calls: Sequence[Callable[[], Any]]) -> tuple[Callable[[], None], int]:
    """A replay of a CUDA graph of the calls, repeated to `GRAPH_SECONDS`, and how many calls it holds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, tunes and allocates outside the capture
            call()
        once = statistics.median(_timed(call) for call in calls)
    torch.cuda.current_stream().wait_stream(stream)
    repeats = max(1, min(200, round(GRAPH_SECONDS / once / len(calls))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    replay()
    return replay, repeats * len(calls)


def path_taken(call: Callable[[], Any]) -> tuple[str, str]:
    """Which path one of our operations takes in a call, and its name in `tuned.json`; empty where there is none."""
    taken = [("", "")]

    def spy(op: str, x: Tensor, key: str) -> dispatch.Taken:
        chosen = choose(op, x, key)
        taken.append((chosen, f"{op} {key}"))
        return chosen

    choose = dispatch.path
    with mock.patch.object(dispatch, "path", spy):
        call()
    return taken[-1]


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if IS_GPU:
        torch.cuda.synchronize()


def _timed(run: Callable[[], Any]) -> float:
    synchronize()
    started = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - started


def machine() -> dict[str, Any]:
    """What a result must name to mean anything: GPU, versions, commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    about = {"device": "cpu", "torch": torch.__version__, "triton": triton.__version__, "commit": commit or "unknown"}
    if IS_GPU:
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability())
        about |= {"device": torch.cuda.get_device_name(), "capability": capability, "cuda": torch.version.cuda or ""}
        about["cudnn"] = str(torch.backends.cudnn.version())
    return about
