"""The memory that a process may use, with simulated control groups and limits, and errors that say it ran out."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pytest
import torch

from engine.ranks import memory_limits
from engine.ranks.memory_limits import is_out_of_memory


def test_only_real_memory_errors_are_recognised() -> None:
    def error_of(work: Any) -> Exception:
        with pytest.raises(Exception) as caught:
            work()
        return caught.value

    assert is_out_of_memory(error_of(lambda: torch.empty(2**50)))
    assert is_out_of_memory(error_of(lambda: np.empty(2**60, np.uint8)))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_out_of_memory(error_of(lambda: torch.empty(2) @ torch.empty(3)))
    assert not is_out_of_memory(ValueError("CUDA out of memory"))


def test_a_control_group_limits_what_is_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limits, "CGROUP", tmp_path)
    monkeypatch.setattr(memory_limits, "OWN_CGROUP", tmp_path / "own")
    (tmp_path / "own").write_text("0::/\n")
    free = memory_limits.limit_bytes(torch.device("cpu"))
    assert 0 < free <= psutil.virtual_memory().total
    for name, content in (
        ("max", "900000000"),
        ("current", "700000000"),
        ("stat", "anon 9\ninactive_file 300000000\n"),
    ):
        (tmp_path / f"memory.{name}").write_text(content)
    own = psutil.Process().memory_info().rss
    assert memory_limits.limit_bytes(torch.device("cpu")) - own == pytest.approx(500_000_000, abs=50_000_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_limits.limit_bytes(torch.device("cpu")) > 0.5 * free


def write_group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


def test_the_smallest_of_the_groups_above_a_process_bounds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limits, "CGROUP", tmp_path)
    monkeypatch.setattr(memory_limits, "OWN_CGROUP", tmp_path / "own")
    (tmp_path / "own").write_text("9:cpu,cpuacct:/job\n4:memory:/slurm/job/step\n0::/user.slice\n")
    first = {"memory.limit_in_bytes": str(2**63 - 4096), "memory.usage_in_bytes": "900", "memory.stat": "cache 1"}
    write_group(tmp_path / "memory", first)
    job = {"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "600", "memory.stat": "total_inactive_file 50"}
    write_group(tmp_path / "memory" / "slurm" / "job", job)
    own = {"memory.max": "3000", "memory.current": "100", "memory.stat": "inactive_file 10"}
    write_group(tmp_path / "user.slice", own)
    found = {limit.most: limit.left for limit in memory_limits._control_groups()}
    assert found == {2**63 - 4096: 2**63 - 4096 - 900, 1000: 450, 3000: 2910}


def test_a_limit_of_the_shell_bounds_a_process_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    most = psutil.Process().memory_info().vms + 300_000_000
    monkeypatch.setattr(memory_limits.resource, "getrlimit", lambda _: (most, most))
    own = psutil.Process().memory_info().rss
    assert memory_limits.limit_bytes(torch.device("cpu")) - own == pytest.approx(300_000_000, abs=50_000_000)
    monkeypatch.setattr(memory_limits.psutil, "virtual_memory", lambda: mock.Mock(total=2 * most))
    assert f"{memory_limits.gb(most)} of `ulimit -v`" in memory_limits.plain_message(MemoryError())


IN_DALI = "Critical error in pipeline:\nError in GPU operator `nvidia.dali.fn.normalize`,\nencountered:\n\n"


@pytest.mark.parametrize(
    ("error", "ran_out"),
    [
        (RuntimeError("could not create a memory object"), True),
        (RuntimeError("can't start new thread"), True),
        (ImportError("libx.so: failed to map segment from shared object"), True),
        (RuntimeError(f"{IN_DALI} CUDA allocation failed"), True),
        (RuntimeError(f"{IN_DALI} Can't allocate 134217728 bytes on device 0."), True),
        (RuntimeError(f"{IN_DALI} Can't allocate 134217728 bytes on host."), True),
        (RuntimeError(f"{IN_DALI} CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory"), True),
        (RuntimeError(f"{IN_DALI} CUDA driver API error CUDA_ERROR_OUT_OF_MEMORY (2):\nout of memory"), True),
        (RuntimeError(f"{IN_DALI} CUDA runtime API error cudaErrorIllegalAddress (700)"), False),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ImportError("No module named 'x'"), False),
        (RuntimeError("size mismatch"), False),
    ],
)
def test_messages_that_mean_memory_ran_out_are_recognised(error: Exception, ran_out: bool) -> None:
    assert is_out_of_memory(error) == ran_out
