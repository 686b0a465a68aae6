"""The command as a user types it; shared by the files that run it."""

from __future__ import annotations

import csv
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
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


class Forked:
    """The command, forked from a server that has imported it once: seconds sooner than a process of its own.

    The rest is as of `subprocess.Popen`, with pipes.
    """

    def __init__(self, folder: Path, args: tuple[str, ...], environment: dict[str, str]) -> None:
        self.args = args
        self.terminals = [Path(tempfile.mkstemp(dir=folder)[1]) for _ in ("output", "errors")]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["engine.run"])
        arguments = (folder, args, environment, self.terminals)
        self.process = context.Process(target=_run_script, args=arguments, daemon=True)
        self.process.start()
        assert self.process.pid
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.process.join(timeout)
        output, errors = (path.read_text() for path in self.terminals)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(f"{self.args} after {timeout} s:\n{output}{errors}")
        return output, errors


def _run_script(folder: Path, args: tuple[str, ...], environment: dict[str, str], terminals: list[Path]) -> None:
    for descriptor, path in enumerate(terminals, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)  # OMP_NUM_THREADS comes too late
    sys.argv = [str(TRAIN), *args]
    runpy.run_path(str(TRAIN), run_name="__main__")


Started = subprocess.Popen | Forked


def start(
    folder: Path, *args: str, launcher: tuple[str, ...] = (), environment: dict[str, str] | None = None
) -> Started:
    """Start the command, by a launcher as a user would or forked; scans and volumes go to `folder/cache`."""
    environment = os.environ | (environment or {}) | {"GLIOFORGE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    for name in ("DS_ACCELERATOR", "LOCAL_RANK"):  # `init_ranks` sets them in this process
        environment.pop(name, None)
    if not launcher:
        return Forked(folder, args, environment)
    pipe = subprocess.PIPE
    command = [*launcher, str(TRAIN), *args]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def train(folder: Path, *args: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Run the command to its end."""
    process = start(folder, *args, launcher=launcher)
    output, errors = process.communicate(timeout=600)
    assert process.returncode is not None
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
