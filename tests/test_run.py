"""Runs from the command line on one rank, killed and resumed. Several ranks: tests/test_ranks.py."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from commands import rows_of, start, train, write_small
from test_checkpoint import write

from engine.checkpoint import states
from engine.config import Config, to_portable_dict
from engine.data import DataConfig, PhantomConfig
from engine.reports.comparison import FinishedRun
from engine.reports.report import is_finished
from engine.step import TrainConfig
from kernels import dispatch
from launch.run import _changed_options, _claim, _log_effects_of_resuming, _refuse_links, run
from launch.train import main
from pipelines.layouts.cases import find_cases
from pipelines.phantom import make_phantoms
from pipelines.scans.nifti import read_nifti, write_nifti

CPU = TrainConfig(device="cpu")


def options(folder: Path) -> tuple[str, ...]:
    return ("--config", str(write_small(folder)), "--data.crops_per_case", "3")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which a run of two epochs, twelve steps each, ended in `runs/one`."""
    folder = tmp_path_factory.mktemp("command")
    done = train(folder, *options(folder), "--run_dir", "runs/one")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


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
    assert page.count("data:image/png;base64,") == 4 and "http" not in page.split("</style>")[1]


def test_config_yaml_keeps_what_was_asked_and_results_say_what_was_taken(finished: Path) -> None:
    run, taken = finished / "runs" / "one", {"precision": "float32", "compile": False, "cuda_graph": False}
    asked = yaml.safe_load((run / "config.yaml").read_text())["train"]
    assert {asked[name] for name in taken} == {"auto"}
    weights = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    about = json.loads((states(run / "checkpoints")[0] / "about.json").read_text())
    for config in (weights["config"], about["config"]):
        assert {name: config["train"][name] for name in taken} == taken
    page = (run / "report.html").read_text()
    assert '<th scope="row">precision</th><td>float32</td>' in page and '"row">step</th><td>eager</td>' in page
    assert FinishedRun.read(run).config.train.precision == "float32"


@pytest.mark.slow
def test_training_on_scans_that_are_not_prepared_gives_the_same_losses(finished: Path) -> None:
    done = train(finished, *options(finished), "--run_dir", "runs/raw", "--data.unprepared", "true",
                 "--data.store_dir", "store_of_one")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((finished / "store_of_one").glob("*.image.npy"))) == 1  # the validation case
    losses = [[float(row["loss"]) for row in rows_of(finished / "runs" / name)[:2]] for name in ("raw", "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_run_killed_within_an_epoch_resumes_bit_for_bit(finished: Path) -> None:
    process = start(finished, *options(finished), "--run_dir", "runs/killed", "--train.save_every_steps", "1")
    checkpoints = finished / "runs" / "killed" / "checkpoints"
    while not states(checkpoints) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (finished / "runs" / "killed" / "log.csv").exists()  # no epoch was whole
    resumed = train(finished, "--resume", "runs/killed")
    assert resumed.returncode == 0, resumed.stderr
    assert "--resume: --" not in resumed.stdout  # no option is said to differ
    assert re.search(r"resumed runs/killed after epoch 0 of 2, step [1-9]\d? of 12", resumed.stdout), resumed.stdout
    expected, found = (rows_of(finished / "runs" / name) for name in ("one", "killed"))
    for name in ("epoch", "step", "loss", "dice_loss", "ce_loss", "val_WT"):
        assert [row[name] for row in found] == [row[name] for row in expected], name
    weights = [
        torch.load(finished / "runs" / name / "checkpoints" / "last.pt", weights_only=True)["weights"]
        for name in ("one", "killed")
    ]
    for key, value in weights[0].items():
        assert torch.equal(weights[1][key], value), key


def test_a_users_mistake_ends_in_one_line_and_status_2(finished: Path) -> None:
    config = str(write_small(finished))
    done = train(finished, "--config", config, "--run_dir", "new/runs/wrong", "--data.root", "nothing_here")
    assert done.returncode == 2 and not (finished / "new").exists()
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "nothing_here" in errors[0]
    assert "Traceback" not in done.stderr


LOCKED = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); print('ready'); input()"


def test_a_folder_in_use_by_another_job_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-c", LOCKED, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        with pytest.raises(ValueError, match=f"--run_dir {tmp_path}: another job is training in this folder"):
            _claim(tmp_path, is_resumed=True)
        other.communicate("\n")
    _claim(tmp_path, is_resumed=True).close()


def test_a_run_is_not_overwritten(finished: Path) -> None:
    run = finished / "runs" / "one"
    with pytest.raises(ValueError, match=f"resume it with --resume {run}, or give another folder"):
        _claim(run, is_resumed=False)
    _claim(run, is_resumed=True).close()


def test_a_failed_start_leaves_alone_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.run._start_log", lambda run_dir, ranks: (run_dir / "run.log").touch())
    kept = tmp_path / "kept" / "notes.txt"
    kept.parent.mkdir()
    kept.touch()
    for name in ("kept", "kept/new/run"):
        with pytest.raises(ValueError, match="nothing_here"):
            run(Config(data=DataConfig(root=tmp_path / "nothing_here"), train=CPU, run_dir=tmp_path / name))
        assert kept.is_file() and not (tmp_path / "kept" / "new").exists()


def test_a_run_applies_deepspeeds_json_and_sets_the_process_before_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 7, "bf16": {"enabled": true}}')
    config = Config(train=replace(CPU, deepspeed=tmp_path / "ds.json", deterministic=True), run_dir=tmp_path / "run")
    set_up, data = mock.Mock(), mock.Mock(train=["a"], val=[])
    data.store.modalities = ("t1",)
    trainer = mock.Mock(side_effect=ValueError("enough"))
    stand_ins = {"_start_log": mock.Mock(), "load_data": lambda _: data, "make_model": mock.Mock(),
                 "parameter_count": lambda _: 1, "set_up_torch": set_up, "Trainer": trainer}  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(f"launch.run.{name}", stand_in)
    with dispatch.using("auto", "cpu"):
        with pytest.raises(ValueError, match="enough"):
            run(config)
        assert dispatch._measurements == "default"
    set_up.assert_called_once_with("bf16", True)
    effective = trainer.call_args.args[0]
    assert (effective.train.batch_size, effective.train.precision) == (7, "bf16")
    assert (config.train.batch_size, config.train.precision) == (CPU.batch_size, "auto")


def test_a_folder_that_another_job_made_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run_dir: Path, is_resumed: bool) -> None:
        (run_dir / "checkpoints").mkdir(parents=True)  # by a job that was started in the same second
        raise ValueError("another job is training in this folder")

    monkeypatch.setattr("launch.run._claim", refuse)
    with pytest.raises(ValueError, match="another job is training"):
        run(Config(run_dir=tmp_path / "run", train=CPU))
    assert (tmp_path / "run" / "checkpoints").is_dir()


def test_a_run_folder_that_cannot_be_made_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--run_dir .*file/run can't be written .Not a directory.: .*another folder"):
        _claim(tmp_path / "file" / "run", is_resumed=False)


def test_a_run_replaces_links_to_files_and_never_follows_them(finished: Path, tmp_path: Path) -> None:
    """Links to folders, and to files that it appends to, are refused: see below."""
    run, precious = tmp_path / "run", tmp_path / "precious"
    precious.mkdir()
    shutil.copytree(finished / "runs" / "one", run)
    for file in [path for path in run.iterdir() if path.is_file()]:
        if file.name not in ("config.yaml", "run.log", ".lock"):
            (precious / file.name).write_text("mine")
            file.unlink()
            file.symlink_to(precious / file.name)
    done = train(finished, "--resume", str(run))
    assert done.returncode == 0, done.stderr
    assert {path.read_text() for path in precious.iterdir()} == {"mine"} and is_finished(run)
    assert not [path for path in run.iterdir() if path.is_symlink()]


UGLY = ("$1_2_$", "=HYPERLINK(1)", "caf\u00e9", "<img src=x onerror=alert(1)>", "[bold]x[!]|`*")


def test_a_run_ends_with_tables_pictures_and_a_page_whatever_its_cases_are_called(tmp_path: Path) -> None:
    source, names = make_phantoms(tmp_path / "source", 5, (48, 48, 32), workers=1), UGLY
    for case, name in zip(find_cases(source).cases, names, strict=True):
        (tmp_path / "set" / name).mkdir(parents=True)
        image, affine = read_nifti(case.images[0])
        assert case.label is not None
        volumes = [*np.moveaxis(image, -1, 0), read_nifti(case.label)[0].astype(np.uint8)]
        for modality, volume in zip(("t2f", "t1n", "t1c", "t2w", "seg"), volumes, strict=True):
            write_nifti(tmp_path / "set" / name / f"{name}-{modality}.nii.gz", volume, affine)
    done = train(tmp_path, "--config", str(write_small(tmp_path)), "--data.root", "set", "--data.val_fraction", "0.7",
                 "--data.release", "brats2023", "--run_dir", "run", "--train.epochs", "1")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    validated = FinishedRun.read(tmp_path / "run").cases
    assert len(validated) == 3 and set(validated) < set(names)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page and "&lt;img src=x" in page


def test_a_folder_that_is_not_utf_8_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    status = main(["--data.root", str(folder), "--train.device", "cpu", "--run_dir", str(tmp_path / "run")])
    assert status == 2 and not (tmp_path / "run").exists()
    assert capsys.readouterr().err == rf"error: --data.root {tmp_path}/caf\udce9 is not UTF-8: rename the folder" + "\n"


@pytest.mark.gpu
def test_a_gpu_gives_the_losses_of_a_cpu(finished: Path) -> None:
    config = str(write_small(finished))
    for device in ("cpu", "cuda"):
        done = train(finished, "--config", config, "--run_dir", f"runs/on_{device}", "--train.device", device)
        assert done.returncode == 0, done.stdout + done.stderr
    cpu, gpu = ([float(row["loss"]) for row in rows_of(finished / "runs" / f"on_{d}")] for d in ("cpu", "cuda"))
    assert gpu == pytest.approx(cpu, rel=1e-2)


def test_resuming_a_finished_run_keeps_its_tables_and_writes_those_it_lacks(finished: Path) -> None:
    page = (finished / "runs" / "one" / "report.html").read_text()
    tables = [finished / "runs" / "one" / name for name in ("metrics.json", "validation.csv", "log.csv")]
    contents = [path.read_text() for path in tables]
    for path in tables:  # as where a disk was full, or a copy of the folder broke off
        path.unlink()
    done = train(finished, "--resume", "runs/one")
    assert done.returncode == 0, done.stderr
    assert [path.read_text() for path in tables] == contents
    after = (finished / "runs" / "one" / "report.html").read_text()
    assert after.split("</table>")[0] == page.split("</table>")[0]


def test_a_finished_run_that_is_extended_counts_as_unfinished(finished: Path) -> None:
    run = finished / "runs" / "longer"
    shutil.copytree(finished / "runs" / "one", run)
    assert is_finished(run)
    process = start(finished, "--resume", str(run), "--train.epochs", "1000")
    while len(rows_of(run)) < 3 and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert not is_finished(run)
    with pytest.raises(ValueError, match="is not a finished run"):
        FinishedRun.read(run)


@pytest.mark.parametrize("name", ["checkpoints", "logs", "tensorboard", "run.log", ".lock", "logs/rank-0001.log"])
def test_a_link_out_of_a_run_folder_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    run_dir, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    (run_dir / name).parent.mkdir(parents=True)
    (run_dir / name).symlink_to(outside / "new" if "." in name else outside)
    before = sorted(run_dir.rglob("*"))
    work = mock.patch("launch.run.load_data", side_effect=AssertionError)
    with work, pytest.raises(ValueError, match=f"{name} is a link to {outside}"):
        run(Config(run_dir=run_dir, train=TrainConfig(device="cpu")))
    assert sorted(run_dir.rglob("*")) == before and not list(outside.iterdir())


def test_links_within_a_run_folder_and_a_link_to_it_are_fine(tmp_path: Path) -> None:
    (tmp_path / "run" / "real").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").symlink_to("real")
    (tmp_path / "link").symlink_to("run")
    _refuse_links(tmp_path / "link")


def test_options_that_differ_from_the_checkpoints_are_named() -> None:
    was, now = (to_portable_dict(Config(data=DataConfig(val_fraction=share, root=root)))
                for share, root in ((0.2, Path("/a")), (0.3, None)))  # fmt: skip
    del was["optim"]
    assert _changed_options(was, now)[:2] == [
        "--data.root is None, and was /a when the checkpoint was written",
        "--data.val_fraction is 0.3, and was 0.2 when the checkpoint was written",
    ]
    assert any(line.startswith("--optim") for line in _changed_options(was, now))
    assert _changed_options(now, now) == []


def test_options_that_are_left_open_differ_from_no_checkpoint() -> None:
    """They are as it says; one that is written out now may differ."""
    was = to_portable_dict(Config(train=TrainConfig(precision="bf16", compile=True, cuda_graph=False)))
    now = to_portable_dict(Config(train=TrainConfig(cuda_graph=True)))
    assert _changed_options(was, now) == ["--train.cuda_graph is True, and was False when the checkpoint was written"]
    assert _changed_options(was | {"kernels": "triton"}, was) == [
        "--kernels is auto, and was triton when the checkpoint was written"
    ]


def test_what_is_written_elsewhere_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def effects(**data: Any) -> list[str]:
        caplog.clear()
        _log_effects_of_resuming(Config(data=DataConfig(**data), run_dir=tmp_path))
        return [message.removeprefix("--resume: outside its folder, this run ") for message in caplog.messages]

    assert effects(store_dir=Path("/store"), phantom=PhantomConfig(cases=7)) == [
        "writes prepared volumes to /store (--data.store_dir)",
        "makes 7 synthetic scans in the cache (no --data.root)",
    ]
    assert effects(root=Path("/scans"), download=True) == ["downloads 7.1 GB to /scans (--data.download true)"]
    assert effects(root=Path("/scans")) == []


@pytest.mark.parametrize("config", [None, 3, [], {"data": 3}, {"data": {"root": "\x1b[31m"}}])
def test_a_record_of_any_content_is_compared(config: object, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "checkpoints"
    write(folder, 1)
    record = folder / "step-00000001" / "about.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"config": config}))
    with caplog.at_level(logging.INFO):
        _log_effects_of_resuming(Config(data=DataConfig(root=Path("/scans")), run_dir=tmp_path))
    assert ("--resume: --data" in caplog.text) == isinstance(config, dict)
    assert all(message.isprintable() for message in caplog.messages)
