"""`launch/tuned.py` as a user calls it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_gpu import FakeGpu

from kernels import dispatch
from kernels.measured_cache import MeasuredCache
from launch import tuned


@pytest.fixture(autouse=True)
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel, an operation of which no way is right, and the ways to run a step."""
    monkeypatch.setenv("GLIOFORGE_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    with monkeypatch.context() as patch, dispatch.using("auto", "cpu"):
        gpu = FakeGpu(patch)
        gpu.times, gpu.wrong = {64: 0.5, "MATH": 0.5}, {"triton", "FLASH_ATTENTION"}
        with dispatch.tuning("cpu"):
            gpu.launch(torch.ones(4))
            gpu.double(torch.ones(4))
    MeasuredCache("steps").put("UNETR on H100", {"eager": 0.5})


def test_what_was_chosen_is_shown_with_times_gpu_and_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuned.main([]) == 0
    said = capsys.readouterr().out
    assert "kernels: 2 measurements in " in said and "steps: 1 measurement in " in said
    (kernel,) = [line for line in said.splitlines() if "a_kernel N256" in line]
    assert [cell.strip() for cell in kernel.split("│")[1:6]] == [
        "a_kernel N256", "BLOCK=64 num_warps=8", "1000.0", "500.0", "2.00 x",
    ]  # fmt: skip
    (operation,) = [line for line in said.splitlines() if "double N256 (forward)" in line]
    assert [cell.strip() for cell in operation.split("│")[2:6]] == ["MATH", "wrong result", "500.0", ""]
    assert f"NVIDIA H100, torch {torch.__version__}" in kernel and '{"eager": 0.5}' in said


def test_clearing_removes_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    for kernels, steps in (("2 measurements", "1 measurement"), ("0 measurements", "0 measurements")):
        assert tuned.main(["--clear"]) == 0
        assert capsys.readouterr().out == f"kernels: {kernels} removed\nsteps: {steps} removed\n"
    assert tuned.main([]) == 0


def test_entries_of_other_programs_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("kernels", "steps"):
        for key, value in (("x", 3), ("y", {"times": {}, "best": "z"}), ("", {"times": {}, "best": None})):
            MeasuredCache(name).put(key, value)
    assert tuned.main([]) == 0
    assert '"best": null' in capsys.readouterr().out
