"""Kill a run at a random moment, resume it, and compare its last weights with those of an undisturbed run.

    python -m benchmarks.resume                     20 kills of one rank, 20 of two (at ZeRO 0 and 2 by turns), and 5 of
                                                    each within a save
    python -m benchmarks.resume --kills 3 --ranks 1

Real processes and SIGKILL: all ranks, or one of two, which the others must notice. The runs are small and on a CPU, in
float32, so that the weights must be equal bit for bit. The result goes to `benchmarks/results/resume_cpu.json`; the
exit status is 1 where a run ends with other weights.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import yaml

from benchmarks.common import machine
from engine.checkpoint import states

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "resume_cpu.json"
EPOCHS, STEPS = 2, 20  # of an epoch on one rank; two have half as many
CONFIG = {
    "data": {
        "phantom": {"cases": 5, "size_voxels": [48, 48, 32]},
        "spacing_mm": [5.0, 5.0, 5.0],
        "crop_size_voxels": [32, 32, 16],
        "crops_per_case": 5,
        "workers": 1,
    },
    "model": {"name": "unetr", "feature_size": 8, "hidden_size": 24, "mlp_dim": 32, "num_heads": 2},
    "optim": {"schedule": "cosine", "warmup_steps": 3, "grad_clip": 1.0, "ema_decay": 0.9},
    "train": {
        "epochs": EPOCHS,
        "val_every_epochs": EPOCHS,
        "batch_size": 1,
        "device": "cpu",
        "save_every_steps": 1,
        "precision": "float32",
        "compile": False,
        "cuda_graph": False,
    },
}
LIMIT_S = 300.0


class Run:
    """A training run of `ranks` processes in `folder`, at a ZeRO stage."""

    def __init__(self, folder: Path, ranks: int, stage: int, name: str) -> None:
        self.folder, self.ranks, self.stage, self.dir = folder, ranks, stage, folder / "runs" / name
        self.processes: list[subprocess.Popen] = []

    def start(self, *args: str) -> None:
        """Start all ranks."""
        environment = os.environ | {"GLIOFORGE_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"}
        for name in ("DS_ACCELERATOR", "LOCAL_RANK", "RANK", "WORLD_SIZE"):
            environment.pop(name, None)
        command = [sys.executable, str(ROOT / "launch" / "train.py"), *args, "--train.zero_stage", str(self.stage)]
        port = str(_free_port())
        for rank in range(self.ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.ranks), "MASTER_PORT": port,
                     "LOCAL_WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
            own = environment | (place if self.ranks > 1 else {})
            log = open(self.folder / f"{self.dir.name}-{rank}.log", "a")  # noqa: SIM115 - the process has it
            self.processes.append(subprocess.Popen(command, cwd=self.folder, env=own, stdout=log, stderr=log))

    def begin(self) -> None:
        """From the first step."""
        self.start("--config", str(self.folder / "config.yaml"), "--run_dir", str(self.dir))

    def finish(self) -> dict[str, torch.Tensor]:
        """Wait for the end; the last weights, averaged ones."""
        codes = [process.wait(timeout=LIMIT_S) for process in self.processes]
        if any(codes):
            raise RuntimeError(f"{self.dir} ended with {codes}: see {self.folder}")
        return torch.load(self.dir / "checkpoints" / "last.pt", weights_only=True)["weights"]

    def kill(self, moment: Callable[[], bool], rank: int | None) -> bool:
        """SIGKILL all ranks, or one, when the moment has come; False where the run ended before it."""
        limit = time.monotonic() + LIMIT_S
        while not moment():
            if self.processes[0].poll() is not None or time.monotonic() > limit:
                return False
        for process in self.processes if rank is None else [self.processes[rank]]:
            process.kill()
        for process in self.processes:
            process.wait(timeout=60)
        self.processes = []
        return True

    def has_reached(self, step: int) -> bool:
        """Whether a checkpoint of this step, or a later one, is there."""
        found = states(self.dir / "checkpoints")
        time.sleep(0.002)
        return bool(found) and int(found[0].name.split("-")[1]) >= step

    def is_saving(self, after: int) -> bool:
        """Whether a checkpoint is being written, and one of step `after` was."""
        return self.has_reached(after) and any((self.dir / "checkpoints").glob(".step-*"))


def kill_and_resume(folder: Path, ranks: int, kills: int, within_save: int, seed: int = 0) -> dict[str, int]:
    """Numbers of runs that were killed at a step, killed within a save, and that ended with other weights."""
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    expected = {}
    for stage in (0,) if ranks == 1 else (0, 2):
        whole = Run(folder, ranks, stage, f"whole-{ranks}-{stage}")
        whole.begin()
        expected[stage] = whole.finish()
    chance, steps = random.Random(seed), EPOCHS * STEPS // ranks
    counts = {"at a step": 0, "within a save": 0, "other weights": 0}
    for number in range(kills + within_save):
        stage = list(expected)[number // 2 % len(expected)]
        run, at = Run(folder, ranks, stage, f"killed-{ranks}-{number}"), chance.randrange(1, steps)
        saving = number >= kills
        one_of_two = 1 if ranks > 1 and number % 2 else None
        run.begin()
        if not run.kill(lambda: (run.is_saving if saving else run.has_reached)(at), one_of_two):  # noqa: B023
            run.finish()  # it was over before the kill: nothing is shown, nothing counted
            continue
        counts["within a save" if saving else "at a step"] += 1
        run.start("--resume", str(run.dir))
        found = run.finish()
        same = all(torch.equal(value, expected[stage][name]) for name, value in found.items())
        counts["other weights"] += not same
        print(f"{ranks} rank(s), ZeRO {stage}, kill {number + 1}: step {at}{', saving' if saving else ''}: "
              f"{'the same weights' if same else 'OTHER WEIGHTS'}", flush=True)  # fmt: skip
    return counts


def main(args: Sequence[str] | None = None) -> int:
    """Run it all; 1 where a resumed run ends with other weights."""
    parser = argparse.ArgumentParser(description="Kill runs, resume them, compare their weights.")
    parser.add_argument("--kills", type=int, default=20, help="At a random step, for each number of ranks.")
    parser.add_argument("--within_save", type=int, default=5, help="While a checkpoint is being written.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0, help="Of the steps.")
    options = parser.parse_args(args)
    results = {}
    with tempfile.TemporaryDirectory(prefix="resume-") as folder:
        for ranks in options.ranks:
            results[f"{ranks} rank(s)"] = kill_and_resume(
                Path(folder), ranks, options.kills, options.within_save, options.seed
            )
    RESULT.write_text(json.dumps({"machine": machine(), "killed": results}, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    return int(any(counts["other weights"] for counts in results.values()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
