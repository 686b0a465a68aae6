"""Prediction from files to files: `launch/predict.py` beside MONAI's transforms, sliding window and writer.

    python -m benchmarks.bench_predict          a table, and benchmarks/results/predict_<device>.json
    pytest --benchmark benchmarks/bench_predict.py -s

Cases are synthetic, 240 x 240 x 155 x 4, repeated under other names where more are requested than there are. Weights
come from a short training on them, made once: on a CPU the network of `launch/configs/demo.yaml` (windows of 48 x 48 x
48), on a GPU UNETR as published (128 x 128 x 64) in bf16. MONAI's side is `benchmarks/monai_predict.py`, with two
workers and without. Each variant is a process of its own, and they take turns, after a first round that warms caches
and whose segmentations are compared: if more voxels differ than rounding explains, there is no result.

Both are timed from outside: from the line in which a program says that it begins to the time of the last file it
wrote. Imports, loading weights and starting the GPU come before, and are reported as "start". Seconds per window are
those of a case divided by the windows that cover it, empty ones included. Memory is what a variant's processes hold
together beyond file contents, sampled every 100 ms (proportional set size, as in `bench_pipeline`); on a GPU also the
peak of PyTorch's allocator.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from benchmarks.bench_pipeline import CORES, held_bytes, scans
from benchmarks.common import IS_GPU, machine
from benchmarks.report import OURS
from engine.sliding_window import OVERLAP, window_starts
from engine.trained import load_trained
from pipelines.basics.machine import cache_dir
from pipelines.scans.geometry import target_grid
from pipelines.scans.nifti import read_grid, read_nifti

ROOT = Path(__file__).resolve().parent.parent
CASES = 12 if IS_GPU else 4
ROUNDS = 3
MODELS = ("unetr", "unetr_monai")
DIFFERING = 5e-3 if IS_GPU else 1e-3
"""Share of all voxels that may differ: at the borders of regions, where bf16 rounds differently in another kernel."""
BEGINS = "segmenting "
PEAK = "torch's peak: "
WITH_PEAK = f"""
import sys, torch
from {{program}} import main
status = main()
print("{PEAK}", torch.cuda.max_memory_allocated(), file=sys.stderr)
sys.exit(status)
"""


@dataclass(frozen=True)
class PredictionTask:
    """The scans that every variant segments, and the weights.

    Fields:
        weights: a run's folder or weights file. files: 4D scans, each of another name. windows: that cover one of them.
    """

    weights: Path
    files: tuple[Path, ...]
    windows: int

    @classmethod
    def of(cls, weights: Path, files: Sequence[Path]) -> PredictionTask:
        """Count the windows of the first file; the others are taken to have as many."""
        data = load_trained(weights).config.data
        shape, affine = read_grid(files[0])
        grid = target_grid(shape[:3], affine, data.spacing)
        sizes = ((max(size, window), window) for size, window in zip(grid.shape, data.crop_size_voxels))
        return cls(weights, tuple(files), prod(len(window_starts(*axis, OVERLAP)) for axis in sizes))


@dataclass
class PredictionVariant:
    """One way to predict.

    Fields:
        name: ours or MONAI's. program: its module, which has a `main`. weights_option, options: of its command line.
        runs: what was measured, without the warm-up. differing: share of voxels that are not as ours, of all.
    """

    name: str
    program: str
    weights_option: str
    options: tuple[str, ...] = ()
    runs: list[dict[str, float]] = field(default_factory=list)
    differing: float = 0.0

    def command(self, work: PredictionTask, output: Path) -> list[str]:
        """The program as a user calls it; on a GPU from Python, to ask for PyTorch's peak afterwards."""
        as_file = [str(ROOT / self.program.replace(".", "/")) + ".py"]
        called = ["-c", WITH_PEAK.format(program=self.program)] if IS_GPU else as_file
        files = [str(path) for path in work.files]
        given = [self.weights_option, str(work.weights), "--input", *files, "--output", str(output)]
        return [sys.executable, *called, *given, *self.options]


def variants() -> list[PredictionVariant]:
    """Ours first."""
    monai = partial(PredictionVariant, program="benchmarks.monai_predict", weights_option="--run")
    return [
        PredictionVariant(OURS, "launch.predict", "--runs"),
        monai("MONAI, 2 workers", options=("--workers", "2")),
        monai("MONAI", options=("--workers", "0")),
    ]


def run_once(command: Sequence[str], outputs: Sequence[Path]) -> dict[str, float]:
    """Run a program to its end.

    Returns:
        start: seconds until it says that it begins. seconds: from there to the last of `outputs`. peak_bytes: most
        that was held at one time. torch_peak_bytes: as it says; 0 on a CPU.

    Raises:
        RuntimeError: it failed, said nothing, or left a file out.
    """
    started = time.time()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    lines: list[tuple[float, str]] = []

    def listen() -> None:
        assert child.stderr is not None
        lines.extend((time.time(), line.rstrip()) for line in child.stderr)

    listener = threading.Thread(target=listen)
    listener.start()
    peak = 0
    try:
        while child.poll() is None:
            peak = max(peak, held_bytes(child.pid))
            time.sleep(0.1)
    finally:
        child.kill()
        listener.join()
    begun = [at for at, line in lines if line.startswith(BEGINS)]
    missing = [path.name for path in outputs if not path.is_file()]
    if child.returncode or missing or not begun:
        said = "\n".join(line for _, line in lines[-20:])
        raise RuntimeError(
            f"status {child.returncode}, {len(missing)} of {len(outputs)} files missing: {' '.join(command)}\n{said}"
        )
    ended = max(path.stat().st_mtime for path in outputs)
    torch_peak = [int(line.removeprefix(PEAK)) for _, line in lines if line.startswith(PEAK)]
    return {
        "start": begun[0] - started,
        "seconds": ended - begun[0],
        "peak_bytes": peak,
        "torch_peak_bytes": torch_peak[0] if torch_peak else 0,
    }


def compare(ours: Sequence[Path], others: Sequence[Path]) -> tuple[float, float]:
    """Of all voxels, the shares that differ, and that ours labels.

    Raises:
        ValueError: segmentations on different grids.
    """
    differing = labelled = voxels = 0
    for pair in zip(ours, others, strict=True):
        (mine, my_affine), (other, affine) = map(read_nifti, pair)
        if mine.shape != other.shape or not np.allclose(my_affine, affine, atol=1e-4):
            raise ValueError(f"{pair[0]} and {pair[1]} are on different grids: {mine.shape}, {other.shape}")
        differing += int(np.count_nonzero(mine != other))
        labelled += int(np.count_nonzero(mine))
        voxels += mine.size
    return differing / voxels, labelled / voxels


def measure(work: PredictionTask, ways: Sequence[PredictionVariant], rounds: int) -> None:
    """Fill in `runs` and `differing` of each variant; the first is ours.

    Raises:
        RuntimeError: a variant fails. ValueError: segmentations differ, or none has a tumour.
    """
    with tempfile.TemporaryDirectory(dir=work.files[0].parent) as folder:
        first: list[Path] = []
        for number in range(rounds + 1):
            for way in ways:
                output = Path(folder) / f"{number} {way.name}"
                outputs = [output / path.name for path in work.files]
                found = run_once(way.command(work, output), outputs)
                if number:
                    way.runs.append(found)
                    continue
                first = first or outputs
                way.differing, labelled = compare(first, outputs)
                check_alike(way, labelled)


def check_alike(way: PredictionVariant, labelled: float) -> None:
    """Refuse to compare the speed of programs whose results differ.

    Args:
        way: with its share of differing voxels. labelled: share of voxels with a label in ours.

    Raises:
        ValueError: too many voxels differ; or nothing was labelled, so that agreement says nothing.
    """
    if not labelled:
        raise ValueError("no voxel of any case has a label: train the network for longer (--run)")
    if way.differing > DIFFERING:
        raise ValueError(
            f"{way.name}: {100 * way.differing:.3g} % of the voxels differ from ours, over "
            f"{100 * DIFFERING:g} %: times of programs with different results are not compared"
        )


def rows_of(work: PredictionTask, ways: Sequence[PredictionVariant]) -> list[dict[str, Any]]:
    """Medians and peaks of each variant."""
    rows = []
    for way in ways:
        rounds = [run["seconds"] / len(work.files) for run in way.runs]
        rows.append(
            {
                "variant": way.name,
                "seconds_per_case": statistics.median(rounds),
                "rounds": rounds,
                "seconds_per_window": statistics.median(rounds) / work.windows,
                "start_seconds": statistics.median(run["start"] for run in way.runs),
                "peak_bytes": max(run["peak_bytes"] for run in way.runs),
                "torch_peak_bytes": max(run["torch_peak_bytes"] for run in way.runs),
                "differing_voxels": way.differing,
            }
        )
    return rows


def print_table(rows: Sequence[dict[str, Any]], title: str, console: Console) -> None:
    """One line for each variant."""
    table = Table(title=title)
    columns = ["s per case", "ms per window", "x ours", "start, s", "peak memory", "voxels that differ"]
    columns += ["PyTorch's peak"] if IS_GPU else []
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    ours = rows[0]["seconds_per_case"]
    for row in rows:
        values = [
            f"{row['seconds_per_case']:.2f}",
            f"{1e3 * row['seconds_per_window']:.1f}",
            f"{row['seconds_per_case'] / ours:.2f}",
            f"{row['start_seconds']:.1f}",
            f"{row['peak_bytes'] / 1e9:.2f} GB",
            f"{100 * row['differing_voxels']:.4f} %",
            *([f"{row['torch_peak_bytes'] / 1e9:.2f} GB"] if IS_GPU else []),
        ]
        table.add_row(row["variant"], *values)
    console.print(table)


def short_run(model: str) -> Path:
    """Weights from a short training on the synthetic cases, made once."""
    size = "published" if IS_GPU else "demo"
    weights = cache_dir() / "bench_predict" / f"{model}-{size}.pt"
    if weights.is_file():
        return weights
    weights.parent.mkdir(parents=True, exist_ok=True)
    options = ["--config", f"launch/configs/{'brats' if IS_GPU else 'demo'}.yaml", "--model.name", model]
    options += ["--data.root", str(scans(None)), "--data.val_fraction", "0.25", "--data.foreground_prob", "0.7"]
    options += ["--loss.ce_weight", "0.2", "--train.epochs", "1", "--train.val_every_epochs", "1"]
    options += ["--data.crops_per_case", "200" if IS_GPU else "32", "--optim.warmup_steps", "5"]
    options += ["--optim.lr", "5e-4"] if IS_GPU else []
    options += ["--train.precision", "bf16" if IS_GPU else "float32"]
    with tempfile.TemporaryDirectory(dir=weights.parent) as folder:
        command = [sys.executable, str(ROOT / "launch" / "train.py"), *options, "--run_dir", f"{folder}/run"]
        subprocess.run(command, check=True, cwd=ROOT)
        os.replace(Path(folder) / "run" / "checkpoints" / "last.pt", weights)
    return weights


def files_of(count: int, folder: Path) -> list[Path]:
    """Links to the synthetic scans, repeated until there are `count`."""
    sources = sorted((scans(None) / "imagesTr").glob("*.nii.gz"))
    links = []
    for number, source in enumerate(islice(cycle(sources), count), start=1):
        links.append(folder / f"case_{number:03d}.nii.gz")
        links[-1].symlink_to(source)
    return links


def measure_all(
    model: str, cases: int, rounds: int, run: Path | None = None
) -> tuple[PredictionTask, list[dict[str, Any]]]:
    """All variants on `cases` scans."""
    weights = run.resolve() if run else short_run(model)
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        work, ways = PredictionTask.of(weights, files_of(cases, Path(folder))), variants()
        measure(work, ways, rounds)
    return work, rows_of(work, ways)


def report(work: PredictionTask, rows: list[dict[str, Any]]) -> Path:
    """Print a table and write the JSON file; its path."""
    config = load_trained(work.weights).config
    network: dict[str, Any] = {"model": config.model.name, "window": list(config.data.crop_size_voxels)}
    network |= {
        "spacing_mm": list(config.data.spacing_mm),
        "precision": config.train.precision if IS_GPU else "float32",
    }
    about = {**machine(), "cores": CORES, "cases": len(work.files), "windows_per_case": work.windows, **network}
    title = f"{about['device']}, {CORES} cores; {about['cases']} cases of 240 x 240 x 155 x 4, {network['model']}, "
    title += f"{work.windows} windows of {' x '.join(map(str, network['window']))} each, {network['precision']}"
    print_table(rows, title, Console(width=140))
    folder = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"predict_{'gpu' if IS_GPU else 'cpu'}.json"
    path.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    return path


@pytest.mark.parametrize("model", MODELS[:1])
def bench_predict(benchmark: Any, model: str) -> None:
    """Every variant, once after a warm-up, in processes of their own; the table is printed with `-s`."""
    work, rows = benchmark.pedantic(partial(measure_all, model, CASES, 1), rounds=1)
    benchmark.extra_info["rows"] = rows
    print_table(rows, model, Console(width=140))
    ours, *others = rows
    assert all(ours["seconds_per_case"] < row["seconds_per_case"] for row in others)
    assert all(ours["peak_bytes"] <= row["peak_bytes"] for row in others)


def main(args: list[str] | None = None) -> int:
    """Measure everything and report; 1 if there is nothing to compare."""
    parser = argparse.ArgumentParser(description="Prediction from files to files, beside MONAI's.")
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="unetr_monai is MONAI's own class there.")
    parser.add_argument("--run", type=Path, help="A run's folder or a weights file, in place of a short training.")
    parser.add_argument("--cases", type=int, default=CASES, help="Scans to segment.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="How often the variants take turns.")
    options = parser.parse_args(args)
    try:
        path = report(*measure_all(options.model, options.cases, options.rounds, options.run))
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
