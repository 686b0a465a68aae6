"""From `--data.*` to prepared volumes: every layout gives the same as a Decathlon task of the same scans."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
import torch
from test_segment_cases import CROP, SPACING, labels_of, make_run, run_predict

from engine.config import Config
from engine.data import Data, DataConfig, load_data, prepared
from engine.network import ModelConfig, make_model
from engine.ranks.distributed import Ranks
from engine.step import TrainConfig
from engine.trainer import Trainer
from launch import prepare
from pipelines.basics.errors import DataError
from pipelines.basics.tables import read_table
from pipelines.layouts.labels import CODINGS, Coding, regions_from_labels
from pipelines.phantom import make_phantoms
from pipelines.scans.nifti import read_nifti

NAMES = ("BraTS2021_00001", "BraTS2021_00002", "BraTS2021_00003")
CHANNELS = {"flair": 0, "t1": 1, "t1ce": 2, "t2": 3}  # of the 4D files
AS_2021 = np.array([0, 2, 1, 4], np.uint8)  # from Decathlon's codes
AS_2023 = np.array([0, 2, 1, 3], np.uint8)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIOFORGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phantoms(tmp_path_factory.mktemp("scans") / "task", 3, (40, 48, 32), workers=1)


@pytest.fixture(scope="module")
def run(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(task, tmp_path_factory.mktemp("run"), ("flair", "t1", "t1c", "t2"))


SHARED: dict[str, Any] = {"spacing_mm": SPACING, "crop_size_voxels": CROP, "pad": True, "workers": 1}


@pytest.fixture(scope="module")
def expected(task: Path) -> Data:
    return load_data(DataConfig(root=task, **SHARED))


@pytest.fixture(scope="module")
def predicted(run: Path, task: Path, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    """Segmentations of the task's cases."""
    folder = tmp_path_factory.mktemp("predicted")
    assert run_predict("--runs", run, "--input", task, "--output", folder) == 0
    return [labels_of(folder / f"BRATS_{i:03d}.nii.gz") for i in (1, 2, 3)]


def write(task: Path, number: int, image: str, label: str, codes: np.ndarray, channels: dict[str, int]) -> None:
    """A case as 3D files; `{}` in `image` is what a modality is called."""
    name = f"BRATS_{number + 1:03d}.nii.gz"
    voxels, affine = read_nifti(task / "imagesTr" / name)
    for word, channel in channels.items():
        path = Path(image.replace("{}", word))
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.asarray(voxels)[..., channel], affine), path)
    Path(label).parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(codes[np.asarray(read_nifti(task / "labelsTr" / name)[0])], affine), label)


def kaggle(task: Path, root: Path) -> Path:
    for number, name in enumerate(NAMES):
        case = f"{root}/{name}/{name}"
        write(task, number, f"{case}_{{}}.nii/0_brain_{{}}.nii", f"{case}_seg.nii/0_final_seg.nii", AS_2021, CHANNELS)
    return root


def bare(task: Path, root: Path) -> Path:
    words = dict(zip(("t2f", "t1n", "t1c", "t2w"), range(4), strict=True))
    for number, name in enumerate(NAMES):
        write(task, number, f"{root}/{name}/{{}}.nii.gz", f"{root}/{name}/seg.nii.gz", AS_2023, words)
    return root


def deep(task: Path, root: Path) -> Path:
    for number, name in enumerate(NAMES):
        case = f"{root}/BraTS2021/site/{name}/{name}"
        write(task, number, f"{case}-{{}}.nii.gz", f"{case}-seg.nii.gz", AS_2021, CHANNELS)
    return root


def monai(task: Path, root: Path) -> Path:
    entries = []
    for number, name in enumerate(NAMES):
        case = f"data/{name}/{name}"
        write(task, number, f"{root}/{case}_{{}}.nii.gz", f"{root}/{case}_seg.nii.gz", AS_2021, CHANNELS)
        entries.append({"image": [f"{case}_{word}.nii.gz" for word in ("t2", "t1", "t1ce", "flair")], "fold": 0})
        entries[-1]["label"] = f"{case}_seg.nii.gz"
    labels = {"0": "background", "1": "NET", "2": "ED", "4": "ET"}
    (root / "folds.json").write_text(json.dumps({"training": entries, "labels": labels}))
    return root / "folds.json"


def monai_4d(task: Path, root: Path) -> Path:
    content = json.loads((task / "dataset.json").read_text())
    for entry in content["training"]:
        entry |= {key: str(task / entry[key]) for key in ("image", "label")}
    entries = [entry | {"name": name} for entry, name in zip(content["training"], NAMES, strict=True)]
    content = {"training": entries, "modality": content["modality"], "labels": content["labels"]}
    root.mkdir()
    (root / "datalist.json").write_text(json.dumps(content))
    return root / "datalist.json"


def nnunet(task: Path, root: Path) -> Path:
    channels = {f"{i:04d}": channel for i, channel in enumerate((2, 0, 3, 1))}
    for number, name in enumerate(NAMES):
        image, label = f"{root}/imagesTr/{name}_{{}}.nii.gz", f"{root}/labelsTr/{name}.nii.gz"
        write(task, number, image, label, np.arange(4, dtype=np.uint8), channels)
    names = {"0": "T1ce", "1": "FLAIR", "2": "T2", "3": "T1"}
    labels = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]}
    content = {"channel_names": names, "labels": labels, "numTraining": 3, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


LAYOUTS = (kaggle, bare, deep, monai, monai_4d, nnunet)


def regions_of(data: Data, i: int) -> np.ndarray:
    label = data.store.label(i)
    assert label is not None
    return regions_from_labels(np.asarray(label), data.store.coding)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_each_layout_is_checked_trained_on_and_predicted_as_a_decathlon_task(
    layout: Callable[[Path, Path], Path],
    task: Path,
    run: Path,
    expected: Data,
    predicted: list[np.ndarray],
    ranks: Ranks,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = layout(task, tmp_path / "data")
    options = ["--data.root", str(root), "--data.pad", "true", "--data.workers", "1"]
    assert prepare.main([*options, "--check"]) == 0
    assert "0 of 3 cases are faulty (flair, t1, t1c, t2; " in capsys.readouterr().out

    settings = DataConfig(root=root, **SHARED)
    data = load_data(settings)
    assert data.store.names == NAMES and data.store.modalities == expected.store.modalities
    for i in range(3):
        np.testing.assert_array_equal(data.store.image(i), expected.store.image(i))
        np.testing.assert_array_equal(regions_of(data, i), regions_of(expected, i))

    config = Config(
        settings, ModelConfig("unet", feature_size=2), train=TrainConfig(epochs=1), run_dir=tmp_path / "run"
    )
    trainer = Trainer(config, ranks, data, make_model(config.model, config.data.crop_size_voxels, 4))
    image, labels = next(iter(trainer.train_loader.epoch(0)))
    assert torch.isfinite(trainer.step(image, labels).loss)

    assert run_predict("--runs", run, "--input", root, "--output", tmp_path / "out", "--release", "decathlon") == 0
    for name, labels_XYZ in zip(NAMES, predicted, strict=True):
        np.testing.assert_array_equal(labels_of(tmp_path / "out" / f"{name}.nii.gz"), labels_XYZ)


def csv_list(task: Path, folder: Path, empty: int, patients: tuple[str, ...] = ("", "", "")) -> Path:
    """The task's cases, of which the first `empty` have a label without tumour."""
    folder.mkdir(exist_ok=True)
    nothing = folder / "nothing.nii.gz"
    label, affine = read_nifti(task / "labelsTr" / "BRATS_001.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros_like(np.asarray(label)), affine), nothing)
    entries = json.loads((task / "dataset.json").read_text())["training"]
    cases = [
        {
            "name": f"case{i}",
            "image": str(task / entry["image"]),
            "label": str(nothing if i < empty else task / entry["label"]),
            "patient": patients[i],
        }
        for i, entry in enumerate(entries)
    ]
    path = folder / "list.json"
    path.write_text(json.dumps({"modalities": ["flair", "t1", "t1ce", "t2"], "cases": cases}))
    return path


def load(root: Path, **options: object) -> Data:
    settings = DataConfig(root=root, release="decathlon", spacing_mm=SPACING, workers=1)
    for name, value in options.items():
        setattr(settings, name, value)
    return load_data(settings)


def test_cases_without_a_tumour_are_counted(
    task: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    load(csv_list(task, tmp_path, 0), val_cases=["case2"])
    assert "tumour" not in caplog.text
    load(csv_list(task, tmp_path, 1), val_cases=["case2"])
    assert "1 of 2 cases to train on have no tumour in their label: case0" in caplog.text
    caplog.clear()
    load(csv_list(task, tmp_path, 2), val_cases=["case2"])
    assert "none of the 2 cases to train on has a tumour in its label" in caplog.text
    assert "validate" not in caplog.text
    options = ["--data.root", str(tmp_path / "list.json"), "--data.release", "decathlon", "--data.workers", "1"]
    assert prepare.main([*options, "--data.spacing_mm", "[8,8,8]"]) == 0
    assert "2 of 3 cases have no tumour in their label" in capsys.readouterr().out


def test_a_cavity_does_not_count_as_tumour(task: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    coding: Coding = CODINGS["brats2024"]
    root = csv_list(task, tmp_path, 3)
    label, affine = read_nifti(task / "labelsTr" / "BRATS_001.nii.gz")
    nib.save(nib.Nifti1Image((np.asarray(label) > 0).astype(np.uint8) * 4, affine), tmp_path / "nothing.nii.gz")
    load(root, val_cases=["case2"], release=coding.release)
    assert "none of the 2 cases to train on has a tumour" in caplog.text


def test_patients_and_cases_are_counted(task: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        data = load(csv_list(task, tmp_path, 0, ("a", "b", "a")))
        assert "3 cases of 2 patients: " in caplog.text and "1 cases of 1 patients to" in caplog.text
        assert {frozenset(data.train), frozenset(data.val)} == {frozenset({"case0", "case2"}), frozenset({"case1"})}
        caplog.clear()
        load(csv_list(task, tmp_path, 0))
        assert "3 cases: 2 to train on, 1 to validate on" in caplog.text and "patients" not in caplog.text


def test_prediction_names_a_case_whose_name_is_not_utf8_and_does_the_others(
    task: Path, run: Path, ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = bare(task, tmp_path / "data")
    (root / NAMES[0]).rename(root / os.fsdecode(b"M\xfcller"))
    assert run_predict("--runs", run, "--input", root, "--output", tmp_path / "out") == 1
    assert "M\\udcfcller is not plain text in UTF-8" in capsys.readouterr().err
    assert all((tmp_path / "out" / f"{name}.nii.gz").is_file() for name in NAMES[1:])
    rows = read_table(tmp_path / "out" / "predictions.csv")
    assert any("M\\udcfcller" in row["case"] for row in rows)


def test_names_in_a_csv_list_are_kept_as_written(task: Path, tmp_path: Path) -> None:
    write(task, 0, f"{tmp_path}/x_{{}}.nii.gz", f"{tmp_path}/s.nii.gz", AS_2021, CHANNELS)
    with (tmp_path / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["", "name", "T2F", "label"])
        rows.writerows([i, name, "x_flair.nii.gz", "s.nii.gz"] for i, name in enumerate(("00001", "00010")))
    data = load(tmp_path / "list.csv", release="brats2018", val_cases=["00010"])
    assert data.train == ("00001",) and data.store.names == ("00001", "00010")


@pytest.mark.parametrize(("gpus", "said"), [(1, "the GPU, by at most 4 pro"), (8, "8 GPUs in turn, by at most 32 pro")])
def test_scans_are_prepared_by_four_processes_for_each_gpu(
    gpus: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    prepare = mock.Mock()
    monkeypatch.setattr("engine.data.prepare", prepare)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    prepared(DataConfig(prepare_on="gpu", store_dir=tmp_path), mock.Mock())
    *_, resample, most = prepare.call_args.args
    assert most == 4 * gpus and said in caplog.text
    used = []
    monkeypatch.setattr("pipelines.loading.raw.resample_case", lambda raw, grid, device: used.append(device))
    for index in range(most):
        monkeypatch.setattr("pipelines.preparing.processes._index", index)
        resample(mock.Mock(), mock.Mock())
    assert {device: used.count(device) for device in used} == {torch.device("cuda", i): 4 for i in range(gpus)}


def test_preparing_on_a_gpu_is_refused_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(DataError, match="prepare_on gpu: PyTorch sees no GPU here; use --data.prepare_on cpu"):
        prepared(DataConfig(prepare_on="gpu", store_dir=tmp_path), mock.Mock())
