"""The memory that this process may use, and errors that say it ran out. PyTorch is imported only for a GPU's."""

from __future__ import annotations

import contextlib
import errno
import resource
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

if TYPE_CHECKING:
    import torch

CGROUP, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_GROUP_FILES = {  # by a version's controllers: limit, use, statistics, and their name for the page cache
    "": ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file"),
}
MESSAGES = (
    "can't allocate memory",  # DefaultCPUAllocator
    "not enough memory",  # the same on Windows
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA allocation failed",  # DALI, whose memory is outside PyTorch's allocator: without a size
    "Can't allocate ",  # the same: "... bytes on device 0", "... bytes on host"
    "cudaErrorMemoryAllocation",  # the same from its calls of CUDA's runtime
    "CUDA_ERROR_OUT_OF_MEMORY",  # and of its driver
    "could not create a primitive",  # oneDNN, which gives no reason; with enough memory it always can
    "could not create a memory",
    "std::bad_alloc",
    "Cannot allocate memory",  # ENOMEM as PyTorch words it, e.g. for a mapped file
    "can't start new thread",
    "Resource temporarily unavailable",  # the same from libraries such as DALI
    "failed to map segment from shared object",  # of a library that is being imported
)


class Limit(NamedTuple):
    """A limit on this process's memory: its name in a message, bytes in all, bytes left."""

    name: str
    most: int
    left: int


def limit_bytes(device: torch.device, ranks_on_node: int = 1) -> int:
    """Memory that this process may use in all, including what it has already.

    On a GPU: what is free, and what PyTorch holds there for this process. On a CPU: a rank's share of what is available
    on the node or left in its control group, or what `ulimit -v` leaves, whichever is less.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    shared = [psutil.virtual_memory().available, *(group.left for group in _control_groups())]
    own = psutil.Process().memory_info().rss
    return min([min(shared) // ranks_on_node, *(limit.left for limit in _address_space())]) + own


def _address_space() -> list[Limit]:
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most == resource.RLIM_INFINITY:
        return []
    return [Limit("`ulimit -v`", most, max(0, most - psutil.Process().memory_info().vms))]


def _control_groups() -> list[Limit]:
    """The limits of this process's control groups (version 1 or 2); page cache does not count as used."""
    limits: list[Limit] = []
    lines = OWN_CGROUP.read_text().splitlines() if OWN_CGROUP.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        *files, cache = _GROUP_FILES.get(controllers, ("",))
        own = CGROUP / controllers / path.lstrip("/")
        for folder in (own, *own.parents) if files else ():
            with contextlib.suppress(OSError, ValueError):  # no such group here, or "max": no limit
                most, used, statistics = ((folder / name).read_text() for name in files)
                cached = int(dict(line.split() for line in statistics.splitlines()).get(cache, 0))
                limits.append(Limit("its control group", int(most), max(0, int(most) - int(used) + cached)))
    return limits


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # PyTorch's
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError | ImportError) and any(message in str(error) for message in MESSAGES)


def plain_message(error: BaseException) -> str:
    """What happened and what to do, where nothing is known of the memory that the work needs."""
    machine = psutil.virtual_memory().total
    limits = {limit.name: limit.most for limit in (*_address_space(), *_control_groups()) if limit.most < machine}
    bounds = [f"{gb(machine)} of the machine", *(f"{gb(most)} of {name}" for name, most in limits.items())]
    return (
        f"out of memory ({first_line(error)}): this process used up to {gb(_peak_of_host())}, of {', '.join(bounds)}. "
        "End other programs, raise the limit, or use less at a time: fewer --data.workers, a smaller crop or batch"
    )


def peak_bytes(device: torch.device) -> int:
    """The most that this process has used so far."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return _peak_of_host()


def _peak_of_host() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def first_line(error: BaseException) -> str:
    """Of an error's message, without its full stop; its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def gb(size: int) -> str:
    """Bytes in GB of 10^9 bytes, or in MB, with at least two significant digits: 3.9 MB, 0.20 GB, 15.1 GB, 139 GB."""
    value, unit = (size / 1e9, "GB") if size >= 0.0995e9 else (size / 1e6, "MB")
    digits = 0 if value >= 99.5 else 1 if value >= 0.995 else 2
    return f"{value:.{digits}f} {unit}"
