"""Data: preparing a case, and training batches, beside MONAI's ways of doing the same.

    python -m benchmarks.bench_pipeline                    a table, and benchmarks/results/pipeline_<device>.json
    python -m benchmarks.bench_pipeline --root FOLDER      on your scans instead of synthetic ones of full size
    pytest --benchmark                                     the same, with the kernels' benchmarks

Preparing a case is load, resample to 1.5 x 1.5 x 2.0 mm, orient to RAS; ours also hashes its files and writes the
result to the store. One process with one thread each.

Training batches are the published recipe's: two crops of 128 x 128 x 64, four modalities, flip, z-score, jitter. MONAI
runs from the files (`Dataset`), under a DataLoader with as many workers as there are cores, and with everything that is
not random cached in memory (`CacheDataset`), in the process itself and with workers. Ours comes out of the prepared
store, on as many threads. On a GPU, batches end there.

Each variant runs in a process of its own, and the variants take turns, `ROUNDS` times; a figure is the median of its
rounds. Memory is the peak of what the processes of a variant hold together beyond file contents (proportional set size
of anonymous and shared memory), with all that is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import DEVICE, IS_GPU, machine, synchronize
from pipelines.basics.machine import cache_dir, cores
from pipelines.layouts.cases import CaseSet, find_cases
from pipelines.loading.loader_options import CropOptions, LoaderOptions, Residence
from pipelines.phantom import FORMAT, make_phantoms

CROP = (128, 128, 64)
BATCH = 2
CASES = 4
ROUNDS = 3
CORES = cores()
SECONDS = 8.0
"""A measurement of batches goes on for so long, and for two batches at least."""

# ---------- variants: each yields the seconds of one case or of one sample, again and again


def prepare_ours(cases: CaseSet, work: Path) -> Iterator[float]:
    """Prepare one case into an empty store."""
    from pipelines.preparing.store import prepare

    torch.set_num_threads(1)
    for number, case in enumerate(cases.cases):
        yield _seconds(partial(prepare, cases.select([case.name]), work / str(number), workers=1))


def prepare_monai(cases: CaseSet, work: Path) -> Iterator[float]:
    """MONAI's load, Spacing and Orientation of one case."""
    from monai.transforms import Compose

    from benchmarks.monai_chain import case_to_dict, prepare_steps

    torch.set_num_threads(1)
    chain = Compose(prepare_steps(cases.coding))
    for case in cases.cases:
        yield _seconds(partial(chain, case_to_dict(case)))


def batches_ours(cases: CaseSet, work: Path, residence: Residence = "auto") -> Iterator[float]:
    """Batches of our loader from a prepared store."""
    from pipelines.loading.loaders import TrainLoader
    from pipelines.preparing.store import prepare

    torch.set_num_threads(1)
    store = prepare(cases, cache_dir() / "store")
    crops = CropOptions(CROP, BATCH, crops_per_case=64)
    options = LoaderOptions(DEVICE, threads=CORES, residence=residence)
    loader = TrainLoader(store, store.names, crops, options)
    return _per_sample(batch for epoch in count() for batch in loader.epoch(epoch))


def batches_monai(cases: CaseSet, work: Path, cached: bool, workers: int = CORES) -> Iterator[float]:
    """Batches of MONAI's chain, from the files or from a cache of all that is deterministic."""
    from monai.data import CacheDataset, DataLoader, Dataset

    from benchmarks.monai_chain import case_to_dict, seed_transforms

    data = [case_to_dict(case) for case in cases.cases] * 64
    chain = seed_transforms(cases.coding, CROP)
    if cached:
        entries = CacheDataset(data[: len(cases.cases)], chain, progress=False, num_workers=None)
        dataset: Any = torch.utils.data.ConcatDataset([entries] * 64)
    else:
        dataset = Dataset(data, chain)
    options = {"persistent_workers": True} if workers else {}
    loader = DataLoader(
        dataset, batch_size=BATCH, shuffle=True, num_workers=workers, pin_memory=IS_GPU, **options
    )  # fmt: skip

    def batches() -> Iterator[Any]:
        while True:
            for batch in loader:
                images, labels = batch["image"].as_tensor(), batch["label"].as_tensor()
                yield (images.cuda(non_blocking=True), labels.cuda(non_blocking=True)) if IS_GPU else (images, labels)

    return _per_sample(batches())


VARIANTS: dict[str, dict[str, Callable[[CaseSet, Path], Iterator[float]]]] = {
    "prepare one case, one thread": {"glioforge": prepare_ours, "MONAI": prepare_monai},
    "training batches, per sample": {
        **(
            {
                "glioforge": partial(batches_ours, residence="gpu"),
                "glioforge, page-locked": partial(batches_ours, residence="pinned"),
                "glioforge, mapped": partial(batches_ours, residence="mapped"),
            }
            if IS_GPU
            else {"glioforge": batches_ours}
        ),
        "MONAI CacheDataset": partial(batches_monai, cached=True, workers=0),
        "MONAI CacheDataset, workers": partial(batches_monai, cached=True),
        "MONAI Dataset": partial(batches_monai, cached=False),
    },
}


def _per_sample(batches: Iterator[Any]) -> Iterator[float]:
    """Seconds per sample over stretches of the stream, after as many batches as may lie ready at the start."""
    for _ in range(2 * CORES + 2):
        next(batches)
    while True:
        taken = 0
        synchronize()
        started = time.perf_counter()
        while taken < 2 or time.perf_counter() - started < SECONDS:
            next(batches)
            taken += 1
        synchronize()
        yield (time.perf_counter() - started) / (taken * BATCH)


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# ---------- one process per variant


def scans(root: Path | None) -> Path:
    """The folder of scans: `root`, or synthetic ones of full size, made once."""
    if root is not None:
        return root
    return make_phantoms(cache_dir() / "phantoms" / f"benchmark-{CASES}-cases-format-{FORMAT}", CASES)


def run_variant(group: str, name: str, root: Path) -> None:
    """Print the median time of a variant, in seconds, as JSON; the work of a process."""
    cases = find_cases(root)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as work:
        times = VARIANTS[group][name](cases, Path(work))
        seconds = [next(times)] if group.startswith("training") else list(times)
    print(json.dumps(statistics.median(seconds)), flush=True)
    os._exit(0)  # not to wait for workers that are at work on batches nobody wants


def measure(group: str, name: str, root: Path) -> tuple[float, float]:
    """Seconds of a variant in a process of its own, and the peak of its memory in bytes."""
    command = [sys.executable, "-m", "benchmarks.bench_pipeline", "--root", str(root), "--variant", group, name]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
    peak = 0
    while child.poll() is None:
        peak = max(peak, held_bytes(child.pid))
        time.sleep(0.1)
    assert child.stdout is not None
    output = child.stdout.read()
    if child.returncode:
        raise RuntimeError(f"{name} ended with status {child.returncode}: {' '.join(command)}")
    return json.loads(output.splitlines()[-1]), peak


def held_bytes(pid: int) -> int:
    """Bytes that a process and its children hold and that no file has."""
    held = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
            fields = dict(line.split(":") for line in lines)
            held += 1024 * sum(int(fields[name].split()[0]) for name in ("Pss_Anon", "Pss_Shmem"))
    except (psutil.NoSuchProcess, OSError):
        pass
    return held


def measure_all(root: Path, groups: list[str], rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Rows of all variants, which take turns."""
    runs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for group in groups:
        for _ in range(rounds):
            for name in VARIANTS[group]:
                runs.setdefault((group, name), []).append(measure(group, name, root))
    rows = []
    for (group, name), measured in runs.items():
        seconds, peaks = zip(*measured, strict=True)
        row = {"what": group, "variant": name, "seconds": statistics.median(seconds), "rounds": list(seconds)}
        rows.append({**row, "peak_bytes": max(peaks)})
    return rows


def report(rows: list[dict[str, Any]], root: Path, synthetic: bool) -> Path:
    """Print a table and write the JSON file; its path."""
    about = {**machine(), "cores": CORES, "scans": "synthetic, 240 x 240 x 155 x 4" if synthetic else str(root.name)}
    folder = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"pipeline_{'gpu' if IS_GPU else 'cpu'}.json"
    path.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    table = Table(title=f"{about['device']}, {CORES} cores; {about['scans']}")
    for column in ("", "", "ms", "x ours", "peak memory"):
        table.add_column(column, justify="right" if column else "left")
    ours = {row["what"]: row["seconds"] for row in reversed(rows) if row["variant"] == "glioforge"}
    for row in rows:
        ratio, peak = row["seconds"] / ours[row["what"]], f"{row['peak_bytes'] / 1e9:.2f} GB"
        table.add_row(row["what"], row["variant"], f"{row['seconds'] * 1e3:.1f}", f"{ratio:.1f}", peak)
    Console(width=120).print(table)
    return path


@pytest.mark.parametrize("group", VARIANTS)
def bench_pipeline(benchmark: Any, group: str) -> None:
    """Every variant of a group, once, in processes of their own; the table is printed with `-s`."""
    root = scans(None)
    rows = benchmark.pedantic(partial(measure_all, root, [group], 1), rounds=1)
    benchmark.extra_info["rows"] = rows
    ours = next(row for row in rows if row["variant"] == "glioforge")
    assert all(ours["seconds"] < row["seconds"] for row in rows if "MONAI" in row["variant"])


def main() -> int:
    """Measure everything and report."""
    parser = argparse.ArgumentParser(description="Preparing and training batches, beside MONAI.")
    parser.add_argument("--root", type=Path, help="A folder of scans; synthetic ones of full size without it.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="How often the variants take turns.")
    parser.add_argument("--variant", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    root = scans(options.root)
    if options.variant:
        group, name = options.variant
        run_variant(group, name, root)
    path = report(measure_all(root, list(VARIANTS), options.rounds), root, options.root is None)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
