"""Runs of several ranks from the command line: launchers, nodes, a rank that is lost, signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import psutil
import pytest
import torch
from commands import free_port, rows_of, start, train, write_small
from two_ranks import TwoRanks, ready

from engine.checkpoint import states

TORCHRUN = (str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", "2", "--master_port")
DEEPSPEED = (str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port")
LIMIT_S = 300  # ends a test that hangs, and no other


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs are, and the scans that they share."""
    return tmp_path_factory.mktemp("ranks")


TrainedByTwo = tuple[Path, str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> TrainedByTwo:
    """Run folder, output and last weights of two ranks at ZeRO 1."""
    launcher = (*DEEPSPEED, free_port())
    config = str(write_small(folder))
    done = train(folder, "--config", config, "--run_dir", "runs/two", "--train.zero_stage", "1", launcher=launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "two", done.stdout, last_weights(folder / "runs" / "two")


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.pt", weights_only=True)["weights"]


def test_two_ranks_under_the_launcher_train_together(two_ranks: TrainedByTwo) -> None:
    run, output, _ = two_ranks
    assert [int(row["step"]) for row in rows_of(run)] == [2, 4]  # four training cases, one crop per rank and step
    assert "2 rank(s)" in output


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_with_the_reason(folder: Path) -> None:
    """Under the launcher; without it: tests/test_watchdog.py."""
    launcher = (*DEEPSPEED, free_port())
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
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0
    told = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(told) == 1 and re.match(r"error: rank 1 on \S+: ended without a message: it was killed", told[0])


def test_one_rank_goes_on_from_the_shards_of_two(two_ranks: TrainedByTwo) -> None:
    """At another ZeRO stage too; the learning rate has no jump, steps are those of one rank from there on."""
    run, _, _ = two_ranks
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
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    log = folder / "runs" / "preempted" / "log.csv"
    ranks = [
        start(folder, *options, environment=place | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        for rank in range(2)
    ]
    while not log.is_file() and ranks[0].poll() is None:
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGUSR1)
    outputs = [rank.communicate(timeout=LIMIT_S) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [os.EX_TEMPFAIL] * 2, outputs
    assert "stopped by SIGUSR1" in outputs[0][1] and "--resume runs/preempted" in outputs[0][1]
    assert len(states(log.parent / "checkpoints")) == 1


@pytest.mark.parametrize(
    ("launcher", "number", "is_its_child"),
    [
        (DEEPSPEED, signal.SIGTERM, False),
        pytest.param(DEEPSPEED, signal.SIGINT, False, marks=pytest.mark.slow),
        pytest.param(DEEPSPEED, signal.SIGKILL, True, marks=pytest.mark.slow),  # deepspeed.launcher.launch
        pytest.param(TORCHRUN, signal.SIGKILL, False, marks=pytest.mark.slow),
    ],
)
def test_ranks_whose_launcher_is_gone_save_and_end(
    launcher: tuple[str, ...], number: signal.Signals, is_its_child: bool, folder: Path
) -> None:
    name = f"{Path(launcher[0]).name}-{number.name}"
    options = ("--config", str(write_small(folder)), "--run_dir", f"runs/{name}", "--train.epochs", "1000",
               "--train.val_every_epochs", "1000")  # fmt: skip
    process = start(folder, *options, launcher=(*launcher, free_port()))
    log = folder / "runs" / name / "log.csv"
    while not log.is_file() and process.poll() is None:
        time.sleep(0.05)
    ranks = [each for each in psutil.Process(process.pid).children(recursive=True) if "--run_dir" in each.cmdline()]
    (process if not is_its_child else psutil.Process(process.pid).children()[0]).send_signal(number)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert not psutil.wait_procs(ranks, timeout=60)[1]
    assert f"stopped by the end of its launcher; runs/{name}/checkpoints/step-" in errors, errors
    assert len(states(log.parent / "checkpoints")) == 1
    if number == signal.SIGTERM:
        epochs = len(rows_of(log.parent)) + 1
        done = train(folder, "--resume", f"runs/{name}", "--train.epochs", str(epochs))
        assert done.returncode == 0 and "resumed" in done.stdout, done.stderr


@pytest.mark.slow
def test_two_nodes_go_on_after_one_was_lost(folder: Path, two_ranks: TrainedByTwo) -> None:
    """A launcher for each of two nodes on this machine; the second node, launcher and all, is killed."""
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    run = folder / "runs" / "nodes"
    options = ("--config", str(write_small(folder)), "--run_dir", str(run), "--resume", "auto",
               "--train.zero_stage", "1", "--train.save_every_steps", "1")  # fmt: skip

    def start_nodes(port: str) -> list[subprocess.Popen]:
        meet = ("--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", port)
        return [start(folder, *options, launcher=(torchrun, *meet, "--node_rank", str(node))) for node in range(2)]

    nodes = start_nodes(free_port())
    while not states(run / "checkpoints") and nodes[0].poll() is None:
        time.sleep(0.01)
    for process in (*psutil.Process(nodes[1].pid).children(recursive=True), nodes[1]):
        process.kill()
    _, errors = nodes[0].communicate(timeout=LIMIT_S)
    assert nodes[0].returncode != 0 and "error: rank 1 on " in errors
    assert not (run / "metrics.json").exists()
    nodes = start_nodes(free_port())
    outputs = [node.communicate(timeout=LIMIT_S) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    weights = last_weights(run)
    assert all(torch.equal(value, weights[key]) for key, value in two_ranks[2].items())


def both_ranks_warn() -> None:
    from launch import run

    ranks = ready()
    run._start_log(Path("runs/one"), ranks)
    run.log.info("hello from %d", ranks.rank)
    warnings.warn(f"warning of {ranks.rank}", stacklevel=1)


def test_each_rank_has_a_log_and_the_terminal_shows_that_of_the_first(tmp_path: Path) -> None:
    ended = TwoRanks(tmp_path).start(both_ranks_warn).end()
    assert ended.statuses == [0, 0], ended.output
    folder = tmp_path / "runs" / "one"
    for rank, file in enumerate(["rank-0000.log", "rank-0001.log"]):
        text = (folder / "logs" / file).read_text()
        assert f"hello from {rank}" in text and f"warning of {rank}" in text and f"of {1 - rank}" not in text
    assert "hello from 0" in (folder / "run.log").read_text() and "from 1" not in (folder / "run.log").read_text()
    assert "hello from 0" in ended.output and "warning of 0" in ended.output
    assert "hello from 1" not in ended.output and "warning of 1" not in ended.output
