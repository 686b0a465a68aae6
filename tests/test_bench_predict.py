"""Prediction beside MONAI: both programs segment alike, times are right, and different results are not compared."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from test_trained import content_of

from benchmarks import bench_predict, monai_predict
from engine.config import Config, to_dict
from engine.data import DataConfig
from engine.inference import Predictor
from engine.network import ModelConfig, make_model
from engine.ranks.distributed import Ranks
from engine.weights_file import write_content
from kernels import dispatch
from launch import predict
from pipelines.layouts.labels import CODINGS
from pipelines.phantom import make_phantoms
from pipelines.scans.nifti import write_nifti


@pytest.mark.parametrize(("name", "seed"), [("unetr", 2), ("unetr_monai", 1)])
def test_monais_program_gives_our_segmentations(name: Any, seed: int, tmp_path: Path) -> None:
    """Of a scan on its own grid; by weights that label some of its voxels and others not."""
    (scan,) = (make_phantoms(tmp_path / "task", 1, (40, 48, 32), workers=1) / "imagesTr").iterdir()
    data = DataConfig(crop_size_voxels=(16, 16, 16), spacing_mm=(8.0, 8.0, 8.0))
    config = Config(data=data, model=ModelConfig(name=name, feature_size=2, hidden_size=8, mlp_dim=8, num_heads=2))
    torch.manual_seed(seed)
    network = make_model(config.model, config.data.crop_size_voxels, 4)
    with torch.no_grad():
        network.get_parameter("head.weight").mul_(20)
    about = {"config": to_dict(config), "modalities": ["flair", "t1", "t1c", "t2"]}
    write_content(tmp_path / "net.pt", content_of(CODINGS["decathlon"], weights=network.state_dict(), **about))
    Predictor(tmp_path / "net.pt", "cpu").segment(scan).save(tmp_path / "ours.nii.gz")
    command = ["--run", str(tmp_path / "net.pt"), "--input", str(scan), "--output", str(tmp_path), "--workers", "0"]
    with dispatch.using("auto"):
        assert monai_predict.main(command) == 0
    differing, labelled = bench_predict.compare([tmp_path / "ours.nii.gz"], [tmp_path / scan.name])
    assert differing <= 1e-3 and 0.02 < labelled < 0.98
    assert bench_predict.PredictionTask.of(tmp_path / "net.pt", [scan]).windows == 3 * 3 * 2


PROGRAM = """
import pathlib, sys, time
time.sleep({before})
print("{line}", file=sys.stderr, flush=True)
held = bytearray(b"1") * 200_000_000
time.sleep(0.3)
pathlib.Path("{path}").write_text("")
print("torch's peak:  7", file=sys.stderr)
time.sleep(0.4)
sys.exit({status})
"""


def program(path: Path, line: str = "segmenting 1 case", status: int = 0, before: float = 0.2) -> list[str]:
    return [sys.executable, "-c", PROGRAM.format(path=path, line=line, status=status, before=before)]


def test_the_clock_runs_from_the_first_word_to_the_last_file(tmp_path: Path) -> None:
    started = time.monotonic()
    found = bench_predict.run_once(program(tmp_path / "a"), [tmp_path / "a"])
    assert found["start"] >= 0.2 and found["seconds"] >= 0.29
    assert found["start"] + found["seconds"] <= time.monotonic() - started - 0.39
    assert 200e6 <= found["peak_bytes"] < 300e6 and found["torch_peak_bytes"] == 7


@pytest.mark.parametrize(("wrong", "says"), [({"status": 3}, "status 3"), ({"line": "no"}, "0 of 1 files missing")])
def test_a_program_that_fails_or_does_not_begin_gives_no_time(wrong: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=says):
        bench_predict.run_once(program(tmp_path / "a", before=0, **wrong), [tmp_path / "a"])
    with pytest.raises(RuntimeError, match="1 of 1 files missing"):
        bench_predict.run_once(program(tmp_path / "a", before=0), [tmp_path / "b"])


def labelled(count: int) -> np.ndarray:
    """(10, 10, 100) with so many voxels of label 1."""
    labels = np.zeros(10_000, np.uint8)
    labels[:count] = 1
    return labels.reshape(10, 10, 100)


def predicting(monkeypatch: pytest.MonkeyPatch, maps: dict[str, np.ndarray]) -> list[str]:
    """Runs take 1, 2, 3, ... s and leave a map by the variant's name; the list has the variants in turn."""
    turns: list[str] = []

    def run_once(command: Sequence[str], outputs: Sequence[Path]) -> dict[str, float]:
        for path in outputs:
            path.parent.mkdir(exist_ok=True)
            write_nifti(path, maps[path.parent.name.partition(" ")[2]], np.eye(4))
        turns.append(outputs[0].parent.name.partition(" ")[2])
        return {"start": 1, "seconds": float(len(turns)), "peak_bytes": len(turns), "torch_peak_bytes": 0}

    monkeypatch.setattr(bench_predict, "run_once", run_once)
    return turns


def test_predicting_programs_take_turns_after_a_round_that_does_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ways = bench_predict.variants()
    turns = predicting(monkeypatch, {way.name: labelled(100 + i) for i, way in enumerate(ways)})
    work = bench_predict.PredictionTask(tmp_path / "net.pt", (tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"), 8)
    bench_predict.measure(work, ways, rounds=2)
    assert turns == [way.name for way in ways] * 3
    rows = bench_predict.rows_of(work, ways)
    assert [row["rounds"] for row in rows] == [[2.0, 3.5], [2.5, 4.0], [3.0, 4.5]]
    assert (rows[0]["seconds_per_case"], rows[0]["seconds_per_window"]) == (2.75, 2.75 / 8)
    assert [row["differing_voxels"] for row in rows] == [0.0, 1e-4, 2e-4] and rows[2]["peak_bytes"] == 9
    said = StringIO()
    bench_predict.print_table(rows, "", Console(file=said, width=160))
    assert "1.36" in said.getvalue() and "0.0200 %" in said.getvalue()


@pytest.mark.parametrize(("ours", "monais", "says"), [(20, 31, "MONAI.*: 0.11 % of the voxels"), (0, 0, "no voxel")])
def test_times_of_programs_with_different_results_are_refused(
    ours: int, monais: int, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ways = bench_predict.variants()
    predicting(monkeypatch, {way.name: labelled(monais if "MONAI" in way.name else ours) for way in ways})
    with pytest.raises(ValueError, match=says):
        bench_predict.measure(bench_predict.PredictionTask(tmp_path, (tmp_path / "a.nii.gz",), 8), ways, 1)


def test_both_programs_are_called_as_users_do(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    work = bench_predict.PredictionTask(tmp_path / "net.pt", (tmp_path / "a.nii.gz",), 8)
    ours, workers, plain = (way.command(work, tmp_path / "out") for way in bench_predict.variants())
    parsed = predict.make_parser().parse_args(ours[2:])
    assert parsed.runs == [work.weights] and parsed.input == list(work.files) and Path(ours[1]).is_file()
    assert plain[1:-1] == workers[1:-1] and (plain[-1], workers[-1]) == ("0", "2")
    monkeypatch.setattr(bench_predict, "IS_GPU", True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5)
    on_gpu = bench_predict.variants()[0].command(work, tmp_path / "out")
    monkeypatch.setattr(sys, "argv", on_gpu[2:])
    with pytest.raises(SystemExit) as end:
        exec(on_gpu[2], {})
    told = capfd.readouterr().err
    assert end.value.code == 2 and f"{work.weights} is not a run" in told and told.endswith("torch's peak:  5\n")
