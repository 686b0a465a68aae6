"""A MONAI bundle: MONAI runs it with the same result, it overwrites nothing else and runs no foreign code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from test_bundle_steps import scan  # noqa: F401
from untrained import CROP, content_of_files, image, saved_run

from engine.export.bundle import write_bundle
from engine.inference import Predictor
from engine.trained import load_trained
from engine.weights_file import read_content, write_content
from launch.convert import main

PROJECT = ("benchmarks", "engine", "kernels", "launch", "models", "pipelines")
TOLERANCES = {"logits": 1e-4, "affine": 1e-6, "undecided probability": 1e-5}


def test_overwriting_a_bundle_keeps_other_files_in_its_folder(tmp_path: Path, capsys: Any) -> None:
    first, bundle = saved_run(tmp_path, "unetr"), tmp_path / "bundle"
    second = saved_run(tmp_path, "unet")
    assert main([str(first), "--to", "bundle", "--output", str(bundle)]) == 0
    users = {"notes.txt", "docs/mine.md", "scans/A/A_t1.nii.gz", "models/best.pt", "../partial-bundle/mine"}
    for name in users:
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_text("mine")
    assert main([str(second), "--to", "bundle", "--output", str(bundle), "--overwrite"]) == 0
    assert all((bundle / name).read_text() == "mine" for name in users)
    fresh = tmp_path / "fresh"
    write_bundle(fresh, load_trained(second))
    written, expected = content_of_files(bundle), content_of_files(fresh)
    assert set(expected) <= set(written) and all(written[name] == content for name, content in expected.items())
    assert sorted(os.listdir(tmp_path)) == ["bundle", "fresh", "partial-bundle", "unet", "unetr"]


@pytest.mark.parametrize("kind", ["foreign", "no metadata", "file", "link out"])
def test_other_folders_are_not_overwritten(kind: str, tmp_path: Path, capsys: Any) -> None:
    run, folder, outside = saved_run(tmp_path, "unet"), tmp_path / "folder", tmp_path / "outside"
    if kind == "file":
        folder.write_text("mine")
    elif kind != "no metadata":
        write_bundle(folder, load_trained(run))
    if kind == "foreign":
        (folder / "configs" / "metadata.json").write_text('{"name": "of somebody else"}')
    elif kind == "link out":
        (folder / "models").rename(outside)
        (folder / "models").symlink_to(outside)
    else:
        folder.mkdir(exist_ok=True) if kind == "no metadata" else None
    before = content_of_files(tmp_path)
    assert main([str(run), "--to", "bundle", "--output", str(folder), "--overwrite"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert content_of_files(tmp_path) == before


def test_text_from_a_weights_file_never_runs_as_code_in_a_bundle(tmp_path: Path) -> None:
    """MONAI evaluates any string that begins with `$`; this tries each field that reaches a bundle."""
    run, mark = saved_run(tmp_path, "unet"), tmp_path / "was_here"
    code = f"$__import__('pathlib').Path({str(mark)!r}).touch()"
    best = run / "checkpoints" / "best.pt"
    good = read_content(best)
    crafted: list[dict[str, Any]] = [
        {"modalities": [code, "t1c"]},
        {"release": code},
        {"tissues": good["tissues"] | {9: code}},
        {"validation": {"mean": code}},
        {"validation": {code: 1}},
        {"validation": {"TC": {code: 1}}},
        {"epoch": code},
        {"config": good["config"] | {"model": good["config"]["model"] | {"name": code}}},
        {"config": good["config"] | {"data": good["config"]["data"] | {"train_cases": [code], "root": code}}},
        {"scans": {code: []}},
    ]
    statuses = []
    for i, changes in enumerate(crafted):
        write_content(best, good | changes)
        bundle = tmp_path / f"bundle-{i}"
        statuses.append(main([str(run), "--to", "bundle", "--output", str(bundle)]))
        for file in bundle.glob("configs/*.json"):
            parser = ConfigParser()
            parser.read_config(str(file))
            for name in set(parser.config) - {
                "run",
                "evaluator",
                "datalist",
                "dataset",
                "network",
            }:  # which do the work
                parser.get_parsed_content(name, instantiate=False)
            assert code not in file.read_text()
    assert not mark.exists() and statuses == [2] * 8 + [0, 2]


def run_by_monai(bundle: Path, scans: Path, output: Path) -> None:
    """In a process of its own, in which nothing of this program can be imported."""
    options = {"bundle_root": str(bundle), "dataset_dir": str(scans), "output_dir": str(output)}
    code = (
        f"import sys, monai.bundle; sys.modules.update(dict.fromkeys({PROJECT}));"
        f"monai.bundle.run(config_file={str(bundle / 'configs' / 'inference.json')!r}, **{options})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=scans, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def store_as(codes: str, path: Path) -> None:
    """Store a scan's voxels with its axes in another order and direction."""
    image = nib.load(path)
    turn = ornt_transform(io_orientation(image.affine), axcodes2ornt(codes))
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine).as_reoriented(turn), path)


@pytest.mark.parametrize(("name", "codes"), [("unetr", "LPS"), ("unet", "PIR"), ("unet", "RSA")])
def test_monai_runs_the_bundle_with_the_same_result(
    name: str,
    codes: str,
    scan: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """A voxel may differ only where a probability is one half within rounding."""
    for path in scan.rglob("*.nii.gz"):
        store_as(codes, path)
    run, bundle, output = saved_run(tmp_path, name), tmp_path / "bundle", tmp_path / "found"
    assert main([str(run), "--to", "bundle", "--output", str(bundle)]) == 0
    run_by_monai(bundle, scan, output)
    case = {"flair": "FLAIR", "t1c": "t1ce"}
    files = {modality: scan / "A" / f"A_{word}.nii.gz" for modality, word in case.items()}
    expected = Predictor(run, device="cpu").segment(files, probabilities=True)
    assert expected.probabilities_RXYZ is not None
    decided = (np.abs(expected.probabilities_RXYZ - 0.5) > TOLERANCES["undecided probability"]).all(0)
    assert decided.mean() > 0.99
    for file in (output / "A" / "A_t1ce_seg.nii.gz", output / "B_seg.nii.gz"):
        found = nib.load(file)
        labels = np.asarray(found.dataobj)
        assert labels.dtype == np.uint8 and set(np.unique(labels)) == {0, 1, 2, 4}
        np.testing.assert_array_equal(labels[decided], expected.labels()[decided])
        np.testing.assert_allclose(found.affine, expected.affine, atol=TOLERANCES["affine"])


def test_a_bundles_own_instructions_work(
    scan: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    bundle = tmp_path / "bundle"
    assert main([str(saved_run(tmp_path, "unet")), "--to", "bundle", "--output", str(bundle)]) == 0
    found = re.search(r"```sh\n(pip .*?)\n(.*?)```", (bundle / "docs" / "README.md").read_text(), re.DOTALL)
    assert found
    install, command = found.groups()
    assert re.fullmatch(r'pip install "monai\[nibabel\]>=[0-9.]+"', install)  # of what is installed here
    scan.rename(bundle / "SCANS")
    here = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": ""}
    done = subprocess.run(["sh", "-c", command], cwd=bundle, env=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (bundle / "SEGMENTATIONS" / "B_seg.nii.gz").is_file()


def test_the_bundle_has_all_that_monai_requires(
    scan: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained, bundle = load_trained(saved_run(tmp_path, "unetr_monai")), tmp_path / "bundle"
    monkeypatch.syspath_prepend(bundle)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    write_bundle(bundle, trained)
    config, meta = (str(bundle / "configs" / f"{name}.json") for name in ("inference", "metadata"))
    overrides = {"bundle_root": str(bundle), "dataset_dir": str(scan)}
    workflow = ConfigWorkflow(config, meta, workflow_type="infer", **overrides)
    workflow.initialize()
    assert not workflow.check_properties()
    workflow.network_def.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True))
    with torch.no_grad():
        logits = workflow.network_def.eval()(image(1))
        close = TOLERANCES["logits"]
        torch.testing.assert_close(logits, trained.network(image(1)), rtol=close, atol=close)
    metadata = json.loads(Path(meta).read_text())
    required = {"schema", "version", "changelog", "monai_version", "pytorch_version", "numpy_version", "task",
                "required_packages_version", "description", "authors", "copyright", "network_data_format"}  # fmt: skip
    assert required <= set(metadata)
    given, found = (
        metadata["network_data_format"]["inputs"]["image"],
        metadata["network_data_format"]["outputs"]["pred"],
    )
    assert given["channel_def"] == {"0": "t1c", "1": "flair"} and given["spatial_shape"] == list(CROP)
    tensor = {"type", "format", "modality", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data",
              "channel_def"}  # fmt: skip
    assert tensor == set(given) == set(found)
    assert found["channel_def"] == {"0": "TC", "1": "WT", "2": "ET"} and found["num_channels"] == 3
    assert "non-zero voxels" in metadata["glioforge"]["input"]
