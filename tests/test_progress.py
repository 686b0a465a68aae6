"""Progress of a training in a pipe, numbers that are read late, and the sums of an epoch over steps and ranks."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch

from engine import progress
from engine.progress import EpochSums, LateValues, TrainingProgress, epoch_means
from engine.ranks.distributed import Ranks
from engine.step import StepValues

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


CPU = torch.device("cpu")


def sums_of(*passes: tuple[float, bool, bool]) -> EpochSums:
    """Of the loss of each pass, whether its gradients were not finite, and whether it made a step."""
    sums = EpochSums(CPU)
    for loss, was_skipped, stepped in passes:
        sums.add(torch.tensor(StepValues(loss, 2 * loss, 3 * loss, 1.0, was_skipped, 0.0)), stepped)
    return sums


def test_losses_that_are_not_finite_do_not_count() -> None:
    sums = sums_of((1.0, False, True), (math.nan, True, True), (math.inf, True, True), (3.0, False, True))
    assert epoch_means([sums.values.tolist()]) == ({"loss": 2.0, "dice_loss": 4.0, "ce_loss": 6.0}, 2)


def test_a_skipped_step_counts_once_for_all_its_passes() -> None:
    """`was_skipped` is that of the last step, in every pass until the next."""
    sums = sums_of((1.0, False, False), (1.0, True, True), (1.0, True, False), (1.0, False, True))
    assert epoch_means([sums.values.tolist()])[1] == 1


def test_means_are_over_the_passes_of_all_ranks_and_skipped_steps_are_common() -> None:
    ranks = [[6.0, 6.0, 6.0, 3.0, 2.0], [2.0, 4.0, 6.0, 1.0, 2.0]]
    assert epoch_means(ranks) == ({"loss": 2.0, "dice_loss": 2.5, "ce_loss": 3.0}, 2)


def test_an_epoch_without_a_finite_loss_has_no_mean() -> None:
    assert epoch_means([sums_of((math.nan, True, True)).values.tolist()])[0]["loss"] is None


@pytest.mark.parametrize(("world_size", "rank", "expected"), [
    (2, 1, [2.0, 4.0, 6.0, 1.0, 2.0]),  # its own
    (1, 0, [8.0, 10.0, 12.0, 4.0, 2.0]),  # all; both ranks skipped the same two steps
    (3, 0, [8.0, 10.0, 12.0, 4.0, 2.0]),
    (3, 1, [0.0] * 5),
])  # fmt: skip
def test_sums_come_back_at_any_number_of_ranks(world_size: int, rank: int, expected: list[float], ranks: Ranks) -> None:
    sums = EpochSums(CPU)
    saved = [[6.0, 6.0, 6.0, 3.0, 2.0], [2.0, 4.0, 6.0, 1.0, 2.0]]
    sums.restore(saved, replace(ranks, rank=rank, world_size=world_size))
    assert sums.values.tolist() == expected
