"""Which signals a command handles, and how all ranks stop at the same step: two processes, gloo."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from two_ranks import LIMIT_S, PROMPT_S, TwoRanks, ready

from engine.ranks.command import run_command
from engine.ranks.distributed import Ranks, init_ranks
from engine.ranks.signals import STOP_SIGNALS, StopSignal, TrainingStopped, install_handlers, restore_handlers


def test_a_hangup_that_nohup_ignores_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_command(lambda: signal.raise_signal(signal.SIGHUP), lambda: "", alone=True) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    handlers = install_handlers(lambda number, frame: None)
    assert list(handlers) == list(STOP_SIGNALS) and signal.getsignal(signal.SIGTERM) not in before
    restore_handlers(handlers)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


@pytest.fixture
def two_ranks(tmp_path: Path) -> TwoRanks:
    return TwoRanks(tmp_path)


def train_until_stopped() -> None:
    ranks = init_ranks("cpu")
    with StopSignal(ranks) as stop:
        for step in range(100_000):
            time.sleep(0.01)
            if step == 50:
                ready()
            if step % 10 == 0:
                dist.barrier()  # ranks in step, as gradients keep them
            if stop.due():
                Path(f"stopped{ranks.rank}").write_text(str(step))
                raise TrainingStopped(stop.name)


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 1)])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    number: signal.Signals, rank: int, two_ranks: TwoRanks
) -> None:
    two_ranks.start(train_until_stopped)
    assert two_ranks.pid(1 - rank)
    os.kill(two_ranks.pid(rank), number)
    ended = two_ranks.end()
    steps = [(two_ranks.folder / f"stopped{rank}").read_text() for rank in range(2)]
    assert steps[0] == steps[1]
    assert ended.statuses == [os.EX_TEMPFAIL, os.EX_TEMPFAIL], ended.output
    assert len(ended.lines()) == 1 and ended.lines()[0].startswith(f"stopped by {number.name}; "), ended.output
    assert ended.seconds < PROMPT_S


def rank_1_is_late() -> None:
    ranks = init_ranks("cpu")
    with StopSignal(ranks) as stop:
        dist.barrier()
        ready()
        if ranks.rank == 1:
            time.sleep(4)
        started = time.monotonic()
        stop.due()
        Path(f"waited{ranks.rank}").write_text(str(time.monotonic() - started))


def test_no_step_waits_for_the_other_ranks_to_agree(two_ranks: TwoRanks) -> None:
    assert two_ranks.start(rank_1_is_late).end().statuses == [0, 0]
    assert float((two_ranks.folder / "waited0").read_text()) < 3


def test_one_rank_stops_at_its_next_step_and_restores_the_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with StopSignal(Ranks(0, 1, 0, torch.device("cpu"))) as stop:
        assert not stop.due()
        signal.raise_signal(signal.SIGUSR1)
        assert stop.due() and stop.name == "SIGUSR1"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before


def slow_to_stop(still_there: Path) -> None:
    with StopSignal(Ranks(0, 1, 0, torch.device("cpu"))):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # the same, passed on by a launcher
        still_there.touch()
        time.sleep(1.1)
        signal.raise_signal(signal.SIGTERM)
        os._exit(0)


def test_a_second_sigterm_ends_at_once_and_the_same_one_passed_on_does_not(tmp_path: Path) -> None:
    still_there = tmp_path / "still_there"
    process = multiprocessing.get_context("forkserver").Process(target=slow_to_stop, args=(still_there,))
    process.start()
    process.join(LIMIT_S)
    assert process.exitcode == -signal.SIGTERM and still_there.exists()


@pytest.mark.parametrize("step_s", [0.03, 0.1, 0.4, 3.0])
def test_a_signal_is_noticed_within_two_seconds_or_three_steps(step_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a simulated clock: the signal comes after 100 steps."""
    now = [0.0]
    monkeypatch.setattr("engine.ranks.signals.time.monotonic", lambda: now[0])
    monkeypatch.setattr("engine.ranks.signals.dist.new_group", lambda backend: object())
    monkeypatch.setattr("engine.ranks.signals.dist.all_reduce", lambda *args, **options: mock.Mock())
    stop = StopSignal(Ranks(0, 2, 0, torch.device("cpu")))
    for step in range(200):
        now[0] += step_s
        stop.number = stop.number or (signal.SIGTERM if step == 100 else 0)
        if stop.due():
            break
    assert (step - 100) * step_s <= max(2.5, 3 * step_s)
