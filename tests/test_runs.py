"""Runs from the command line, on one and two ranks, killed and resumed."""

from __future__ import annotations

import csv
import json
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
import yaml

from engine.checkpoint import states

ROOT = Path(__file__).resolve().parent.parent
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
    command = [*launcher, str(ROOT / "launch" / "train.py"), *args]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def train(folder: Path, *args: str, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.CompletedProcess:
    """Run the command to its end."""
    with start(folder, *args, launcher=launcher) as process:
        output, errors = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which a two-epoch run ended in `runs/one`."""
    folder = tmp_path_factory.mktemp("command")
    done = train(folder, "--config", str(write_small(folder)), "--run_dir", "runs/one")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def write_small(folder: Path) -> Path:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


def rows_of(run: Path) -> list[dict[str, str]]:
    with open(run / "log.csv") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_pictures_tables_checkpoints_and_a_page(finished: Path) -> None:
    run = finished / "runs" / "one"
    for name in (
        "curves.png",
        "samples.png",
        "prediction.png",
        "report.html",
        "log.csv",
        "validation.csv",
        "config.yaml",
    ):
        assert (run / name).stat().st_size > 0, name
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["epochs"] == 2 and set(metrics["last"]) >= {"mean", "TC", "WT", "ET", "cases", "empty_truths"}
    assert len(rows_of(run)) == 2
    assert "kernels: " in (run / "run.log").read_text()
    weights = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    assert weights["epoch"] == 2 and weights["config"]["model"]["hidden_size"] == 24
    assert list((run / "tensorboard").iterdir())
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "http" not in page.split("</style>")[1]


def test_resume_continues_the_same_loss_curve(finished: Path) -> None:
    config = str(write_small(finished))
    through = train(finished, "--config", config, "--run_dir", "runs/through", "--train.epochs", "3")
    assert through.returncode == 0, through.stderr
    resumed = train(finished, "--resume", "runs/one", "--train.epochs", "3")
    assert resumed.returncode == 0, resumed.stderr
    expected, found = (rows_of(finished / "runs" / name) for name in ("through", "one"))
    assert [row["epoch"] for row in found] == ["1", "2", "3"]
    for name in ("loss", "dice_loss", "ce_loss", "val_WT"):
        assert [row[name] for row in found] == [row[name] for row in expected], name


def test_training_on_scans_that_are_not_prepared_gives_the_same_losses(finished: Path) -> None:
    config = str(write_small(finished))
    done = train(finished, "--config", config, "--run_dir", "runs/raw", "--data.unprepared", "true",
                 "--data.store_dir", "store_of_one")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((finished / "store_of_one").glob("*.image.npy"))) == 1  # the validation case
    losses = [[float(row["loss"]) for row in rows_of(finished / "runs" / name)[:2]] for name in ("raw", "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_run_killed_within_an_epoch_goes_on_as_if_it_had_not_been(finished: Path) -> None:
    config = str(write_small(finished))
    options = ("--config", config, "--train.epochs", "2", "--data.crops_per_case", "3")  # 12 steps an epoch
    through = train(finished, *options, "--run_dir", "runs/unbroken")
    assert through.returncode == 0, through.stderr
    process = start(finished, *options, "--run_dir", "runs/killed", "--train.save_every_steps", "1")
    checkpoints = finished / "runs" / "killed" / "checkpoints"
    while not states(checkpoints) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (finished / "runs" / "killed" / "log.csv").exists()  # no epoch was whole
    resumed = train(finished, "--resume", "runs/killed")
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"resumed runs/killed after epoch 0 of 2, step [1-9]\d? of 12", resumed.stdout), resumed.stdout
    expected, found = (rows_of(finished / "runs" / name) for name in ("unbroken", "killed"))
    for name in ("epoch", "step", "loss", "dice_loss", "ce_loss", "val_WT"):
        assert [row[name] for row in found] == [row[name] for row in expected], name
    weights = [
        torch.load(finished / "runs" / name / "checkpoints" / "last.pt", weights_only=True)["weights"]
        for name in ("unbroken", "killed")
    ]
    for key, value in weights[0].items():
        assert torch.equal(weights[1][key], value), key


@pytest.fixture(scope="module")
def two_ranks(finished: Path) -> tuple[Path, str]:
    """Run folder and output of two ranks at ZeRO 1."""
    launcher = (str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", "29581")
    config = str(write_small(finished))
    done = train(finished, "--config", config, "--run_dir", "runs/two", "--train.zero_stage", "1", launcher=launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    return finished / "runs" / "two", done.stdout


def test_two_ranks_under_the_launcher_train_together(two_ranks: tuple[Path, str]) -> None:
    run, output = two_ranks
    assert [int(row["step"]) for row in rows_of(run)] == [2, 4]  # four training cases, one crop per rank and step
    assert "2 rank(s)" in output


def test_a_killed_rank_ends_the_job_with_the_reason(finished: Path) -> None:
    launcher = (str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", "29582")
    options = ("--config", str(write_small(finished)), "--run_dir", "runs/lost", "--train.epochs", "1000")
    process = start(finished, *options, launcher=launcher)
    log = finished / "runs" / "lost" / "log.csv"
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
    assert [int(row["step"]) for row in rows] == [2, 4, 12]  # four crops a step of two ranks, then one
    assert float(rows[2]["loss"]) < float(rows[0]["loss"])


def test_a_signal_to_one_of_two_ranks_ends_both_with_a_checkpoint(finished: Path) -> None:
    """Started as a SLURM step is, without a launcher in between; the same command goes on."""
    options = ("--config", str(write_small(finished)), "--run_dir", "runs/preempted", "--resume", "auto",
               "--train.epochs", "200", "--train.val_every_epochs", "1000")  # fmt: skip
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29584", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    log = finished / "runs" / "preempted" / "log.csv"
    for wanted in (2, None):  # rows when the signal is sent, to the first job and, later on, to the second
        ranks = [
            start(finished, *options, environment=place | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
            for rank in range(2)
        ]
        before = len(rows_of(log.parent)) if log.is_file() else 0
        while (not log.is_file() or len(rows_of(log.parent)) < (wanted or before + 2)) and ranks[0].poll() is None:
            time.sleep(0.05)
        ranks[1].send_signal(signal.SIGUSR1)
        outputs = [rank.communicate(timeout=60) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [os.EX_TEMPFAIL] * 2, outputs
        assert "stopped by SIGUSR1" in outputs[0][1] and "--resume runs/preempted" in outputs[0][1]
        saved = states(log.parent / "checkpoints")
        assert len(saved) == 1 if wanted else saved
        assert ("resumed runs/preempted" in outputs[0][0]) == (wanted is None)


def test_two_nodes_train_together_and_go_on_after_one_was_lost(finished: Path) -> None:
    """A launcher for each of two nodes on this machine; the second node, launcher and all, is killed."""
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    options = ("--config", str(write_small(finished)), "--resume", "auto", "--train.epochs", "3",
               "--train.save_every_steps", "1")  # fmt: skip

    def nodes(name: str, port: int) -> list[subprocess.Popen]:
        meet = ("--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port))
        return [
            start(finished, *options, "--run_dir", f"runs/{name}", launcher=(torchrun, *meet, "--node_rank", str(node)))
            for node in range(2)
        ]

    def finish(running: list[subprocess.Popen]) -> None:
        outputs = [node.communicate(timeout=120) for node in running]
        assert [node.returncode for node in running] == [0, 0], outputs

    finish(nodes("nodes", 29585))
    running = nodes("lost_node", 29586)
    checkpoints = finished / "runs" / "lost_node" / "checkpoints"
    while not states(checkpoints) and running[0].poll() is None:
        time.sleep(0.01)
    for process in (*psutil.Process(running[1].pid).children(recursive=True), running[1]):
        process.kill()
    _, errors = running[0].communicate(timeout=60)
    assert running[0].returncode != 0 and "error: rank 1 on " in errors
    assert not (finished / "runs" / "lost_node" / "metrics.json").exists()
    finish(nodes("lost_node", 29587))
    weights = [
        torch.load(finished / "runs" / name / "checkpoints" / "last.pt", weights_only=True)["weights"]
        for name in ("nodes", "lost_node")
    ]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--data.root", "nothing_here"), "nothing_here"),
        (("--data.crop_size_voxels", "[32,32,20]"), "try (32, 32, 16)"),
        (("--data.crop_size_voxels", "[96,96,96]"), "96"),
        (("--train.device", "cpu", "--kernels", "triton"), "kernels 'triton': Triton kernels need an NVIDIA GPU"),
    ],
)
def test_a_users_mistake_ends_in_one_line_and_status_2(args: tuple[str, ...], message: str, finished: Path) -> None:
    done = train(finished, "--config", str(write_small(finished)), "--run_dir", "runs/wrong", *args)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.gpu
def test_a_gpu_gives_the_losses_of_a_cpu(finished: Path) -> None:
    config = str(write_small(finished))
    for device in ("cpu", "cuda"):
        done = train(finished, "--config", config, "--run_dir", f"runs/on_{device}", "--train.device", device)
        assert done.returncode == 0, done.stdout + done.stderr
    cpu, gpu = ([float(row["loss"]) for row in rows_of(finished / "runs" / f"on_{d}")] for d in ("cpu", "cuda"))
    assert gpu == pytest.approx(cpu, rel=1e-2)


def test_resuming_a_finished_run_keeps_its_table(finished: Path) -> None:
    before = json.loads((finished / "runs" / "one" / "metrics.json").read_text())
    page = (finished / "runs" / "one" / "report.html").read_text()
    done = train(finished, "--resume", "runs/one")
    assert done.returncode == 0, done.stderr
    assert json.loads((finished / "runs" / "one" / "metrics.json").read_text()) == before
    after = (finished / "runs" / "one" / "report.html").read_text()
    assert after.split("</table>")[0] == page.split("</table>")[0]


def test_the_unet_needs_no_transformer_widths(tmp_path: Path) -> None:
    done = train(tmp_path, "--config", str(write_small(tmp_path)), "--model.name", "unet", "--train.epochs", "1")
    assert done.returncode == 0, done.stderr
