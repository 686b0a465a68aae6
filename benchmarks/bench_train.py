"""Training steps: this engine beside a plain loop of MONAI and PyTorch over the same network.

    python -m benchmarks.bench_train                    tables, and benchmarks/results/train_<device>.json
    python -m benchmarks.bench_train --model unet --sections steps breakdown --profile trace.json
    pytest --benchmark benchmarks/bench_train.py        float32 alone, small

The plain loop is the published tutorial's (`benchmarks.training.Plain`). It runs from the files, as published; with all
that is not random cached; in bf16; and compiled, channels last. Ours is the trainer as a run has it, and does the same
arithmetic: same network, same loss. PyTorch's default on a GPU is convolutions in TF32, so the plain loop without bf16
is compared with our tf32; our float32 is IEEE throughout. Scans are synthetic, of full size.

"Step" is one optimizer step on a batch already loaded; "end to end" includes the variant's own loading. All variants
live in one process and take turns; a time is the median of its rounds. Each brings back its own settings of TF32 and
cuDNN before its turn. That a rank on a CPU keeps memory between steps serves all of them. A variant that fails is
reported with its reason and stops no other.

Memory is the peak of a step beyond what was there before the variant was built: on a GPU all that PyTorch's allocator
gave out, volumes included, and for a CUDA graph in its recording; on a CPU weights, gradients, moments and what a step
allocates. bf16 is skipped on a CPU without instructions for it, where a step takes fifty times as long.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.bench_pipeline import scans
from benchmarks.common import DEVICE, IS_GPU, machine
from benchmarks.report import OURS
from benchmarks.roofline import predicted_step_s
from benchmarks.step_profile import Marks, count_in
from benchmarks.training import (
    BATCH,
    FULL,
    SMALL,
    WARM_STEPS,
    LoopVariant,
    Ours,
    Scene,
    Timed,
    free,
    plain_network,
    seconds,
)
from engine.ranks.distributed import Ranks, init_ranks
from kernels import dispatch
from models import NETWORKS, parameter_count

ROUNDS = 3
LARGEST_BATCH = 64 if IS_GPU else 4
SECTIONS = ("steps", "breakdown", "batches")


def variants() -> list[LoopVariant]:
    """What this machine can compare; on a CPU nothing compiled, for Inductor takes minutes with these networks."""
    if not IS_GPU:
        found = [
            LoopVariant(f"{OURS} float32"),
            LoopVariant("plain, as published", from_files=True),
            LoopVariant("plain, cached"),
        ]
        if torch.cpu._is_avx512_bf16_supported():
            found += [LoopVariant(f"{OURS} bf16", "bf16"), LoopVariant("plain bf16, cached", "bf16")]
        return found
    return [
        LoopVariant(f"{OURS} bf16", "bf16"),
        LoopVariant(f"{OURS} tf32", "tf32"),
        LoopVariant(f"{OURS} float32"),
        LoopVariant("plain, as published", "tf32", from_files=True),
        LoopVariant("plain, cached", "tf32"),
        LoopVariant("plain bf16, cached", "bf16"),
        LoopVariant(f"{OURS} bf16, CUDA graph", "bf16", graphed=True),
        LoopVariant(f"{OURS} bf16, compiled", "bf16", compiled=True),
        LoopVariant("plain bf16 compiled, cached", "bf16", compiled=True),
    ]


def measure_steps(
    scene: Scene,
    which: Sequence[LoopVariant],
    rounds: int,
    note: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """A row for each variant, which take turns; `note` is called with all rows after each turn."""
    rows: dict[LoopVariant, dict[str, Any]] = {
        variant: {"variant": variant.name, "precision": variant.precision, "batch": BATCH, "step_rounds": [],
                  "loop_rounds": []} for variant in which
    }  # fmt: skip
    built: dict[LoopVariant, Timed] = {}
    for _ in range(rounds):
        for variant, row in rows.items():
            if "failed" in row:
                continue
            try:
                if variant not in built:
                    built[variant] = Timed(scene, variant)
                    row["peak_bytes"] = built[variant].peak_bytes
                row["step_rounds"].append(built[variant].step_seconds())
                row["loop_rounds"].append(built[variant].loop_seconds())
            except RuntimeError as error:
                row["failed"] = _reason(error)
                built.pop(variant, None)
            for kind in ("step", "loop"):
                if row[f"{kind}_rounds"]:
                    row[f"{kind}_seconds"] = statistics.median(row[f"{kind}_rounds"])
            note(list(rows.values()))
    return list(rows.values())


def best_batch(scene: Scene, variant: LoopVariant) -> dict[str, Any]:
    """Throughput of the step alone at powers of two, until one does not fit or `LARGEST_BATCH` is done."""
    rates: dict[int, float] = {}
    stopped_by = f"the limit of {LARGEST_BATCH}"
    size = 1
    while size <= LARGEST_BATCH:
        try:
            timed = Timed(scene, variant, size)
            rates[size], peak = size / timed.step_seconds(), timed.peak_bytes
        except RuntimeError as error:
            stopped_by = f"batch {size}: {_reason(error)}"
            break
        finally:
            timed = None  # type: ignore[assignment]
            free()
        if rates[size] == max(rates.values()):
            best = {"batch": size, "samples_per_s": rates[size], "peak_bytes": peak}
        size *= 2
    if not rates:
        return {"variant": variant.name, "failed": stopped_by}
    return {"variant": variant.name, "precision": variant.precision, **best, "rates": rates, "stopped_by": stopped_by}


def _reason(error: RuntimeError) -> str:
    kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
    return f"{kind}: {str(error).splitlines()[0][:160]}" if str(error) else kind


def breakdown(scene: Scene, variant: LoopVariant, trace: Path | None = None, steps: int = 10) -> dict[str, Any]:
    """Where the time of one of our steps goes, and how often the host launches and waits.

    Args:
        trace: file for a Chrome trace of the steps that were counted.

    Returns:
        "seconds": data (until the batch is there), forward, loss, backward (with reducing gradients), optimizer, of
        the loop; communication (a part of these) and wait (no kernel runs; None on a CPU), of the step alone.
        "launches", "waits": in the step alone, by name. On a CPU, "waits" are values that Python reads from tensors.
    """
    timed = Timed(scene, variant)
    assert isinstance(timed.loop, Ours)
    with timed.own_flags():
        parts = parts_of(timed.loop, steps)
        counted = count_in(timed.step, steps, trace)
        step = seconds(timed.step)
    counted["seconds"] = {**parts, "communication": counted.pop("communication")}
    idle = counted.pop("idle")
    counted["seconds"]["wait"] = None if idle is None else idle * step
    return {"variant": variant.name, "step_seconds": step, **counted}


def parts_of(loop: Ours, steps: int) -> dict[str, float]:
    """Seconds of data, forward, loss, backward and optimizer: medians over steps."""
    step, marks = loop.step, Marks()
    for _ in range(WARM_STEPS):
        step(*next(loop.batches))
    hook = step.engine.register_forward_hook(lambda *_: marks("forward"))
    marks("")
    for _ in range(steps):
        image, labels = next(loop.batches)
        marks("data")
        loss = step.loss(image, labels)
        marks("loss")
        step.backward(loss)
        marks("backward")
        step.update()
        marks("optimizer")
    hook.remove()
    return marks.medians()


# ---------- report


def print_steps(rows: Sequence[dict[str, Any]], title: str, console: Console) -> None:
    """Times beside those of ours in the same precision."""
    table = Table(title=title)
    columns = ("", "batch", "predicted ms", "step ms", "x ours", "end to end ms", "x ours", "samples/s", "peak GB")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    ours: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["variant"].startswith(OURS):
            ours.setdefault(row["precision"], row)
    for row in rows:
        if "failed" in row or "loop_seconds" not in row:
            table.add_row(row["variant"], str(row["batch"]), "", row.get("failed", "not measured"))
            continue
        cells = [f"{1e3 * row['predicted_seconds']:.1f}" if row.get("predicted_seconds") else ""]
        for kind in ("step_seconds", "loop_seconds"):
            beside = ours.get(row["precision"], {}).get(kind, math.nan)
            cells += [f"{1e3 * row[kind]:.1f}", f"{row[kind] / beside:.2f}"]
        rate = f"{row['batch'] / row['loop_seconds']:.2f}"
        table.add_row(row["variant"], str(row["batch"]), *cells, rate, f"{row['peak_bytes'] / 1e9:.2f}")
    console.print(table)


def print_batches(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """The batch with the largest throughput."""
    table = Table(title="best batch, step alone")
    for column in ("", "batch", "predicted samples/s", "samples/s", "peak GB", "stopped by"):
        table.add_column(column, justify="left" if column in ("", "stopped by") else "right")
    for row in rows:
        if "failed" in row:
            table.add_row(row["variant"], "", "", "", "", row["failed"])
            continue
        predicted = f"{row['batch'] / row['predicted_seconds']:.2f}" if row.get("predicted_seconds") else ""
        rate, peak = f"{row['samples_per_s']:.2f}", f"{row['peak_bytes'] / 1e9:.2f}"
        table.add_row(row["variant"], str(row["batch"]), predicted, rate, peak, row["stopped_by"])
    console.print(table)


def print_breakdown(row: dict[str, Any], console: Console) -> None:
    """Parts of a step, launches and waits."""
    parts = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in row["seconds"].items() if value is not None)
    console.print(f"{row['variant']}, ms: {parts}", highlight=False)
    for kind in ("launches", "waits"):
        each = ", ".join(f"{name} {value:g}" for name, value in row[kind].items())
        console.print(f"  {kind} in a step: {sum(row[kind].values()):g}{f' ({each})' if each else ''}", highlight=False)


def result_file() -> Path:
    """Where the results of this device are."""
    folder = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
    name = re.sub(r"\W+", "_", machine()["device"].removeprefix("NVIDIA ")).lower()
    return folder / f"train_{name}.json"


def write_result(result: dict[str, Any]) -> None:
    """Write the result file."""
    result_file().parent.mkdir(parents=True, exist_ok=True)
    result_file().write_text(json.dumps(result, indent=1) + "\n")


def measure_all(scene: Scene, sections: Sequence[str], rounds: int, trace: Path | None, result: dict[str, Any]) -> None:
    """Fill `result`, and write it after each turn, for a run may be cut short."""

    def write(name: str, value: Any) -> None:
        result[name] = value
        write_result(result)

    which = variants()
    for section in sections:
        if section == "steps":
            measure_steps(scene, which, rounds, partial(write, "steps"))
        elif section == "breakdown":
            write("breakdown", breakdown(scene, which[0], trace))
        else:
            rows: list[dict[str, Any]] = []
            for variant in which:
                if not variant.from_files:
                    rows.append(best_batch(scene, variant))
                    write("batches", rows)
        free()


def add_predictions(result: dict[str, Any]) -> None:
    """Add the seconds that the roofline predicts, as a CUDA graph, to the rows of our steps at the published size."""
    for row in [*result.get("steps", ()), *result.get("batches", ())]:
        if row["variant"].startswith(OURS) and "failed" not in row:
            asked = result["model"], row["batch"], row["precision"], result["machine"]["device"]
            row["predicted_seconds"] = predicted_step_s(*asked)


def print_all(result: dict[str, Any], console: Console) -> None:
    """What there is of `result`."""
    about = result["machine"]
    title = f"{result['model']}, crops of {result['crop']}, {about['device']}, torch {about['torch']}"
    if "steps" in result:
        print_steps(result["steps"], title, console)
    if "breakdown" in result:
        print_breakdown(result["breakdown"], console)
    if "batches" in result:
        print_batches(result["batches"], console)


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    yield init_ranks(DEVICE.type)
    dist.destroy_process_group()


def bench_train(benchmark: Any, ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours beside the plain loop, one precision, small."""
    scene = Scene.of("unetr_monai", SMALL, scans(None), ranks)
    which = [LoopVariant(f"{OURS} float32"), LoopVariant("plain, cached")]
    rows = benchmark.pedantic(partial(measure_steps, scene, which, 1), rounds=1)
    benchmark.extra_info["rows"] = rows
    with capsys.disabled():
        print_steps(rows, f"training step, {machine()['device']}", Console(width=120))
    assert not any("failed" in row for row in rows)


def main() -> int:
    """Measure, report, and say by the exit status whether every variant ran."""
    parser = argparse.ArgumentParser(description="Training steps, beside a plain loop of MONAI and PyTorch.")
    parser.add_argument("--model", choices=NETWORKS, default="unetr")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="How often the variants take turns.")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="In this order.")
    parser.add_argument("--profile", type=Path, help="A file for a Chrome trace of our steps (section breakdown).")
    options = parser.parse_args()
    ranks = init_ranks(DEVICE.type)
    console = Console(width=120)
    console.print(dispatch.use("auto", ranks.device), highlight=False)
    scene = Scene.of(options.model, FULL if IS_GPU else SMALL, scans(None), ranks)
    parameters = parameter_count(plain_network(scene))
    result: dict[str, Any] = {
        "machine": {**machine(), "cores": torch.get_num_threads(), "load_before": os.getloadavg()[0]},
        "model": options.model,
        "crop": list(scene.size.crop), "widths": scene.size.widths, "parameters": parameters,
    }  # fmt: skip
    interrupted = False
    try:
        measure_all(scene, options.sections, options.rounds, options.profile, result)
    except KeyboardInterrupt:
        interrupted = True
        console.print("interrupted: this is what was measured")
    if IS_GPU:  # where the scene has the published size
        add_predictions(result)
        write_result(result)
    print_all(result, console)
    console.print(f"wrote {result_file()}", highlight=False)
    rows = [*result.get("steps", []), *result.get("batches", [])]
    dist.destroy_process_group()
    return 130 if interrupted else int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
