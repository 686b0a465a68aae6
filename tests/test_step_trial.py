"""Trials of the ways to compute a step, on a clock that the tests control: what is measured, refused, left behind."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_step import batch, cuda_graphs_on_a_cpu, make_step, network
from torch import nn

from engine.ranks.distributed import Ranks
from engine.step import TrainConfig, TrainingStep
from engine.step_trial import STEPS, TIMED_STEPS, StepTrial, Tried, Way

EAGER, GRAPH, COMPILED, BOTH = Way(False, False), Way(False, True), Way(True, False), Way(True, True)
TRAIN = TrainConfig(precision="float32")
Change = Callable[[TrainingStep], None]


class Clock:
    """A clock that only steps move, each by the time that its way is given.

    Attributes:
        now: seconds. taken: the ways of all steps, in order. seconds: of a step, by way.
    """

    def __init__(self, **seconds: float) -> None:
        self.now, self.taken = 0.0, list[Way]()
        names = {"eager": EAGER, "graph": GRAPH, "compiled": COMPILED, "both": BOTH}
        self.seconds = {names[name]: value for name, value in seconds.items()}

    def __call__(self) -> float:
        return self.now

    def patch(self, patch: pytest.MonkeyPatch, changes: dict[Way, Change] | None = None) -> Clock:
        """Run trials by this clock, compile nothing, and change what a step of some ways does."""
        call = TrainingStep.__call__

        def counted(step: TrainingStep, image: torch.Tensor, labels: torch.Tensor) -> Any:
            way = Way.of(step.train)
            self.taken.append(way)
            self.now += self.seconds[way]
            result = call(step, image, labels)
            (changes or {}).get(way, lambda _: None)(step)
            return result

        patch.setattr(TrainingStep, "__call__", counted)
        patch.setattr("engine.step_trial.clock", self)
        patch.setattr(torch, "compile", lambda function, **_: function)
        cuda_graphs_on_a_cpu(patch)
        patch.setattr("engine.step_choice.check_options", lambda train, ranks: None)
        return self


def step_of(ranks: Ranks) -> Callable[[nn.Module, TrainConfig], TrainingStep]:
    return lambda model, train: make_step(ranks, model, **vars(train))


def trial_of(ranks: Ranks, model: nn.Module | None = None, train: TrainConfig = TRAIN) -> StepTrial:
    return StepTrial(step_of(ranks), model or network(), train, ranks, batch(0))


def fail(error: Exception) -> Change:
    def change(step: TrainingStep) -> None:
        raise error

    return change


def set_value(index: int, value: float) -> Change:
    def change(step: TrainingStep) -> None:
        step.values[index] = value

    return change


def test_ways_have_names() -> None:
    assert [str(way) for way in (EAGER, GRAPH, COMPILED, BOTH)] == [
        "eager", "CUDA graph", "compiled", "compiled CUDA graph",
    ]  # fmt: skip


def test_the_time_of_a_way_is_the_median_of_its_timed_steps(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(eager=1.0)

    def slow_start(step: TrainingStep) -> None:  # two slow steps while nobody times, and one among those timed
        clock.now += 100.0 if len(clock.taken) in (1, 2, 4) else 0.0

    monkeypatch.setattr("engine.step_trial.TIMED_S", 1000.0)
    clock.patch(monkeypatch, {EAGER: slow_start})
    assert trial_of(ranks).tried(EAGER) == Tried(1.0)
    assert clock.taken == [EAGER] * STEPS


def test_fewer_of_very_slow_steps_are_timed(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(eager=60.0).patch(monkeypatch)
    assert trial_of(ranks).tried(EAGER) == Tried(60.0)
    assert len(clock.taken) == STEPS - TIMED_STEPS + 1


def test_a_step_of_several_passes_is_timed_whole(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(eager=1.0).patch(monkeypatch)
    assert trial_of(ranks, train=replace(TRAIN, accumulate_steps=3)).tried(EAGER) == Tried(3.0)
    assert len(clock.taken) % 3 == 0


@pytest.mark.parametrize(
    ("index", "value", "fault"),
    [
        (0, math.nan, "its first step has a loss of nan, not of "),
        (0, 3.0, "its first step has a loss of 3, not of "),
        (3, math.inf, "its first step has a gradient norm of inf, not of "),
        (3, 0.0, "its first step has a gradient norm of 0, not of "),
    ],
)
def test_a_way_with_another_result_is_refused(
    index: int, value: float, fault: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(eager=1.0, graph=0.125).patch(monkeypatch, {GRAPH: set_value(index, value)})
    trial = trial_of(ranks)
    assert not trial.tried(EAGER).fault
    found = trial.tried(GRAPH)
    assert found.fault.startswith(fault) and found.seconds == math.inf


def test_a_way_may_round_otherwise_and_more_so_under_autocast(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    low = replace(TRAIN, precision="bf16")
    for train, error, is_fine in ((TRAIN, 1e-4, True), (TRAIN, 1e-2, False), (low, 1e-2, True), (low, 0.1, False)):

        def stray(step: TrainingStep, error: float = error) -> None:
            step.values *= 1 + error

        with pytest.MonkeyPatch.context() as patch:
            Clock(eager=1.0, graph=0.125).patch(patch, {GRAPH: stray})
            trial = trial_of(ranks, train=train)
            trial.tried(EAGER)
            assert (not trial.tried(GRAPH).fault) == is_fine, (train.precision, error)


def test_where_the_plainest_way_overflows_others_may_too(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in fp16, whose first loss scale is large; whether they do is a matter of rounding."""
    overflows = set_value(3, math.inf)
    Clock(eager=1.0, graph=0.125, compiled=0.125).patch(monkeypatch, {EAGER: overflows, GRAPH: overflows})
    trial = trial_of(ranks)
    trial.tried(EAGER)
    assert trial.tried(GRAPH) == trial.tried(COMPILED) == Tried(0.125)


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (RuntimeError("no\ncompiler"), "RuntimeError: no compiler"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "out of memory"),
        (ValueError("sizes"), "ValueError: sizes"),
    ],
)
def test_what_a_way_raises_is_its_fault(
    error: Exception, fault: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(graph=0.125).patch(monkeypatch, {GRAPH: fail(error)})
    assert trial_of(ranks).tried(GRAPH) == Tried(fault=fault)


def test_a_validation_must_fit_beside_a_cuda_graph(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(nn.Sequential):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            if not self.training:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(image)

    Clock(eager=1.0, graph=0.125).patch(monkeypatch)
    trial = trial_of(ranks, Large(network()))
    assert [trial.tried(way) for way in (EAGER, GRAPH)] == [Tried(1.0), Tried(fault="out of memory")]


def test_a_user_who_stops_a_trial_stops_the_run(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(step: TrainingStep) -> None:
        raise KeyboardInterrupt

    Clock(eager=0.1).patch(monkeypatch, {EAGER: interrupt})
    with pytest.raises(KeyboardInterrupt):
        trial_of(ranks).tried(EAGER)


@pytest.mark.parametrize("fails", [False, True])
def test_a_trial_leaves_nothing_behind(fails: bool, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the copies, with their gradients and moments; and the network and the random state as they were."""
    made: list[weakref.ref] = []
    resets: list[bool] = []

    def note(step: TrainingStep) -> None:
        torch.rand(1)
        made.extend(map(weakref.ref, (step, step.model, next(step.model.parameters()))))
        if fails and len(made) > 4:
            raise RuntimeError("late")

    Clock(eager=1.0, compiled=1.0).patch(monkeypatch, {EAGER: note, COMPILED: note})
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(True))
    model = nn.Sequential(network(), nn.Dropout())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    trial = trial_of(ranks, model)
    for way in (EAGER, COMPILED):
        assert bool(trial.tried(way).fault) == fails
        assert made and not any(reference() is not None for reference in made)
        made.clear()
    assert resets == [True]  # of the compiled one alone
    drawn = torch.rand(1)
    assert torch.equal(drawn, torch.rand(1, generator=torch.Generator().manual_seed(3)))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters()) and "forward" not in vars(model)


def test_a_compiled_step_is_tried_and_forgotten(ranks: Ranks) -> None:
    """The real compiler."""
    trial = trial_of(ranks)
    assert not trial.tried(EAGER).fault
    assert trial.tried(COMPILED).seconds < math.inf
    compiled = make_step(ranks, compile=True)
    with torch._dynamo.config.patch(error_on_recompile=True):  # nothing is left that this would be a second form of
        compiled(*batch(0))
