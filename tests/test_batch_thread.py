"""Batches made in a thread: one ahead and no more, in the order asked for, with faults where they are asked for."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.loading.batch_thread import BatchThread, on_stream, side_stream

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3


def after(tag: tuple[int, int]) -> tuple[int, int]:
    epoch, step = tag
    return divmod(epoch * STEPS + step + 1, STEPS)


class Maker:
    """Makes the name of a batch, and remembers those it made."""

    def __init__(self) -> None:
        self.made: list[tuple[int, int]] = []
        self.faulty: set[tuple[int, int]] = set()
        self.threads: set[int] = set()
        self.running = self.most = 0

    def __call__(self, epoch: int, step: int) -> str:
        self.threads.add(threading.get_ident())
        self.made.append((epoch, step))
        self.running += 1
        self.most = max(self.most, self.running)
        time.sleep(0.05)
        self.running -= 1
        if (epoch, step) in self.faulty:
            raise ValueError(f"batch {epoch} {step} is faulty")
        return f"{epoch} {step}"


def wait_for(made: list, count: int) -> None:
    end = time.monotonic() + 60
    while len(made) < count:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_next_batch_is_made_ahead_in_one_thread_and_no_other() -> None:
    make = Maker()
    batches = BatchThread(make, after, None)
    assert make.made == []
    for taken, tag in enumerate([(0, 0), (0, 1), (0, 2), (1, 0)], 1):
        assert batches.take(tag) == f"{tag[0]} {tag[1]}"
        wait_for(make.made, taken + 1)
        time.sleep(0.05)
        assert make.made == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)][: taken + 1]
    assert len(make.threads) == 1 and threading.get_ident() not in make.threads


def test_the_next_batch_is_made_while_the_last_one_is_used() -> None:
    ahead = threading.Event()

    def make(epoch: int, step: int) -> int:
        if step == 1:
            ahead.set()
        return step

    BatchThread(make, after, None).take((0, 0))
    assert ahead.wait(60)


def test_a_jump_drops_what_was_made_ahead() -> None:
    make = Maker()
    batches = BatchThread(make, after, None)
    batches.take((0, 0))
    assert batches.take((7, 2)) == "7 2"
    assert batches.take((8, 0)) == "8 0"
    assert make.made[:4] == [(0, 0), (0, 1), (7, 2), (8, 0)]
    assert make.most == 1  # they share buffers


def test_a_fault_is_raised_where_its_batch_is_asked_for_and_the_batch_may_be_asked_for_again() -> None:
    make = Maker()
    make.faulty = {(0, 1)}
    batches = BatchThread(make, after, None)
    assert batches.take((0, 0)) == "0 0"
    for _ in range(2):
        with pytest.raises(ValueError, match="batch 0 1 is faulty"):
            batches.take((0, 1))
    make.faulty.clear()
    assert batches.take((0, 1)) == "0 1"
    make.faulty = {(1, 0)}
    assert batches.take((0, 2)) == "0 2"
    assert batches.take((2, 0)) == "2 0"  # the fault of a batch that nobody asked for is nobody's


def test_cuda_work_goes_to_the_side_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[Any] = []

    @contextmanager
    def stream(name: Any) -> Iterator[None]:
        current.append((name, threading.get_ident()))
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "stream", stream)
    side: Any = "side"
    batches = BatchThread(lambda epoch, step: (list(current), threading.get_ident()), after, side)
    (entered, thread) = batches.take((0, 0))
    assert entered == [("side", thread)]


def test_a_cpu_has_no_side_stream() -> None:
    assert side_stream(torch.device("cpu")) is None
    with on_stream(None):
        pass


@pytest.mark.gpu
def test_a_gpu_has_a_side_stream_of_its_own() -> None:
    device = torch.device("cuda", 0)
    side = side_stream(device)
    assert side is not None and side != torch.cuda.current_stream(device)
    with on_stream(side):
        assert torch.cuda.current_stream(device) == side


SCRIPT = """
import signal, sys, time
from pipelines.loading.batch_thread import BatchThread

signal.signal(signal.SIGINT, signal.default_int_handler)

def make(epoch, step):
    print("making", step, flush=True)
    time.sleep(SECONDS if step == 1 else 0)

batches = BatchThread(make, lambda tag: (tag[0], tag[1] + 1), None)
batches.take((0, 0))
"""


@pytest.mark.parametrize("end", ["the program ends", "an error ends it", "Ctrl-C ends it"])
def test_the_program_ends_while_a_batch_is_being_made(end: str) -> None:
    last = {"the program ends": "", "an error ends it": "raise ValueError", "Ctrl-C ends it": "batches.take((0, 1))"}
    script = SCRIPT.replace("SECONDS", "2") + last[end]
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for step in range(2):
            assert process.stdout.readline() == f"making {step}\n"
        if end == "Ctrl-C ends it":
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert output == ""  # no further batch
    expected = {"the program ends": "", "an error ends it": "ValueError", "Ctrl-C ends it": "KeyboardInterrupt"}
    assert errors.strip().splitlines()[-1:] == ([expected[end]] if expected[end] else [])


def test_the_thread_ends_with_the_loader() -> None:
    make = Maker()
    batches = BatchThread(make, after, None)
    batches.take((0, 0))
    wait_for(make.made, 2)
    (thread,) = (each for each in threading.enumerate() if each.ident in make.threads)
    del batches
    thread.join(60)
    assert not thread.is_alive()
