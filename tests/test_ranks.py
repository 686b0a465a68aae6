"""Runs of several ranks from the command line: launchers, nodes, a rank that is lost, signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from commands import rows_of, start, train, write_small

from engine.checkpoint import states


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs are, and the scans that they share."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> tuple[Path, str]:
    """Run folder and output of two ranks at ZeRO 1."""
    launcher = (str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", "29581")
    config = str(write_small(folder))
    done = train(folder, "--config", config, "--run_dir", "runs/two", "--train.zero_stage", "1", launcher=launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "two", done.stdout


def test_two_ranks_under_the_launcher_train_together(two_ranks: tuple[Path, str]) -> None:
    run, output = two_ranks
    assert [int(row["step"]) for row in rows_of(run)] == [2, 4]  # four training cases, one crop per rank and step
    assert "2 rank(s)" in output


def test_a_killed_rank_ends_the_job_with_the_reason(folder: Path) -> None:
    launcher = (str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", "29582")
    options = ("--config", str(write_small(folder)), "--run_dir", "runs/lost", "--train.epochs", "1000")
    process = start(folder, *options, launcher=launcher)
    log = folder / "runs" / "lost" / "log.csv"
    while not log.is_file() and process.poll() is None:
        time.sleep(0.05)
    ranks = [
        child for child in psutil.Process(process.pid).children(recursive=True)
        if "--local_rank=1" in child.cmdline()
    ]  # fmt: skip
    ranks[0].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    told = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(told) == 1 and re.match(r"error: rank 1 on \S+: ended without a message: it was killed", told[0])


def test_one_rank_goes_on_from_the_shards_of_two(two_ranks: tuple[Path, str]) -> None:
    """At another ZeRO stage too; the learning rate has no jump, steps are those of one rank from there on."""
    run, _ = two_ranks
    done = train(run.parent.parent, "--resume", str(run), "--train.epochs", "3", "--train.zero_stage", "3")
    assert done.returncode == 0, done.stderr
    assert "saved by 2 rank(s), resumed by 1" in done.stdout
    rows = rows_of(run)
    assert [int(row["step"]) for row in rows] == [2, 4, 8]  # two crops a step, then one
    assert float(rows[2]["loss"]) < float(rows[0]["loss"])


def test_a_signal_to_one_of_two_ranks_ends_both_with_a_checkpoint(folder: Path) -> None:
    """Started as a SLURM step is, without a launcher in between, and by a command that would go on as well."""
    options = ("--config", str(write_small(folder)), "--run_dir", "runs/preempted", "--resume", "auto",
               "--train.epochs", "200", "--train.val_every_epochs", "1000")  # fmt: skip
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29584", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    log = folder / "runs" / "preempted" / "log.csv"
    ranks = [
        start(folder, *options, environment=place | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        for rank in range(2)
    ]
    while not log.is_file() and ranks[0].poll() is None:
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGUSR1)
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [os.EX_TEMPFAIL] * 2, outputs
    assert "stopped by SIGUSR1" in outputs[0][1] and "--resume runs/preempted" in outputs[0][1]
    assert len(states(log.parent / "checkpoints")) == 1


def test_two_nodes_train_together_and_go_on_after_one_was_lost(folder: Path) -> None:
    """A launcher for each of two nodes on this machine; the second node, launcher and all, is killed."""
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    options = ("--config", str(write_small(folder)), "--resume", "auto", "--train.epochs", "3",
               "--train.save_every_steps", "1")  # fmt: skip

    def nodes(name: str, port: int) -> list[subprocess.Popen]:
        meet = ("--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port))
        return [
            start(folder, *options, "--run_dir", f"runs/{name}", launcher=(torchrun, *meet, "--node_rank", str(node)))
            for node in range(2)
        ]

    def finish(running: list[subprocess.Popen]) -> None:
        outputs = [node.communicate(timeout=120) for node in running]
        assert [node.returncode for node in running] == [0, 0], outputs

    finish(nodes("nodes", 29585))
    running = nodes("lost_node", 29586)
    checkpoints = folder / "runs" / "lost_node" / "checkpoints"
    while not states(checkpoints) and running[0].poll() is None:
        time.sleep(0.01)
    for process in (*psutil.Process(running[1].pid).children(recursive=True), running[1]):
        process.kill()
    _, errors = running[0].communicate(timeout=60)
    assert running[0].returncode != 0 and "error: rank 1 on " in errors
    assert not (folder / "runs" / "lost_node" / "metrics.json").exists()
    finish(nodes("lost_node", 29587))
    weights = [
        torch.load(folder / "runs" / name / "checkpoints" / "last.pt", weights_only=True)["weights"]
        for name in ("nodes", "lost_node")
    ]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
