"""How an operation is timed, and how its time compares with the machine's limits.

On a GPU a time is the median of replays of a CUDA graph of many calls, which excludes Python and launches; the same
calls dispatched eagerly are timed too. Calls take turns over several sets of inputs where the second-level cache must
not serve them, and each writes to memory of its own. On a CPU the calls are timed as they are. "forward" is without a
gradient, as in inference; "forward + backward" is as in training.

The floor of an operation is the longer of two times: the bytes that it must move over the measured bandwidth of a
large copy, and its arithmetic over the measured rate of a large matrix product. Its share of the roofline is the floor
over the time. Bandwidth and rate are measured in the same run.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_map

from engine.precision import tf32
from kernels import dispatch
from kernels.dispatch import DIRECTIONS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IS_GPU = DEVICE.type == "cuda"
MARGIN = 1.03
"""A smaller difference between two times is noise."""
CACHE_BYTES = 200_000_000
"""Sets of inputs larger than this in all come from memory: four times the cache of an H100."""
GRAPH_SECONDS = 2e-3
"""Length of one replay: long enough to queue the next, so that gaps between replays do not count."""
GRAPH_CALLS = 400
"""Most calls in one replay, because Python records each; at 2.5 us they last a millisecond."""


if IS_GPU:
    torch._dynamo.config.recompile_limit = 64  # a shape is a compilation; the default gives up at the ninth


@dataclass(frozen=True)
class LeastWork:
    """The least that an operation must do.

    Fields:
        bytes: to read and write, each tensor once for every pass that the algorithm needs.
        tensors: bytes of all tensors that one call reads or writes: if they fit the cache, a second pass over one need
            not come from memory.
        flops: floating-point operations of its matrix products; 0 where memory is the bound.
        rate: of those products, a key of `Roofline.rates`.
    """

    bytes: int
    tensors: int
    flops: int = 0
    rate: str = "bfloat16"


@dataclass(frozen=True)
class Roofline:
    """Ceilings of this machine.

    Fields:
        bandwidth: measured, bytes per second of a copy (read + written).
        rates: measured, FLOP/s of matrix products by dtype; "tf32 x 3" is float32 as three TF32 products.
        cache: bytes of the GPU's second-level cache; 0 on a CPU.
    """

    bandwidth: float
    rates: dict[str, float]
    cache: int

    def floor(self, work: LeastWork) -> float:
        """Seconds that `work` takes at the ceilings."""
        return max(work.bytes / self.bandwidth, work.flops / self.rates[work.rate] if work.flops else 0.0)


def measure_roofline() -> Roofline:
    """Copy bandwidth and matrix rates of this machine."""
    names = ("bfloat16", "float16", "float32") if IS_GPU else ("float32",)
    rates = {name: _matrix_rate(getattr(torch, name)) for name in names}
    cache = 0
    if IS_GPU:
        with tf32(True):
            rates["tf32 x 3"] = _matrix_rate(torch.float32) / 3
        cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return Roofline(_copy_bandwidth(2**30 if IS_GPU else 2**26), rates, cache)


def _copy_bandwidth(nbytes: int) -> float:
    source, target = (torch.empty(nbytes // 4, device=DEVICE).normal_() for _ in range(2))
    return 2 * nbytes / seconds([lambda: target.copy_(source)])


def _matrix_rate(dtype: torch.dtype) -> float:
    n = 8192 if IS_GPU else 512
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * n**3 / seconds([lambda: a @ b])


class InputSource(Protocol):
    """What an operation is measured on; its `str` names it in the report."""

    def inputs(self, device: torch.device | str) -> list[Tensor]:
        """A new set of inputs, random."""
        ...


def calls_of(
    op: Callable[..., Any], source: InputSource, direction: str, cached: bool, parameters: Sequence[Tensor] = ()
) -> list[Callable[[], Any]]:
    """Calls of `op(*inputs)`, each on inputs of its own.

    Args:
        op: from inputs to a tensor or a tuple of them.
        source: of the inputs.
        direction: of `DIRECTIONS`; backward computes the gradients of the inputs that require one and of `parameters`.
        cached: one set of inputs, which may stay in the cache; else enough sets to outgrow it (on a CPU, one).
    """
    sets = [source.inputs(DEVICE)]
    nbytes = sum(tensor.nbytes for tensor in sets[0])
    if IS_GPU and not cached:
        sets += [source.inputs(DEVICE) for _ in range(math.ceil(CACHE_BYTES / nbytes))]
    return [_call(op, inputs, direction, parameters) for inputs in sets]


def _call(
    op: Callable[..., Any], inputs: list[Tensor], direction: str, parameters: Sequence[Tensor]
) -> Callable[[], Any]:
    if direction == DIRECTIONS[0]:
        return torch.no_grad()(lambda: op(*inputs))
    wanted = [*(tensor for tensor in inputs if tensor.requires_grad), *parameters]
    gradient = tree_map(_random_like, op(*inputs))
    return lambda: torch.autograd.grad(op(*inputs), wanted, gradient)


def _random_like(y: Tensor) -> Tensor:
    """Random, with the strides of `y`, which may be a slice."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(y.shape, y.stride()))
    return torch.randn(span, dtype=y.dtype, device=y.device).as_strided(y.shape, y.stride())


def seconds(calls: Sequence[Callable[[], Any]], rounds: int = 10) -> float:
    """Median time of one call, in seconds; in a CUDA graph on a GPU.

    Args:
        calls: the same work on different sets of inputs.
        rounds: repetitions for the median.
    """
    if IS_GPU:
        graph, count = graph_of(calls)
        return replay_seconds(graph, rounds) / count
    return eager_seconds(calls, rounds)


def eager_seconds(calls: Sequence[Callable[[], Any]], rounds: int = 10) -> float:
    """Median time of one call dispatched from Python, in seconds."""
    some = calls[:32]  # small inputs come in hundreds of sets
    return statistics.median(timed(lambda: [call() for call in some]) for _ in range(rounds + 1)) / len(some)


def graph_of(calls: Sequence[Callable[[], Any]]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A CUDA graph of the calls, repeated to `GRAPH_SECONDS`, and how many calls it holds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (*calls[:2], *calls[:2]):  # compiles, tunes and allocates outside the capture
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = _captured(calls, 1)
    repeats = min(round(GRAPH_SECONDS / replay_seconds(graph, 3)), GRAPH_CALLS // len(calls))
    if repeats <= 1:
        return graph, len(calls)
    return _captured(calls, repeats), repeats * len(calls)


def _captured(calls: Sequence[Callable[[], Any]], repeats: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            # Results live until the next round is done, so that calls don't write to the same memory.
            results = [call() for call in calls]  # noqa: F841
    return graph


def replay_seconds(graph: torch.cuda.CUDAGraph, rounds: int) -> float:
    """Median time from the end of one replay to that of the next, in seconds."""
    graph.replay()  # while it runs the next is queued, and so on
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairwise(marks)) / 1e3


def path_taken(call: Callable[[], Any]) -> tuple[str, str]:
    """The path of our operation in a call, and its name and key; empty without one."""
    taken = [("", "")]

    def spy(op: str, x: Tensor, key: str) -> dispatch.OpPath:
        chosen = choose(op, x, key)
        taken.append((chosen, f"{op} {key}"))
        return chosen

    choose = dispatch.path
    with mock.patch.object(dispatch, "path", spy):
        call()
    return taken[-1]


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if IS_GPU:
        torch.cuda.synchronize()


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one run, to the end of its work on the GPU."""
    synchronize()
    started = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - started


@cache
def machine() -> dict[str, Any]:
    """What a result must state to mean anything: GPU, versions, commit (without git that of `GLIOFORGE_COMMIT`)."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        commit = ""
    commit = commit or os.environ.get("GLIOFORGE_COMMIT") or "unknown"
    about = {"device": "cpu", "torch": torch.__version__, "triton": triton.__version__, "commit": commit}
    if IS_GPU:
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability())
        about |= {"device": torch.cuda.get_device_name(), "capability": capability, "cuda": torch.version.cuda or ""}
        about["cudnn"] = str(torch.backends.cudnn.version())
    return about
