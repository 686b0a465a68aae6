"""Networks as torch.export and ONNX programs: run, compared, and refused where they differ."""

from __future__ import annotations

import functools
import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from untrained import CROP, WIDTHS, config_of, image

from engine.export import programs
from engine.export.programs import OPSET, trace
from engine.network import make_model
from engine.trained import TrainedNetwork
from launch.convert import main
from models.unetr import MONAI, SELF_ATTENTION_CV, UNETR
from pipelines.layouts.labels import CODINGS

TOLERANCES = {"written": programs.TOLERANCE, "instance norm": 1e-5}


@functools.cache
def shallow(name: str) -> tuple[TrainedNetwork, torch.export.ExportedProgram]:
    """A network and its program, with four transformer blocks instead of twelve, to save time."""
    torch.manual_seed(0)
    config = config_of(name)
    network: torch.nn.Module = make_model(config.model, config.data.crop_size_voxels, 2)
    if name != "unet":
        variant = replace(SELF_ATTENTION_CV if name == "unetr" else MONAI, layers=(1, 2, 3, 4))
        with mock.patch("models.vit.NUM_LAYERS", 4):
            network = UNETR(variant, 2, 3, CROP, **WIDTHS[name])
    trained = TrainedNetwork(Path("best.pt"), network.eval(), config, ("t1c", "flair"), CODINGS["brats2018"], 7, {}, {})
    return trained, trace(trained)


def convert_shallow(name: str, target: str, output: Path) -> tuple[int, TrainedNetwork]:
    """The status of the command on a network of `shallow`, and that network."""
    trained, program = shallow(name)
    with (
        mock.patch("engine.trained.load_trained", return_value=trained),
        mock.patch("engine.export.programs.trace", return_value=program),
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
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript", "onnx_ir")}
    status, trained = convert_shallow(name, "onnx", path)
    assert all(logging.getLogger(name).level == level for name, level in levels.items())
    said = capsys.readouterr().out
    assert status == 0 and f"onnx of {name}, t1c, flair, windows of 32 x 32 x 32 voxels at 2 x 2 x 3 mm" in said
    difference = re.search(r"differs by at most (\S+) from", said)
    assert difference and 0 < float(difference[1]) < TOLERANCES["written"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        (logits,) = session.run(["logits"], {"image": image(batch).numpy()})
        np.testing.assert_allclose(logits, trained.network(image(batch)).numpy(), atol=TOLERANCES["written"])
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
    table: Any = {torch.ops.aten.instance_norm.default: programs._instance_norm_in_onnx}
    graph = torch.onnx.export(program, opset_version=OPSET, custom_translation_table=table, verbose=False)
    assert graph is not None
    graph.save(tmp_path / "norm.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "norm.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, Norm().double()(x.double()).numpy(), atol=TOLERANCES["instance norm"])


@pytest.mark.parametrize(
    "name", [pytest.param("unetr", marks=pytest.mark.slow), "unetr_monai", "unet"]
)  # unetr_monai has every module that unetr has
@torch.no_grad()
def test_torch_export_gives_the_networks_logits_from_plain_operations(name: str, tmp_path: Path) -> None:
    status, trained = convert_shallow(name, "torch_export", tmp_path / "model.pt2")
    words = {"metadata.json": ""}
    loaded = torch.export.load(tmp_path / "model.pt2", extra_files=words)
    assert status == 0 and json.loads(words["metadata.json"]) == trained.description()
    for batch in (1, 3):
        torch.testing.assert_close(loaded.module()(image(batch)), trained.network(image(batch)))
    called = {str(node.target) for node in loaded.graph.nodes if node.op == "call_function"}
    assert {target.split(".")[0] for target in called} <= {"aten", "<built-in function getitem>"}


def test_a_program_that_differs_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    faithful = programs._compare
    with mock.patch.object(programs, "_compare", lambda it, run: faithful(it, lambda x: run(x) + 0.1)):
        status, _ = convert_shallow("unet", "torch_export", tmp_path / "out" / "model.pt2")
    assert status == 2 and "error: the exported program's logits differ by up to 1.0e-01" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
