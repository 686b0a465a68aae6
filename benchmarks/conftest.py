"""The fixture with which every benchmark measures, and the report at the end."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console

from benchmarks import report
from benchmarks.common import (
    DEVICE,
    IS_GPU,
    LeastWork,
    Roofline,
    eager_seconds,
    graph_of,
    machine,
    measure_roofline,
    path_taken,
    replay_seconds,
)
from kernels import dispatch

Measure = Callable[..., None]
ROUNDS = 10

_rows: list[report.Measurement] = []
_rooflines: list[Roofline] = []


@pytest.fixture(scope="session")
def roofline() -> Roofline:
    """Bandwidth and matrix rates of this machine, measured in this run."""
    _rooflines.append(measure_roofline())
    return _rooflines[0]


@pytest.fixture
def measure(benchmark: BenchmarkFixture, roofline: Roofline) -> Measure:
    """Time calls, the same work on different inputs, and add a row to the report.

    A variant that is not ours and can't do it, such as an SDPA backend without the dtype, is skipped.
    """

    def run(make_calls: Callable[[], Sequence[Callable[[], Any]]], work: LeastWork, **labels: str) -> None:
        try:
            calls = make_calls()
            replay, count, seconds = _graphed(calls) if IS_GPU else (partial(_call_all, calls), len(calls), None)
        except RuntimeError as error:
            if labels["variant"] == report.OURS:
                raise
            pytest.skip(f"{labels['variant']} does not take {labels['case']}: {str(error).splitlines()[0]}")
        benchmark.group = "{op} {case} {direction}".format(**labels)
        benchmark.pedantic(replay, rounds=ROUNDS, warmup_rounds=1)
        assert benchmark.stats is not None
        if seconds is None:
            seconds = benchmark.stats.stats.median / count
        eager = eager_seconds(calls, rounds=5) if IS_GPU else seconds
        labels["path"] = path_taken(calls[0])[0]
        row = report.Measurement.of(labels, seconds, eager, work, roofline)
        benchmark.extra_info.update(vars(row), calls_in_a_round=count)
        _rows.append(row)
        report.write_json(_rows, roofline, machine(), _folder() / f"{_name()}.json")  # a run may be cut short

    return run


def _graphed(calls: Sequence[Callable[[], Any]]) -> tuple[Callable[[], None], int, float]:
    """A replay to its end, for pytest-benchmark; its number of calls; the time of one by the GPU's own clock."""
    graph, count = graph_of(calls)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay, count, replay_seconds(graph, ROUNDS) / count


def _call_all(calls: Sequence[Callable[[], Any]]) -> None:
    for call in calls:
        call()


def _folder() -> Path:
    folder = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _name() -> str:
    return "kernels_" + re.sub(r"\W+", "_", machine()["device"].removeprefix("NVIDIA ")).lower()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Table, JSON and plot of the measurements."""
    if not _rows:
        return
    about, path = machine(), _folder() / _name()
    report.write_json(_rows, _rooflines[0], about, path.with_suffix(".json"))
    report.draw(_rows, about, path.with_suffix(".png"))
    report.print_table(_rows, _rooflines[0], about, Console(width=160))
    terminalreporter.write_line(dispatch.use("auto", DEVICE))
    if IS_GPU:
        for line in report.lost(_rows):
            terminalreporter.write_line(f"slower than PyTorch: {line}")
    else:
        terminalreporter.write_line("no GPU: sizes are small, and ours is what PyTorch has, not the kernels")
    terminalreporter.write_line(f"wrote {path}.json and .png")
