"""Networks in other programs' files: graphs that are run, weights there and back, and a bundle that MONAI runs."""

from __future__ import annotations

import functools
import importlib
import json
import os
import pickle
import re
import shutil
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data import MetaTensor
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from safetensors.torch import save_file
from test_models import reference_unetr
from test_trained import content_of

from engine.checkpoint import load_weights, save_weights
from engine.config import Config, to_dict
from engine.data import DataConfig
from engine.export import interchange
from engine.export.bundle import FILE_NAMES, WEIGHTS, write_bundle
from engine.export.bundle_steps import SelectChannelsd, find_scans
from engine.export.interchange import (
    OPSET,
    describe,
    read_state_dict,
    reference_class,
    trace,
)
from engine.inference import Predictor
from engine.network import ModelConfig, make_model
from engine.trained import Trained, load_trained
from launch.convert import ENDINGS, main
from models import MODELS
from models.convert import PACKAGES
from models.unetr import MONAI, SELF_ATTENTION_CV, UNETR
from pipelines.labels import CODINGS
from pipelines.phantom import draw_phantom

CROP = (32, 32, 32)  # at 16 the UNet normalises two voxels, and float32 itself is 4e-4 off
WIDTHS: dict[str, dict[str, int]] = {
    "unetr": {"feature_size": 4, "hidden_size": 10, "mlp_dim": 8, "num_heads": 3},
    "unetr_monai": {"feature_size": 4, "hidden_size": 12, "mlp_dim": 8, "num_heads": 3},
    "unet": {"feature_size": 4},
}
TOLERANCE = 1e-4
FILE_LIMIT = 20_000  # bytes; the networks here have more
PROJECT = ("benchmarks", "engine", "kernels", "launch", "models", "pipelines")


def config_of(name: Any) -> Config:
    data = DataConfig(crop_size_voxels=CROP, spacing_mm=(2.0, 2.0, 3.0))
    return Config(data=data, model=ModelConfig(name=name, **WIDTHS[name]))


def saved_run(folder: Path, name: str) -> Path:
    """A run's folder with the weights of a network that nobody trained, on (t1c, flair)."""
    config = config_of(name)
    torch.manual_seed(0)
    weights = make_model(config.model, config.data.crop_size_voxels, 2).state_dict()
    save_weights(folder / name / "checkpoints" / "best.pt", content_of(weights=weights, config=to_dict(config)))
    return folder / name


def image(batch: int) -> torch.Tensor:
    return torch.randn(batch, 2, *CROP, generator=torch.Generator().manual_seed(1))


@functools.cache
def shallow(name: str) -> tuple[Trained, torch.export.ExportedProgram]:
    """A network and its graph, of four transformer blocks in place of twelve, for the time that they take."""
    torch.manual_seed(0)
    config = config_of(name)
    network: torch.nn.Module = make_model(config.model, config.data.crop_size_voxels, 2)
    if name != "unet":
        variant = replace(SELF_ATTENTION_CV if name == "unetr" else MONAI, layers=(1, 2, 3, 4))
        with mock.patch("models.vit.NUM_LAYERS", 4):
            network = UNETR(variant, 2, 3, CROP, **WIDTHS[name])
    trained = Trained(Path("best.pt"), network.eval(), config, ("t1c", "flair"), CODINGS["brats2018"], 7, {}, {})
    return trained, trace(trained)


# Graphs


def convert_shallow(name: str, target: str, output: Path) -> tuple[int, Trained]:
    """The status of the command on a network of `shallow`, and that network."""
    trained, program = shallow(name)
    with (
        mock.patch("launch.convert.load_trained", return_value=trained),
        mock.patch("launch.convert.trace", return_value=program),
    ):
        return main(["run", "--to", target, "--output", str(output)]), trained


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("unetr", "unetr_monai")), "unet"]
)
@torch.no_grad()
def test_onnx_gives_the_networks_logits_for_any_batch_size(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    status, trained = convert_shallow(name, "onnx", path)
    said = capsys.readouterr().out
    assert status == 0 and f"onnx of {name}, t1c, flair, windows of 32 x 32 x 32 voxels at 2 x 2 x 3 mm" in said
    difference = re.search(r"differs by at most (\S+) from", said)
    assert difference and 0 < float(difference[1]) < TOLERANCE
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        (logits,) = session.run(["logits"], {"image": image(batch).numpy()})
        np.testing.assert_allclose(logits, trained.network(image(batch)).numpy(), atol=TOLERANCE)
    (given,) = session.get_inputs()
    assert given.shape == ["batch", 2, *CROP]
    words = session.get_modelmeta().custom_metadata_map
    assert json.loads(words["modalities"]) == ["t1c", "flair"] and json.loads(words["spacing_mm"]) == [2.0, 2.0, 3.0]
    assert json.loads(words["threshold"]) == 0 and "non-zero" in words["input"] and "TC, WT, ET" in words["output"]


class Norm(torch.nn.Module):
    """An affine instance norm and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(torch.tensor([2.0, -1.0])), torch.nn.Parameter(torch.ones(2))

    def forward(self, x_BCXYZ: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.instance_norm(x_BCXYZ, weight=self.weight, bias=self.bias)


@torch.no_grad()
def test_instance_norm_in_onnx_is_exact_over_a_million_voxels_of_one_background(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    x = torch.randn(1, 2, 128, 128, 64, generator=torch.Generator().manual_seed(0))
    x[..., :48] = 0.3
    program = torch.export.export(Norm(), (x,))
    graph = torch.onnx.export(program, opset_version=OPSET, custom_translation_table=interchange.IN_ONNX, verbose=False)
    assert graph is not None
    graph.save(tmp_path / "norm.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "norm.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, Norm().double()(x.double()).numpy(), atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_torch_export_gives_the_networks_logits_from_plain_operations(name: str, tmp_path: Path) -> None:
    status, trained = convert_shallow(name, "torch_export", tmp_path / "model.pt2")
    words = {"metadata.json": ""}
    loaded = torch.export.load(tmp_path / "model.pt2", extra_files=words)
    assert status == 0 and json.loads(words["metadata.json"]) == describe(trained)
    for batch in (1, 3):
        torch.testing.assert_close(loaded.module()(image(batch)), trained.network(image(batch)))
    called = {str(node.target) for node in loaded.graph.nodes if node.op == "call_function"}
    assert {target.split(".")[0] for target in called} <= {"aten", "<built-in function getitem>"}


def test_a_graph_that_differs_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    faithful = interchange._compare
    with mock.patch.object(interchange, "_compare", lambda it, run: faithful(it, lambda x: run(x) + 0.1)):
        status, _ = convert_shallow("unet", "torch_export", tmp_path / "out" / "model.pt2")
    assert status == 2 and "error: the graph's logits differ by up to 1.0e-01" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


# Weights


def test_safetensors_hold_all_that_a_weights_file_does(tmp_path: Path) -> None:
    run, path = saved_run(tmp_path, "unetr"), tmp_path / "model.safetensors"
    assert main([str(run), "--to", "safetensors", "--output", str(path)]) == 0
    before, after = load_trained(run), load_trained(path)
    for name in ("config", "modalities", "coding", "epoch", "validation", "scans"):
        assert getattr(after, name) == getattr(before, name)
    weights = before.network.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in after.network.state_dict().items())
    for broken, content in (("cut", path.read_bytes()[:5000]), ("empty", b"")):
        (tmp_path / f"{broken}.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{broken}.safetensors can't be read"):
            load_trained(tmp_path / f"{broken}.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="not a checkpoint of this program's format"):
        load_trained(tmp_path / "foreign.safetensors")


def reference_of(trained: Trained) -> torch.nn.Module:
    """The reference package's network, as the command says that it is made."""
    target, arguments = reference_class(trained)
    module, name = target.rsplit(".", 1)
    kind = (
        reference_unetr()
        if name == "UNETR" and "attention" in module
        else getattr(importlib.import_module(module), name)
    )
    return kind(**arguments).eval()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_weights_go_to_the_reference_package_and_come_back(name: str, tmp_path: Path) -> None:
    run, theirs, ours = saved_run(tmp_path, name), tmp_path / "theirs.pth", tmp_path / "ours.pt"
    package, trained = PACKAGES[name], load_trained(run)
    assert main([str(run), "--to", package, "--output", str(theirs)]) == 0
    reference = reference_of(trained)
    reference.load_state_dict(torch.load(theirs, weights_only=True))
    torch.testing.assert_close(reference(image(1)), trained.network(image(1)), rtol=1e-4, atol=1e-4)
    torch.save({"epoch": torch.tensor(1), "state_dict": torch.load(theirs, weights_only=True)}, theirs)
    options = {"model.name": name, **{f"model.{key}": value for key, value in WIDTHS[name].items()}}
    options |= {"data.crop_size_voxels": list(CROP), "data.spacing_mm": [2, 2, 3], "data.release": "brats2018"}
    told = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    told += ["--data.modalities", "[t1ce,flair]"]
    assert main([str(theirs), "--from", package, "--output", str(ours), *told]) == 0
    back = load_trained(ours)
    assert (back.modalities, back.coding, back.epoch) == (("t1c", "flair"), CODINGS["brats2018"], 0)
    assert (back.config.data.spacing_mm, back.validation) == ((2.0, 2.0, 3.0), {})
    assert torch.equal(back.network(image(1)), trained.network(image(1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --data.modalities"),
        (["--data.modalities", "[flair,t1]"], "give --data.modalities, .* and --data.release"),
        (["--data.modalities", "[flair]", "--model.name", "unet"], "not those of a unet with 1 modalities"),
        (["--data.modalities", "[flair,t1]", "--model.name", "unet"], "'feature_size': 16"),
        (["--data.modalities", "[flair,t1]"], "monai does not have our unetr.*unetr_monai or unet"),
        (["--data.modalities", "[flair,t1]", "--model.name", "unetr_monai"], "not the weights of .*'unetr_monai'"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    theirs, output = tmp_path / "theirs.pt", tmp_path / "ours.pt"
    assert main([str(saved_run(tmp_path, "unet")), "--to", "monai", "--output", str(theirs)]) == 0
    if options and "and --data.release" not in message:
        options = [*options, "--data.release", "brats2018", "--data.crop_size_voxels", "[32,32,32]"]
    assert main([str(theirs), "--from", "monai", "--output", str(output), *options]) == 2
    assert re.match(f"(?s)error: .*{message}", capsys.readouterr().err)
    assert not output.exists()


class Intruder:
    """What pickle would turn into a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_code_from_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"weight": Intruder(tmp_path / "was_here")}, tmp_path / "bad.pt")
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(Intruder(tmp_path / "was_here"), protocol=2))
    for name in ("bad.pt", "bad.pkl"):
        with pytest.raises(ValueError, match=f"{name} can't be read.* no code from a file is run") as told:
            read_state_dict(tmp_path / name)
        assert "weights_only" not in str(told.value)  # PyTorch's own advice is to run the code
    assert not (tmp_path / "was_here").exists()
    torch.save({"weight": 1}, tmp_path / "number.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_state_dict(tmp_path / "number.pt")
    with pytest.raises(ValueError, match="there is no file"):
        read_state_dict(tmp_path / "none.pt")


# Files


def test_safetensors_that_cannot_be_written_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = saved_run(tmp_path, "unet")
    assert main([str(run), "--to", "safetensors", "--output", "/proc/model.safetensors"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "/proc/model.safetensors" in error and error.count("\n") == 1


def test_a_conversion_that_is_stopped_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, path = saved_run(tmp_path, "unet"), tmp_path / "out" / "model.safetensors"
    stop = mock.Mock(side_effect=lambda *_: signal.raise_signal(signal.SIGTERM))
    with mock.patch("launch.convert.save_safetensors", stop):
        assert main([str(run), "--to", "safetensors", "--output", str(path)]) == 75
    assert "stopped by SIGTERM; nothing was written" in capsys.readouterr().err
    assert not any(path.parent.iterdir())


def test_a_file_is_replaced_only_when_asked_and_only_by_something_whole(tmp_path: Path, capsys: Any) -> None:
    run, path = saved_run(tmp_path, "unet"), tmp_path / "model.safetensors"
    path.write_text("first")
    convert = [str(run), "--to", "safetensors", "--output", str(path)]
    assert main(convert) == 2 and "is there already: " in capsys.readouterr().err
    with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")):
        assert main([*convert, "--overwrite"]) == 2
    assert path.read_text() == "first" and sorted(os.listdir(tmp_path)) == ["model.safetensors", "unet"]
    assert main([*convert, "--overwrite"]) == 0 and load_trained(path).epoch == 7
    other = tmp_path / "checkpoints" / "model.safetensors"  # a folder of that name which is no run's
    other.parent.mkdir()
    other.write_text("first")
    assert main([*convert[:-1], str(other), "--overwrite"]) == 0 and load_trained(other).epoch == 7


def test_what_is_read_and_what_a_run_needs_are_never_replaced(tmp_path: Path, capsys: Any) -> None:
    run = saved_run(tmp_path, "unet")
    best = run / "checkpoints" / "best.pt"
    (run / "config.yaml").touch()
    shutil.copy(best, best.with_name("last.pt"))
    shutil.copy(best, tmp_path / "copy.pt")
    (tmp_path / "link.pt").symlink_to(tmp_path / "copy.pt")
    save_weights(tmp_path / "bundle" / WEIGHTS, torch.load(best, weights_only=True))
    before = content_of_files(tmp_path)
    for source, output in ((best, best), (run, best.with_name("last.pt")), ("link.pt", "copy.pt"), (run, "folder")):
        (tmp_path / "folder").mkdir(exist_ok=True)
        for target in ("--to", "--from"):
            asked = ["--output", str(tmp_path / output), "--overwrite", "--data.modalities", "[t1c,flair]"]
            main([str(tmp_path / source), target, "monai", *asked])
    main([str(tmp_path / "bundle" / WEIGHTS), "--to", "bundle", "--output", str(tmp_path / "bundle"), "--overwrite"])
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 9 and all("choose another --output" in line or "must end in" in line for line in errors)
    assert content_of_files(tmp_path) == before


def content_of_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_bundle_that_is_there_keeps_what_is_not_its_own(tmp_path: Path, capsys: Any) -> None:
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
def test_a_folder_that_is_no_bundle_of_ours_is_left_alone(kind: str, tmp_path: Path, capsys: Any) -> None:
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


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path) -> None:
    """In a process of its own, for it must not be ended from within a library."""
    runs, calls = {name: saved_run(tmp_path, name) for name in ("unet", "unetr")}, []
    for target, (ending, *_) in ENDINGS.items():
        run, output = runs["unetr" if target == "self_attention_cv" else "unet"], tmp_path / f"old-{target}{ending}"
        if target == "bundle":
            write_bundle(output, load_trained(run))
        else:
            output.write_bytes(b"old")
        calls.append([str(run), "--to", target, "--output", str(output), "--overwrite"])
    before = content_of_files(tmp_path)
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({FILE_LIMIT}, {FILE_LIMIT}))\n"
        f"from launch.convert import main\nprint([main(arguments) for arguments in {calls}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == f"{[2] * len(ENDINGS)}\n", done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    for line, call in zip(lines, calls, strict=True):
        assert line.startswith("error: ") and "File too large" in line and call[4] in line
    assert content_of_files(tmp_path) == before


def test_a_file_may_be_read_by_whom_the_umask_says(tmp_path: Path) -> None:
    run = saved_run(tmp_path, "unet")
    before = os.umask(0o022)
    try:
        for target in ("safetensors", "monai"):
            output = tmp_path / f"model{ENDINGS[target][0]}"
            assert main([str(run), "--to", target, "--output", str(output)]) == 0
            assert stat.S_IMODE(output.stat().st_mode) == 0o644
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "onnx", "--output", "model.pt"], "--output model.pt must end in .onnx"),
        (["--output", "model.pt"], "give either --to .* or --from"),
        (["--to", "monai", "--from", "monai", "--output", "model.pt"], "give either --to"),
        (["--to", "monai", "--output", "model.pt"], "no run with weights"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([str(tmp_path), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: .*{message}", line)


# MONAI's bundle


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A synthetic scan, LPS, as a 4D file and as a folder of one file for each modality; what it is called."""
    image_XYZC = draw_phantom((40, 36, 24), 0, 0)[0].astype(np.float32)
    affine = np.diag([-1.5, -1.5, 2.25, 1.0])
    affine[:3, 3] = 30, 28, -20
    nib.save(nib.Nifti1Image(image_XYZC, affine), tmp_path / "stacked.nii.gz")
    (tmp_path / "scans" / "A").mkdir(parents=True)
    for i, name in enumerate(("FLAIR", "t1", "t1ce", "t2")):
        nib.save(nib.Nifti1Image(image_XYZC[..., i], affine), tmp_path / "scans" / "A" / f"A_{name}.nii.gz")
    (tmp_path / "stacked.nii.gz").rename(tmp_path / "scans" / "B.nii.gz")
    return tmp_path / "scans"


def test_words_of_a_file_are_no_code_in_a_bundle(tmp_path: Path) -> None:
    """MONAI evaluates a string that begins with `$`, wherever it stands; each field is tried that reaches a bundle."""
    run, mark = saved_run(tmp_path, "unet"), tmp_path / "was_here"
    code = f"$__import__('pathlib').Path({str(mark)!r}).touch()"
    best = run / "checkpoints" / "best.pt"
    good = load_weights(best)
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
        save_weights(best, good | changes)
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


@pytest.mark.parametrize(("name", "codes"), [("unetr", "LPS"), ("unet", "LPS"), ("unet", "PIR"), ("unet", "RSA")])
def test_monai_runs_the_bundle_and_finds_the_same(name: str, codes: str, scan: Path, tmp_path: Path) -> None:
    """A voxel may differ only where a probability is one half but for rounding."""
    for path in scan.rglob("*.nii.gz"):
        store_as(codes, path)
    run, bundle, output = saved_run(tmp_path, name), tmp_path / "bundle", tmp_path / "found"
    assert main([str(run), "--to", "bundle", "--output", str(bundle)]) == 0
    run_by_monai(bundle, scan, output)
    case = {"flair": "FLAIR", "t1c": "t1ce"}
    files = {modality: scan / "A" / f"A_{word}.nii.gz" for modality, word in case.items()}
    expected = Predictor(run, device="cpu").segment(files, probabilities=True)
    assert expected.probabilities_RXYZ is not None
    decided = (np.abs(expected.probabilities_RXYZ - 0.5) > 1e-5).all(0)
    assert decided.mean() > 0.99
    for file in (output / "A" / "A_t1ce_seg.nii.gz", output / "B_seg.nii.gz"):
        found = nib.load(file)
        labels = np.asarray(found.dataobj)
        assert labels.dtype == np.uint8 and set(np.unique(labels)) == {0, 1, 2, 4}
        np.testing.assert_array_equal(labels[decided], expected.labels()[decided])
        np.testing.assert_allclose(found.affine, expected.affine, atol=1e-6)


def test_a_bundles_own_instructions_work(scan: Path, tmp_path: Path) -> None:
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


def test_the_bundle_has_what_monai_asks_of_one(scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        torch.testing.assert_close(logits, trained.network(image(1)), rtol=1e-4, atol=1e-4)
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


def test_files_of_every_release_are_found(tmp_path: Path) -> None:
    endings = [
        ("A_flair", "A_t1", "A_t1ce", "A_t2"),
        ("A-t2f", "A-t1n", "A-t1c", "A-t2W"),
        ("Flair_subtrMeanDivStd", "T1_subtrMeanDivStd", "T1c_subtrMeanDivStd", "T2_subtrMeanDivStd"),
    ]
    for i, names in enumerate(endings):
        for name in (*names, "A-seg", "OTMultiClass", "brainmask"):
            path = tmp_path / str(i) / f"{name}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            path.touch()
        assert find_scans(str(tmp_path), FILE_NAMES, [])[i]["image"] == [
            str(tmp_path / str(i) / f"{name}.nii.gz") for name in names
        ]


def test_a_bundle_refuses_scans_without_the_channels_or_with_voxels_that_are_no_numbers() -> None:
    meta = {"filename_or_obj": "scan.nii.gz"}
    image = MetaTensor(torch.arange(2.0)[:, None, None, None].expand(2, 4, 4, 4).clone(), meta=meta)
    select = SelectChannelsd()
    assert select({"image": image, "channels": [1, 0]})["image"][:, 0, 0, 0].tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"scan.nii.gz has 2 channel\(s\), and \[0, 2\] are asked for.*--channels"):
        select({"image": image, "channels": [0, 2]})
    image[1, 2, 2, 2] = torch.nan
    with pytest.raises(ValueError, match="scan.nii.gz has voxels that are NaN or Inf"):
        select({"image": image, "channels": None})


def test_scans_with_a_file_missing_or_twice_are_named(scan: Path) -> None:
    names = {"t1c": ("t1c", "t1ce"), "t1": ("t1",)}
    stacked, apart = find_scans(str(scan), names, [2, 1])[::-1]
    assert stacked == {"image": str(scan / "B.nii.gz"), "channels": [2, 1]}
    assert [Path(path).name for path in apart["image"]] == ["A_t1ce.nii.gz", "A_t1.nii.gz"]
    with pytest.raises(ValueError, match="A has 0 files of flair, .*_t2f"):
        find_scans(str(scan), {"flair": ("t2f",)}, [0])
    with pytest.raises(ValueError, match="A has 2 files of t1, "):
        find_scans(str(scan), {"t1": ("t1", "t1ce")}, [0])
    shutil.copy(scan / "B.nii.gz", scan / "._B.nii.gz")  # as macOS leaves them in archives
    shutil.copy(scan / "A" / "A_t2.nii.gz", scan / "A" / "._A_t1.nii.gz")
    assert len(find_scans(str(scan), names, [2, 1])) == 2
    (scan / "A" / "empty").mkdir()
    with pytest.raises(ValueError, match="no scan in"):
        find_scans(str(scan / "A" / "empty"), names, [2, 1])
    with pytest.raises(ValueError, match="there is no folder"):
        find_scans(str(scan / "none"), names, [2, 1])
