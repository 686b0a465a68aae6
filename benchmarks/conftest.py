"""The fixture with which every benchmark measures, and the report at the end."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console

from benchmarks import report
from benchmarks.common import (
    DEVICE,
    IS_GPU,
    Roofline,
    Work,
    eager_seconds,
    graph_of,
    machine,
    measure_roofline,
    path_taken,
)
from kernels import dispatch

Measure = Callable[..., None]
ROUNDS = 10

_rows: list[report.Row] = []
_rooflines: list[Roofline] = []


@pytest.fixture(scope="session")
def roofline() -> Roofline:
    """Bandwidth and matrix rates of this machine, measured in this run."""
    _rooflines.append(measure_roofline())
    return _rooflines[0]


@pytest.fixture
def measure(benchmark: BenchmarkFixture, roofline: Roofline) -> Measure:
    """Time calls that do the same work on different inputs, and add a row to the report."""

    def run(calls: Sequence[Callable[[], Any]], work: Work, **labels: str) -> None:
        if IS_GPU:
            replay, count = graph_of(calls)
        else:
            replay, count = (lambda: [call() for call in calls]), len(calls)  # type: ignore[assignment]
        benchmark.group = "{op} {case} {direction}".format(**labels)
        benchmark.pedantic(replay, rounds=ROUNDS, warmup_rounds=1)
        assert benchmark.stats is not None
        seconds = benchmark.stats.stats.median / count
        eager = eager_seconds(calls, rounds=5) if IS_GPU else seconds
        labels["path"] = path_taken(calls[0])[0]
        row = report.Row.of(labels, seconds, eager, work, roofline)
        benchmark.extra_info.update(vars(row), calls_in_a_round=count)
        _rows.append(row)

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Table, JSON and plot of what was measured."""
    if not _rows:
        return
    about = machine()
    folder = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
    folder.mkdir(parents=True, exist_ok=True)
    name = "kernels_" + re.sub(r"\W+", "_", about["device"].removeprefix("NVIDIA ")).lower()
    report.write_json(_rows, _rooflines[0], about, folder / f"{name}.json")
    report.draw(_rows, about, folder / f"{name}.png")
    report.print_table(_rows, _rooflines[0], about, Console(width=160))
    terminalreporter.write_line(dispatch.use("auto", DEVICE))
    if IS_GPU:
        for line in report.lost(_rows):
            terminalreporter.write_line(f"slower than PyTorch: {line}")
    else:
        terminalreporter.write_line("no GPU: sizes are small, and ours is the reference path, not the kernels")
    terminalreporter.write_line(f"wrote {folder / name}.json and .png")
