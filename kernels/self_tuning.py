"""Which of several ways to compute one thing is the fastest on this GPU: what is known, and how it is measured.

A choice is a kernel's configuration, or the name of a way to compute an operation (ours, or one that PyTorch has). It
holds for one GPU, version of PyTorch and of Triton, source file of the kernel, and key. What is known comes from, the
first that has it: choices restored with a checkpoint, the cache of this machine (`MeasuredCache("kernels")`), and
`priors.json` beside this file, by the name of the GPU; none ships today. Otherwise the default is taken.

Measuring changes nothing that its caller sees: kernels run on copies of their tensors, operations on detached inputs.
A way counts only if its result agrees with the reference's; one that raises or differs is named in the log and never
taken. Times are medians of a few runs between CUDA events, from memory: the second-level cache is overwritten before
each. The GPU is kept waiting until the host has queued them all, so that launches don't count.

Several ranks must run the same. So only rank 0 measures, within `dispatch.tuning()`, and at the end of that block all
ranks take what it knows, in one collective. Until then, and where their GPUs differ, they take the defaults.
"""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from .measured_cache import MeasuredCache

log = logging.getLogger(__name__)

Choice = Any
"""A configuration (a mapping of names to integers), or the name of a way."""
MARGIN = 1.03
"""How much faster than the default a choice must be; less is noise."""
REPEATS = 5
"""Runs of each way, after one that compiles it and whose result is checked."""
CANDIDATES = 3
"""Configurations of a kernel that are measured, the first ones; `thorough` measures all."""
SECONDS = 180.0
"""Longest time that a block measures, most of it compilation; other ranks wait for it in their next collective."""
MAX_WAIT_CYCLES = 50_000_000
"""Most clock cycles, some 25 ms, that the GPU is kept waiting for the host."""
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Norm of the difference between two results over the norm of the expected one, by dtype; others must be equal."""
PRIORS_FILE = Path(__file__).with_name("priors.json")
CACHE = MeasuredCache("kernels")
REFERENCE = "reference"
WRONG = "wrong result"


class Way(NamedTuple):
    """One way to compute something.

    Fields:
        check: computes it once, from the same state each time; the results, in groups that are compared as one vector.
        run: computes it again, to be timed.
    """

    check: Callable[[], list[list[Tensor]]]
    run: Callable[[], Any]


class Choices:
    """What is known of this machine, and which choices this process has made."""

    def __init__(self) -> None:
        self.restored: dict[str, Choice] = {}
        self.taken: dict[str, Choice] = {}
        self.is_measuring = False
        self._own: dict[str, Choice] | None = None
        self._agreed: dict[str, Choice] = {}

    @property
    def own(self) -> dict[str, Choice]:
        """Choices known on this machine, by identity; read from the disk at first use."""
        if self._own is None:
            measured = {name: entry.get("choice") for name, entry in CACHE.entries().items() if isinstance(entry, dict)}
            self._own = _priors() | measured
        return self._own

    def take(self, name: str, default: Choice) -> Choice:
        """The choice to take, by identity. While rank 0 measures, it takes what the others don't know yet."""
        known = self._agreed if are_several() and not self.is_measuring else self.own
        choice = self.restored.get(name, known.get(name, default))
        if not self.is_measuring:
            self.taken[name] = choice
        return choice

    def agree(self, device: torch.device | str) -> None:
        """Give all ranks the choices of rank 0; a collective. Those of different GPUs or versions take the defaults."""
        rank = dist.get_rank()
        everything: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everything, (machine(device), self.own if rank == 0 else {}))
        machines = sorted({name for name, _ in everything})
        self._agreed = everything[0][1] if len(machines) == 1 else {}
        if len(machines) > 1 and rank == 0:
            log.warning("kernels: default configurations, as the ranks differ: %s", "; ".join(machines))


class Session:
    """A time in which what is unknown is measured.

    Args:
        choices: where measurements go. is_idle: measure nothing, as on all ranks but the first.
        thorough: every candidate, and what is known once more.
    """

    def __init__(self, choices: Choices, is_idle: bool = False, thorough: bool = False) -> None:
        self.choices, self.is_idle, self.thorough = choices, is_idle, thorough
        self.summary = Summary()
        self._seen: set[str] = set()

    def wants(self, name: str) -> bool:
        """Whether a choice is to be measured, by identity."""
        if self.is_idle or self.choices.is_measuring or name in self._seen:
            return False
        known = name in self.choices.restored or name in self.choices.own
        if known and not self.thorough:
            return False
        if self.summary.seconds > SECONDS and not self.thorough:
            self.summary.left += 1
            self._seen.add(name)
            return False
        return True

    def measure(
        self,
        name: str,
        ways: Mapping[str, Way],
        values: Mapping[str, Choice],
        expected: Way | None,
        device: torch.device,
    ) -> None:
        """Measure ways, the default first, and keep the choice.

        Args:
            name: identity of the choice. values: what each way is as a choice. expected: the reference; the default
                where there is none. device: of the tensors.
        """
        self._seen.add(name)
        started, self.choices.is_measuring = time.monotonic(), True
        try:
            best, times = fastest(name, ways, expected, device)
        finally:
            self.choices.is_measuring = False
            self.summary.seconds += time.monotonic() - started
        if best is None:
            return
        default = next(iter(ways))
        self.summary.measured += 1
        self.summary.changed += best != default
        self.choices.own[name] = values.get(best, best)
        CACHE.put(name, {"choice": self.choices.own[name], "default": default, "best": best, "times": times})


@dataclass
class Summary:
    """Of a session: choices measured, choices that left the default, seconds, and choices that time ran out for."""

    measured: int = 0
    changed: int = 0
    seconds: float = 0.0
    left: int = 0

    def __str__(self) -> str:
        left = f"; left to the next run: {self.left}" if self.left else ""
        return (
            f"kernels: choices measured: {self.measured}, in {self.seconds:.1f} s; faster than the default: "
            f"{self.changed}{left}"
        )


def fastest(
    name: str, ways: Mapping[str, Way], expected: Way | None, device: torch.device
) -> tuple[str | None, dict[str, float | str]]:
    """The fastest way whose result is right, the default unless another leads by `MARGIN`.

    Returns:
        its name, "reference" if no way is right, None if there is nothing to compare with; and of each way the
        milliseconds, or what was wrong.
    """
    default = next(iter(ways))
    times: dict[str, float | str] = {}
    try:
        results = (expected or ways[default]).check()
        for way in ways:
            times[way] = _time_or_fault(ways[way], results, device)
    except Exception as error:  # what there is to compare with fails, or memory ran out: nobody's fault
        log.info("kernels: %s: not measured: %s", name, _line(error))
        return None, {}
    _log(name, times)
    right = {way: value for way, value in times.items() if isinstance(value, float)}
    if not right:
        return (REFERENCE if expected else None), times
    best = min(right, key=right.__getitem__)
    return (default if default in right and right[default] <= MARGIN * right[best] else best), times


def _time_or_fault(way: Way, results: list[list[Tensor]], device: torch.device) -> float | str:
    """Milliseconds, or why the way is never taken. Raises torch.OutOfMemoryError: there may be more another time."""
    try:
        return milliseconds(way.run, device) if agree(way.check(), results) else WRONG
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or a kernel raises is a fault of this way
        return _line(error)


def _log(name: str, times: Mapping[str, float | str]) -> None:
    """Times, for those who debug; and a line that names the ways that are never taken."""
    log.debug("kernels: %s: %s", name, times)
    faults = {way: value for way, value in times.items() if isinstance(value, str)}
    if faults:
        level = logging.WARNING if WRONG in faults.values() else logging.INFO
        log.log(level, "kernels: %s: not taken: %s", name, "; ".join(f"{way} ({why})" for way, why in faults.items()))


def agree(found: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]) -> bool:
    """Whether results are the same within `TOLERANCES`, each group by its norm."""
    return len(found) == len(expected) and all(map(_is_close, found, expected))


def _is_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return False
    tolerance = max((TOLERANCES.get(tensor.dtype, 0.0) for tensor in expected), default=0.0)
    difference = norm = 0.0
    for a, b in zip(found, expected, strict=True):
        a, b = a.to(torch.promote_types(b.dtype, torch.float32)), b.to(torch.promote_types(b.dtype, torch.float32))
        same = (a == b) | (a.isnan() & b.isnan())
        difference += torch.where(same, 0, a - b).square().sum().item()
        norm += torch.where(b.isfinite(), b, 0).square().sum().item()
    return difference <= tolerance**2 * norm


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """Median time of a run on the GPU, its inputs coming from memory."""
    properties = torch.cuda.get_device_properties(device)
    flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.int8, device=device)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    cycles = (time.perf_counter() - started) * (REPEATS + 1) * 2e9
    torch.cuda._sleep(min(int(cycles), MAX_WAIT_CYCLES))
    marks = []
    for _ in range(REPEATS):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in marks)


def scratch(tensor: Tensor) -> Tensor:
    """A copy with the same strides and alignment to 16 bytes, for kernels that were compiled for both."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return tensor  # expanded, so no kernel writes to it
    extent = 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    offset = tensor.data_ptr() % 16 // tensor.element_size()
    whole = torch.empty(offset + extent, dtype=tensor.dtype, device=tensor.device)
    copy = whole.as_strided(tensor.shape, tensor.stride(), offset)
    return copy.copy_(tensor) if tensor.numel() else copy


def can_measure(tensors: Iterable[Tensor]) -> bool:
    """Whether tensors hold memory of a GPU, and nothing traces or captures what is done with them."""
    if torch._C._len_torch_dispatch_stack():
        return False
    if not all(type(tensor) in (Tensor, torch.nn.Parameter) and _has_memory(tensor) for tensor in tensors):
        return False
    return not torch.cuda.is_current_stream_capturing()


def _has_memory(tensor: Tensor) -> bool:
    """On a GPU: launches on tensors without storage are watched, not run."""
    return tensor.is_cuda


def are_several() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def identity(what: str, file: str, device: torch.device) -> str:
    """Name of a choice: what is chosen, for which machine, of which source file."""
    return f"{machine(device)} | {what} | {version(file)}"


def machine(device: torch.device | str) -> str:
    """GPU, and versions of what compiles for it."""
    return f"{_gpu_name(torch.device(device))} | torch {torch.__version__} | triton {triton.__version__}"


def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def version(file: str) -> str:
    """Eight digits that change with a source file."""
    path = Path(file)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8] if path.is_file() else "none"


def _priors() -> dict[str, Choice]:
    """Choices that ship, for the versions installed here, by identity."""
    if not PRIORS_FILE.is_file():
        return {}
    versions = f"torch {torch.__version__} | triton {triton.__version__}"
    table = json.loads(PRIORS_FILE.read_text())
    return {f"{gpu} | {versions} | {what}": choice for gpu, own in table.items() for what, choice in own.items()}


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:200] or type(error).__name__
