"""Windows in a call: as many as fit a GPU's free memory, fewer where it runs out, two on a CPU."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import pytest
import torch

from engine import windows_at_once
from engine.windows_at_once import WindowsAtOnce

GB = 10**9
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")


def windows(channels: int = 4) -> WindowsAtOnce:
    return WindowsAtOnce(torch.nn.Conv3d(channels, 3, 1), (8, 8, 8), channels)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A GPU with 10 GB free, 2 GB that PyTorch holds unused, and windows of 0.5 GB; what is returned changes it."""
    memory = {"free": 10 * GB, "reserved": 3 * GB, "allocated": GB, "window": GB // 2}
    monkeypatch.setattr(WindowsAtOnce, "_device", torch.device("cuda", 0))
    monkeypatch.setattr(windows_at_once, "forward_bytes", lambda *_: memory["window"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory["free"], 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: memory["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: memory["allocated"])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return memory


def test_a_cpu_takes_two() -> None:
    assert windows().run(lambda count: count) == 2


@pytest.mark.parametrize(
    ("free", "window", "expected"),
    [(10 * GB, GB // 2, 8), (14 * GB, GB // 2, 16), (70 * GB, GB // 2, 16), (6 * GB, GB // 2, 8),
     (5 * GB, GB // 2, 4), (GB, 2 * GB, 1), (0, 9 * GB, 1), (10 * GB, 2 * GB, 2)],
)  # fmt: skip
def test_a_gpu_takes_the_power_of_two_that_fits_half_of_its_free_memory(
    free: int, window: int, expected: int, gpu: dict[str, int]
) -> None:
    gpu |= {"free": free, "window": window}
    assert windows().run(lambda count: count) == expected


def test_where_memory_runs_out_half_as_many_are_tried_and_kept(
    gpu: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tried: list[int] = []

    def predict(count: int) -> int:
        tried.append(count)
        if count > 2:
            raise OUT_OF_MEMORY
        return count

    several = windows()
    assert several.run(predict) == 2 and tried == [8, 4, 2]
    assert several.run(predict) == 2 and tried == [8, 4, 2, 2]  # the next volume
    assert [record.getMessage() for record in caplog.records] == [
        f"{count} windows at once don't fit (CUDA out of memory. Tried to allocate 2.00 GiB): predicting {half} at once"
        for count, half in ((8, 4), (4, 2))
    ]


def test_the_tensors_of_a_failed_try_are_free_before_the_next(gpu: dict[str, int]) -> None:
    kept: list[weakref.ref] = []

    def predict(count: int) -> int:
        assert all(tensor() is None for tensor in kept)
        activations = torch.zeros(3)
        kept.append(weakref.ref(activations))
        if count > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return count

    assert windows().run(predict) == 1 and len(kept) == 4


def test_what_does_not_fit_as_a_single_window_or_fails_otherwise_is_an_error(gpu: dict[str, int]) -> None:
    def fail(error: Exception, tried: list[int], count: int) -> None:
        tried.append(count)
        raise error

    for error, expected in ((OUT_OF_MEMORY, [8, 4, 2, 1]), (ValueError("NaN"), [8])):
        tried: list[int] = []
        with pytest.raises(type(error)):
            windows().run(lambda count, error=error, tried=tried: fail(error, tried, count))  # type: ignore[misc]
        assert tried == expected


def test_on_a_cpu_out_of_memory_is_an_error_at_once() -> None:
    tried: list[Any] = []

    def fail(count: int) -> None:
        tried.append(count)
        raise MemoryError

    with pytest.raises(MemoryError):
        windows().run(fail)
    assert tried == [2]


@pytest.mark.gpu
def test_a_real_gpu_takes_a_power_of_two() -> None:
    network = torch.nn.Conv3d(4, 3, 1).cuda()
    count = WindowsAtOnce(network, (64, 64, 64), 4).run(lambda count: count)
    assert 1 <= count <= windows_at_once.MOST and count.bit_count() == 1
