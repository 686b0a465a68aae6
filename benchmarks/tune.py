"""Measure every configuration of every kernel on this GPU and write the fastest to `kernels/tuned.json`.

    python -m benchmarks.tune

Every configuration is compiled first, on all cores. Then each workload of the benchmarks runs forward and backward
while its launches are observed. The candidates of each launch are timed on the launch's own arguments, and one that
beats the default by more than `MARGIN` is written. With these the operation is timed on our path and on PyTorch's, as a
caller would run them, for attention with each backend of `scaled_dot_product_attention`.

Where ours loses by more than `MARGIN`, the winner is written and the dispatcher takes it: by forward + backward where a
gradient is needed, because training runs both and a gain in one must not cost more in the other; by the forward alone
elsewhere.

Results are written after each workload, so a run that is interrupted keeps what it measured. Entries of other GPUs
stay, and so do this GPU's own until the end.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from triton import TritonError

from benchmarks.aot import compile_workloads
from benchmarks.common import IS_GPU, MARGIN, forced, machine, path_taken, seconds
from benchmarks.report import OURS
from benchmarks.workloads import MEASURED, OPS, Workload
from engine.ranks.memory_limits import first_line
from kernels import dispatch
from kernels.dispatch import DIRECTIONS
from pipelines.basics.atomic import write_text

BENCHES = {op: import_module(f"benchmarks.bench_{op}") for op in OPS}


def launches_of(calls: Sequence[Callable[[], Any]]) -> list[tuple[dispatch.Launch, ...]]:
    """The launches of a call, each once per call: on the inputs of each."""
    found: list[list[dispatch.Launch]] = []

    def observer(launch: dispatch.Launch) -> None:
        found[-1].append(launch)
        launch.run(launch.candidates[0])

    with dispatch.observed(observer):
        for call in calls:
            found.append([])
            call()
    return list(zip(*found, strict=True))


def tune_launch(launches: Sequence[dispatch.Launch]) -> dispatch.Config | None:
    """The fastest configuration of a launch, if it beats the default; None if not.

    Args:
        launches: the same on different sets of inputs, which take turns.
    """
    first, times = launches[0], []
    for config in first.candidates:
        try:
            times.append(seconds([partial(launch.run, config) for launch in launches], rounds=5))
        except (RuntimeError, TritonError) as error:
            if config is first.candidates[0]:
                raise
            print(f"{first.name} {first.key} {config}: {first_line(error)}")
            times.append(float("inf"))
    best = min(range(len(times)), key=times.__getitem__)
    print(
        f"{first.name:32} {first.key:60} default {1e6 * times[0]:9.1f} us, best {1e6 * times[best]:9.1f} us",
        first.candidates[best],
    )
    return first.candidates[best] if times[0] > MARGIN * times[best] else None


def tune_workload(
    bench: ModuleType, workload: Workload, configs: dict[str, dict[str, Any]], seen: set[tuple[str, str]]
) -> None:
    """Tune the launches of a workload that are not yet in `seen`, into `configs` by kernel and key."""
    for launches in launches_of(bench.calls(workload, OURS, DIRECTIONS[1])):
        name, key = launches[0].name, launches[0].key
        if (name, key) in seen or len(launches[0].candidates) == 1:
            continue
        seen.add((name, key))
        best = tune_launch(launches)
        configs.setdefault(name, {}).pop(key, None)
        if best is not None:
            configs[name][key] = dict(best)


def faster_of_pytorch(bench: ModuleType, workload: Workload, direction: str) -> str:
    """Which of the module's `CHOICES` beats our kernels in one direction; empty if none does."""
    with forced("triton"):
        ours = seconds(bench.calls(workload, OURS, direction), rounds=5)
    times = {}
    for choice in bench.CHOICES:
        try:
            with forced("torch", choice):
                times[choice] = seconds(bench.calls(workload, OURS, direction), rounds=5)
        except RuntimeError as error:
            print(f"{workload} {choice}: {first_line(error)}")
    print(f"{workload!s:64} {direction:20} ours {1e6 * ours:.1f} us", *(f"{n} {1e6 * t:.1f}" for n, t in times.items()))
    best = min(times, key=times.__getitem__, default="")
    return best if best and ours > MARGIN * times[best] else ""


def tune(measured: dict[str, Any], write: Callable[[], None]) -> None:
    """Measure all workloads of the benchmarks into `measured`; `write` is called after each."""
    configs, torch_wins = measured["configs"], measured["torch"]
    tuned: set[tuple[str, str]] = set()
    compared: set[str] = set()
    for bench in BENCHES.values():
        for workload in bench.WORKLOADS:
            with dispatch.using("triton"):  # an earlier entry must not keep a workload from being measured
                tune_workload(bench, workload, configs, tuned)
                write()
                op_key = path_taken(bench.calls(workload, OURS, DIRECTIONS[0])[0])[1]
            compared.add(op_key)
            for direction in DIRECTIONS:
                torch_wins.setdefault(direction, {}).pop(op_key, None)
                winner = faster_of_pytorch(bench, workload, direction)
                if winner:
                    torch_wins[direction][op_key] = winner
            write()
    measured["configs"] = {
        name: {key: config for key, config in by_key.items() if (name, key) in tuned}
        for name, by_key in configs.items()
    }
    measured["torch"] = {
        direction: {op_key: winner for op_key, winner in wins.items() if op_key in compared}
        for direction, wins in torch_wins.items()
    }
    write()


def _write(capability: str, measured: dict[str, Any]) -> None:
    """Add the measurements to the table of all GPUs, and have the dispatcher read it again."""
    table = dispatch.tuned_table() | {capability: measured}
    write_text(dispatch.TUNED_FILE, json.dumps(table, indent=1) + "\n")
    dispatch.tuned_table.cache_clear()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if not IS_GPU:
        print("error: tuning measures kernels on a GPU, and PyTorch finds none", file=sys.stderr)
        return 2
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it for its children
    about, started, finished = machine(), time.perf_counter(), False
    listed = dispatch.tuned_table().get(about["capability"], {})
    measured = {"configs": {}, "torch": {}, **listed, "machine": about}
    try:
        major, minor = torch.cuda.get_device_capability()
        compiled = compile_workloads(dict.fromkeys(MEASURED, [10 * major + minor]), every=True)
        print(f"{len(compiled)} configurations compiled in {time.perf_counter() - started:.0f} s", flush=True)
        tune(measured, lambda: _write(about["capability"], measured))
        finished = True
    except KeyboardInterrupt:
        print("interrupted: the measurements so far are written", file=sys.stderr)
    wins = [f"{op_key} ({direction})" for direction, won in measured["torch"].items() for op_key in won]
    print(f"wrote {dispatch.TUNED_FILE}; PyTorch's own is faster for: {', '.join(wins) or 'nothing'}")
    return 0 if finished else 1


if __name__ == "__main__":
    sys.exit(main())
