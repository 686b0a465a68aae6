"""Compile every kernel for GPUs that are not here, and refuse what would not run well on them.

    python -m kernels.aot             default configurations, on the shapes that the models use
    python -m kernels.aot --every     every configuration that tuning may choose

The operations run on tensors without memory (`device="meta"`) while `dispatch.observed` collects their launches; each
is compiled exactly as it would be at run time, argument specialisation included, with a stand-in for Triton's driver
that knows nothing but the target. A kernel is refused on an architecture where it

    spills       a stack or local memory: registers did not suffice, and each use goes through memory
    does not fit shared memory beyond what one block may have, or tensor memory beyond 512 columns
    traps        ptxas turns an sm_100 kernel that does not fit into a bare `trap`, without a word

A row of the table is one compiled kernel; a column holds registers per thread and KiB of shared memory.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from kernels import attention, dice_ce, dispatch, instance_norm

SHARED_KIB = {80: 163, 90: 227, 100: 227, 120: 99}
"""Shared memory that one block may have, in KiB, by compute capability (CUDA C++ Programming Guide, table of
technical specifications)."""
MAX_TENSOR_MEMORY = 512
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """What a kernel needs on one architecture.

    Fields:
        kernel, case, config: which kernel, in which use, with which block sizes.
        arch: 80, 90, 100 or 120.
        registers: per thread. stack: bytes per thread, stack and local memory. shared: bytes per block.
        tensor_memory: columns. traps: whether the code holds a bare trap.
    """

    kernel: str
    case: str
    config: str
    arch: int
    registers: int
    stack: int
    shared: int
    tensor_memory: int
    traps: bool

    def faults(self) -> list[str]:
        """Why this kernel must not be used there; empty where it may."""
        limit = SHARED_KIB[self.arch]
        return [
            fault
            for is_so, fault in (
                (self.stack > 0, f"spills {self.stack} bytes a thread"),
                (self.shared > limit * 1024, f"{self.shared} bytes of shared memory, the limit is {limit} KiB"),
                (self.tensor_memory > MAX_TENSOR_MEMORY, f"{self.tensor_memory} columns of tensor memory, of 512"),
                (self.traps, "is a bare trap"),
            )
            if is_so
        ]


class _Target:
    """All of a driver that compiling needs: which GPU is meant. Its number stands for the device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """What the models launch, forward and backward, at full size, on tensors without memory; named for the table."""
    for batch, heads, tokens, features, dtype in (
        (2, 10, 256, 51, torch.bfloat16),
        (2, 10, 256, 51, torch.float32),
        (2, 12, 512, 64, torch.bfloat16),
        (2, 12, 4096, 64, torch.bfloat16),
        (1, 8, 4096, 128, torch.float32),
    ):
        name = f"{tokens} tokens, {features} features, {_short(dtype)}"
        yield name, partial(_run_attention, (batch, tokens, 3, heads, features), dtype)
    last, first = torch.channels_last_3d, torch.contiguous_format
    for shape, dtype, layout, uses in (
        ((2, 16, 128, 128, 64), torch.bfloat16, last, ""),
        ((2, 16, 128, 128, 64), torch.bfloat16, last, "normalised residual"),
        ((2, 16, 128, 128, 64), torch.bfloat16, last, "raw residual"),
        ((2, 16, 128, 128, 64), torch.float32, first, "normalised residual, affine"),
        ((2, 3, 128, 128, 64), torch.bfloat16, last, "PReLU"),
        ((2, 16, 16, 16, 16), torch.bfloat16, first, "normalised residual"),
        ((2, 256, 8, 8, 4), torch.float32, last, "PReLU"),
    ):
        name = f"{shape[1]} channels{' last' if layout == last else ''}, {uses + ', ' if uses else ''}{_short(dtype)}"
        yield name, partial(_run_norm, shape, dtype, layout, uses)
    for ce, dtype, layout in (
        ("bce", torch.bfloat16, first),
        ("bce", torch.float32, last),
        ("multihot", torch.bfloat16, first),
        ("argmax", torch.float32, first),
    ):
        name = f"{ce}, {'channels last, ' if layout == last else ''}{_short(dtype)}"
        yield name, partial(_run_loss, ce, dtype, layout)


def _run_attention(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = _empty(shape, dtype).permute(2, 0, 3, 1, 4).unbind(0)
    out, lse = attention.attention_forward(q, k, v, 0.1)
    attention.attention_backward(q, k, v, out, lse, torch.empty_like(out), 0.1)


def _run_norm(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, uses: str) -> None:
    x, dy = (_empty(shape, dtype).to(memory_format=layout) for _ in range(2))
    residual = torch.empty_like(x) if "residual" in uses else None
    weight, bias = (_empty(shape[1:2], torch.float32) if "affine" in uses else None for _ in range(2))
    slopes = _empty((1,), torch.float32) if "PReLU" in uses else None
    slope = 0.01 if slopes is None else None
    normalised = "normalised" in uses
    _, stats = instance_norm.instance_norm_forward(x, weight, bias, 1e-5, slopes, slope, residual, normalised)
    instance_norm.instance_norm_backward(dy, x, stats, weight, bias, slopes, slope, residual, normalised)


def _run_loss(ce: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    logits = _empty((2, 3, 128, 128, 64), dtype).to(memory_format=layout)
    labels = _empty((2, 128, 128, 64), torch.uint8)
    regions, factors = [2, 3, -1, 1, 2, 3, -1, 3, -1], [1.0, 1.0, 1e-5, 1e-5]
    loss, _, _, saved = dice_ce.dice_ce_forward(logits, labels, regions, None, ce, factors, False, False)
    dice_ce.dice_ce_backward(loss, None, None, logits, labels, saved, regions, None, ce, factors, False, False)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compile_launch(launch: dispatch.Launch, config: dispatch.Config, arch: int) -> Any:
    """The compiled kernel of a launch, for one architecture; nothing is run and no GPU is needed."""
    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Target(arch))
    try:
        return launch.kernel.run(**launch.args, **config, grid=(1,), warmup=True)
    finally:
        triton.runtime.driver._active = active


def resources(compiled: Any, launch: dispatch.Launch, case: str, config: dispatch.Config) -> Compiled:
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
        case=case,
        config=" ".join(f"{name}={value}" for name, value in config.items()),
        arch=compiled.metadata.target.arch,
        registers=used["REG"],
        stack=used["STACK"] + used["LOCAL"],
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        traps=re.search(r"^\s*(@\S+\s+)?trap;", compiled.asm["ptx"], re.MULTILINE) is not None,
    )


def compile_cases(arch: int, every: bool) -> list[Compiled]:
    """Every kernel of every case for one architecture, each distinct one once."""
    done: dict[str, Compiled] = {}
    for case, run in cases():

        def compile_it(launch: dispatch.Launch, case: str = case) -> None:
            for config in launch.candidates if every else launch.candidates[:1]:
                compiled = compile_launch(launch, config, arch)
                if compiled.hash not in done:
                    done[compiled.hash] = resources(compiled, launch, case, config)

        with dispatch.observed(compile_it):
            run()
    return list(done.values())


def table(compiled: list[Compiled]) -> str:
    """A line for each kernel, use and configuration; registers per thread / KiB of shared memory on each GPU."""
    archs = sorted({item.arch for item in compiled})
    lines: dict[tuple[str, str, str], dict[int, str]] = {}
    for item in compiled:
        cell = f"{item.registers} / {item.shared / 1024:.0f}" + (" !" if item.faults() else "")
        lines.setdefault((item.kernel, item.case, item.config), {})[item.arch] = cell
    head = ["kernel", "use", "configuration", *(f"sm_{arch}" for arch in archs)]
    rows = [head, *([*key, *(cells.get(arch, "") for arch in archs)] for key, cells in sorted(lines.items()))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", action="store_true", help="every configuration, not the defaults alone")
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=SHARED_KIB, default=list(SHARED_KIB), help="for these GPUs"
    )
    args = parser.parse_args()
    if dispatch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: unset it to compile")
    # A process for each GPU: Triton keeps one target at a time.
    with ProcessPoolExecutor(min(len(args.arch), os.cpu_count() or 1), get_context("spawn")) as pool:
        found = pool.map(compile_cases, args.arch, [args.every] * len(args.arch))
        compiled = [item for items in found for item in items]
    print(table(compiled))
    faults = [
        f"{item.kernel} ({item.case}; {item.config}) on sm_{item.arch}: {fault}"
        for item in compiled
        for fault in item.faults()
    ]
    print(f"{len(compiled)} compiled kernels; registers per thread / KiB of shared memory; {len(faults)} faults")
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
