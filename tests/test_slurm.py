"""launch/slurm.sh, between programs that stand in for SLURM's."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "launch" / "slurm.sh"


def submit(folder: Path, nodes: int, status: int = 0) -> subprocess.CompletedProcess:
    """Run the script as SLURM would on a list of nodes; the ranks end with `status`."""
    programs = {
        "scontrol": f"""case $1 in
            show) for ((i = 0; i < {nodes}; i++)); do echo "a-node-with-a-long-name-$i"; done ;;
            *) echo "scontrol $*" ;;
            esac""",
        "srun": f'echo "$MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS"; echo "$*"; exit {status}',
    }
    for name, text in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\nset -e\n{text}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "a-node[0-999]", "SLURM_CPUS_PER_TASK": "12"}
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", **slurm}
    return subprocess.run(
        ["bash", SCRIPT, "--train.epochs", "5"], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("nodes", [1, 1000])
def test_ranks_meet_at_the_first_node(nodes: int, tmp_path: Path) -> None:
    done = submit(tmp_path, nodes)
    assert done.returncode == 0, done.stderr
    place, command = done.stdout.splitlines()
    assert place == "a-node-with-a-long-name-0 21234 12"
    assert command.endswith("launch/train.py --run_dir runs/slurm-41234 --resume auto --train.epochs 5")


@pytest.mark.parametrize(("status", "is_queued"), [(75, True), (2, False), (0, False)])
def test_only_a_stopped_job_is_queued_again(status: int, is_queued: bool, tmp_path: Path) -> None:
    done = submit(tmp_path, 2, status)
    assert done.returncode == status
    assert ("scontrol requeue 41234" in done.stdout) == is_queued
