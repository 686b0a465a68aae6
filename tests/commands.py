"""The command as a user types it, in a process of its own; shared by the files that run it."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import yaml

TRAIN = Path(__file__).resolve().parent.parent / "launch" / "train.py"
CROP = (32, 32, 16)
SMALL = {
    "data": {
        "phantom": {"cases": 5, "size_voxels": [48, 48, 32]},
        "spacing_mm": [5.0, 5.0, 5.0],
        "crop_size_voxels": list(CROP),
        "workers": 1,
    },
    "model": {"name": "unetr", "feature_size": 8, "hidden_size": 24, "mlp_dim": 32, "num_heads": 2},
    "train": {"epochs": 2, "val_every_epochs": 1, "batch_size": 1, "device": "cpu"},
}


def start(
    folder: Path, *args: str, launcher: tuple[str, ...] = (sys.executable,), environment: dict[str, str] | None = None
) -> subprocess.Popen:
    """Start the command as a user would; scans and volumes go to `folder/cache`."""
    environment = os.environ | (environment or {}) | {"GLIOFORGE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    for name in ("DS_ACCELERATOR", "LOCAL_RANK"):  # `init_ranks` sets them in this process
        environment.pop(name, None)
    pipe = subprocess.PIPE
    command = [*launcher, str(TRAIN), *args]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def train(folder: Path, *args: str, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.CompletedProcess:
    """Run the command to its end."""
    with start(folder, *args, launcher=launcher) as process:
        output, errors = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def free_port() -> str:
    """A port of this machine that nobody has now: another run of these tests may be going on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def write_small(folder: Path) -> Path:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


def rows_of(run: Path) -> list[dict[str, str]]:
    with open(run / "log.csv") as file:
        return list(csv.DictReader(file))
