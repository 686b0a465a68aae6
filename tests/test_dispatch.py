"""Which path an operation takes, who says so, and how a kernel gets its configuration."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels import dispatch

needs_compiled_kernels = pytest.mark.skipif(dispatch.INTERPRETED, reason="TRITON_INTERPRET is set")


@pytest.fixture(autouse=True)
def auto_afterwards() -> Iterator[None]:
    yield
    dispatch.use("auto")


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As on an H100 on which two things were measured."""
    measured = {"configs": {"a_kernel": {"N256": {"BLOCK": 64, "num_warps": 8}}}, "torch": ["attention N4096"]}
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"sm_90": measured}))
    monkeypatch.setattr(dispatch, "TUNED_FILE", file)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(dispatch, "_refusal", lambda device_type: "")
    monkeypatch.setattr(dispatch, "_capability", lambda: "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    dispatch.tuned_table.cache_clear()
    yield
    dispatch.tuned_table.cache_clear()


@needs_compiled_kernels
def test_a_cpu_takes_the_reference_and_says_why() -> None:
    why = "Triton kernels need an NVIDIA GPU, the tensors are on cpu"
    assert dispatch.use("auto", "cpu") == f"kernels: reference ({why})"
    assert dispatch.path("attention", torch.zeros(1), "N256") == "reference"


@needs_compiled_kernels
def test_triton_on_a_cpu_is_refused_at_once_and_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="kernels 'triton': Triton kernels need an NVIDIA GPU.*'auto'"):
        dispatch.use("triton", "cpu")
    monkeypatch.setattr(dispatch, "_mode", "triton")
    with pytest.raises(ValueError, match="the tensors are on cpu.*move the tensors"):
        dispatch.path("attention", torch.zeros(1), "N256")


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="kernels 'cuda' must be one of auto, triton, reference"):
        dispatch.use("cuda")  # type: ignore[arg-type]


def test_float64_and_the_asked_for_reference_never_run_a_kernel(on_a_gpu: None) -> None:
    assert dispatch.path("attention", torch.zeros(1, dtype=torch.float64), "N256") == "reference"
    assert dispatch.path("attention", torch.zeros(1, dtype=torch.bfloat16), "N256") == "triton"
    assert dispatch.use("reference", "cuda") == "kernels: reference (asked for)"
    assert dispatch.path("attention", torch.zeros(1), "N256") == "reference"


def test_pytorch_takes_over_where_it_was_measured_faster_and_the_log_says_where(on_a_gpu: None) -> None:
    said = dispatch.use("auto", "cuda")
    assert said == "kernels: triton (NVIDIA H100, sm_90); PyTorch's own where it was measured faster: attention N4096"
    assert dispatch.path("attention", torch.zeros(1), "N4096") == "torch"
    assert dispatch.path("attention", torch.zeros(1), "N256") == "triton"
    dispatch.use("triton", "cuda")
    assert dispatch.path("attention", torch.zeros(1), "N4096") == "triton"


class Kernel:
    """Stands in for a compiled kernel: notes its grid and arguments."""

    def __init__(self) -> None:
        self.fn = SimpleNamespace(__name__="a_kernel")
        self.launched: list[tuple[Any, dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda **args: self.launched.append((grid, args))


def test_a_measured_configuration_goes_before_the_default(on_a_gpu: None) -> None:
    kernel, x = Kernel(), torch.zeros(1)
    candidates = [{"BLOCK": 128, "num_warps": 4}, {"BLOCK": 64, "num_warps": 8}]
    for key in ("N256", "N512"):
        dispatch.launch(kernel, lambda c: (512 // c["BLOCK"],), {"x_ptr": x}, candidates, key)
    assert [(grid, args["BLOCK"], args["num_warps"]) for grid, args in kernel.launched] == [
        ((8,), 64, 8),
        ((4,), 128, 4),
    ]


def test_a_configuration_measured_for_an_older_kernel_is_not_used(on_a_gpu: None) -> None:
    kernel = Kernel()
    dispatch.launch(kernel, lambda c: (1,), {"x_ptr": torch.zeros(1)}, [{"BLOCK_S": 128, "num_warps": 4}], "N256")
    assert kernel.launched[0][1]["BLOCK_S"] == 128


def test_an_observed_launch_does_not_run() -> None:
    kernel = Kernel()
    seen: list[dispatch.Launch] = []
    with dispatch.observed(seen.append):
        dispatch.launch(kernel, lambda c: (1,), {"x_ptr": torch.zeros(1)}, [{"BLOCK": 1}], "key")
    assert [launch.name for launch in seen] == ["a_kernel"] and not kernel.launched


def test_what_was_measured_names_kernels_and_configurations_that_there_are() -> None:
    if not dispatch.TUNED_FILE.is_file():
        pytest.skip("nothing was measured yet")
    sources = "".join(path.read_text() for path in dispatch.TUNED_FILE.parent.glob("*.py"))
    for measured in json.loads(dispatch.TUNED_FILE.read_text()).values():
        assert all(f"def {kernel}(" in sources for kernel in measured["configs"])


@needs_compiled_kernels
def test_the_interpreter_runs_kernels_on_a_cpu_but_not_in_bfloat16() -> None:
    code = (
        "import torch; from kernels import dispatch; print(dispatch.use('auto', 'cpu'));"
        "print(*(dispatch.path('attention', torch.zeros(1, dtype=t), '') for t in (torch.float32, torch.bfloat16)))"
    )
    env = {"TRITON_INTERPRET": "1", "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "interpreted on the CPU" in done.stdout and done.stdout.split("\n")[1] == "triton reference", done.stderr
