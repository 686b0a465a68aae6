"""Cases in three stages side by side: they overlap, and none ends the others' work."""

from __future__ import annotations

import errno
import gc
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import case_batch
from engine.case_batch import BatchStopped, in_stages, threads_for
from engine.ranks.distributed import Ranks
from pipelines.basics.errors import DataError
from pipelines.layouts.cases import Case


def test_stages_overlap_and_a_faulty_item_leaves_the_others_alone() -> None:
    """While item 1 is computed, item 2 is read and item 0 finished: each waits for the others to be there."""
    together = threading.Barrier(3, timeout=120)
    alive: set[int] = set()

    def read(item: int) -> int:
        if item == 2:
            together.wait()
        if item == 3:
            raise DataError("no such item")
        alive.add(item)
        return 10 * item

    def compute(content: int) -> int:
        assert len(alive) <= 3
        if content == 10:
            together.wait()
        return content + 1

    def finish(item: int, content: int, result: int) -> str:
        if item == 0:
            together.wait()
        alive.remove(item)
        if item == 4:
            raise DataError("disk")
        return f"{item} {content} {result}"

    outcomes = [(item, str(outcome)) for item, outcome in in_stages(range(6), read, compute, finish)]
    assert outcomes == [(0, "0 0 1"), (1, "1 10 11"), (2, "2 20 21"), (3, "no such item"), (4, "disk"), (5, "5 50 51")]
    assert list(in_stages([], read, compute, finish)) == []


def test_several_threads_read_and_finish_while_one_item_is_computed_and_order_is_kept() -> None:
    """Items 3 to 5 are read together while 2 is computed, and 0 to 2 finished together while 3 is."""
    reading, finishing = threading.Barrier(4, timeout=120), threading.Barrier(4, timeout=120)
    alive: set[int] = set()
    most: list[int] = []

    def read(item: int) -> int:
        alive.add(item)
        most.append(len(alive))
        if item in (3, 4, 5):
            reading.wait()
        return item

    def compute(content: int) -> int:
        assert computed == list(range(content))
        computed.append(content)
        if content == 2:
            reading.wait()
        if content == 3:
            finishing.wait()
        return content

    def finish(item: int, content: int, result: int) -> str:
        if item in (0, 1, 2):
            finishing.wait()
        alive.remove(item)
        return str(result)

    computed: list[int] = []
    outcomes = list(in_stages(range(20), read, compute, finish, threads=3))
    assert outcomes == [(item, str(item)) for item in range(20)]
    assert max(most) <= 7


@pytest.mark.parametrize(
    ("device", "cores", "ranks_on_node", "room", "expected"),
    [
        ("cpu", 64, 1, 2**40, 1),
        ("cuda", 64, 1, 2**40, 8),
        ("cuda", 64, 8, 2**40, 4),  # 8 cores for a rank
        ("cuda", 2, 1, 2**40, 1),
        ("cuda", 64, 1, 14 * 80_000, 3),  # half of it holds 7 cases
        ("cuda", 64, 1, 13 * 80_000, 2),
        ("cuda", 64, 1, 10, 1),
    ],
)
def test_a_gpu_gets_as_many_threads_as_cores_and_memory_allow(
    device: str, cores: int, ranks_on_node: int, room: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(case_batch, "cores", lambda: cores)
    monkeypatch.setattr(case_batch, "limit_bytes", lambda device, ranks: room)
    monkeypatch.setattr(case_batch, "read_grid", lambda path: ((int(path.name), 10, 10), None))
    ranks = Ranks(0, ranks_on_node, 0, torch.device(device), ranks_on_node)
    cases = [Case(size, (Path(size),) * 4, None, None) for size in ("5", "25", "6")]
    assert case_batch.case_bytes(cases[1]) == 2 * 4 * 2500 * 4 == 80_000
    assert threads_for(cases, ranks) == expected
    assert threads_for([], ranks) == 1


def test_a_case_whose_header_cannot_be_read_counts_for_nothing(tmp_path: Path) -> None:
    assert case_batch.case_bytes(Case("gone", (tmp_path / "gone.nii",), None, None)) == 1


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), r"out of memory \(MemoryError\): end other programs"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), r"out of memory \(CUDA out of memory. Tried\)"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (RuntimeError("sizes\n of tensors"), r"RuntimeError: sizes of tensors \(test_case_batch.py, line \d+\)"),
        (
            OSError(errno.EACCES, "Permission denied", "a/scan.nii"),
            "a/scan.nii: Permission denied; change its",
        ),
        (RuntimeError("could not create a primitive"), "out of memory"),
        (ValueError("some of the strides are negative"), "some of the strides are negative"),
        (IndexError("one slice"), r"IndexError: one slice \(test_case_batch.py"),
    ],
)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("stage", ["read", "compute", "finish"])
def test_a_failing_item_leaves_the_others_alone_whatever_the_error(
    error: Exception, says: str, stage: str, threads: int
) -> None:
    def work(name: str, item: int) -> int:
        if name == stage and item == 1:
            raise error
        return item

    read, compute, finish = (lambda item, *_, name=name: work(name, item) for name in STAGES)
    outcomes = dict(in_stages(range(3), read, compute, finish, threads))
    fault = outcomes.pop(1)
    assert outcomes == {0: 0, 2: 2}
    assert isinstance(fault, DataError)
    with pytest.raises(DataError, match=f"^{says}"):
        raise fault


STAGES = ("read", "compute", "finish")


@pytest.mark.parametrize("error", [BatchStopped("disk full"), torch.AcceleratorError("device-side assert")])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_an_error_that_every_further_item_would_meet_ends_the_batch(
    error: BaseException, stage: str, threads: int
) -> None:
    def work(name: str, item: int) -> int:
        if name == stage and item == 1:
            raise error
        return item

    done = []
    with pytest.raises(type(error)):
        read, compute, finish = (lambda item, *_, name=name: work(name, item) for name in STAGES)
        for item, _ in in_stages(range(4), read, compute, finish, threads):
            done.append(item)
    assert done == [0]


def test_a_failed_items_volumes_are_not_kept() -> None:
    """An error holds the frames that it passed through, and these the volumes that memory ran out for."""
    kept: list[weakref.ref] = []

    class Volume(np.ndarray):
        pass

    def read(item: int) -> np.ndarray:
        volume = np.zeros(8).view(Volume)
        kept.append(weakref.ref(volume))
        return volume

    def compute(volume: np.ndarray) -> None:
        raise MemoryError

    faults = [fault for _, fault in in_stages(range(2), read, compute, lambda *_: None)]
    assert len(faults) == 2
    gc.disable()
    try:
        assert [volume() for volume in kept] == [None, None]
    finally:
        gc.enable()
