"""Progress of a training in a pipe, where lines stand for the bar, and numbers that are read late."""

from __future__ import annotations

import logging

import pytest
import torch

from engine import progress
from engine.progress import LateValues, TrainingProgress

ROW = {"epoch": 2, "loss": 1.25, "samples_per_s": 3.0, "val_mean": 0.5, "val_TC": None, "val_WT": 0.6, "val_ET": 0.4}


def test_in_a_pipe_epochs_are_lines_and_steps_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    with TrainingProgress(10, 0, is_shown=True) as bar:
        bar.step(None, done=1, samples=2)
        bar.step(1.5, done=2, samples=2)
        bar.epoch({name: value for name, value in ROW.items() if name == "epoch"}, 4)
        bar.epoch(ROW, 4)
    assert caplog.messages == [
        "step 2/10  loss 1.500  2.00 samples/s  0 min left",
        "epoch 2/4  loss 1.250  Dice 50.0  (TC n/a  WT 60.0  ET 40.0)  3.00 samples/s",
    ]


def test_only_one_rank_shows_its_progress(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    with TrainingProgress(10, 0, is_shown=False) as bar:
        for done in range(3):
            bar.step(1.5, done, samples=2)
        bar.epoch(ROW, 4)
    assert not caplog.messages


def test_values_are_those_of_the_step_before() -> None:
    late = LateValues()
    assert late.push(torch.tensor([1.0, 2.0])) is None
    assert late.push(torch.tensor([3.0, 4.0])) == [1.0, 2.0]
    assert late.last() == [3.0, 4.0] and late.last() is None
