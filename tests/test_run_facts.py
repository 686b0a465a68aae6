"""Facts about a run, from its log, its configuration and the machine."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import Config
from engine.data import DataConfig
from engine.ranks.distributed import Ranks
from engine.reports import report
from engine.reports.report import data_facts, environment_facts, timing_facts
from engine.step import TrainConfig
from pipelines.layouts.labels import CODINGS

ROW: dict[str, Any] = {"epoch": 1, "step": 2, "skipped_steps": 0, "samples_per_s": 2.0, "data_wait": 0.1}
RANKS = Ranks(0, 1, 0, torch.device("cpu"))


def test_data_are_named_with_split_grid_and_coding() -> None:
    config = DataConfig(root=Path("/scans/task"), crop_size_voxels=(32, 32, 16))
    assert data_facts(config, ["a", "b"], ["c"], ("flair", "t1c"), CODINGS["brats2018"]) == {
        "scans": "task",
        "cases": "2 for training, 1 for validation",
        "modalities": "flair, t1c",
        "spacing": "1.5 x 1.5 x 2 mm",
        "crop": "32 x 32 x 16 voxels",
        "labels": "brats2018: 1 non-enhancing, 2 oedema, 4 enhancing",
        "regions": "TC 1 + 4, WT 1 + 2 + 4, ET 4 (label values)",
    }
    facts = data_facts(DataConfig(folds=5, fold=1), ["a"], ["c"], ("flair",), CODINGS["brats2018"])
    assert facts["scans"] == "synthetic" and facts["cases"].endswith("(fold 1 of 5, counted from 0)")


def test_timing_comes_from_the_log() -> None:
    history = [
        ROW | {"samples_per_s": 2.0, "data_wait": 0.5},
        ROW | {"epoch": 2, "step": 4, "samples_per_s": 4.0, "data_wait": 0.1, "val_seconds": 3.0, "skipped_steps": 1},
        ROW | {"epoch": 3, "step": 1006, "samples_per_s": 4.0, "data_wait": 0.1, "val_seconds": 5.0},
    ]
    facts = timing_facts(history, epoch_samples=400)
    assert facts == {
        "epochs": "3",
        "steps": "1,006 (1 skipped)",
        "training": "100.0 s per epoch (the first 200.0 s)",
        "throughput": "4.00 crops/s over all ranks",
        "waiting for data": "30.0 % of the training time",
        "validation": "4.0 s each, 2 times",
        "total": "6 min 48 s",
    }
    assert timing_facts(history, epoch_samples=40_000)["total"] == "11 h 06 min"


def test_timing_survives_an_epoch_that_was_resumed_after_its_last_step() -> None:
    facts = timing_facts([ROW | {"samples_per_s": 0.0, "val_seconds": 2.0}], epoch_samples=20)
    assert "training" not in facts and facts["total"] == "0 min 02 s"


def test_the_environment_names_versions_ranks_and_kernels() -> None:
    config = Config(train=TrainConfig(precision="bf16", zero_stage=2, seed=7))
    facts = environment_facts(config, Ranks(0, 8, 0, torch.device("cpu"), 4), "kernels: reference (asked for)")
    assert facts["device"].startswith("CPU, ") and facts["ranks"] == "8, 4 of them on this node"
    assert (facts["kernels"], facts["precision"]) == ("reference (asked for)", "bf16")
    assert (facts["ZeRO stage"], facts["seed"]) == ("2", "7")
    assert f"PyTorch {torch.__version__}" in facts["versions"]
    for name in ("Python", "Triton", "MONAI", "DALI", "DeepSpeed"):
        assert re.search(rf"\b{name} \d+\.\d+", facts["versions"]), name
    assert environment_facts(config, RANKS, "")["ranks"] == "1"


def test_the_commit_is_that_of_the_checkout_and_of_no_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*command: str) -> str:
        name = ("-c", "user.name=one", "-c", "user.email=one@example.org")
        done = subprocess.run(["git", *name, *command], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    monkeypatch.delenv("GLIOFORGE_COMMIT", raising=False)
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert environment_facts(Config(), RANKS, "")["commit"] == git("rev-parse", "--short", "HEAD")
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(report, "ROOT", tmp_path / "site-packages")
    assert environment_facts(Config(), RANKS, "")["commit"] == "unknown"
    monkeypatch.setenv("GLIOFORGE_COMMIT", "abc1234")
    assert environment_facts(Config(), RANKS, "")["commit"] == "abc1234"
