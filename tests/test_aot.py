"""Ahead-of-time compilation finds kernels that would not run, or not run well, on a GPU that is not here."""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import kernels
from benchmarks import aot, tune, workloads
from benchmarks.report import OURS
from kernels import dispatch

pytestmark = pytest.mark.skipif(dispatch.INTERPRETED, reason="TRITON_INTERPRET is set: nothing compiles")
FITS = aot.Compiled(
    "kernel", "workload", "", 90, registers=128, stack=0, shared=227 * 1024, tensor_memory=512, traps=False
)


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


def test_too_few_registers_are_found() -> None:
    compiled = compile_square(90, 64, torch.bfloat16, num_warps=1, maxnreg=64)
    assert any("spills" in fault for fault in compiled.faults())


def test_a_kernel_that_compiles_to_a_bare_trap_is_found() -> None:
    compiled = compile_square(100, 512, torch.bfloat16, num_warps=4)
    assert "is a bare trap" in compiled.faults()


def test_configurations_that_differ_in_warps_alone_are_compiled_each() -> None:
    x = torch.empty(32, 32, device="meta")
    launches: list[dispatch.Launch] = []
    with dispatch.observed(launches.append):
        dispatch.launch(square, lambda c: (1,), {"x_ptr": x, "y_ptr": x}, [{"BLOCK": 32}], "key")
    assert len({aot.signature(launches[0], {"BLOCK": 32, "num_warps": warps}) for warps in (2, 4, 8)}) == 3


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


def test_compiling_restores_the_driver() -> None:
    before = triton.runtime.driver._active
    compile_square(80, 16, torch.float16, num_warps=1)
    assert triton.runtime.driver._active is before


def test_a_kernel_that_does_not_compile_is_a_fault_beside_the_others() -> None:
    (fault,) = aot.Compiled("kernel", "workload", "", 90, error="out of registers").faults()
    assert fault == "does not compile: out of registers"


def signatures(every_workload: Iterable[workloads.Workload], every: bool) -> set[tuple[Any, ...]]:
    return {
        aot.signature(launch, config)
        for workload in every_workload
        for launch in workloads.launches(workload)
        for config in (launch.candidates if every else launch.candidates[:1])
    }


def test_every_kernel_of_the_package_is_in_a_workload() -> None:
    found = {
        name
        for file in pkgutil.iter_modules(kernels.__path__)
        for name, value in vars(import_module(f"kernels.{file.name}")).items()
        if isinstance(value, triton.JITFunction) and (name.endswith("_kernel") or not name.startswith("_"))
    }
    assert found and found == {signature[0] for signature in signatures(workloads.MODELS, every=False)}


def test_continuous_integration_has_few_enough_kernels_to_compile() -> None:
    assert len(signatures(workloads.MODELS, every=False)) < 90


SMALL = (
    workloads.AttentionWorkload(2, 10, 24, 51),
    workloads.AttentionWorkload(1, 2, 520, 16, torch.float32),
    workloads.AttentionWorkload(2, 10, 24, 51, packed=False),
    workloads.InstanceNormWorkload((2, 16, 32, 32, 16), residual="normalised", prelu=True, affine=True),
    workloads.InstanceNormWorkload((2, 3, 32, 32, 33), torch.float32, workloads.FIRST, residual="raw"),
    workloads.InstanceNormWorkload((2, 5, 4, 4, 4), affine=True),
    workloads.LayerNormWorkload((2, 24, 51)),
    workloads.LayerNormWorkload((2, 24, 40), torch.float32),
    workloads.LayerNormWorkload((2, 24, 40), update=False),
    workloads.DiceCEWorkload((2, 3, 16, 16, 16)),
    workloads.DiceCEWorkload((1, 3, 9, 7, 5), torch.float32, "argmax", workloads.LAST),
    workloads.UpConvWorkload((2, 32, 4, 4, 2), 16, sliced=True),
    workloads.UpConvWorkload((1, 5, 3, 4, 2), 3, torch.float16, memory_format=workloads.FIRST),
    workloads.AdamWWorkload(2, 16),
    *(bench.WORKLOADS[0] for bench in tune.BENCHES.values()),
)


@pytest.mark.parametrize("workload", SMALL, ids=str)
def test_ahead_of_time_compilation_covers_what_a_training_step_launches(
    workload: workloads.Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Triton's own key, so that its cache serves the launch; and by the key of the tuned configurations."""
    monkeypatch.setattr(dispatch, "path", lambda *args: "triton")
    launched: list[dispatch.Launch] = []
    with dispatch.observed(launched.append):
        (call, *_) = tune.BENCHES[workload.op].calls(workload, OURS, "forward + backward")
        launched.clear()
        call()

    def described(launches: Iterable[dispatch.Launch]) -> list[Any]:
        return [(it.key, aot.signature(it, it.candidates[0]), list(it.candidates)) for it in launches]

    assert described(launched) == described(workloads.launches(workload))


@pytest.mark.parametrize("op", workloads.OPS)
def test_every_operation_is_measured_and_its_tests_run_in_the_interpreter(op: str) -> None:
    assert tune.BENCHES[op].pytestmark == import_module(f"test_{op}").pytestmark == pytest.mark.kernel
    assert workloads.measured(op)


@pytest.mark.parametrize("op", sorted(set(workloads.OPS) - {"adamw"}))  # an optimizer is in no graph
def test_every_operation_of_a_network_is_one_of_pytorch(op: str) -> None:
    assert getattr(torch.ops.glioforge, op).default in dispatch.LAUNCHERS
