"""Measure every configuration of every kernel on this GPU and write the fastest to `kernels/tuned.json`.

    python -m benchmarks.tune

Each benchmark case runs forward and backward once while its launches are observed; every candidate of a launch is
timed on the launch's own arguments, and where one beats the default by more than `MARGIN` it is written down. Then
whole operations are timed against what PyTorch has for them; those that lose are written down too, and the dispatcher
takes PyTorch's path there. What other GPUs are listed with stays.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from triton.testing import do_bench

from benchmarks import bench_attention, bench_dice_ce, bench_instance_norm
from benchmarks.common import DIRECTIONS, IS_GPU, machine, path_taken, seconds
from benchmarks.report import OURS
from kernels import dispatch

MARGIN = 1.03
"""A smaller gain is noise, and the default is the simpler answer."""
BENCHES = (bench_attention, bench_instance_norm, bench_dice_ce)


def tune_launch(launch: dispatch.Launch, configs: dict[str, dict[str, Any]]) -> None:
    """Time the candidates of one launch, note the fastest in `configs` by kernel and key, and run it."""
    times = [_milliseconds(launch, config) for config in launch.candidates]
    best = min(range(len(times)), key=times.__getitem__)
    if times[0] > MARGIN * times[best]:
        configs.setdefault(launch.name, {})[launch.key] = dict(launch.candidates[best])
    print(
        f"{launch.name:32} {launch.key:60} default {1e3 * times[0]:9.1f} µs, best {1e3 * times[best]:9.1f} µs",
        dict(launch.candidates[best]),
    )
    launch.run(launch.candidates[best])


def _milliseconds(launch: dispatch.Launch, config: dispatch.Config) -> float:
    return do_bench(lambda: launch.run(config), warmup=5, rep=20, return_mode="median")


def tune_configs() -> dict[str, dict[str, Any]]:
    """The fastest configuration by kernel and key, where it is not the default."""
    configs: dict[str, dict[str, Any]] = {}
    seen: set[tuple[str, str]] = set()

    def observer(launch: dispatch.Launch) -> None:
        if (launch.name, launch.key) in seen:
            launch.run(launch.candidates[0])
            return
        seen.add((launch.name, launch.key))
        tune_launch(launch, configs)

    for bench in BENCHES:
        for case in bench.CASES:
            calls = bench.calls(case, OURS, DIRECTIONS[1])
            with dispatch.observed(observer):
                calls[0]()
    return configs


def slower_than_pytorch() -> list[str]:
    """Operations and keys, as the dispatcher asks for them, for which our kernel loses to a path of PyTorch."""
    slower = []
    dispatch.use("triton")  # whatever was written down before
    for bench in BENCHES:
        for case in bench.CASES:
            times = {}
            for variant in bench.VARIANTS:
                if variant in (OURS, "torch.compile") or variant.startswith("SDPA"):
                    try:
                        timed = bench.calls(case, variant, DIRECTIONS[1])
                        times[variant] = seconds(timed, rounds=5)
                    except RuntimeError as error:  # an SDPA backend that does not take this dtype
                        if "No available kernel" not in str(error):
                            raise
            best = min(times, key=times.__getitem__)
            print(f"{case!s:64}", *(f"{name} {1e6 * time:.1f} µs" for name, time in times.items()), sep="  ")
            if times[OURS] > MARGIN * times[best]:
                slower.append(path_taken(bench.calls(case, OURS, DIRECTIONS[0])[0])[1])
    return slower


def _write(capability: str, measured: dict[str, Any]) -> None:
    """Put what was measured into the table of all GPUs, and have the dispatcher read it again."""
    table = dispatch.tuned_table() | {capability: measured}
    dispatch.TUNED_FILE.write_text(json.dumps(table, indent=1) + "\n")
    dispatch.tuned_table.cache_clear()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if not IS_GPU:
        print("error: tuning measures kernels on a GPU, and PyTorch sees none here", file=sys.stderr)
        return 2
    about = machine()
    measured: dict[str, Any] = {"machine": about, "configs": tune_configs()}
    _write(about["capability"], measured)
    measured["torch"] = slower_than_pytorch()
    _write(about["capability"], measured)
    print(f"wrote {dispatch.TUNED_FILE}; PyTorch's own is faster for: {', '.join(measured['torch']) or 'nothing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
