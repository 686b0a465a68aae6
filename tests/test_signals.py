"""Which signals a command handles."""

from __future__ import annotations

import signal

import pytest

from engine.ranks.command import run_command
from engine.ranks.signals import STOP_SIGNALS, install_handlers, restore_handlers


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
