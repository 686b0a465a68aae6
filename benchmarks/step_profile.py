"""Inside a step: its parts, launches, waits and memory, from marks on the device's time line and PyTorch's profiler."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.common import IS_GPU, synchronize

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
READS = "aten::_local_scalar_dense"
"""Every `item()` ends in this; on a GPU it waits in one of `WAITS`."""


class Marks:
    """A clock on the device's own time line: events on a GPU, so that nothing waits for a step."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.times: list[Any] = []

    def __call__(self, name: str) -> None:
        """Mark the end of a part."""
        self.names.append(name)
        if IS_GPU:
            self.times.append(torch.cuda.Event(enable_timing=True))
            self.times[-1].record()
        else:
            self.times.append(time.perf_counter())

    def medians(self) -> dict[str, float]:
        """Seconds of each part of a step: the median over steps."""
        synchronize()
        parts = defaultdict(list)
        for i, name in enumerate(self.names[1:], 1):
            before, after = self.times[i - 1], self.times[i]
            parts[name].append(before.elapsed_time(after) / 1e3 if IS_GPU else after - before)
        return {name: statistics.median(values) for name, values in parts.items()}


def count_in(step: Callable[[], Any], steps: int, trace: Path | None) -> dict[str, Any]:
    """Launches, waits, seconds of collectives and the GPU's idle share, per step."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if IS_GPU else [])]
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            with record_function("step"):
                step()
        synchronize()
    if trace is not None:
        recorded.export_chrome_trace(str(trace))
    events = list(recorded.events() or [])
    return {"steps": steps, **count_events(events, steps)}


def count_events(events: Sequence[Any], steps: int) -> dict[str, Any]:
    """The result of `count_in`, from a profile of `steps` steps, each in a range "step".

    Args:
        events: with name, device_type, time_range (start, end in us), is_user_annotation.
    """
    host = [event for event in events if event.device_type == DeviceType.CPU]
    spans = [event.time_range for event in host if event.name == "step"]
    found: dict[str, float] = defaultdict(float)
    for event in host:
        if event.name in (*LAUNCHES, *WAITS, READS) and any(
            span.start <= event.time_range.start < span.end for span in spans
        ):
            found[event.name] += 1 / steps
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    kernels = [event for event in kernels if event.name != "step"]
    collectives = [event for event in kernels or host if event.name.startswith(("nccl", "gloo:"))]
    waits = {name: found[name] for name in (WAITS if kernels else (READS,)) if name in found}
    return {
        "launches": {name: found[name] for name in LAUNCHES if name in found},
        "waits": waits,
        "communication": sum(event.time_range.end - event.time_range.start for event in collectives) / steps / 1e6,
        "idle": 1 - busy(kernels) if kernels else None,
    }


def busy(kernels: Sequence[Any]) -> float:
    """Share of the time from the first kernel's start to the last one's end in which at least one runs."""
    ranges = sorted((event.time_range.start, event.time_range.end) for event in kernels)
    first = reached = ranges[0][0]
    covered = 0.0
    for start, end in ranges:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered / (reached - first)


def allocated_peak(step: Callable[[], Any]) -> int:
    """Peak of a step's CPU memory above that at its start, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()  # the profile must see the allocation of what the next step frees
        with record_function("watched"):
            step()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    held, peak = 0, None
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "watched":
            held = peak = 0
        elif event.name() == "[memory]":
            held += event.nbytes()
            peak = None if peak is None else max(peak, held)
    assert peak is not None
    return peak
