"""Measure every configuration of every kernel on this GPU and write the fastest to `kernels/tuned.json`.

    python -m benchmarks.tune

Every configuration is compiled beforehand, on all cores. Then, for each benchmark case, the operation runs forward and
backward while its launches are observed; the candidates of each launch are timed on the launches' own arguments, and
where one beats the default by more than `MARGIN` it is written down. With these, the operation is timed on our path and
on PyTorch's, as a caller would run either, for attention with each backend of `scaled_dot_product_attention`.

Where ours loses by more than `MARGIN`, the winner is written down and the dispatcher takes it: by forward + backward
where a gradient is wanted, for training runs both, and a gain in the one must not cost more in the other; by the
forward alone elsewhere.

Results are written after each case, so that a run that is cut short leaves what it measured; what other GPUs are listed
with stays, and so does, until the end, what this one was listed with.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from triton import TritonError

from benchmarks import bench_attention, bench_dice_ce, bench_instance_norm
from benchmarks.common import DIRECTIONS, IS_GPU, MARGIN, forced, machine, path_taken, seconds
from benchmarks.report import OURS
from kernels import dispatch
from kernels.aot import compile_cases
from kernels.cases import MEASURED, Case

BENCHES = (bench_attention, bench_instance_norm, bench_dice_ce)


def launches_of(calls: Sequence[Callable[[], Any]]) -> list[tuple[dispatch.Launch, ...]]:
    """The launches of one call, each as many times as there are calls: on the inputs of each."""
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
            print(f"{first.name} {first.key} {config}: {_first_line(error)}")
            times.append(float("inf"))
    best = min(range(len(times)), key=times.__getitem__)
    print(
        f"{first.name:32} {first.key:60} default {1e6 * times[0]:9.1f} us, best {1e6 * times[best]:9.1f} us",
        first.candidates[best],
    )
    return first.candidates[best] if times[0] > MARGIN * times[best] else None


def tune_case(bench: ModuleType, case: Case, configs: dict[str, dict[str, Any]], seen: set[tuple[str, str]]) -> None:
    """Tune what a case launches and `seen` does not hold yet; note it in `configs`, by kernel and key."""
    for launches in launches_of(bench.calls(case, OURS, DIRECTIONS[1])):
        name, key = launches[0].name, launches[0].key
        if (name, key) in seen or len(launches[0].candidates) == 1:
            continue
        seen.add((name, key))
        best = tune_launch(launches)
        configs.setdefault(name, {}).pop(key, None)
        if best is not None:
            configs[name][key] = dict(best)


def faster_of_pytorch(bench: ModuleType, case: Case, direction: str) -> str:
    """What PyTorch has that beats our kernels in one direction, of the module's `CHOICES`; empty if nothing does."""
    with forced("triton"):
        ours = seconds(bench.calls(case, OURS, direction), rounds=5)
    times = {}
    for choice in bench.CHOICES:
        try:
            with forced("torch", choice):
                times[choice] = seconds(bench.calls(case, OURS, direction), rounds=5)
        except RuntimeError as error:
            print(f"{case} {choice}: {_first_line(error)}")
    print(f"{case!s:64} {direction:20} ours {1e6 * ours:.1f} us", *(f"{n} {1e6 * t:.1f}" for n, t in times.items()))
    best = min(times, key=times.__getitem__, default="")
    return best if best and ours > MARGIN * times[best] else ""


def tune(measured: dict[str, Any], write: Callable[[], None]) -> None:
    """Measure all benchmark cases into `measured`; `write` is called after each."""
    configs, torch_wins = measured["configs"], measured["torch"]
    tuned: set[tuple[str, str]] = set()
    compared: set[str] = set()
    for bench in BENCHES:
        for case in bench.CASES:
            dispatch.use("triton")  # what was written down before must not keep a case from being measured
            tune_case(bench, case, configs, tuned)
            write()
            op_key = path_taken(bench.calls(case, OURS, DIRECTIONS[0])[0])[1]
            compared.add(op_key)
            for direction in DIRECTIONS:
                torch_wins.setdefault(direction, {}).pop(op_key, None)
                winner = faster_of_pytorch(bench, case, direction)
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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _write(capability: str, measured: dict[str, Any]) -> None:
    """Put what was measured into the table of all GPUs, and have the dispatcher read it again."""
    table = dispatch.tuned_table() | {capability: measured}
    unfinished = dispatch.TUNED_FILE.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(table, indent=1) + "\n")
    unfinished.replace(dispatch.TUNED_FILE)  # a run that is killed leaves one whole file
    dispatch.tuned_table.cache_clear()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if not IS_GPU:
        print("error: tuning measures kernels on a GPU, and PyTorch sees none here", file=sys.stderr)
        return 2
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell ignores it for its children
    about, started, finished = machine(), time.perf_counter(), False
    listed = dispatch.tuned_table().get(about["capability"], {})
    measured = {"configs": {}, "torch": {}, **listed, "machine": about}
    try:
        major, minor = torch.cuda.get_device_capability()
        compiled = compile_cases(dict.fromkeys(MEASURED, [10 * major + minor]), every=True)
        print(f"{len(compiled)} configurations compiled in {time.perf_counter() - started:.0f} s", flush=True)
        tune(measured, lambda: _write(about["capability"], measured))
        finished = True
    except KeyboardInterrupt:
        print("interrupted: what was measured is written", file=sys.stderr)
    finally:
        dispatch.use("auto")
    wins = [f"{op_key} ({direction})" for direction, won in measured["torch"].items() for op_key in won]
    print(f"wrote {dispatch.TUNED_FILE}; PyTorch's own is faster for: {', '.join(wins) or 'nothing'}")
    return 0 if finished else 1


if __name__ == "__main__":
    sys.exit(main())
