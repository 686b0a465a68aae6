"""Ahead-of-time compilation finds what would not run, or not run well, on a GPU that is not here."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from kernels import aot, dispatch

pytestmark = pytest.mark.skipif(dispatch.INTERPRETED, reason="TRITON_INTERPRET is set: nothing compiles")
FITS = aot.Compiled("kernel", "case", "", 90, registers=128, stack=0, shared=227 * 1024, tensor_memory=512, traps=False)


@triton.jit
def square(x_ptr, y_ptr, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + rows * BLOCK + columns)
    tl.store(y_ptr + rows * BLOCK + columns, tl.dot(x, x).to(y_ptr.dtype.element_ty))


def compile_square(arch: int, size: int, dtype: torch.dtype, **config: int) -> aot.Compiled:
    x = torch.empty(size, size, dtype=dtype, device="meta")
    found: list[aot.Compiled] = []

    def observer(launch: dispatch.Launch) -> None:
        compiled = aot.compile_launch(launch, launch.candidates[0], arch)
        found.append(aot.resources(compiled, launch, "test", launch.candidates[0]))

    with dispatch.observed(observer):
        dispatch.launch(square, lambda c: (1,), {"x_ptr": x, "y_ptr": x}, [{"BLOCK": size, **config}], "key")
    return found[0]


@pytest.mark.parametrize("arch", aot.SHARED_KIB)
def test_a_kernel_that_fits_has_no_faults(arch: int) -> None:
    compiled = compile_square(arch, 32, torch.bfloat16, num_warps=4)
    assert compiled.arch == arch and compiled.registers > 0 and not compiled.faults()


def test_registers_that_do_not_suffice_are_found() -> None:
    compiled = compile_square(90, 64, torch.bfloat16, num_warps=1, maxnreg=64)
    assert any("spills" in fault for fault in compiled.faults())


def test_a_kernel_that_compiles_to_a_bare_trap_is_found() -> None:
    compiled = compile_square(100, 512, torch.bfloat16, num_warps=4)
    assert "is a bare trap" in compiled.faults()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"stack": 8}, "spills 8 bytes"),
        ({"shared": 227 * 1024 + 1}, "the limit is 227 KiB"),
        ({"arch": 120}, "the limit is 99 KiB"),
        ({"tensor_memory": 513}, "513 columns"),
        ({"traps": True}, "bare trap"),
    ],
)
def test_each_limit_is_a_fault_just_beyond(change: dict[str, Any], word: str) -> None:
    assert not FITS.faults()
    (fault,) = dataclasses.replace(FITS, **change).faults()
    assert word in fault


def test_the_driver_that_was_there_is_there_again() -> None:
    before = triton.runtime.driver._active
    compile_square(80, 16, torch.float16, num_warps=1)
    assert triton.runtime.driver._active is before


def test_every_kernel_of_the_package_is_among_the_cases() -> None:
    launched: set[str] = set()
    with dispatch.observed(lambda launch: launched.add(launch.name)):
        for _, run in aot.cases():
            run()
    modules = (aot.attention, aot.dice_ce, aot.instance_norm)
    kernels = {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and (name.endswith("_kernel") or not name.startswith("_"))
    }
    assert kernels and kernels == launched
