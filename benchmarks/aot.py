"""Compile every kernel for GPUs that are not here, and refuse those that would not run well on them.

    python -m benchmarks.aot             default configurations, on the shapes that the models use
    python -m benchmarks.aot --every     every configuration that tuning may choose, and what other users bring

Without `--arch` that is for all four GPUs, except for what other users bring (`benchmarks.workloads.OTHERS`), which is
for sm_90 alone: a quarter of an hour on one core.

The operations run on tensors without storage (`device="meta"`) while `dispatch.observed` collects their launches. Each
is compiled exactly as at run time, argument specialisation included, with a stand-in for Triton's driver that only
knows the target; Triton's cache then serves the launch itself. A kernel is refused on an architecture where it

    spills       stack or local memory: registers run out, and each use goes through memory
    does not fit more shared memory than a block may have, or more than 512 columns of tensor memory
    traps        ptxas silently turns an sm_100 kernel that does not fit into a bare `trap`
    fails        a compiler error

A row of the table is one compiled kernel; a column has registers per thread and KiB of shared memory.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from benchmarks.workloads import MEASURED, MODELS, OTHERS, Workload, launches
from kernels import dispatch

SHARED_KIB = {80: 163, 90: 227, 100: 227, 120: 99}
"""Shared memory that one block may have, in KiB, by compute capability (CUDA C++ Programming Guide, table of
technical specifications)."""
MAX_TENSOR_MEMORY = 512
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """What a kernel needs on one architecture.

    Fields:
        kernel, workload, config: which kernel, on what, with which block sizes.
        arch: 80, 90, 100 or 120.
        registers: per thread. stack: bytes of stack and local memory per thread. shared: bytes per block.
        tensor_memory: columns. traps: whether the code has a bare trap.
        error: why it did not compile; the rest is then zero.
    """

    kernel: str
    workload: str
    config: str
    arch: int
    registers: int = 0
    stack: int = 0
    shared: int = 0
    tensor_memory: int = 0
    traps: bool = False
    error: str = ""

    def faults(self) -> list[str]:
        """Why this kernel must not be used there; empty if it may."""
        limit = SHARED_KIB[self.arch]
        return [
            fault
            for is_so, fault in (
                (self.stack > 0, f"spills {self.stack} bytes a thread"),
                (self.shared > limit * 1024, f"{self.shared} bytes of shared memory, the limit is {limit} KiB"),
                (self.tensor_memory > MAX_TENSOR_MEMORY, f"{self.tensor_memory} columns of tensor memory, of 512"),
                (self.traps, "is a bare trap"),
                (bool(self.error), f"does not compile: {self.error}"),
            )
            if is_so
        ]


class _Target:
    """What compilation needs of a driver: the target GPU. Its number stands for the device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def compile_launch(launch: dispatch.Launch, config: dispatch.Config, arch: int) -> Any:
    """The compiled kernel of a launch, for one architecture; nothing is run and no GPU is needed."""
    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Target(arch))
    try:
        return launch.kernel.run(**launch.args, **config, grid=(1,), warmup=True)
    finally:
        triton.runtime.driver._active = active


def signature(launch: dispatch.Launch, config: dispatch.Config) -> tuple[Any, ...]:
    """What Triton compiles a launch for: a kernel, its constants, and what it specialises arguments on."""
    variables = {parameter.name for parameter in launch.kernel.params if not parameter.is_constexpr}
    args = {**launch.args, **config}
    return launch.name, *((name, _kind(value) if name in variables else value) for name, value in sorted(args.items()))


def _kind(value: Any) -> Any:
    """What a kernel knows about an argument that is not a constant."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, tuple):
        return tuple(map(_kind, value))
    if isinstance(value, int) and value != 1:
        return value % 16 == 0, value.bit_length() > 31
    return None if isinstance(value, float) else (value,)


def resources(compiled: Any, launch: dispatch.Launch, workload: str, config: dispatch.Config) -> Compiled:
    """Registers, memory and traps of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [str(CUOBJDUMP), "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        kernel=launch.name,
        workload=workload,
        config=_words(config),
        arch=compiled.metadata.target.arch,
        registers=used["REG"],
        stack=used["STACK"] + used["LOCAL"],
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        traps=re.search(r"^\s*(@\S+\s+)?trap;", compiled.asm["ptx"], re.MULTILINE) is not None,
    )


def _words(config: dispatch.Config) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())


_launches = cache(launches)


def _compile(workload: Workload, launch_index: int, config_index: int, arch: int) -> Compiled:
    """One kernel, in a process of the pool: a launch can't be pickled."""
    launch = _launches(workload)[launch_index]
    config = launch.candidates[config_index]
    try:
        return resources(compile_launch(launch, config, arch), launch, str(workload), config)
    except Exception as error:  # whatever a compiler raises is a fault of this kernel, listed with the others
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return Compiled(launch.name, str(workload), _words(config), arch, error=reason[-1])


def compile_workloads(archs: Mapping[Workload, Sequence[int]], every: bool) -> list[Compiled]:
    """Compile the kernels of workloads for some architectures, each distinct one once, on all cores.

    Args:
        archs: of each workload.
        every: all configurations instead of the default of each launch.
    """
    tasks: dict[tuple[Any, ...], tuple[Workload, int, int, int]] = {}
    for workload in archs:
        for i, launch in enumerate(_launches(workload)):
            for j, config in enumerate(launch.candidates if every else launch.candidates[:1]):
                for arch in archs[workload]:
                    tasks.setdefault((arch, signature(launch, config)), (workload, i, j, arch))
    # Processes, not threads: Triton knows one target at a time. Spawned, because the caller may use a GPU.
    with ProcessPoolExecutor(min(len(tasks), os.cpu_count() or 1), get_context("spawn")) as pool:
        return list(pool.map(_compile, *zip(*tasks.values(), strict=True), chunksize=4))


def table(compiled: list[Compiled]) -> str:
    """A line per kernel, workload and configuration: registers per thread / KiB of shared memory on each GPU."""
    archs = sorted({item.arch for item in compiled})
    lines: dict[tuple[str, str, str], dict[int, str]] = {}
    for item in compiled:
        cell = f"{item.registers} / {item.shared / 1024:.0f}" + (" !" if item.faults() else "")
        lines.setdefault((item.kernel, item.workload, item.config), {})[item.arch] = cell
    head = ["kernel", "workload", "configuration", *(f"sm_{arch}" for arch in archs)]
    rows = [head, *([*key, *(cells.get(arch, "") for arch in archs)] for key, cells in sorted(lines.items()))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", action="store_true", help="every configuration, not only the defaults")
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_KIB, help="only for these GPUs")
    args = parser.parse_args()
    if dispatch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: unset it to compile")
    archs = dict.fromkeys((*MODELS, *MEASURED) if args.every else MODELS, args.arch or list(SHARED_KIB))
    if args.every:
        archs |= dict.fromkeys(OTHERS, args.arch or [90])
    compiled = compile_workloads(archs, args.every)
    print(table(compiled))
    faults = [
        f"{item.kernel} ({item.workload}; {item.config}) on sm_{item.arch}: {fault}"
        for item in compiled
        for fault in item.faults()
    ]
    print(f"{len(compiled)} compiled kernels; registers per thread / KiB of shared memory; {len(faults)} faults")
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
