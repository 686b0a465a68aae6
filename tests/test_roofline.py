"""A step's bytes, launches and FLOPs are pinned: a change that adds a pass fails here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import roofline
from benchmarks.performance_page import NOW
from benchmarks.roofline import GPUS, count, multi_tensor_launches, predicted_s, roofline_s, totals
from kernels import dispatch
from kernels.instance_norm import instance_norm_backward
from kernels.up_conv import up_conv
from models import build_model

COUNTED = json.loads(NOW.read_text())
LIMITS = {("unetr", 2): (9.9, 430), ("unetr", 32): (130, 480)}  # GB, launches of a step in bf16


@pytest.mark.parametrize(("model", "batch"), [("unetr", 2), ("unetr", 32), ("unetr_monai", 2), ("unet", 2)])
def test_a_step_is_the_one_that_was_published(model: str, batch: int, tmp_path: Path) -> None:
    """A change that adds a pass fails; after one that removes some, run `python -m benchmarks.performance_page`."""
    # In a process of its own: DeepSpeed's ZeRO 3 replaces PyTorch's `linear` for good.
    command = [sys.executable, "-m", "benchmarks.roofline", "--model", model, "--batch", str(batch)]
    command += ["--json", str(tmp_path / "counted.json")]
    subprocess.run(command, cwd=Path(roofline.__file__).parent.parent, check=True, capture_output=True)
    found = json.loads((tmp_path / "counted.json").read_text())["total"]
    assert found == COUNTED[f"{model}, batch {batch}"]["total"]


@pytest.mark.parametrize(("model", "batch"), LIMITS)
def test_the_published_step_stays_lean(model: str, batch: int) -> None:
    gigabytes, launches = LIMITS[model, batch]
    total = COUNTED[f"{model}, batch {batch}"]["total"]
    assert total["bytes"] <= gigabytes * 1e9 and total["launches"] <= launches


def test_an_added_pass_is_counted_in_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    before = count("unet", 1, "bf16", (32, 32, 32))
    build = roofline.build_model

    def with_a_pass(*args: object) -> nn.Module:
        return nn.Sequential(build(*args), nn.Sigmoid())  # type: ignore[arg-type]

    monkeypatch.setattr(roofline, "build_model", with_a_pass)
    after = count("unet", 1, "bf16", (32, 32, 32))
    added = [row for row in after if row.layer == "1"]
    assert [(row.direction, row.op, row.launches) for row in added] == [
        ("forward", "sigmoid", 1),
        ("backward", "sigmoid_backward", 1),
    ]
    map_bytes = 3 * 32**3 * 2
    assert [row.bytes for row in added] == [2 * map_bytes, 3 * map_bytes]
    assert totals(after)["launches"] == totals(before)["launches"] + 2


def test_every_operation_belongs_to_a_layer_and_a_kind() -> None:
    rows = count("unetr", 1, "bf16", (32, 32, 32))
    assert all(row.layer and row.kind in roofline.EFFICIENCY for row in rows)
    assert {row.direction for row in rows} == {"forward", "loss", "backward", "optimizer"}
    norms = [row for row in rows if row.kind == "norm"]
    assert norms and {row.layer for row in norms} == {"stem", *(f"decoder{level}.block" for level in range(4))}


def test_a_convolution_counts_its_three_directions() -> None:
    rows = [row for row in count("unet", 1, "float32", (32, 32, 32)) if row.layer == "downs.0.unit0.conv"]
    kinds = [row.op for row in rows if row.kind == "convolution"]
    assert kinds == ["convolution", "convolution's weight gradient"]  # the image has no gradient
    assert {row.flops for row in rows if row.flops} == {2 * 16**3 * 16 * 4 * 27}


def test_a_doubling_counts_its_three_products() -> None:
    counter = roofline.Counter()
    x = torch.empty(2, 32, 8, 4, 2, dtype=torch.bfloat16).to(memory_format=roofline.LAST).requires_grad_()
    weight = torch.empty(32, 16, 2, 2, 2, dtype=torch.bfloat16).to(memory_format=roofline.LAST).requires_grad_()
    on_a_gpu = mock.patch.multiple(dispatch, _refusal=lambda device: "", _way=lambda *_: "triton")
    with FakeTensorMode() as fake, on_a_gpu, counter, dispatch.observed(counter.launch):
        up_conv(*map(fake.from_tensor, (x, weight))).sum().backward()
    rows = {row.op: row for row in counter.rows if row.op.startswith("up_conv")}
    flops = 2 * (2 * 8 * 4 * 2) * 32 * 8 * 16
    assert [row.flops for row in rows.values()] == [flops, flops, flops, 0]
    assert {row.kind for row in rows.values()} == {"product"}
    maps = 2 * (x.numel() + weight.numel() + 8 * x.numel() // 2)
    assert rows["up_conv_forward_kernel"].bytes == rows["up_conv_gradient_kernel"].bytes == maps


def test_a_copy_that_an_operation_of_ours_makes_is_counted() -> None:
    with FakeTensorMode():
        x, dy = torch.empty(2, 16, 4, 4, 4), torch.empty(2, 16, 4, 4, 4)
        stats = torch.empty(2, 2, 16)
        with roofline.Counter() as counter, dispatch.observed(counter.launch):
            for gradient in (dy, dy.transpose(3, 4)):
                instance_norm_backward(gradient, x, stats, None, None, None, 0.01, None, False)
    copies = [(row.op, row.bytes) for row in counter.rows if row.kind == "copy"]
    assert copies == [("clone", 2 * 4 * dy.numel())]


@pytest.mark.parametrize("model", ["unetr", "unetr_monai"])
def test_a_decoder_copies_no_map(model: str) -> None:
    rows = count(model, 2, "bf16", (32, 32, 32))
    decoder = [row for row in rows if row.layer.startswith(("decoder", "stem", "skip"))]
    assert [row.op for row in decoder if row.kind == "copy" and row.bytes > 1e5] == []


def test_the_optimizer_counts_every_tensor_once() -> None:
    """Gradients twice; parameters and both moments read and written."""
    rows = [row for row in count("unet", 1, "float32", (32, 32, 32)) if row.direction == "optimizer"]
    network = build_model("unet", 4, 3, (32, 32, 32))
    parameters = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    by_op = {row.op: row.bytes for row in rows}
    assert by_op["adamw_sum_kernel"] == 4 * parameters and by_op["adamw_kernel"] == 28 * parameters
    assert len(rows) == 3 and 0 < by_op["adamw_finish_kernel"] < 4 * parameters


def test_a_step_in_low_precision_casts_no_weight() -> None:
    rows = [row for row in count("unet", 1, "bf16", (32, 32, 32)) if row.kind == "cast"]
    assert not [row for row in rows if row.layer.endswith("conv")]


@pytest.mark.parametrize(
    ("sizes", "depth", "launches"),
    [([1] * 36, 4, 1), ([1] * 37, 4, 2), ([320 * 65536], 4, 1), ([321 * 65536], 4, 2), ([1] * 110, 1, 1), ([], 4, 0)],
)
def test_multi_tensor_operations_launch_by_chunks_and_tensors(sizes: list[int], depth: int, launches: int) -> None:
    assert multi_tensor_launches(sizes, depth) == launches


@pytest.mark.parametrize("gpu", GPUS)
def test_nothing_is_predicted_faster_than_the_roofline(gpu: str) -> None:
    for row in count("unet", 1, "bf16", (32, 32, 32)):
        assert 0 < roofline_s(row, GPUS[gpu], "bf16") <= predicted_s(row, GPUS[gpu], "bf16") < math.inf or not row.bytes


def test_a_prediction_needs_the_data_sheet_of_the_gpu() -> None:
    small = ("unet", 2, "bf16")
    assert roofline.predicted_step_s(*small, "Tesla T4", (32, 32, 32)) is None
    found = roofline.predicted_step_s(*small, "NVIDIA H100 80GB HBM3", (32, 32, 32))
    assert found == sum(predicted_s(row, GPUS["H100"], "bf16") for row in count(*small, (32, 32, 32)))


def test_the_command_writes_totals_rows_and_a_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(roofline, "CROP", (32, 32, 32))
    monkeypatch.setattr(count, "__defaults__", ((32, 32, 32),))
    command = ["roofline", "--model", "unet", "--json", str(tmp_path / "c.json"), "--plot", str(tmp_path / "c.png")]
    monkeypatch.setattr(sys, "argv", command)
    roofline.main()
    content = json.loads((tmp_path / "c.json").read_text())
    assert set(content["total"]) == {"bytes", "launches", "flops"}
    assert sum(row["bytes"] for row in content["rows"]) == content["total"]["bytes"] > 0
    assert (tmp_path / "c.png").stat().st_size > 0
    assert "not measured" in capsys.readouterr().out
    assert not torch.is_autocast_enabled("cpu")
