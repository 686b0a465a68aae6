"""Tuning and the benchmarks' report on a machine without a GPU: what is decided, written and said, from given times."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import bench_attention, bench_instance_norm, common, report, tune
from benchmarks.common import MARGIN, Roofline
from kernels import cases, dispatch

ROOT = Path(__file__).resolve().parent.parent
CASES = (cases.Attention(1, 2, 32, 16, torch.float32), cases.Attention(1, 2, 64, 16, torch.float32))


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    """What tuning has written for two small cases of attention, on a GPU that runs no kernels."""
    monkeypatch.setattr(dispatch, "TUNED_FILE", tmp_path / "tuned.json")
    monkeypatch.setattr(dispatch, "_refusal", lambda device: "")
    monkeypatch.setattr(dispatch, "_capability", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    monkeypatch.setattr(dispatch.Launch, "run", lambda launch, config: None)
    monkeypatch.setattr(bench_attention, "CASES", CASES)
    monkeypatch.setattr(tune, "BENCHES", (bench_attention,))
    dispatch.tuned_table.cache_clear()
    yield lambda: json.loads((tmp_path / "tuned.json").read_text())["sm_90"]
    dispatch.use("auto")
    dispatch.tuned_table.cache_clear()


Clock = Callable[[Any, str, str], float]
"""Seconds of a configuration, or of ours or a backend in a direction."""


def tune_by(clock: Clock, monkeypatch: pytest.MonkeyPatch, listed: dict[str, Any] | None = None) -> None:
    def seconds(calls: Any, rounds: int) -> float:
        if isinstance(calls[0], partial):
            return clock(calls[0].args[0], "", "")
        x = torch.zeros(1)
        who = "ours" if dispatch.path("", x, "") == "triton" else dispatch.sdpa_backends("", x, "")[0].name
        return clock(None, who, "forward" if hasattr(calls[0], "__wrapped__") else "forward + backward")

    monkeypatch.setattr(tune, "seconds", seconds)
    measured = {"configs": {}, "torch": {}} | (listed or {})
    tune.tune(measured, lambda: tune._write("sm_90", measured))


KEYS = [launches[0].key for launches in map(cases.launches, CASES)]
FIRST = cases.launches(CASES[0])[0]


def test_tuning_lists_the_fastest_backend_where_ours_loses_in_one_direction(
    table: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"ours": 2.0, "CUDNN_ATTENTION": 1.5, "FLASH_ATTENTION": 1.0, "EFFICIENT_ATTENTION": 3.0}

    def clock(config: Any, who: str, direction: str) -> float:
        if who == "MATH":
            raise RuntimeError("No available kernel")
        return times.get(who, 1.0) if direction == "forward" else 1.0

    tune_by(clock, monkeypatch)
    assert table()["torch"]["forward"] == {f"flash_attention {key}": "FLASH_ATTENTION" for key in KEYS}
    assert table()["torch"]["forward + backward"] == {}


def test_tuning_writes_down_what_beats_the_default_by_more_than_noise(
    table: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    best = dict(FIRST.candidates[-1])
    for gain, listed in ((1.01 * MARGIN, best), (0.99 * MARGIN, None)):
        tune_by(lambda config, *_, gain=gain: 1.0 if config == best else gain, monkeypatch)
        assert table()["configs"][FIRST.name].get(KEYS[0]) == listed


def test_a_candidate_that_does_not_run_is_passed_over_but_not_the_default(
    table: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def clock(config: Any, who: str, direction: str) -> float:
        if config is not None and config != FIRST.candidates[failing]:
            return 1.0
        raise RuntimeError("out of resources") if config is not None else RuntimeError("ours")

    monkeypatch.setattr(tune, "faster_of_pytorch", lambda *args: "")
    failing = -1
    tune_by(clock, monkeypatch)
    failing = 0
    with pytest.raises(RuntimeError, match="out of resources"):
        tune_by(clock, monkeypatch)


def test_tuning_that_is_cut_short_leaves_what_it_measured_and_what_was_listed(
    table: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    best = dict(FIRST.candidates[-1])

    def until(comparisons: int, then_config: bool) -> Clock:
        """Interrupted after so many comparisons, by the next configuration or by the last comparison itself."""
        compared = 0

        def clock(config: Any, who: str, direction: str) -> float:
            nonlocal compared
            compared += who == "ours"
            if compared == comparisons and (config is not None) == then_config:
                raise KeyboardInterrupt
            return 1.0 if config == best else 2.0 if config or who == "ours" else 1.0

        return clock

    listed = {"torch": {"forward": {f"flash_attention {KEYS[0]}": "MATH", "gone": "MATH"}}}
    for clock in (until(1, False), until(2, True)):
        with pytest.raises(KeyboardInterrupt):
            tune_by(clock, monkeypatch, listed)
        assert table()["configs"][FIRST.name][KEYS[0]] == best
        assert table()["torch"]["forward"]["gone"] == "MATH"
    assert table()["torch"]["forward"][f"flash_attention {KEYS[0]}"] == "CUDNN_ATTENTION"
    tune_by(lambda *_: 1.0, monkeypatch, {"torch": table()["torch"]})
    assert table()["torch"] == {"forward": {}, "forward + backward": {}}


def row(variant: str, seconds: float, direction: str = "forward", in_cache: bool = False) -> report.Row:
    path = "triton" if variant == report.OURS else ""
    return report.Row("op", "case", direction, variant, path, seconds, 1.0, 8, 0, 0.5, in_cache)


def test_a_row_is_lost_in_either_direction_beyond_the_margin() -> None:
    both = [row(report.OURS, 1.0, "forward + backward"), row("eager", 1.0, "forward + backward")]
    assert report.lost([row(report.OURS, 0.99 * MARGIN), row("eager", 1.0), *both]) == []
    (line,) = report.lost([row(report.OURS, 1.06), row("eager", 2.0), row("torch.compile", 1.0), *both])
    assert line == "op case forward: torch.compile is 1.06 x as fast as ours (triton path)"


def test_the_summary_holds_ceilings_each_case_and_what_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    roofline = Roofline(4e12, {"bfloat16": 8e14, "tf32 x 3": 1.2e14}, 50 * 2**20)
    rows = [row(report.OURS, 2e-6, in_cache=True), row("SDPA cuDNN", 1e-6), row("eager", 3e-6)]
    report.write_json(rows, roofline, {}, tmp_path / "rows.json")
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "rows.json")])
    assert report.main() == 0
    said = capsys.readouterr().out
    assert "copy 4000 GB/s; matrix products bfloat16 800, tf32 x 3 120 TFLOP/s" in said
    assert " 50 %*" in said and "0.50 x SDPA cuDNN" in said and "lost: op case forward: SDPA cuDNN" in said


def test_passes_are_those_of_one_launch_where_a_sample_and_channel_fits_a_program() -> None:
    both = cases.InstanceNorm((2, 256, 8, 8, 4)), cases.InstanceNorm(cases.LARGE)
    passes = [
        [bench_instance_norm.work(case, direction).bytes // (2 * torch.Size(case.shape).numel()) for case in both]
        for direction in common.DIRECTIONS
    ]
    assert passes == [[2, 3], [5, 8]]


def test_a_machine_without_git_takes_the_commit_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("GLIOFORGE_COMMIT", raising=False)
    assert common.machine.__wrapped__()["commit"] == "unknown"
    monkeypatch.setenv("GLIOFORGE_COMMIT", "abc1234")
    assert common.machine.__wrapped__()["commit"] == "abc1234"


def test_without_pytest_benchmark_the_tests_run_and_the_benchmarks_say_what_they_need() -> None:
    spec = importlib.util.spec_from_file_location("root_conftest", ROOT / "conftest.py")
    assert spec is not None and spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    plugins = SimpleNamespace(hasplugin=lambda name: False)
    for asked in (False, True):
        config = SimpleNamespace(option=SimpleNamespace(), pluginmanager=plugins, getoption={"--benchmark": asked}.get)
        says = pytest.raises(pytest.UsageError, match="pip install pytest-benchmark") if asked else nullcontext()
        with says:
            conftest.pytest_configure(config)
