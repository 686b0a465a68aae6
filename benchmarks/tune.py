"""Measure every configuration of every kernel on this GPU, and where PyTorch is faster, into the cache folder.

    python -m benchmarks.tune             then `python launch/tuned.py` shows what was chosen
    python -m benchmarks.tune --prior     also as kernels/priors.json, for others with such a GPU

Training measures what it meets by itself, in the first configurations of each kernel (`kernels.dispatch.tuning`). This
measures all of them, on the workloads of the benchmarks, forward alone and forward + backward. Everything is compiled
first, on all cores. Results are written one by one, so a run that is interrupted keeps what it measured.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import time
from importlib import import_module

import torch

from benchmarks.aot import compile_workloads
from benchmarks.common import DEVICE, IS_GPU
from benchmarks.report import OURS
from benchmarks.workloads import MEASURED, OPS
from kernels import dispatch, self_tuning
from kernels.dispatch import DIRECTIONS
from pipelines.basics.atomic import write_text

BENCHES = {op: import_module(f"benchmarks.bench_{op}") for op in OPS}


def tune() -> None:
    """Measure all workloads of the benchmarks; the log has a line for each."""
    for bench in BENCHES.values():
        for workload in bench.WORKLOADS:
            with dispatch.tuning(DEVICE, thorough=True):
                for direction in DIRECTIONS:
                    bench.calls(workload, OURS, direction)[0]()


def priors() -> str:
    """What this machine's cache has for its GPU and versions, as `priors.json` with those of other GPUs."""
    file = self_tuning.PRIORS_FILE
    table = json.loads(file.read_text()) if file.is_file() else {}
    machine = self_tuning.machine(DEVICE)
    entries = self_tuning.CACHE.entries()
    own = {
        name.removeprefix(f"{machine} | "): entry["choice"]
        for name, entry in entries.items()
        if name.startswith(f"{machine} | ")
    }
    return json.dumps(table | {machine.split(" | ")[0]: own}, indent=1) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", action="store_true", help="also write kernels/priors.json")
    options = parser.parse_args()
    if not IS_GPU:
        print("error: tuning measures kernels on a GPU, and PyTorch finds none", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it for its children
    started, status = time.perf_counter(), 0
    try:
        major, minor = torch.cuda.get_device_capability()
        compiled = compile_workloads(dict.fromkeys(MEASURED, [10 * major + minor]), every=True)
        print(f"{len(compiled)} configurations compiled in {time.perf_counter() - started:.0f} s", flush=True)
        tune()
    except KeyboardInterrupt:
        print("interrupted: the measurements so far are kept", file=sys.stderr)
        status = 1
    if options.prior:
        write_text(self_tuning.PRIORS_FILE, priors())
    print(f"measured in {time.perf_counter() - started:.0f} s: {self_tuning.CACHE.path}")
    return status


if __name__ == "__main__":
    sys.exit(main())
